"""Uniform grids: the scale and zero point of each group of columns, and rounding onto them.

Symbols: W [N, K] weight, G groups per row, S [N, G] scale, Z [N, G] zero. Scales are rounded to float16, the dtype that
is stored, before any error is measured.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from quantcli.scheme import Scheme
from quantcli.tensors import kernels
from quantcli.tensors.quantized import QuantizedTensor, group_index

__all__ = [
    "LARGEST_SCALE",
    "SCALE_DTYPE",
    "divide_rows",
    "grouped",
    "minmax_grid",
    "round_to_grid",
    "searched_grid",
    "stored_scale",
]

SCALE_DTYPE = torch.float16
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16: a group of zeros keeps a scale that is not zero
LARGEST_SCALE = 65504.0


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as the file holds them: float16 values, never zero or infinite, in the dtype given."""
    rounded = scale.clamp(-LARGEST_SCALE, LARGEST_SCALE).to(SCALE_DTYPE).to(scale.dtype)
    return torch.where(rounded == 0, torch.full_like(rounded, SMALLEST_SCALE), rounded)


def minmax_grid(weight: Tensor, scheme: Scheme, clip_ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """The grid that spans each group's range, or a share of it; (S, Z) [N, G] in the weight's dtype.

    Symmetric grids are full-range signed: the weight of largest magnitude sits on code 0.
    """
    groups = grouped(weight, scheme)
    top = scheme.levels - 1
    if scheme.symmetric:
        at = groups.abs().argmax(2, keepdim=True)
        scale = stored_scale(-clip_ratio * groups.gather(2, at)[..., 0] / scheme.middle)
        return scale, torch.full_like(scale, scheme.middle)
    low, high = clip_ratio * groups.amin(2).clamp(max=0), clip_ratio * groups.amax(2).clamp(min=0)
    scale = stored_scale((high - low) / top)
    return scale, (-low / scale).round().clamp(scheme.lowest_zero, top)


def searched_grid(
    weight: Tensor,
    scheme: Scheme,
    importance: Tensor,
    *,
    steps: int = 60,
    smallest: float = 0.45,
    refine: int = 0,
) -> tuple[Tensor, Tensor]:
    """Per group, the (scale, zero) with the least importance-weighted squared rounding error.

    Args:
        weight: W [N, K] float32 or float64.
        scheme: Bits, group size, symmetry.
        importance: [K], such as the diagonal of the Hessian, or [N, K].
        steps: Ranges tried, from the whole (slightly more for symmetric grids) down to `smallest` of it. Asymmetric
            grids try both neighbouring integers as zero point for each.
        smallest: Smallest share of the range.
        refine: Rounds of "codes fixed, best scale; scale fixed, best codes" after the search, each kept per group only
            where it lowers the error.

    Returns:
        S and Z, [N, G] in the weight's dtype.
    """
    factors = torch.linspace(1.1 if scheme.symmetric else 1.0, smallest, steps, dtype=torch.float64)
    if weight.device.type == "cpu":
        weights = np.ascontiguousarray(weight.numpy())
        rows = importance if importance.ndim == 2 else importance[None]
        scale, zero = kernels.search_grid(
            weights,
            np.ascontiguousarray(rows.to(weight.dtype).numpy()),
            scheme.columns_per_group(weight.shape[1]),
            scheme.levels - 1,
            scheme.middle if scheme.symmetric else -1,
            scheme.lowest_zero,
            factors.numpy().astype(weights.dtype),
            refine,
        )
        return torch.from_numpy(scale), torch.from_numpy(zero)
    return _search_on_device(weight, scheme, importance, factors.tolist(), refine)


def round_to_grid(
    weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, *, float_zeros: bool = False
) -> QuantizedTensor:
    """Rounds every weight to the nearest code of its group's grid.

    Args:
        weight: W [N, K] float32 or float64.
        scale: S [N, G].
        zero: Z [N, G], whole numbers unless `float_zeros`.
        scheme: Their grid.
        float_zeros: Zero points are any float16, and stored as such: code = round(w / s + z).
    """
    group = group_index(weight.shape[1], scheme, weight.device)
    if weight.device.type == "cpu":
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        arrays = (weight, scale.to(weight.dtype), zero.to(weight.dtype), group)
        kernels.round_nearest(*(a.contiguous().numpy() for a in arrays), scheme.levels - 1, float_zeros, codes.numpy())
    else:
        at = group.long()
        steps, shift = weight / scale[:, at], zero[:, at]
        codes = (steps + shift).round() if float_zeros else steps.round() + shift
        codes = codes.clamp(0, scheme.levels - 1).to(torch.uint8)
    stored = zero.to(SCALE_DTYPE if float_zeros else torch.uint8)
    return QuantizedTensor(codes, scale.to(SCALE_DTYPE), stored, scheme, group)


def divide_rows(tensor: QuantizedTensor, rows: Tensor, divisor: Tensor) -> QuantizedTensor:
    """With the weights of row rows[i] divided by divisor[i]: the same codes, other scales, as they are stored."""
    scale = tensor.scale.float()
    scale[rows] = stored_scale(scale[rows] / divisor[:, None])
    return replace(tensor, scale=scale.to(SCALE_DTYPE))


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """W [N, K] as [N, G, g]; a shorter last group is filled up with zeros, which lie in every grid."""
    size = scheme.columns_per_group(weight.shape[1])
    short = -weight.shape[1] % size
    return pad(weight, (0, short)).view(weight.shape[0], -1, size)


def _search_on_device(
    weight: Tensor, scheme: Scheme, importance: Tensor, factors: list[float], refine: int
) -> tuple[Tensor, Tensor]:
    """The search as whole-tensor operations, for accelerators; equal to the kernel up to rounding of sums."""
    groups, top = grouped(weight, scheme), scheme.levels - 1
    weights = grouped(importance.to(weight.dtype).expand_as(weight), scheme)
    best = torch.full(groups.shape[:2], torch.inf, dtype=weight.dtype, device=weight.device)
    scale, zero = torch.ones_like(best), torch.zeros_like(best)

    def attempt(s: Tensor, z: Tensor) -> None:
        nonlocal best, scale, zero
        s = stored_scale(s)
        codes = ((groups / s[..., None]).round() + z[..., None]).clamp(0, top)
        error = (((codes - z[..., None]) * s[..., None] - groups) ** 2 * weights).sum(2)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)

    if scheme.symmetric:
        extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0]
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    for factor in factors:
        if scheme.symmetric:
            attempt(-extreme * factor / scheme.middle, torch.full_like(best, scheme.middle))
        else:
            s = (high - low) * factor / top
            position = -low * factor / s.clamp(min=SMALLEST_SCALE)
            attempt(s, position.floor().clamp(scheme.lowest_zero, top))
            attempt(s, position.ceil().clamp(scheme.lowest_zero, top))
    for _ in range(refine):
        levels = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, top) - zero[..., None]
        energy = (weights * levels**2).sum(2)
        attempt(torch.where(energy > 0, (weights * levels * groups).sum(2) / energy.clamp(min=1e-30), scale), zero)
    return scale, zero
