"""compressed-tensors checkpoints of the `pack-quantized` layout, as llm-compressor writes and vLLM reads them.

For a linear with K inputs, N outputs, b bits and G groups of g columns:

- weight_packed     [N, ceil(K*b/32)] int32: code - 2**(b-1) as signed numbers, which are shifted back to 0 ... 2**b - 1
  before they are packed: so the codes themselves, along K as one little-endian bit stream (`bitpack`);
- weight_scale      [N, G] float;
- weight_zero_point [ceil(N*b/32), G] int32: zero points, shifted and packed alike along N; only where asymmetric;
- weight_shape      [2] int64: N and K.

Older writers have int8 zero points [N, G] that are not packed, and `weight_g_idx` [K] int32 (`actorder: group`), the
group of each column; compressed-tensors 0.20 took both away, we read them. A signed grid with zero point 0 is our
symmetric grid with the zero in the middle; scales may be negative, readers only multiply by them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.formats import compressed_config
from quantcli.formats.bitpack import pack_rows, packed_words, unpack_rows
from quantcli.formats.codec import Codec, Held, require, require_groups, require_scales
from quantcli.formats.compressed_config import METHOD
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index

__all__ = ["CODEC", "PARTS", "pack", "unpack"]

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def pack(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The stored tensors of one linear: three, and the zero points where they are not all in the middle by scheme."""
    scheme = tensor.scheme
    if tensor.has_float_zeros:
        raise AssertionError("compressed-tensors holds whole zero points; the plan should have said so")
    stored = {
        "weight_packed": pack_rows(tensor.codes.T, scheme.bits).T.contiguous(),
        "weight_scale": tensor.scale.contiguous(),
        "weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        stored["weight_zero_point"] = pack_rows(tensor.zero, scheme.bits)
    elif not bool((tensor.zero == scheme.middle).all()):
        raise AssertionError("a symmetric grid has its zero in the middle")
    return stored


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Reads one linear.

    Args:
        tensors: By the names in `PARTS`; weight_zero_point and weight_g_idx may be missing.
        scheme: From `compressed_config.scheme_of`.

    Raises:
        InputError: a tensor is missing, or they do not fit together.
    """
    sizes = tensors.get("weight_shape")
    if sizes is None or sizes.shape != (2,) or sizes.is_floating_point() or int(sizes.min()) < 1:
        raise InputError(f"weight_shape is {None if sizes is None else sizes.tolist()}, expected outputs and inputs")
    rows, columns = (int(n) for n in sizes)
    groups = scheme.group_count(columns)
    words = require(tensors, "weight_packed", (rows, packed_words(columns, scheme.bits)), torch.int32)
    scales = dict(tensors)
    if (given := tensors.get("weight_scale")) is not None and given.numel() == 1:  # one for the whole matrix
        scales["weight_scale"] = given.reshape(1, 1).expand(rows, groups)
    scale = require_scales(scales, "weight_scale", (rows, groups))
    group = group_index(columns, scheme, words.device)
    index = tensors.get("weight_g_idx")
    if index is not None and bool((index != -1).any()):  # -1 everywhere: in order
        group = require_groups(tensors, "weight_g_idx", columns, groups)
    return QuantizedTensor(
        codes=unpack_rows(words.T, scheme.bits, columns).T.contiguous(),
        scale=scale.contiguous(),
        zero=_zero(tensors, scheme, rows, groups),
        scheme=scheme,
        group=group,
    )


def _zero(tensors: Mapping[str, Tensor], scheme: Scheme, rows: int, groups: int) -> Tensor:
    """The zero points [N, G] uint8."""
    given = tensors.get("weight_zero_point")
    if given is None:
        if not scheme.symmetric:
            raise InputError("weight_zero_point is missing")
        return torch.full((rows, groups), scheme.middle, dtype=torch.uint8)
    if given.dtype == torch.int8:
        signed = given.reshape(1, 1).expand(rows, groups) if given.numel() == 1 else given
        shifted = require({"weight_zero_point": signed}, "weight_zero_point", (rows, groups), torch.int8).int()
        shifted += scheme.middle
        if int(shifted.min()) < 0 or int(shifted.max()) >= scheme.levels:
            raise InputError(f"weight_zero_point is outside of {scheme.bits} bits")
        return shifted.to(torch.uint8)
    words = require(tensors, "weight_zero_point", (packed_words(rows, scheme.bits), groups), torch.int32)
    return unpack_rows(words, scheme.bits, rows)


def _refuse(held: Held) -> str | None:
    scheme = held.scheme
    if not held.ordered:
        return "it holds groups of neighbouring columns only"
    if held.columns % scheme.columns_per_group(held.columns):
        return f"groups of {scheme.group_size} do not divide {held.columns} inputs"
    if held.transposed:
        return "its readers know Linear, not Conv1D"
    return None


def _packed_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    groups = scheme.group_count(columns)
    words = rows * packed_words(columns, scheme.bits)
    words += 0 if scheme.symmetric else packed_words(rows, scheme.bits) * groups
    return 4 * words + 2 * rows * groups + 16


CODEC = Codec(
    name=METHOD,
    lowest_zero=0,
    refuse=_refuse,
    pack=pack,
    unpack=unpack,
    config=compressed_config.describe,
    packed_bytes=_packed_bytes,
)
