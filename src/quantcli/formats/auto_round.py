"""AutoRound's own checkpoints (`quant_method: auto-round`): tensors of GPTQ v1 or of AWQ gemm under other headings.

`packing_format` says which; `extra_config` has, by module name or regular expression, what differs for single linears.
"""

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["METHOD", "PACKINGS", "as_packed", "packing_of"]

METHOD = "auto-round"
PACKINGS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}
"""By `packing_format`, the format of the tensors."""
_KEYS = ("bits", "group_size", "sym")


def packing_of(config: Mapping[str, Any]) -> str | None:
    """The format of its tensors; None where it is none that we read."""
    return PACKINGS.get(str(config.get("packing_format")))


def as_packed(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a `quantization_config` of that format would say of one linear."""
    found = {key: config[key] for key in _KEYS if key in config}
    for pattern, values in (config.get("extra_config") or {}).items():
        if pattern == name or _matches(pattern, name):
            found |= {key: values[key] for key in _KEYS if values.get(key) is not None}
    return found | {"zero_point": not found.get("sym", True), "version": "gemm"}


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False
