"""What Olive searches where a key says "SEARCHABLE_VALUES" or nothing is chosen: the values that it documents.

A key that is not here has none: a list of values is searched all the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SEARCHABLE", "Values"]


@dataclass(frozen=True)
class Values:
    """The values of one key."""

    values: tuple[Any, ...]
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of other keys with which they are searched; a key that is not chosen has its default."""


_BOTH = (False, True)
_KINDS = ("QInt8", "QUInt8")
_COMMON = {"weight_type": Values(_KINDS), "per_channel": Values(_BOTH), "reduce_range": Values(_BOTH)}
_METHODS, _FORMATS = ("MinMax", "Entropy", "Percentile"), ("QDQ", "QOperator")


def _static(mode: Mapping[str, tuple[Any, ...]], types: bool = True) -> dict[str, Values]:
    """Of static quantization, where another key says that it is."""
    found = {"quant_format": Values(_FORMATS, mode)}
    if types:
        found |= {"calibrate_method": Values(_METHODS, mode)}
    return found


_WEIGHT_ONLY = {"approach": ("weight_only",)}

SEARCHABLE: Mapping[str, Mapping[str, Values]] = {
    "OnnxQuantization": {
        "quant_mode": Values(("static", "dynamic")),
        **_COMMON,
        **_static({"quant_mode": ("static",)}),
    },
    "OnnxStaticQuantization": {**_COMMON, **_static({})},
    "OnnxDynamicQuantization": _COMMON,
    "IncQuantization": {
        "approach": Values(("static", "dynamic", "weight_only")),
        "reduce_range": Values(_BOTH, {"approach": ("static", "dynamic")}),
        **_static({"approach": ("static",)}, types=False),
        "weight_only_config.scheme": Values(("asym", "sym"), _WEIGHT_ONLY),
        "weight_only_config.algorithm": Values(("RTN", "GPTQ"), _WEIGHT_ONLY),
    },
    "IncStaticQuantization": {"reduce_range": Values(_BOTH), **_static({}, types=False)},
    "IncDynamicQuantization": {"reduce_range": Values(_BOTH)},
}
"""By type and key, the first value ours by default."""
