"""LoRA adapters as peft saves them: adapter_config.json and adapter_model.safetensors."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from msgspec import Meta
from torch import Tensor

from quantcli.errors import InputError
from quantcli.json_files import as_type, read_json
from quantcli.models.checkpoint import Checkpoint, read_header
from quantcli.tensors.finite import all_finite

__all__ = ["LoraLayer", "read_peft", "refuse_adapter"]

_Rank = Annotated[int, Meta(ge=1, lt=1 << 31)]
Number = TypeVar("Number", int, float)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
# what changes the function beyond y + scaling * B A x, each with the value that leaves it alone
_NOT_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": ([], None),
    "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None),
    "alora_invocation_tokens": ([], None),
    "layer_replication": ([], None),
    "megatron_config": ({}, None),
    "velora_config": ({}, None),
    "monteclora_config": ({}, None),
    "arrow_config": ({}, None),
    "kasa_config": ({}, None),
}


@dataclass(frozen=True)
class _LoraConfig:
    """What we read of `adapter_config.json`; peft's names."""

    r: _Rank
    lora_alpha: float
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    base_model_name_or_path: str | None = None


@dataclass(frozen=True)
class LoraLayer:
    """What an adapter adds to one linear of K inputs and N outputs: y + scaling * B (A x)."""

    module: str
    """Name of the linear in the base model."""
    a: Tensor
    """[r, K] float32."""
    b: Tensor
    """[N, r] float32."""
    scaling: float
    """alpha / r, or alpha / sqrt(r) where the adapter says so (rsLoRA)."""


def read_peft(folder: Path) -> list[LoraLayer]:
    """Reads an adapter folder, or the folder above a single `adapter/`.

    Raises:
        InputError: no adapter, one that is damaged, or one that is not plain LoRA.
    """
    if not (folder / CONFIG).is_file() and (folder / "adapter" / CONFIG).is_file():
        folder = folder / "adapter"
    config = _read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        other = "; adapter_model.bin is a pickle, which is not read" if (folder / "adapter_model.bin").is_file() else ""
        raise InputError(f"{folder} has no {WEIGHTS}{other}", hint="save the adapter with safetensors")
    file = Checkpoint(folder, {}, read_header(path))
    parts: dict[str, dict[str, Tensor]] = {}
    for name in file.entries:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise InputError(f"{path}: tensor {name} is no LoRA matrix of a linear")
        tensor = file.read(name)
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise InputError(f"{path}: tensor {name} has shape {list(tensor.shape)}, expected a float matrix")
        if not all_finite(tensor):
            raise InputError(f"{path}: tensor {name} holds NaN or infinite values")
        parts.setdefault(match["module"], {})[match["part"]] = tensor.float()
    if not parts:
        raise InputError(f"{path} holds no LoRA matrices")
    return [_layer(path, config, module, found) for module, found in parts.items()]


def refuse_adapter(folder: Path) -> None:
    """Refuses an adapter folder where a model is expected, and says where its base should be.

    Raises:
        InputError: it is one.
    """
    if not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return
    named = _read_config(folder).base_model_name_or_path or ""
    beside = folder.parent / "model"  # of a folder of ours, which may have been moved
    base = folder / named if named.startswith(".") else Path(named)
    base = base if base.is_dir() or not beside.is_dir() else beside
    found = bool(named) and base.is_dir()
    moved = "" if found or not named else f"; its base was {named}, which is not there"
    raise InputError(
        f"{folder} is an adapter, not a model{moved}",
        hint=f"write -m {os.path.relpath(base) if found else 'BASE'} --adapter-path {folder}",
    )


def _layer(path: Path, config: _LoraConfig, module: str, parts: Mapping[str, Tensor]) -> LoraLayer:
    for part in "AB":
        if part not in parts:
            raise InputError(f"{path}: {module}.lora_{part}.weight is missing")
    a, b = parts["A"], parts["B"]
    rank = _for_module(config.rank_pattern, module, config.r)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise InputError(
            f"{path}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, {CONFIG} says rank {rank}"
        )
    alpha = float(_for_module(config.alpha_pattern, module, config.lora_alpha))
    return LoraLayer(module, a, b, alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _for_module(patterns: Mapping[str, Number] | None, module: str, default: Number) -> Number:
    """The rule of peft: the first pattern that matches the end of the name, behind a dot or from its beginning."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _read_config(folder: Path) -> _LoraConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} is not an adapter folder: no {CONFIG}", hint="give a folder that peft saved")
    config = read_json(path, dict[str, Any], what := "an adapter configuration")
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: adapters of type {config.get('peft_type')!r} are not supported, LORA is")
    found = as_type(config, _LoraConfig, f"{path} is not {what}")
    for pattern in (*(found.rank_pattern or {}), *(found.alpha_pattern or {})):
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{path}: {pattern!r} is no regular expression: {error}") from error
    for key, plain in _NOT_PLAIN_LORA.items():
        if config.get(key) not in plain:
            raise InputError(
                f"{path}: {key} is {config[key]!r}, which ONNX Runtime adapters cannot hold: they add B A x, no more",
                hint="train a plain LoRA adapter, or merge this one into the model",
            )
    return found
