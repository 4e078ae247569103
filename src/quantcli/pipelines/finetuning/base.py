"""The base of a finetuned folder: taken as it is or made nf4, and the float model that it was rounded from."""

import os
import shutil
from pathlib import Path

from quantcli.errors import InputError, QuantcliError, UsageError
from quantcli.finetune.loftq import require_same_model
from quantcli.folder import PartialFolder, read_manifest, write_json
from quantcli.models.checkpoint import Checkpoint, copy_companions
from quantcli.models.source import locate_model
from quantcli.options import FinetuneOptions, QuantizeOptions
from quantcli.pipelines import quantize
from quantcli.progress import Progress

__all__ = ["find_float_source", "place_base"]

_NF4_BLOCKS = (64, 32, 16)


def find_float_source(options: FinetuneOptions, base: Checkpoint, quantizes: bool) -> Checkpoint | None:
    """The float model whose rounding errors adapters begin with; None where they begin as the base.

    Raises:
        UsageError: there is none, or none was named.
        InputError: it cannot be read, or the base was not rounded from it.
    """
    if options.init_lora != "loftq":
        return None
    if quantizes:
        if options.float_model is not None:
            raise UsageError("--float-model would have no effect: the model is float itself", hint="leave it out")
        return base
    if base.config.get("quantization_config") is None:
        raise UsageError(
            "--init-lora loftq makes up for rounding, and the base is float", hint="add --method qlora, or leave it out"
        )
    if options.float_model is None:
        try:
            manifest = read_manifest(base.folder)
        except InputError:  # it would only have helped to name them
            manifest = None
        made_from = f", made from {manifest.parent.get('name')!r}" if manifest is not None else ""
        raise UsageError(
            f"--init-lora loftq needs the float weights of {options.model}{made_from}", hint="add --float-model FOLDER"
        )
    source = Checkpoint.open(locate_model(options.float_model))
    require_same_model(base, source)
    return source


def place_base(
    checkpoint: Checkpoint, partial: PartialFolder, options: FinetuneOptions, quantizes: bool, progress: Progress
) -> None:
    """Fills model/, unless an interrupted run has done so."""
    done = partial.state / "base.json"
    if done.is_file():
        return
    shutil.rmtree(partial.model, ignore_errors=True)
    if quantizes:
        _make_nf4(checkpoint.folder, partial, options, progress)
    else:
        partial.model.mkdir()
        _link(checkpoint, partial.model, options.copy_base)
    write_json(done, {"files": sorted(p.name for p in partial.model.iterdir())})


def _link(checkpoint: Checkpoint, target: Path, copy: bool) -> None:
    """The base as it is: weights linked where the file system can, unless they are to be copied; the rest copied."""
    names = {"config.json", *(p.name for p in checkpoint.folder.glob("*.safetensors*"))}
    for name in sorted(names):
        source = (checkpoint.folder / name).resolve()  # the hub's cache holds links
        if copy or not name.endswith(".safetensors"):
            shutil.copyfile(source, target / name)
            continue
        try:
            os.link(source, target / name)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, target / name)
    copy_companions(checkpoint.folder, target)


def _make_nf4(folder: Path, partial: PartialFolder, options: FinetuneOptions, progress: Progress) -> None:
    """The base as nf4, in the largest blocks that divide every linear's inputs."""
    made = partial.state / "nf4"
    if (made / "model").is_dir():  # finished, and not yet put in its place
        (made / "model").rename(partial.model)
        return
    shutil.rmtree(made, ignore_errors=True)
    for size in _NF4_BLOCKS:
        try:
            wanted = QuantizeOptions(
                str(folder),
                made,
                "nf4",
                group_size=size,
                device=options.device,
                trust_remote_code=options.trust_remote_code,
            )
            quantize.run(wanted, progress)
            break
        except QuantcliError as error:
            if "do not divide" not in error.message or size == _NF4_BLOCKS[-1]:
                raise
    (made / "model").rename(partial.model)
