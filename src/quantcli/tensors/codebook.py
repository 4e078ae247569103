"""Codebooks of 4 bits as bitsandbytes has them: a code names one of 16 values in [-1, 1], a block its largest weight.

nf4: quantiles of the normal distribution, from QLoRA (https://arxiv.org/abs/2305.14314); fp4: a sign, two bits of
exponent, one of mantissa. Double quantization stores the blocks' largest weights as codes of 8 bits on the dynamic map
of https://arxiv.org/abs/1511.04561, after their mean was taken away.

Symbols: W [N, K] weight, blocks of B columns, G blocks per row, S [N, G] largest |w| of each block.
"""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantcli.scheme import Scheme
from quantcli.tensors import kernels
from quantcli.tensors.quantized import NestedScale, QuantizedTensor, group_index

__all__ = ["VALUES", "codebook", "dynamic_map", "nest_scale", "round_to_codebook", "with_scale"]

_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by their three bits, in twelfths
VALUES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in _FP4),
}  # fmt: skip
"""The value of each code."""
_TINY = 1e-38  # stands for the largest weight of a block of zeros, so that nothing is divided by zero


def codebook(name: str, device: torch.device | str = "cpu") -> Tensor:
    """The values of nf4 or fp4 by code, [16] float32, fp4 with two codes for zero; or of int8, [256]: k / 127."""
    if name == "int8":
        return (torch.arange(256, dtype=torch.float32, device=device) - 128) / 127
    # the second zero is plain too: a sign would be the only difference to bitsandbytes' table
    return torch.tensor(VALUES[name], dtype=torch.float32, device=device) + 0.0


def round_to_codebook(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Rounds every weight to the nearest value of its block's scaled codebook, as bitsandbytes does on a CPU.

    Args:
        weight: W [N, K], any float dtype; taken as float32.
        scheme: Codebook, block size and whether scales are nested. A block size that does not divide K leaves the last
            block of each row shorter.

    Returns:
        Codes [N, K] and scales [N, G] float32: the largest |w| of each block, 0 where all are zero; where scales are
        nested, what their codes expand to. Codes are chosen by the scale before that.
    """
    assert scheme.codebook is not None
    table = codebook(scheme.codebook, weight.device)
    size, columns = scheme.columns_per_group(weight.shape[1]), weight.shape[1]
    weight = weight.float()
    if weight.device.type == "cpu":
        order, bounds = _bounds(table)
        absmax = torch.empty(len(weight), scheme.group_count(columns), dtype=torch.float32)
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        arrays = (weight.contiguous(), bounds, order.to(torch.uint8), absmax, codes)
        w, *others = (a.numpy() for a in arrays)
        kernels.round_codebook(w, size, *others)
    else:
        absmax, codes = _round_on_device(weight, size, table)
    nested = nest_scale(absmax) if scheme.double_quant else None
    return QuantizedTensor(
        codes=codes,
        scale=absmax if nested is None else nested.expand(),
        zero=torch.zeros(absmax.shape, dtype=torch.uint8, device=weight.device),
        scheme=scheme,
        group=group_index(columns, scheme, weight.device),
        codebook=table,
        nested=nested,
    )


def nest_scale(scale: Tensor) -> NestedScale:
    """Scales [N, G] float32 as 8-bit codes, in runs of 256 of the flattened matrix, around their mean.

    Codes are the nearest ones, as bitsandbytes computes them on accelerators; on a CPU it looks them up in 65536 steps
    and may take the neighbour.
    """
    table = dynamic_map().to(scale.device)
    offset = scale.reshape(-1).mean()
    flat, size = scale.reshape(-1) - offset, NestedScale.size
    runs = pad(flat, (0, -flat.numel() % size)).view(-1, size)
    absmax = runs.abs().amax(1)
    scaled = (runs * (1.0 / absmax.clamp(min=_TINY))[:, None]).clamp(-1, 1).view(-1)[: flat.numel()]
    codes = _nearest(scaled.contiguous(), table).view(scale.shape)
    return NestedScale(codes, absmax, table, float(offset), size)


def with_scale(tensor: QuantizedTensor, scale: Tensor) -> QuantizedTensor:
    """The same codes under other scales [N, G], as they are stored: in float32, or nested anew."""
    nested = nest_scale(scale.float()) if tensor.nested is not None else None
    return replace(tensor, scale=scale.float() if nested is None else nested.expand(), nested=nested)


@cache
def dynamic_map() -> Tensor:
    """The signed dynamic map of 8 bits, [256] float32, rising: values near 0 have more exponent and less fraction."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = 10.0 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2.0)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


def _round_on_device(weight: Tensor, size: int, table: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and codes as whole-tensor operations, for accelerators; equal to the kernel's."""
    rows, columns = weight.shape
    blocks = pad(weight, (0, -columns % size)).view(rows, -1, size)
    absmax = blocks.abs().amax(2)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY))[..., None]).clamp(-1, 1).view(rows, -1)[:, :columns]
    return absmax, _nearest(scaled.contiguous(), table)


def _nearest(scaled: Tensor, table: Tensor) -> Tensor:
    """The code of the nearest value, the lower value at a tie; uint8 in the shape of `scaled`."""
    order, bounds = _bounds(table)
    return order.to(torch.uint8)[torch.bucketize(scaled, bounds, out_int32=True)]


def _bounds(table: Tensor) -> tuple[Tensor, Tensor]:
    """The codes in the order of their values [levels], and the middles between neighbours [levels - 1]."""
    order = torch.argsort(table, stable=True)
    rising = table[order]
    return order, (rising[:-1] + rising[1:]) / 2
