"""Grids of least lp error by half-quadratic splitting: per group, an error matrix and the grid are solved in turn.

Symbols: W [N, K] weight, G groups per row, S [N, G] scale, Z [N, G] zero; one group: w its weights, c their codes,
e the errors that are left out of the fit, p the norm. Each turn solves

    e = argmin |e|^p + beta / 2 |e - (w - (c - z) s)|^2      shrinkage: sign(x) max(|x| - |x|^(p-1) / beta, 0)
    s, z = argmin |w - e - (c - z) s|^2                      a regression line through the codes

and beta grows by the factor kappa. Errors are those of the grid as it is stored.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantcli.scheme import Scheme
from quantcli.tensors.affine import SCALE_DTYPE, grouped, minmax_grid, stored_scale
from quantcli.tensors.kernels import as_float16

__all__ = ["Splitting", "split_grid"]

Floats = NDArray[np.floating]
_LARGEST = 65504.0


@dataclass(frozen=True)
class Splitting:
    """How the turns are taken; `algorithms.rounders.hqq` says what each number does."""

    p: float
    beta: float
    kappa: float
    iterations: int
    early_stop: bool
    fit_scale: bool
    float_zeros: bool


def split_grid(weight: Tensor, scheme: Scheme, how: Splitting) -> tuple[Tensor, Tensor]:
    """Per group the grid of least lp error that the turns come by, round-to-nearest's grid among them.

    Args:
        weight: W [N, K] float32 or float64.
        scheme: Bits, group size, symmetry: a symmetric grid keeps its zero, only its scale is fitted.
        how: The turns.

    Returns:
        S and Z, [N, G] in the weight's dtype: values that float16 holds, Z whole numbers unless `how.float_zeros`.
    """
    scale, zero = minmax_grid(weight, scheme)
    if weight.device.type != "cpu":
        return _split_on_device(weight, scheme, how, scale, zero)
    weights = np.ascontiguousarray(weight.numpy())
    scales, zeros, as_float = scale.numpy(), zero.numpy(), weights.dtype.type
    _split(
        weights,
        scales,
        zeros,
        scheme.columns_per_group(weight.shape[1]),
        scheme.levels - 1,
        scheme.lowest_zero,
        scheme.symmetric,
        how.float_zeros and not scheme.symmetric,
        how.fit_scale,
        as_float(how.p),
        as_float(how.beta),
        as_float(how.kappa),
        how.iterations,
        how.early_stop,
    )
    return torch.from_numpy(scales), torch.from_numpy(zeros)


@numba.njit(cache=True)
def _stored_zero(zero: Any, lowest: int, top: int, float_zeros: bool) -> Any:
    """A zero point as the file holds it: a float16, where zero itself is one, or a whole number of the grid."""
    if not float_zeros:
        return min(max(np.rint(zero), float(lowest)), float(top))
    return 0.0 if zero == 0.0 else as_float16(zero)


@numba.njit(cache=True)
def _measure(w: Floats, s: Any, z: Any, top: Any, float_zeros: bool, p: Any, strength: Any) -> Any:
    """The sum of |error|^p of one group on a grid, and the sums of c, t, c^2 and c t with t = w - e."""
    error, sum_c, sum_t, sum_cc, sum_ct = 0.0, 0.0, 0.0, 0.0, 0.0
    none, less = w.dtype.type(0), p - w.dtype.type(1)
    for i in range(w.size):
        steps = w[i] / s
        c = min(max(np.rint(steps + z) if float_zeros else np.rint(steps) + z, none), top)
        x = w[i] - (c - z) * s
        size, kept = abs(x), none
        if size > 0:
            power = size**less
            error += size * power
            kept = max(size - power / strength, none)
        t = w[i] - (kept if x > 0 else -kept)
        sum_c += c
        sum_t += t
        sum_cc += c * c
        sum_ct += c * t
    return error, sum_c, sum_t, sum_cc, sum_ct


@numba.njit(cache=True)
def _fitted_scale(
    s: Any, z: Any, sums: Any, count: Any, lowest: int, top: int, symmetric: bool, float_zeros: bool
) -> Any:
    """The scale of least squared |t - (c - z) s|, z along with it unless it is fixed; s where there is none."""
    _, sum_c, sum_t, sum_cc, sum_ct = sums
    slope = float(s)
    if not symmetric:
        spread = count * sum_cc - sum_c * sum_c
        line = (count * sum_ct - sum_c * sum_t) / spread if spread > 0 else slope
        slope = line if line > 0 else slope
        z = _stored_zero((sum_c - sum_t / slope) / count, lowest, top, float_zeros)
    if not float_zeros:  # the zero was rounded to a whole number: the scale makes up for it
        energy = sum_cc - 2 * z * sum_c + count * z * z
        slope = (sum_ct - z * sum_t) / energy if energy > 0 else slope
    usable = slope != 0 if symmetric else slope > 0
    return as_float16(slope) if usable else float(s)


@numba.njit(cache=True, parallel=True)
def _split(
    weight: Floats,
    scales: Floats,
    zeros: Floats,
    group_size: int,
    top: int,
    lowest: int,
    symmetric: bool,
    float_zeros: bool,
    fit_scale: bool,
    p: Any,
    beta: Any,
    kappa: Any,
    iterations: int,
    early_stop: bool,
) -> None:
    """Improves `scales` and `zeros` [N, G] in place, from round-to-nearest's."""
    as_float = weight.dtype.type
    for r in numba.prange(weight.shape[0]):
        for g in range(scales.shape[1]):
            w = weight[r, g * group_size : (g + 1) * group_size]
            s, z, count = scales[r, g], zeros[r, g], float(w.size)
            best, previous, strength = np.inf, np.inf, beta
            if float_zeros:  # round-to-nearest's own grid is one to beat; the turns begin with both ends on the grid
                best = _measure(w, s, z, as_float(top), True, p, strength)[0]
                z = as_float(_stored_zero(-min(w.min(), as_float(0)) / s, lowest, top, True))
            for turn in range(iterations + 1):
                sums = _measure(w, s, z, as_float(top), float_zeros, p, strength)
                error = sums[0]
                if error < best:
                    best, scales[r, g], zeros[r, g] = error, s, z
                if turn == iterations or (early_stop and not error < previous):
                    break
                previous, strength = min(previous, error), strength * kappa
                if fit_scale:
                    s = as_float(_fitted_scale(s, z, sums, count, lowest, top, symmetric, float_zeros))
                if not symmetric:
                    z = as_float(_stored_zero((sums[1] - sums[2] / s) / count, lowest, top, float_zeros))


def _split_on_device(
    weight: Tensor, scheme: Scheme, how: Splitting, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """The same turns as whole-tensor operations, for accelerators; equal up to rounding of sums."""
    top, float_zeros = scheme.levels - 1, how.float_zeros and not scheme.symmetric
    groups = grouped(weight, scheme).double()
    filled = grouped(torch.ones_like(weight), scheme).double()
    count = filled.sum(2)
    best_scale, best_zero = scale, zero
    s, z = scale.double(), zero.double()
    best = previous = torch.full_like(s, torch.inf)
    active = torch.ones_like(s, dtype=torch.bool)
    strength = how.beta

    def stored(z: Tensor) -> Tensor:
        if float_zeros:
            return z.clamp(-_LARGEST, _LARGEST).to(SCALE_DTYPE).to(z.dtype)
        return z.round().clamp(scheme.lowest_zero, top)

    def measured(s: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps = groups / s[..., None]
        rounded = (steps + z[..., None]).round() if float_zeros else steps.round() + z[..., None]
        codes = rounded.clamp(0, top) * filled
        x = (groups - (codes - z[..., None]) * s[..., None]) * filled
        return codes, x, (x.abs() ** how.p).sum(2)

    if float_zeros:
        best = measured(s, z)[2]
        z = stored(-groups.amin(2).clamp(max=0) / s)
    for _ in range(how.iterations + 1):
        codes, x, error = measured(s, z)
        size = x.abs()
        better = active & (error < best)
        best = torch.where(better, error, best)
        best_scale = torch.where(better, s.to(weight.dtype), best_scale)
        best_zero = torch.where(better, z.to(weight.dtype), best_zero)
        if how.early_stop:
            active = active & (error < previous)
        previous = torch.minimum(previous, error)
        power = torch.where(size > 0, size, torch.ones_like(size)) ** (how.p - 1)
        target = groups - x.sign() * (size - power / strength).clamp(min=0)
        strength *= how.kappa
        sum_c, sum_t = codes.sum(2), target.sum(2)
        sum_cc, sum_ct = codes.square().sum(2), (codes * target).sum(2)
        slope, middle = s, z
        if how.fit_scale:
            if not scheme.symmetric:
                spread = count * sum_cc - sum_c.square()
                fitted = (count * sum_ct - sum_c * sum_t) / spread.clamp(min=1e-30)
                slope = torch.where((spread > 0) & (fitted > 0), fitted, s)
                middle = z if float_zeros else stored((sum_c - sum_t / slope) / count)
            if not float_zeros:
                energy = sum_cc - 2 * middle * sum_c + count * middle.square()
                slope = torch.where(energy > 0, (sum_ct - middle * sum_t) / energy.clamp(min=1e-30), s)
            usable = slope != 0 if scheme.symmetric else slope > 0
            slope = torch.where(usable, stored_scale(slope), s)
        s = torch.where(active, slope, s)
        if not scheme.symmetric:
            z = torch.where(active, stored((sum_c - sum_t / s) / count), z)
    return best_scale, best_zero
