"""How a quantized matrix becomes the blocks of MatMulNBits and GatherBlockQuantized: same codes, scales and zeros.

The operators know 2, 4 and 8 bits and blocks of 16 to 256 neighbouring columns, one scale and zero each. Everything
else is brought there without touching a value:

- 3 bits lie in 4-bit containers, 5 to 7 in 8-bit ones;
- a group is cut into equal blocks that repeat its scale and zero (per channel, long groups, a short last group);
- columns whose groups are not runs of whole blocks (`desc_act`, a group size of 24) are gathered first: sorted by
  group, each group filled up with columns whose code is its zero point, which adds exactly nothing to a product.

Symbols: N rows, K columns, G groups, B blocks per row, b block size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from quantcli.tensors.quantized import QuantizedTensor
    from quantcli.tensors.quantized_array import QuantizedArray

__all__ = [
    "BLOCK_SIZES",
    "BlockLayout",
    "container_bits",
    "pack_codes",
    "plan_blocks",
    "plan_codebook_blocks",
    "unpack_codes",
]

BLOCK_SIZES = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class BlockLayout:
    """Where each code of a row goes."""

    bits: int
    """Bits of the container: 2, 4 or 8."""
    block_size: int
    """Columns of a block."""
    group: np.ndarray
    """[B] int64: the group whose scale and zero the block repeats."""
    columns: np.ndarray | None
    """[B*b] int64: the input column that stands here, -1 for a filler; None where the order is kept."""
    width: int
    """Columns of the product's input: K, or B*b where columns are gathered."""

    @property
    def blocks(self) -> int:
        """Blocks per row, B."""
        return len(self.group)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: codes, float32 scales, packed zeros."""
        return _row_bytes(self.blocks, self.block_size, self.bits)

    def same_as(self, other: BlockLayout) -> bool:
        """Whether rows in both layouts can stand in one node."""
        if (self.bits, self.block_size, self.blocks) != (other.bits, other.block_size, other.blocks):
            return False
        if self.columns is None or other.columns is None:
            return self.columns is other.columns
        return np.array_equal(self.columns, other.columns)

    def codes(self, tensor: QuantizedTensor | QuantizedArray) -> np.ndarray:
        """The packed codes, [N, B, b*bits/8] uint8."""
        return pack_codes(self.unpacked(tensor), self.bits).reshape(tensor.shape[0], self.blocks, -1)

    def unpacked(self, tensor: QuantizedTensor | QuantizedArray) -> np.ndarray:
        """The codes block after block, [N, B*b] uint8."""
        columns = tensor.shape[1]
        assert self.columns is None or not tensor.has_float_zeros  # no code is exactly nothing
        codes, zero = np.asarray(tensor.codes), np.asarray(tensor.zero)
        out: np.ndarray = zero[:, self.group].astype(np.uint8).repeat(self.block_size, axis=1)  # fillers
        if self.columns is None:
            out[:, :columns] = codes
        else:
            used = self.columns >= 0
            out[:, used] = codes[:, self.columns[used]]
        return out

    def scales(self, tensor: QuantizedTensor | QuantizedArray) -> np.ndarray:
        """The scale of each block, [N, B] float32."""
        return np.asarray(tensor.scale)[:, self.group].astype(np.float32)

    def zeros(self, tensor: QuantizedTensor | QuantizedArray) -> np.ndarray:
        """The zero of each block, packed: [N, ceil(B*bits/8)] uint8; [N, B] float32 where it is a fraction."""
        zero = np.asarray(tensor.zero)[:, self.group]
        return zero.astype(np.float32) if tensor.has_float_zeros else pack_codes(zero, self.bits)

    def inverse(self, columns: int) -> np.ndarray:
        """[K] int64: where each input column stands among the blocks."""
        if self.columns is None:
            return np.arange(columns)
        out = np.empty(columns, np.int64)
        used = (self.columns >= 0).nonzero()[0]
        out[self.columns[used]] = used
        return out


def container_bits(bits: int) -> int:
    """The narrowest width that the operators know and the codes fit in."""
    return next(width for width in (2, 4, 8) if bits <= width)


def plan_blocks(group: ArrayLike, bits: int) -> BlockLayout:
    """The layout that takes the least space.

    Args:
        group: [K] the group of each column.
        bits: Bits of the codes, 2 to 8.
    """
    group = np.asarray(group, np.int64)
    width, count = container_bits(bits), len(group)
    starts = np.concatenate([[0], (group[1:] != group[:-1]).nonzero()[0] + 1])
    fitting = [b for b in BLOCK_SIZES if not (starts % b).any()]
    if fitting:
        size = min(fitting, key=lambda b: (_row_bytes(-(-count // b), b, width), -b))
        first = np.arange(-(-count // size)) * size
        return BlockLayout(width, size, group[first], None, count)
    present, counts = np.unique(group, return_counts=True)
    size = min(BLOCK_SIZES, key=lambda b: (_row_bytes(int(-(-counts // b).sum()), b, width), -b))
    order = np.argsort(group, kind="stable")
    pieces, owners = [], []
    for name, columns in zip(present.tolist(), np.split(order, np.cumsum(counts)[:-1]), strict=True):
        filler = np.full(-len(columns) % size, -1, np.int64)
        pieces += [columns, filler]
        owners += [name] * (-(-len(columns) // size))
    gathered = np.concatenate(pieces)
    return BlockLayout(width, size, np.array(owners), gathered, len(gathered))


def plan_codebook_blocks(group: ArrayLike) -> BlockLayout | None:
    """The blocks of a MatMulBnb4, which run over the flattened matrix: they have to divide the rows.

    Args:
        group: [K] the group of each column.

    Returns:
        The layout with the largest blocks; None where K is no multiple of 16.
    """
    group = np.asarray(group, np.int64)
    count, starts = len(group), (group[1:] != group[:-1]).nonzero()[0] + 1
    size = next((b for b in BLOCK_SIZES if count % b == 0 and not (starts % b).any()), None)
    return None if size is None else BlockLayout(4, size, group[::size], None, count)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs along the last axis, first code in the lowest bits: [..., n] uint8 to [..., ceil(n*bits/8)] uint8."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    per_byte = 8 // bits
    short = -codes.shape[-1] % per_byte
    if short:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], short), np.uint8)], axis=-1)
    out = codes[..., 0::per_byte].copy()
    for index in range(1, per_byte):
        out |= codes[..., index::per_byte] << np.uint8(bits * index)
    return out


def unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `pack_codes`: [..., ceil(count*bits/8)] uint8 to [..., count] uint8."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :count]


def _row_bytes(blocks: int, size: int, bits: int) -> int:
    """Bytes of one row: codes, float32 scales, packed zeros."""
    return blocks * (size * bits // 8 + 4) + -(-blocks * bits // 8)
