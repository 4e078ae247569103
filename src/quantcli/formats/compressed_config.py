"""`quantization_config` of compressed-tensors: schemes by target, the same in all of its layouts; written and read."""

import re
from collections.abc import Mapping
from typing import Any

from quantcli.errors import InputError
from quantcli.formats.codec import Described
from quantcli.formats.layouts import METHOD, activation_args, activations_of, weight_args, weights_of
from quantcli.scheme import ActivationScheme, Scheme

__all__ = [
    "FP8_CACHE",
    "INTEGER_LAYOUT",
    "METHOD",
    "READ_LAYOUTS",
    "activations_of_linear",
    "cache_scheme_of",
    "describe",
    "is_cache_scale",
    "layout_of",
    "layouts_of",
    "refuse_config",
    "scheme_of",
]

INTEGER_LAYOUT = "pack-quantized"
READ_LAYOUTS = (
    INTEGER_LAYOUT, "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip
_VERSION = "0.20.0"
"""Of the package whose layouts these are."""
_CACHE_SCALE = re.compile(r"\.[qkv]_(scale|zero_point)$")
FP8_CACHE = ActivationScheme("e4m3", 8, None, dynamic=False)
"""Keys and values with a stored scale for each layer."""


def describe(described: Described) -> dict[str, Any]:
    """What is written of a checkpoint."""
    schemes: dict[Scheme, list[str]] = {described.default: ["Linear"]}
    if described.head is not None and described.head not in described.exceptions:
        schemes[described.default].append(described.head)  # a head is no Linear to vLLM: it goes by the name
    for name, scheme in described.exceptions.items():
        schemes.setdefault(scheme, []).append(name)
    return {
        "quant_method": METHOD,
        "format": described.layout,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": _group(scheme, targets, described)
            for number, (scheme, targets) in enumerate(schemes.items())
        },
        "ignore": list(described.float_linears),
        "kv_cache_scheme": activation_args(FP8_CACHE) if described.fp8_cache else None,
        "global_compression_ratio": None,
        "moe_sparsity_config": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": _VERSION,
    }


def _group(scheme: Scheme, targets: list[str], described: Described) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": weight_args(scheme),
        "input_activations": None if described.activations is None else activation_args(described.activations),
        "output_activations": None,
        "format": described.layout,
    }


def is_cache_scale(name: str) -> bool:
    """Whether a tensor belongs to the keys, values or queries of an attention."""
    return _CACHE_SCALE.search(name) is not None


def layouts_of(config: Mapping[str, Any]) -> set[str]:
    """The layouts of its groups."""
    groups = config.get("config_groups")
    found = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    return {str(group.get("format") or config.get("format") or INTEGER_LAYOUT) for group in found}


def refuse_config(config: Mapping[str, Any]) -> str | None:
    """Which layout it has that is not read, or what else; None where all is read, or nothing is said."""
    unknown = sorted(layouts_of(config) - set(READ_LAYOUTS))
    if unknown:
        return f"compressed-tensors checkpoint of layout {unknown[0]!r}: {', '.join(READ_LAYOUTS)} are read"
    if (config.get("transform_config") or {}).get("config_groups"):
        return "its transform_config changes what the model computes, which is not read"
    try:
        cache_scheme_of(config)
    except InputError as error:
        return error.message
    return None


def cache_scheme_of(config: Mapping[str, Any]) -> ActivationScheme | None:
    """How keys and values are rounded as they enter the cache.

    Raises:
        InputError: in a way that we do not simulate.
    """
    try:
        found = activations_of(config.get("kv_cache_scheme"))
    except InputError as error:
        raise InputError(f"its kv_cache_scheme: {error.message}") from error
    if found is not None and (found.group_size is not None or found.dynamic):
        raise InputError("its kv_cache_scheme is not one stored scale for each layer, which is read")
    return found


def scheme_of(config: Mapping[str, Any], name: str) -> Scheme:
    """The scheme of one packed linear by a `quantization_config`.

    Raises:
        InputError: one that is not read; or the linear is said to stay float.
    """
    group = _group_of(config, name)
    if group.get("output_activations"):
        raise InputError("its scheme quantizes output_activations too, which is not read")
    return weights_of(group.get("weights") or {})


def activations_of_linear(config: Mapping[str, Any], name: str) -> ActivationScheme | None:
    """How what one linear reads is rounded.

    Raises:
        InputError: in a way that we do not simulate.
    """
    return activations_of(_group_of(config, name).get("input_activations"))


def layout_of(config: Mapping[str, Any], name: str) -> str:
    """The layout of one packed linear."""
    return str(_group_of(config, name).get("format") or config.get("format") or INTEGER_LAYOUT)


def _group_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise InputError("quantization_config has no config_groups of schemes")
    if any(_matches(target, name) for target in config.get("ignore") or ()):
        raise InputError("it is packed, but quantization_config ignores it")
    # as its own reader does: names before regular expressions before classes
    targets = [(_rank(target, name), target, group) for group in groups.values() for target in group["targets"]]
    found = sorted((t for t in targets if t[0] is not None), key=lambda t: t[:2])
    if not found:
        raise InputError("it is packed, but no target of quantization_config matches it")
    group: Mapping[str, Any] = found[0][2]
    return group


def _matches(target: str, name: str) -> bool:
    expression = target.removeprefix("re:")
    return target == name if expression == target else re.match(expression, name) is not None


def _rank(target: str, name: str) -> int | None:
    """0 for a name, 1 for a regular expression, 2 for the class that a module of this name has; None for no match."""
    if _matches(target, name):
        return int(target.startswith("re:"))
    return 2 if target == ("Embedding" if "emb" in name.rpartition(".")[2] else "Linear") else None
