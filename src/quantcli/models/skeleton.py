"""A model without weights: transformers' classes on the meta device, and the names their tensors have on disk."""

import logging
import math
import re
import warnings
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantcli.errors import InputError
from quantcli.models.checkpoint import TensorEntry, read_config
from quantcli.models.conversion import expert_names
from quantcli.models.experts import unfuse_experts
from quantcli.models.marks import is_marked

__all__ = [
    "build_skeleton",
    "check_counts",
    "check_tensors",
    "disk_name",
    "disk_stem",
    "first_names",
    "has_experts",
    "load_config",
    "materialize",
]

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LISTED = 10
_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a decoder-only language model.

    Raises:
        InputError: unknown architecture, code needed that is not trusted, or not a decoder-only language model.
    """
    raw = read_config(folder)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{folder / 'config.json'} names no model_type", hint="give a transformers checkpoint")
    brings_code = bool(raw.get("auto_map"))
    if brings_code and not trust_remote_code and model_type not in _known_types():
        raise InputError(
            f"{model_type} brings its own model code, which is not run unasked",
            hint="add --trust-remote-code if you trust the folder",
        )
    if not brings_code and model_type not in _known_types():
        made = raw.get("transformers_version")
        newer = isinstance(made, str) and re.match(r"\d+\.\d+", made) is not None and _is_newer(made)
        raise InputError(
            f"model type {model_type!r} is not known to the installed transformers {transformers.__version__}"
            + (f"; config.json was written by {made}" if newer else ""),
            hint=f"pip install 'transformers>={made}'" if newer else None,
        )
    try:
        if is_marked(raw) or raw.get("auto_map", "absent") in (None, {}):
            # the file names a type that transformers is not to know, or has an empty map, which it stumbles over
            config = AutoConfig.for_model(**{key: value for key, value in raw.items() if key != "auto_map"})
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # validators of configurations raise whatever they like
        raise InputError(f"{folder / 'config.json'} cannot be used: {_reason(error)}") from error
    architectures = getattr(config, "architectures", None) or []
    decoders = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if not (isinstance(architectures, list) and all(isinstance(a, str) for a in architectures)):
        raise InputError(
            f"{folder / 'config.json'} names the architectures {architectures!r}, expected a list of names"
        )
    wrong = [a for a in architectures if a not in decoders] if not brings_code else []
    if getattr(config, "is_encoder_decoder", False) or (wrong and len(wrong) == len(architectures)):
        what = wrong[0] if wrong else model_type
        raise InputError(f"{folder} holds a {what}; a decoder-only language model (…ForCausalLM) is expected")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not brings_code:
        raise InputError(f"{folder} holds a {model_type}; a decoder-only language model (…ForCausalLM) is expected")
    return config


def build_skeleton(folder: Path, config: Any = None, trust_remote_code: bool = False) -> Any:
    """The model in eval mode with every parameter on the meta device and fused experts taken apart.

    Buffers that are computed rather than stored (rotary frequencies) are real.
    """
    config = load_config(folder, trust_remote_code) if config is None else config
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with warnings.catch_warnings(), init_empty_weights(include_buffers=False):
        warnings.simplefilter("ignore")
        logging.getLogger("transformers").setLevel(logging.ERROR)
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
        except Exception as error:  # a value that cannot be shows up anywhere in a model's code
            raise InputError(f"no model can be built from {folder / 'config.json'}: {_reason(error)}") from error
        model.stacked = unfuse_experts(model, expert_names(model))
    model.names_on_disk = {}
    return model.eval()


def disk_name(name: str, model: Any, stored: Container[str]) -> str | None:
    """The name on disk of a parameter of the skeleton; None where the files do not have it.

    A head tied to the embedding has no tensor of its own.
    """
    found = model.names_on_disk.get(name, name)
    return found if found in stored else None


def disk_stem(path: str, model: Any, stored: Container[str]) -> str:
    """The name on disk of a module of the skeleton that has weights in the files."""
    for name in model.state_dict():
        if name.startswith(f"{path}."):
            disk, inside = disk_name(name, model, stored), name.removeprefix(path)
            if disk is not None and disk.endswith(inside):
                return disk.removesuffix(inside)
    return path


def check_counts(config: Any, entries: Mapping[str, TensorEntry], folder: Path) -> None:
    """Refuses a configuration with more layers or experts than files can hold, before a model of that size is built.

    Raises:
        InputError: a count that cannot be.
    """
    text = config.get_text_config()
    rows = sum(math.prod(entry.shape) for entry in entries.values()) // max(getattr(text, "hidden_size", 1), 1)
    # an expert has at least a row of its own
    for name, most in ({"num_hidden_layers": len(entries)} | dict.fromkeys(_EXPERT_COUNTS, min(rows, 65536))).items():
        count = getattr(text, name, None)
        if isinstance(count, int) and count > most:
            raise InputError(f"{folder / 'config.json'} says {name} {count}, the files hold {len(entries)} tensors")


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether config.json describes a mixture of experts."""
    text = config.get("text_config") or config
    return any(text.get(name) for name in _EXPERT_COUNTS)


def check_tensors(model: Any, entries: Mapping[str, TensorEntry], folder: Path) -> None:
    """Compares every parameter of the skeleton with what the files' headers say.

    Raises:
        InputError: a tensor is missing, or has another shape than the configuration says, or is of integers.
    """
    missing = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        disk = disk_name(name, model, entries)
        if disk is None:
            if name not in getattr(model, "all_tied_weights_keys", {}):
                missing.append(name)
            continue
        entry = entries[disk]
        if entry.shape != tuple(parameter.shape):
            raise InputError(
                f"tensor {disk} has shape {list(entry.shape)}, the configuration says {list(parameter.shape)}"
            )
        if entry.dtype not in _WEIGHT_DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in _WEIGHT_DTYPES)
            raise InputError(f"tensor {disk} is {str(entry.dtype).removeprefix('torch.')}, expected {allowed}")
    if missing:
        raise InputError(
            f"tensor {first_names(missing)} is missing from {folder}", hint="copy or download the model again"
        )


def first_names(names: Sequence[str]) -> str:
    """The first ten of a list, and how many more there are."""
    listed = ", ".join(names[:_LISTED])
    return listed + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def materialize(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Gives a module on the meta device its tensors, by their names inside it; the module owns them afterwards.

    Raises:
        InputError: a shape differs from what the configuration says.
    """
    expected = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if tuple(expected[name].shape) != tuple(tensor.shape):
            raise InputError(
                f"tensor {name} has shape {list(tensor.shape)}, the configuration says {list(expected[name].shape)}"
            )
    module.load_state_dict(tensors, strict=False, assign=True)
    module.requires_grad_(False)


def _reason(error: Exception) -> str:
    """One line of an error that may have none or many."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _is_newer(version: str) -> bool:
    """Whether a version of transformers is newer than the installed one."""
    mine, other = (tuple(map(int, re.findall(r"\d+", v)[:2])) for v in (transformers.__version__, version))
    return other > mine


def _known_types() -> Container[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    names: Container[str] = CONFIG_MAPPING_NAMES
    return names
