"""A quantized checkpoint as a float one: the values that its codes stand for, for what cannot hold the codes."""

from pathlib import Path

from quantcli.folder import write_json
from quantcli.models.checkpoint import copy_companions
from quantcli.models.load import read_packed
from quantcli.models.marks import without_mark
from quantcli.models.opened import open_checkpoint
from quantcli.models.readers import packed_names, reader_of
from quantcli.models.writer import CheckpointWriter

__all__ = ["write_float"]


def write_float(source: Path, target: Path) -> None:
    """Writes a float32 checkpoint, one linear in memory at a time.

    Args:
        source: Folder whose config has a `quantization_config`.
        target: An existing empty folder.

    Raises:
        InputError: a linear that cannot be read.
    """
    checkpoint = open_checkpoint(source)
    reader = reader_of(checkpoint)
    packed = packed_names(checkpoint, reader)
    codes = {f"{name}.{part}" for name in packed for part in reader.parts}
    writer = CheckpointWriter(target)
    writer.write(0, {name: checkpoint.read(name) for name in checkpoint.entries if name not in codes})
    for number, name in enumerate(packed, 1):
        writer.write(number, {f"{name}.weight": read_packed(checkpoint, name).dequantize()})
    writer.finish(len(packed) + 1)
    left_out = ("quantization_config", "torch_dtype")
    config = without_mark({k: v for k, v in checkpoint.config.items() if k not in left_out}, "quantized_embedding")
    write_json(target / "config.json", config | {"dtype": "float32"})
    copy_companions(source, target)
