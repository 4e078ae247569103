"""Opens what holds a model's tensors: a folder of safetensors files, a folder with a GGUF file, or such a file."""

from pathlib import Path

from quantcli.errors import InputError
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.gguf.checkpoint import open_gguf

__all__ = ["open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a folder or a GGUF file and checks every header.

    Raises:
        InputError: there are no weights, or files that are damaged, or several GGUF files.
    """
    gguf = path if path.is_file() else _only_gguf(path)
    return Checkpoint.open(path) if gguf is None else open_gguf(gguf)


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds no other weights.

    Raises:
        InputError: there are several.
    """
    found = sorted(folder.glob("*.gguf")) if not any(folder.glob("*.safetensors")) else []
    if len(found) > 1:
        raise InputError(
            f"{folder} holds {len(found)} GGUF files ({', '.join(p.name for p in found[:3])})", hint="name one of them"
        )
    return found[0] if found else None
