"""What `generate-adapter` and `convert-adapter` were asked to do."""

import re
from dataclasses import dataclass
from pathlib import Path

from quantcli.errors import UsageError, nearest

__all__ = ["ADAPTER_FORMATS", "ConvertAdapterOptions", "GenerateAdapterOptions"]

ADAPTER_FORMATS = ("onnx_adapter", "safetensors", "npz")


@dataclass(frozen=True)
class ConvertAdapterOptions:
    """What `quantcli convert-adapter` was asked to do."""

    model: str
    """Base that it is for: a folder that generate-adapter wrote."""
    adapter: Path
    """Adapter folder that peft saved."""
    output: Path
    """File to write; without an ending it gets that of the format."""
    adapter_format: str = "onnx_adapter"
    """File format: onnx_adapter, which ONNX Runtime loads, safetensors or npz."""
    force: bool = False
    """Replace an existing file."""

    def __post_init__(self) -> None:
        _check_adapter_format(self.adapter_format)


@dataclass(frozen=True)
class GenerateAdapterOptions:
    """What `quantcli generate-adapter` was asked to do."""

    model: str
    """Base model: a checkpoint, float or quantized, a captured ONNX folder, or an output folder of finetune."""
    output: Path
    """Folder to write."""
    adapters: tuple[str, ...] = ()
    """Adapter folder that peft saved, as FOLDER or NAME=FOLDER; may be given several times. Default: the adapter of
    finetune's output folder."""
    adapter_format: str = "onnx_adapter"
    """File format of the adapters: onnx_adapter, which ONNX Runtime loads, safetensors or npz."""
    only_adapted: bool = False
    """Let only linears that these adapters change take adapters: faster where they are few, but later adapters can
    change no others. Default: every linear of the blocks."""
    trust_remote_code: bool = False
    """Run model code that the folder brings along."""
    force: bool = False
    """Replace an output folder of ours."""

    def __post_init__(self) -> None:
        _check_adapter_format(self.adapter_format)

    def named(self) -> dict[str, Path]:
        """The adapters by name: what stands before `=`, else the folder's own."""
        found: dict[str, Path] = {}
        for word in self.adapters:
            name, equals, folder = word.partition("=")
            is_named = bool(equals) and "/" not in name  # else the sign is part of the folder's path
            path = Path(folder if is_named else word)
            name = name if is_named else path.resolve().name
            if not re.fullmatch(r"[\w.-]+", name) or (is_named and not folder):
                raise UsageError(f"--adapter-path {word!r} is not of the form NAME=FOLDER")
            if name in found:
                raise UsageError(f"two adapters are named {name!r}", hint="name them: --adapter-path NAME=FOLDER")
            found[name] = path
        return found


def _check_adapter_format(name: str) -> None:
    if name not in ADAPTER_FORMATS:
        raise UsageError(f"unknown --adapter-format {name!r}, {nearest(name, ADAPTER_FORMATS)}")
