"""The grids of GGML's block types, which GGUF files hold: facts of llama.cpp's `ggml-common.h`, by name.

A row is cut into blocks. The small types have one float16 scale per block of 32, and `_1` types a float16 minimum. The
K types have super-blocks of 256 with a float16 scale d (and d_min), whose groups of 16 or 32 columns have a small
integer each: scale = d * integer, minimum = d_min * integer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quantcli.scheme import Scheme

__all__ = ["BLOCK_TYPES", "BlockType", "block_type_of", "fitted_type", "scheme_of"]


@dataclass(frozen=True)
class BlockType:
    """One type: dequantized = (code - middle) * scale on symmetric grids, code * scale - minimum on the others."""

    name: str
    """In lower case."""
    bits: int
    """Of a code."""
    group: int
    """Columns that share a scale."""
    columns: int
    """Columns of a block, which divide a row."""
    size_bytes: int
    """Of a block."""
    symmetric: bool
    scale_low: int = 0
    """Smallest integer scale of a group; with `scale_top` 0, scales are float16 themselves."""
    scale_top: int = 0
    """Largest integer scale of a group."""
    minimum_top: int = 0
    """Largest integer minimum of a group."""

    @property
    def nested(self) -> bool:
        """Whether the scales of groups are integers."""
        return self.scale_top > 0

    @property
    def fitted(self) -> bool:
        """Whether its grids are other than those of plain group-wise quantization with whole zero points."""
        return self.nested or not self.symmetric

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight."""
        return 8 * self.size_bytes / self.columns


BLOCK_TYPES: Mapping[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("q4_0", 4, 32, 32, 18, symmetric=True),
        BlockType("q4_1", 4, 32, 32, 20, symmetric=False),
        BlockType("q5_0", 5, 32, 32, 22, symmetric=True),
        BlockType("q5_1", 5, 32, 32, 24, symmetric=False),
        BlockType("q8_0", 8, 32, 32, 34, symmetric=True),
        BlockType("q2_k", 2, 16, 256, 84, symmetric=False, scale_low=1, scale_top=15, minimum_top=15),
        BlockType("q3_k", 3, 16, 256, 110, symmetric=True, scale_low=-32, scale_top=31),
        BlockType("q4_k", 4, 32, 256, 144, symmetric=False, scale_low=1, scale_top=63, minimum_top=63),
        BlockType("q5_k", 5, 32, 256, 176, symmetric=False, scale_low=1, scale_top=63, minimum_top=63),
        BlockType("q6_k", 6, 16, 256, 210, symmetric=True, scale_low=-128, scale_top=127),
    )
}
"""By name."""


def scheme_of(name: str) -> Scheme:
    """The scheme of a block type."""
    kind = BLOCK_TYPES[name]
    return Scheme(kind.bits, kind.group, kind.symmetric, block_type=name)


def block_type_of(scheme: Scheme) -> BlockType | None:
    """The block type of a scheme, where it has one."""
    return None if scheme.block_type is None else BLOCK_TYPES[scheme.block_type]


def fitted_type(scheme: Scheme) -> BlockType | None:
    """The same where its grids are other than those of plain group-wise quantization (`BlockType.fitted`)."""
    kind = block_type_of(scheme)
    return kind if kind is not None and kind.fitted else None
