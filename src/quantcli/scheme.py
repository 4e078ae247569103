"""The grid of a quantized tensor: how many bits, how many columns share a scale, symmetric or not; or a codebook."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from quantcli.errors import UsageError

__all__ = ["CODEBOOKS", "FLOATS", "PER_CHANNEL", "ActivationScheme", "Scheme"]

PER_CHANNEL = -1
CODEBOOKS: Mapping[str, int] = {"nf4": 4, "fp4": 4, "int8": 8}
"""Bits of those of bitsandbytes; int8 is LLM.int8()'s, whose scale is a row's largest weight."""
FLOATS: Mapping[str, int] = {"e2m1": 4, "e4m3": 8}
"""Bits of small floats, by their exponent and mantissa: FP4 and FP8, codebooks of the values that they have."""


@dataclass(frozen=True)
class Scheme:
    """Dequantized weight = (code - zero) * scale, with one scale and zero per row and group of columns.

    Symmetric grids are full-range signed: zero is always 2**(bits-1) and the scale may be negative, so that the
    weight of largest magnitude in a group sits exactly on code 0.
    """

    bits: int = 4
    """Bits per weight, 1 to 8."""
    group_size: int = 128
    """Input columns that share a scale, 16 or more; -1 is one scale per output row. The last group of a row is
    shorter where the group size does not divide the row."""
    symmetric: bool = False
    """Whether the zero point is fixed in the middle of the grid."""
    lowest_zero: int = 0
    """Smallest zero point that the target format can hold (GPTQ v1: 1)."""
    codebook: str | None = None
    """nf4, fp4, int8, e2m1 or e4m3 where the dequantized weight is codebook[code] * scale, without zero points; None on
    uniform grids."""
    double_quant: bool = False
    """Of nf4 and fp4: whether the scales are stored as 8-bit codes themselves."""
    scale: Literal["float", "e8m0", "e4m3"] = "float"
    """Of e2m1 and e4m3, how scales are stored: as floats, as powers of two in 8 bits (MX), or as FP8 under one float32
    that divides those of the whole matrix (NVFP4)."""
    block_rows: int = 1
    """Rows that share a scale, beside the columns of a group; a last block of rows may be shorter."""
    block_type: str | None = None
    """GGML's type, as q4_k, where a GGUF file holds the grid: `tensors.block_types` says what that means."""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError(f"bits must be 1 to 8, got {self.bits}")
        if self.group_size != PER_CHANNEL and self.group_size < 16:
            raise UsageError(f"group size must be 16 or more, or -1 for per channel, got {self.group_size}")
        if not 0 <= self.lowest_zero < self.levels:
            raise UsageError(f"lowest zero must be below {self.levels}, got {self.lowest_zero}")
        widths = {**CODEBOOKS, **FLOATS}
        if self.codebook is not None and widths.get(self.codebook) != self.bits:
            known = ", ".join(f"{name} of {bits}" for name, bits in widths.items())
            raise UsageError(f"codebooks are {known} bits, got {self.codebook}, {self.bits} bits")
        if self.codebook == "int8" and self.group_size != PER_CHANNEL:
            raise UsageError(f"int8 has one scale per row, got groups of {self.group_size}", hint="leave it out")

    @property
    def levels(self) -> int:
        """How many codes there are; codes run from 0 to levels - 1."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero point of symmetric grids."""
        return 1 << (self.bits - 1)

    def columns_per_group(self, columns: int) -> int:
        """Group size in columns for rows of `columns` inputs: never more than the row."""
        return columns if self.group_size == PER_CHANNEL else min(self.group_size, columns)

    def group_count(self, columns: int) -> int:
        """Groups per row, a shorter last one counted."""
        return -(-columns // self.columns_per_group(columns))

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits per weight with 16-bit scales and packed zero points; a codebook has scales alone.

        Block types say it themselves.
        """
        if self.codebook is not None:
            scale_bits = 8 + 32 / 256 if self.double_quant else 32.0 if self.scale == "float" else 8.0
            return self.bits + scale_bits * self.group_count(columns) / columns / self.block_rows
        return self.bits + (16 + self.bits) * self.group_count(columns) / columns

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return asdict(self)


@dataclass(frozen=True)
class ActivationScheme:
    """How what a linear reads is rounded as the model runs."""

    element: Literal["int", "e4m3", "e2m1"]
    """Signed integers of `bits`, or small floats."""
    bits: int = 8
    group_size: int | None = PER_CHANNEL
    """Entries of a token that share a scale; -1: all of them; None: one scale for all tokens."""
    dynamic: bool = True
    """Whether scales are those of the values at hand; else they are stored."""
    scale: Literal["float", "e8m0", "e4m3"] = "float"
    """How scales are rounded; e4m3: under a stored float32, as those of weights are."""
    symmetric: bool = True
    """Whether zero is code 0."""

    @property
    def stored(self) -> bool:
        """Whether calibration has to find something that is stored."""
        return not self.dynamic or self.scale == "e4m3"

    def describe(self) -> str:
        """In words."""
        kind = {"int": f"int{self.bits}", "e4m3": "FP8", "e2m1": "FP4"}[self.element]
        groups = {None: "per tensor", PER_CHANNEL: "per token"}.get(self.group_size, f"in groups of {self.group_size}")
        return f"{kind} {groups}, {'dynamic' if self.dynamic else 'static'}"
