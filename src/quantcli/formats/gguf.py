"""GGUF's quantized tensors, as llama.cpp's `ggml-common.h` lays their blocks out.

Of a linear with N outputs and K inputs there is one part, `blocks` [N, bytes of a row] uint8: row after row, block
after block. In bytes of a block:

- q4_0  d, 16 x two codes            q8_0  d, 32 x code - 128 (int8)
- q4_1  d, -minimum, 16 x two codes
- q5_0  d, high bits, 16 x two codes (q5_1: d, -minimum, ...)
- q2_k  16 x (scale, minimum), codes, d, d_min
- q3_k  high bits, codes, 16 x 6-bit scale + 32, d
- q4_k  d, d_min, 8 x 6-bit (scale, minimum), codes (q5_k: ..., high bits, codes)
- q6_k  low 4 bits, high 2 bits, 16 x scale (int8), d

d, minimum and d_min are float16. In the file's index types and shapes stand beside names; `models.gguf` writes it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.formats.codec import Codec, Described, Held, require
from quantcli.scheme import Scheme
from quantcli.tensors.block_grids import holding
from quantcli.tensors.block_types import BlockType, block_type_of
from quantcli.tensors.quantized import BlockScales, QuantizedTensor, group_index

__all__ = ["CODEC", "PART", "pack", "row_bytes", "unpack"]

PART = "blocks"
_BITS = {width: torch.arange(0, 8, width, dtype=torch.uint8)[:, None] for width in (1, 2, 4)}
"""Shifts of the codes of so many bits in a byte."""


def row_bytes(kind: BlockType, columns: int) -> int:
    """Bytes of a row of K columns."""
    return columns // kind.columns * kind.size_bytes


def pack(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The stored bytes of one linear."""
    kind = block_type_of(tensor.scheme)
    assert kind is not None
    rows, columns = tensor.shape
    codes = tensor.codes.reshape(-1, kind.columns)
    parts = _PACK[kind.name](codes, _scales_of(tensor, kind))
    return {PART: torch.cat(parts, 1).reshape(rows, row_bytes(kind, columns))}


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Reads one linear.

    Raises:
        InputError: the bytes are no whole number of blocks.
    """
    kind = block_type_of(scheme)
    assert kind is not None
    stored = require(tensors, PART, (None, None), torch.uint8)
    rows, size = stored.shape
    if size % kind.size_bytes:
        raise InputError(f"rows of {size} bytes are no blocks of {kind.size_bytes}, as {kind.name} has")
    columns = size // kind.size_bytes * kind.columns
    codes, scales = _UNPACK[kind.name](stored.reshape(-1, kind.size_bytes))
    codes = codes.reshape(rows, columns)
    found = scales.mapped(lambda part: part.reshape(rows, -1))
    if not all(bool(torch.isfinite(d).all()) for d in (found.d, found.d_min) if d is not None):
        raise InputError("scales are not finite numbers")
    if kind.fitted:
        return holding(codes, scheme, found)
    zero = torch.full(found.d.shape, scheme.middle, dtype=torch.uint8)
    return QuantizedTensor(codes, found.d, zero, scheme, group_index(columns, scheme))


def _scales_of(tensor: QuantizedTensor, kind: BlockType) -> BlockScales:
    """By block: d [B, 1], scales [B, groups] and so on."""
    found = tensor.blocks or BlockScales(tensor.scale, torch.ones_like(tensor.scale, dtype=torch.int16))
    groups = kind.columns // kind.group

    def shaped(part: Tensor | None, count: int) -> Tensor | None:
        return None if part is None else part.reshape(-1, count)

    return BlockScales(
        found.d.reshape(-1, 1), found.scales.reshape(-1, groups), shaped(found.d_min, 1), shaped(found.minimums, groups)
    )


def _half(values: Tensor | None) -> Tensor:
    """float16 values [B, n] as bytes."""
    assert values is not None
    return values.contiguous().view(torch.uint8)


def _float16(stored: Tensor) -> Tensor:
    return stored.contiguous().view(torch.float16)


def _together(codes: Tensor, width: int, run: int) -> Tensor:
    """Codes of some bits, several a byte: those of a byte stand `run` columns apart; [B, n] to [B, n * width / 8]."""
    several = codes.reshape(len(codes), -1, 8 // width, run)
    return (several << _BITS[width]).sum(2, dtype=torch.uint8).reshape(len(codes), -1)


def _apart(stored: Tensor, width: int, run: int) -> Tensor:
    """The inverse of `_together`."""
    several = stored.reshape(len(stored), -1, 1, run) >> _BITS[width]
    return (several & ((1 << width) - 1)).reshape(len(stored), -1)


def _high_bits(codes: Tensor) -> Tensor:
    """Bit 4 of 32 codes as 4 bytes, first code lowest."""
    bits = (codes >> 4).reshape(len(codes), 4, 8)
    return (bits << _BITS[1][:, 0]).sum(2, dtype=torch.uint8)


def _from_high_bits(stored: Tensor) -> Tensor:
    return ((stored[:, :, None] >> _BITS[1][:, 0]) & 1).reshape(len(stored), -1) << 4


def _pack_small(codes: Tensor, scales: BlockScales) -> list[Tensor]:
    """q4_0, q4_1, q5_0 and q5_1."""
    head = [_half(scales.d)] + ([] if scales.d_min is None else [_half(-scales.d_min)])
    return [*head, _together(codes & 15, 4, 16)]


def _unpack_small(stored: Tensor, minimum: bool) -> tuple[Tensor, BlockScales]:
    codes = _apart(stored[:, -16:], 4, 16)
    return codes, _small_scales(stored, minimum)


def _pack_small5(codes: Tensor, scales: BlockScales) -> list[Tensor]:
    *head, low = _pack_small(codes, scales)
    return [*head, _high_bits(codes), low]


def _unpack_small5(stored: Tensor, minimum: bool) -> tuple[Tensor, BlockScales]:
    codes = _apart(stored[:, -16:], 4, 16) | _from_high_bits(stored[:, -20:-16])
    return codes, _small_scales(stored, minimum)


def _small_scales(stored: Tensor, minimum: bool) -> BlockScales:
    ones = torch.ones(len(stored), 1, dtype=torch.int16)
    if not minimum:
        return BlockScales(_float16(stored[:, :2]), ones)
    return BlockScales(_float16(stored[:, :2]), ones, -_float16(stored[:, 2:4]), ones.clone())


def _pack_q8(codes: Tensor, scales: BlockScales) -> list[Tensor]:
    return [_half(scales.d), codes ^ 128]  # the codes from 0 as int8


def _unpack_q8(stored: Tensor) -> tuple[Tensor, BlockScales]:
    return stored[:, 2:] ^ 128, _small_scales(stored, minimum=False)


def _pack_q2(codes: Tensor, scales: BlockScales) -> list[Tensor]:
    assert scales.minimums is not None
    integers = (scales.scales | scales.minimums << 4).to(torch.uint8)
    return [integers, _together(codes, 2, 32), _half(scales.d), _half(scales.d_min)]


def _unpack_q2(stored: Tensor) -> tuple[Tensor, BlockScales]:
    integers, codes = stored[:, :16].to(torch.int16), _apart(stored[:, 16:80], 2, 32)
    return codes, BlockScales(_float16(stored[:, 80:82]), integers & 15, _float16(stored[:, 82:84]), integers >> 4)


def _pack_q3(codes: Tensor, scales: BlockScales) -> list[Tensor]:
    integers = (scales.scales + 32).to(torch.uint8)
    low = integers[:, :8] & 15 | (integers[:, 8:] & 15) << 4
    return [
        _together(codes >> 2, 1, 32),
        _together(codes & 3, 2, 32),
        low,
        _together(integers >> 4, 2, 4),
        _half(scales.d),
    ]


def _unpack_q3(stored: Tensor) -> tuple[Tensor, BlockScales]:
    codes = _apart(stored[:, :32], 1, 32) << 2 | _apart(stored[:, 32:96], 2, 32)
    low = torch.cat([stored[:, 96:104] & 15, stored[:, 96:104] >> 4], 1)
    integers = (low | _apart(stored[:, 104:108], 2, 4) << 4).to(torch.int16) - 32
    return codes, BlockScales(_float16(stored[:, 108:110]), integers)


def _pack_pairs(scales: BlockScales) -> Tensor:
    """8 scales and 8 minimums of 6 bits in 12 bytes: the first four of each whole, others' high bits on top."""
    assert scales.minimums is not None
    a, b = scales.scales.to(torch.uint8), scales.minimums.to(torch.uint8)
    return torch.cat(
        [a[:, :4] | a[:, 4:] >> 4 << 6, b[:, :4] | b[:, 4:] >> 4 << 6, a[:, 4:] & 15 | (b[:, 4:] & 15) << 4], 1
    )


def _unpack_pairs(stored: Tensor) -> tuple[Tensor, Tensor]:
    first, second, rest = stored[:, :4], stored[:, 4:8], stored[:, 8:]
    scales = torch.cat([first & 63, rest & 15 | first >> 6 << 4], 1)
    minimums = torch.cat([second & 63, rest >> 4 | second >> 6 << 4], 1)
    return scales.to(torch.int16), minimums.to(torch.int16)


def _pack_q4(codes: Tensor, scales: BlockScales) -> list[Tensor]:
    return [_half(scales.d), _half(scales.d_min), _pack_pairs(scales), _together(codes & 15, 4, 32)]


def _unpack_q4(stored: Tensor) -> tuple[Tensor, BlockScales]:
    integers, minimums = _unpack_pairs(stored[:, 4:16])
    scales = BlockScales(_float16(stored[:, :2]), integers, _float16(stored[:, 2:4]), minimums)
    return _apart(stored[:, -128:], 4, 32), scales


def _pack_q5(codes: Tensor, scales: BlockScales) -> list[Tensor]:
    *head, low = _pack_q4(codes, scales)
    return [*head, _together(codes >> 4, 1, 32), low]


def _unpack_q5(stored: Tensor) -> tuple[Tensor, BlockScales]:
    codes, scales = _unpack_q4(stored)
    return codes | _apart(stored[:, 16:48], 1, 32) << 4, scales


def _pack_q6(codes: Tensor, scales: BlockScales) -> list[Tensor]:
    integers = scales.scales.to(torch.int8).view(torch.uint8)
    return [_together(codes & 15, 4, 64), _together(codes >> 4, 2, 32), integers, _half(scales.d)]


def _unpack_q6(stored: Tensor) -> tuple[Tensor, BlockScales]:
    codes = _apart(stored[:, :128], 4, 64) | _apart(stored[:, 128:192], 2, 32) << 4
    integers = stored[:, 192:208].contiguous().view(torch.int8).to(torch.int16)
    return codes, BlockScales(_float16(stored[:, 208:210]), integers)


_PACK: Mapping[str, Callable[[Tensor, BlockScales], list[Tensor]]] = {
    "q4_0": _pack_small,
    "q4_1": _pack_small,
    "q5_0": _pack_small5,
    "q5_1": _pack_small5,
    "q8_0": _pack_q8,
    "q2_k": _pack_q2,
    "q3_k": _pack_q3,
    "q4_k": _pack_q4,
    "q5_k": _pack_q5,
    "q6_k": _pack_q6,
}
_UNPACK: Mapping[str, Callable[[Tensor], tuple[Tensor, BlockScales]]] = {
    "q4_0": lambda stored: _unpack_small(stored, minimum=False),
    "q4_1": lambda stored: _unpack_small(stored, minimum=True),
    "q5_0": lambda stored: _unpack_small5(stored, minimum=False),
    "q5_1": lambda stored: _unpack_small5(stored, minimum=True),
    "q8_0": _unpack_q8,
    "q2_k": _unpack_q2,
    "q3_k": _unpack_q3,
    "q4_k": _unpack_q4,
    "q5_k": _unpack_q5,
    "q6_k": _unpack_q6,
}


def _refuse(held: Held) -> str | None:
    kind = block_type_of(held.scheme)
    if kind is None:
        return "it holds GGML's block types, whose groups and scales are their own"
    if held.columns % kind.columns:
        return f"{kind.name} has blocks of {kind.columns}, which do not divide {held.columns} inputs"
    if not held.ordered:
        return "it holds groups of neighbouring columns only"
    return None


def _config(described: Described) -> dict[str, Any]:
    return {"quant_method": "gguf"}


def _packed_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    kind = block_type_of(scheme)
    assert kind is not None
    return rows * row_bytes(kind, columns)


CODEC = Codec(
    name="gguf",
    lowest_zero=0,
    refuse=_refuse,
    pack=pack,
    unpack=unpack,
    config=_config,
    packed_bytes=_packed_bytes,
)
