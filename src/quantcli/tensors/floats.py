"""Small floats: E2M1 (FP4) and E4M3 (FP8) as grids for weights, and the scales that go with them.

Ties between two values go to the one with an even mantissa, as in hardware. Scales are stored as floats, as powers of
two (E8M0, the MX formats: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf) or as
FP8 under one divisor of the whole matrix (NVFP4). All are positive.

Symbols: W [N, K] weight, G groups per row, S [N, G] scale, L levels.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantcli.scheme import Scheme

__all__ = ["LARGEST", "Levels", "levels", "mx_scale", "round_values", "span", "stored", "tensor_divisor", "values"]

LARGEST = {"e2m1": 6.0, "e4m3": 448.0}
"""The largest value of each."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SMALLEST_FP8 = 2.0**-9
_SMALLEST = 2.0**-126
"""Scales of groups of zeros."""


@dataclass(frozen=True)
class Levels:
    """The values of a small float in rising order, each once."""

    codes: Tensor
    """[L] uint8: sign, exponent and mantissa."""
    values: Tensor
    """[L]."""
    bounds: Tensor
    """[L - 1]: above how many of them x lies is the place of the nearest value."""


@cache
def values(name: str) -> Tensor:
    """The value of each code, [16] or [256] float32; the codes for NaN of E4M3 have NaN."""
    if name == "e2m1":
        magnitudes = torch.tensor(_E2M1)
        return torch.cat([magnitudes, -magnitudes])
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()


@cache
def levels(name: str, dtype: torch.dtype = torch.float32) -> Levels:
    """The levels for weights of a dtype: float32 or float64."""
    table = values(name).to(dtype)
    half = len(table) // 2
    known = torch.isfinite(table)
    known[half] = False  # zero with a sign
    codes = torch.nonzero(known)[:, 0]
    codes = codes[torch.argsort(table[codes])]
    rising = table[codes]
    middles = (rising[:-1] + rising[1:]) / 2
    up = codes[1:] % 2 == 0  # the upper neighbour has the even mantissa: a tie is above the bound
    below = torch.nextafter(middles, torch.full_like(middles, -torch.inf))
    return Levels(codes.to(torch.uint8), rising, torch.where(up, below, middles))


def round_values(x: Tensor, name: str) -> Tensor:
    """The nearest values of a small float to x; what lies beyond the largest goes there. In x's dtype."""
    top = LARGEST[name]
    if name == "e4m3":
        return x.clamp(-top, top).to(torch.float8_e4m3fn).to(x.dtype)
    found = levels(name, torch.float64 if x.dtype == torch.float64 else torch.float32)
    exact = x.to(found.values.dtype)
    places = torch.bucketize(exact, found.bounds.to(x.device), out_int32=True)
    return found.values.to(x.device)[places].where(~exact.isnan(), exact).to(x.dtype)


def span(weight: Tensor, scheme: Scheme, divisor: Tensor | None, clip_ratio: float = 1.0) -> Tensor:
    """S [N, G], as stored, with which each group's largest magnitude, or a share of it, is the largest value."""
    assert scheme.codebook is not None
    size = scheme.columns_per_group(weight.shape[1])
    largest = clip_ratio * pad(weight, (0, -weight.shape[1] % size)).view(len(weight), -1, size).abs().amax(2)
    if scheme.block_rows > 1:
        rows = len(largest)
        blocks = pad(largest, (0, 0, 0, -rows % scheme.block_rows)).view(-1, scheme.block_rows, largest.shape[1])
        largest = blocks.amax(1).repeat_interleave(scheme.block_rows, 0)[:rows]
    if scheme.scale == "e8m0":
        return mx_scale(largest, scheme.codebook)
    return stored(largest / LARGEST[scheme.codebook], scheme, divisor)


def mx_scale(largest: Tensor, name: str) -> Tensor:
    """The power of two by which MX formats scale a group.

    That of the largest magnitude over that of the largest value; one more where the former would be rounded up to the
    next power by a mantissa of one bit more than E2M1's.
    """
    fraction, exponent = torch.frexp(largest.float())
    offset = {"e2m1": 2, "e4m3": 8}[name]
    exponent = exponent - 1 + (fraction >= 0.875).int() - offset  # fraction is in [0.5, 1)
    exponent = torch.where(largest > 0, exponent, -126).clamp(-126, 127)
    return torch.ldexp(torch.ones_like(largest), exponent)


def stored(scale: Tensor, scheme: Scheme, divisor: Tensor | None) -> Tensor:
    """Positive scales as the file holds them, in the dtype given; never zero.

    Floats are float32 with a mantissa of bfloat16, so that readers in any dtype have them exactly.
    """
    if scheme.scale == "e8m0":
        fraction, exponent = torch.frexp(scale.float())
        exponent = exponent - (fraction < 0.5**0.5).int()
        return torch.ldexp(torch.ones_like(scale), torch.where(scale > 0, exponent, -126).clamp(-126, 127))
    if scheme.scale == "e4m3":
        assert divisor is not None
        codes = (scale.float() * divisor).clamp(_SMALLEST_FP8, LARGEST["e4m3"]).to(torch.float8_e4m3fn)
        return (codes.float() / divisor).to(scale.dtype)
    return scale.clamp(min=_SMALLEST).to(torch.bfloat16).to(scale.dtype)


def tensor_divisor(largest: Tensor, name: str = "e2m1") -> Tensor:
    """By what FP8 scales are divided: [1] float32, with which the largest magnitude's scale is the largest FP8."""
    top = LARGEST["e4m3"] * LARGEST[name]
    found = top / largest.float().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.nan_to_num(found, nan=1.0, posinf=1.0, neginf=1.0).reshape(1)
