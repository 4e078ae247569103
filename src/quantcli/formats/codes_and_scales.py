"""Linears of compressed-tensors that are codes and scales: W8A8 integers, FP8, FP4 with a scale for a few columns.

For a linear with K inputs and N outputs:

- weight              [N, K] int8 or float8_e4m3fn (`int-quantized`, `float-quantized`, `naive-quantized`); or
- weight_packed       [N, K/2] uint8 (`nvfp4-` and `mxfp4-pack-quantized`): two codes of E2M1, the first in the low
  bits;
- weight_scale        [N, 1] of rows, [1] of the matrix, [N, G] of groups, or one for each block of rows and columns;
  float8_e4m3fn with NVFP4, uint8 exponents plus 127 with MX formats;
- weight_global_scale [1] float32, NVFP4: what those scales are divided by;
- weight_zero_point   int8 in the shape of the scale, of asymmetric integers;
- input_scale         [1] where activations are rounded by a stored scale, with input_zero_point where asymmetric;
- input_global_scale  [1] float32, NVFP4: what multiplies the scales of activations before they are rounded to FP8.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.formats import compressed_config
from quantcli.formats.codec import Codec, Held, require, require_scales
from quantcli.formats.layouts import LAYOUTS
from quantcli.scheme import PER_CHANNEL, Scheme
from quantcli.tensors import floats
from quantcli.tensors.quantized import QuantizedTensor, group_index

__all__ = ["CODECS", "PARTS", "pack", "unpack"]

PARTS = (
    "weight", "weight_packed", "weight_scale", "weight_global_scale", "weight_zero_point",
    "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip
_BIAS = 127
"""Of exponents."""


def pack(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The stored tensors of one linear."""
    scheme, stored = tensor.scheme, {}
    if tensor.has_float_zeros:
        raise AssertionError("these layouts hold whole zero points; the plan should have said so")
    if scheme.codebook is None:
        stored["weight"] = (tensor.codes.to(torch.int16) - scheme.middle).to(torch.int8)
    elif scheme.codebook == "e4m3":
        stored["weight"] = tensor.codes.view(torch.float8_e4m3fn)
    else:
        stored["weight_packed"] = tensor.codes[:, ::2] | tensor.codes[:, 1::2] << 4
    scale = tensor.scale[:: scheme.block_rows].contiguous()
    if scheme.scale == "e8m0":
        scale = (scale.log2() + _BIAS).to(torch.uint8)
    elif scheme.scale == "e4m3":
        assert tensor.divisor is not None
        scale = (scale * tensor.divisor).to(torch.float8_e4m3fn)
        stored["weight_global_scale"] = tensor.divisor.clone()  # one object for those that are run as one
    stored["weight_scale"] = scale
    if tensor.input_scale is not None:
        stored["input_global_scale" if scheme.scale == "e4m3" else "input_scale"] = tensor.input_scale.clone()
    return stored


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Reads one linear.

    Args:
        tensors: By the names in `PARTS`.
        scheme: From `compressed_config.scheme_of`.

    Raises:
        InputError: a tensor is missing, or they do not fit together.
    """
    codes = _codes(tensors, scheme)
    rows, columns = codes.shape
    groups = scheme.group_count(columns)
    divisor = None
    if scheme.scale == "e4m3":
        divisor = require_scales(tensors, "weight_global_scale", (1,)).float()
        if not bool(divisor > 0):
            raise InputError(f"weight_global_scale is {divisor.item():g}, expected a positive number")
    scale = _scale(tensors, scheme, rows, groups, divisor)
    name = "input_global_scale" if scheme.scale == "e4m3" else "input_scale"
    given = tensors.get(name)
    if given is not None:
        given = require_scales({name: given.reshape(-1)}, name, (1,)).float()
    return QuantizedTensor(
        codes=codes,
        scale=scale.contiguous(),
        zero=_zero(tensors, scheme, rows, groups),
        scheme=scheme,
        group=group_index(columns, scheme, codes.device),
        codebook=None if scheme.codebook is None else floats.values(scheme.codebook),
        divisor=divisor,
        input_scale=given,
    )


def _codes(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """[N, K] uint8."""
    if scheme.codebook is None:
        weight = require(tensors, "weight", (None, None), torch.int8).to(torch.int16) + scheme.middle
        if scheme.bits < 8 and bool(((weight < 0) | (weight >= scheme.levels)).any()):
            raise InputError(f"weight is outside of {scheme.bits} bits")
        return weight.to(torch.uint8)
    if scheme.codebook == "e4m3":
        codes = require(tensors, "weight", (None, None), torch.float8_e4m3fn).view(torch.uint8)
        if bool((codes & 127 == 127).any()):
            raise InputError("weight holds NaN")
        return codes
    packed = require(tensors, "weight_packed", (None, None), torch.uint8)
    return torch.stack([packed & 15, packed >> 4], 2).flatten(1)


def _scale(tensors: Mapping[str, Tensor], scheme: Scheme, rows: int, groups: int, divisor: Tensor | None) -> Tensor:
    """[N, G]: float32 of small floats, as they are stored of integers."""
    given = tensors.get("weight_scale")
    if given is not None and given.numel() == 1:
        given = given.reshape(1, 1).expand(-(-rows // scheme.block_rows), groups)
    elif given is not None and given.ndim == 1:
        given = given[:, None]
    parts = {} if given is None else {"weight_scale": given}
    shape = -(-rows // scheme.block_rows), groups
    if scheme.scale == "e8m0":
        exponents = require(parts, "weight_scale", shape, torch.uint8).int()
        return torch.ldexp(torch.ones(shape), exponents - _BIAS)
    scale = require(parts, "weight_scale", shape)
    scale = scale.float() if scheme.codebook is not None else scale
    require_scales({"weight_scale": scale}, "weight_scale", shape)
    if divisor is not None:
        scale = scale / divisor
    return scale.repeat_interleave(scheme.block_rows, 0)[:rows]


def _zero(tensors: Mapping[str, Tensor], scheme: Scheme, rows: int, groups: int) -> Tensor:
    given = tensors.get("weight_zero_point")
    if scheme.codebook is not None:
        return torch.zeros(rows, groups, dtype=torch.uint8)
    if given is None:
        if not scheme.symmetric:
            raise InputError("weight_zero_point is missing")
        return torch.full((rows, groups), scheme.middle, dtype=torch.uint8)
    given = given.reshape(-1, 1).expand(rows, groups) if given.numel() in (1, rows) else given
    shifted = require({"weight_zero_point": given}, "weight_zero_point", (rows, groups), torch.int8).int()
    return (shifted + scheme.middle).to(torch.uint8)


def _refuse(held: Held) -> str | None:
    scheme = held.scheme
    if not held.ordered:
        return "it holds groups of neighbouring columns only"
    if held.transposed:
        return "its readers know Linear, not Conv1D"
    if not held.is_default:
        return "all linears have one scheme in it"
    if scheme.group_size != PER_CHANNEL and held.columns % scheme.group_size:
        return f"groups of {scheme.group_size} do not divide {held.columns} inputs"
    return None


def _packed_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    width = 1 if scheme.scale != "float" else 4 if scheme.codebook is not None else 2
    scales = -(-rows // scheme.block_rows) * scheme.group_count(columns) * width
    return rows * columns * scheme.bits // 8 + scales


CODECS = tuple(
    Codec(
        name=layout.name,
        lowest_zero=0,
        refuse=_refuse,
        pack=pack,
        unpack=unpack,
        config=compressed_config.describe,
        packed_bytes=_packed_bytes,
        codebooks=True,
        layout=layout,
    )
    for layout in LAYOUTS.values()
)
