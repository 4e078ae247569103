"""Other bits, groups, grids or ranges for some layers."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quantcli.errors import UsageError, nearest
from quantcli.options.regex import compile_regex

__all__ = ["Override"]


@dataclass(frozen=True)
class Override:
    """Another scheme for the linears whose name matches."""

    pattern: str
    """Regular expression, searched in the module name."""
    bits: int | None = None
    """Bits per weight there."""
    group_size: int | None = None
    """Group size there."""
    symmetric: bool | None = None
    """Symmetric grid there."""
    clip_ratio: float | None = None
    """Of rtn: share of the range that the grid spans there."""

    @property
    def scheme(self) -> dict[str, Any]:
        """What it changes of a scheme."""
        values = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def parse(cls, text: str) -> "Override":
        """Reads `REGEX=bits=8,group_size=32,sym=true`."""
        hint = "write --override 'REGEX=bits=8,group_size=32'"
        match = re.fullmatch(r"(?P<pattern>.+?)=(?P<settings>(?:[a-z_-]+=[^=,]+)(?:,[a-z_-]+=[^=,]+)*)", text)
        if match is None:
            raise UsageError(f"override {text!r} is not of the form REGEX=KEY=VALUE,...", hint=hint)
        values: dict[str, Any] = {}
        for setting in match["settings"].split(","):
            key, value = setting.split("=")
            key = {"sym": "symmetric"}.get(key.replace("-", "_"), key.replace("-", "_"))
            if key not in _KINDS:
                known = ["sym" if name == "symmetric" else name for name in _KINDS]
                raise UsageError(f"override {text!r}: unknown key {key!r}, {nearest(key, known)}", hint=hint)
            values[key] = _KINDS[key](value, text)
        return cls(compile_regex(match["pattern"], "--override"), **values)


def _parse_int(value: str, text: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise UsageError(f"override {text!r}: {value!r} is not a whole number") from error


def _parse_float(value: str, text: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UsageError(f"override {text!r}: {value!r} is not a number") from error


def _parse_bool(value: str, text: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UsageError(f"override {text!r}: sym is true or false, got {value!r}")
    return value.lower() == "true"


_KINDS: dict[str, Callable[[str, str], Any]] = {
    "bits": _parse_int,
    "group_size": _parse_int,
    "symmetric": _parse_bool,
    "clip_ratio": _parse_float,
}
