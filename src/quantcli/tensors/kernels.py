"""Loops that are too fine for whole-tensor operations, compiled by numba: rows in parallel, one row's data in cache.

Every kernel takes float32 arrays (or float64, in the tests that compare it with a literal reference).
"""

import math
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["descend_block", "expand", "round_block", "round_nearest", "search_grid"]

Floats = NDArray[np.floating]

# the default (tbb, omp) would add a second OpenMP pool that fights torch's for the cores
numba.config.THREADING_LAYER = "workqueue"


@numba.njit(cache=True)
def _as_float16(value: Any) -> Any:
    """The nearest float16, as a wider float; zero becomes the smallest positive float16."""
    if value == 0.0:
        return 2.0**-24
    exponent = max(math.frexp(value)[1], -13)
    step = math.ldexp(1.0, exponent - 11)
    rounded = np.rint(value / step) * step
    if rounded == 0.0:
        return 2.0**-24
    return min(max(rounded, -65504.0), 65504.0)


@numba.njit(cache=True, fastmath=True)
def _grid_error(w: Floats, h: Floats, scale: Any, zero: Any, top: Any) -> Any:
    """Importance-weighted squared error of one group on one grid."""
    inverse = w.dtype.type(1.0) / scale
    total = w.dtype.type(0.0)
    low, high = -zero, top - zero
    for i in range(w.size):
        level = min(max(np.rint(w[i] * inverse), low), high)
        error = level * scale - w[i]
        total += h[i] * error * error
    return total


@numba.njit(cache=True, fastmath=True)
def _best_scale(w: Floats, h: Floats, scale: Any, zero: Any, top: Any) -> Any:
    """The scale that minimizes the weighted error for the codes that `scale` gives."""
    inverse = w.dtype.type(1.0) / scale
    product, energy = w.dtype.type(0.0), w.dtype.type(0.0)
    low, high = -zero, top - zero
    for i in range(w.size):
        level = min(max(np.rint(w[i] * inverse), low), high)
        product += h[i] * level * w[i]
        energy += h[i] * level * level
    return product / energy if energy > 0 else scale


@numba.njit(cache=True, parallel=True)
def search_grid(
    weight: Floats,
    importance: Floats,
    group_size: int,
    top: int,
    middle: int,
    lowest_zero: int,
    factors: Floats,
    refine: int,
) -> tuple[Floats, Floats]:
    """See `affine.searched_grid`; `middle` is the zero of symmetric grids or -1, `importance` is [1 or N, K]."""
    rows, columns = weight.shape
    groups = (columns + group_size - 1) // group_size
    scales, zeros = np.empty((rows, groups), weight.dtype), np.empty((rows, groups), weight.dtype)
    as_float = weight.dtype.type
    per_row = np.intp(1 if importance.shape[0] > 1 else 0)
    for r in numba.prange(rows):
        for g in range(groups):
            w = weight[r, g * group_size : (g + 1) * group_size]
            h = importance[np.intp(r) * per_row, g * group_size : (g + 1) * group_size]
            low, high = as_float(0.0), as_float(0.0)
            for i in range(w.size):
                low, high = min(low, w[i]), max(high, w[i])
            extreme = low if -low > high else high
            best, best_scale, best_zero = as_float(np.inf), as_float(1.0), as_float(0.0)
            for f in range(factors.size):
                if middle >= 0:
                    scale = as_float(_as_float16(-extreme * factors[f] / as_float(middle)))
                    error = _grid_error(w, h, scale, as_float(middle), as_float(top))
                    if error < best:
                        best, best_scale, best_zero = error, scale, as_float(middle)
                else:
                    span = (high - low) * factors[f] / as_float(top)
                    position = -low * factors[f] / max(span, as_float(2.0**-24))
                    scale = as_float(_as_float16(span))
                    for side in range(2):
                        zero = np.floor(position) if side == 0 else np.ceil(position)
                        zero = min(max(as_float(zero), as_float(lowest_zero)), as_float(top))
                        error = _grid_error(w, h, scale, zero, as_float(top))
                        if error < best:
                            best, best_scale, best_zero = error, scale, zero
            for _ in range(refine):
                scale = as_float(_as_float16(_best_scale(w, h, best_scale, best_zero, as_float(top))))
                error = _grid_error(w, h, scale, best_zero, as_float(top))
                if not error < best:
                    break
                best, best_scale = error, scale
            scales[r, g], zeros[r, g] = best_scale, best_zero
    return scales, zeros


@numba.njit(cache=True, parallel=True)
def round_nearest(
    weight: Floats, scale: Floats, zero: Floats, group: NDArray[np.int32], top: int, codes: NDArray[np.uint8]
) -> None:
    """Fills `codes` [N, K] with the nearest code of each weight; scale and zero are [N, G], group [K]."""
    for r in numba.prange(weight.shape[0]):
        for k in range(weight.shape[1]):
            z = zero[r, group[k]]
            code = np.rint(weight[r, k] / scale[r, group[k]]) + z
            codes[r, k] = np.uint8(min(max(code, z - z), z - z + top))


@numba.njit(cache=True, parallel=True)
def expand(
    codes: NDArray[np.uint8], scale: Floats, zero: NDArray[np.uint8], group: NDArray[np.int32], out: Floats
) -> None:
    """Fills `out` [N, K] with (code - zero) * scale; scale [N, G] is of `out`'s dtype."""
    for r in numba.prange(codes.shape[0]):
        for k in range(codes.shape[1]):
            g = group[k]
            out[r, k] = np.float32(np.int32(codes[r, k]) - np.int32(zero[r, g])) * scale[r, g]


@numba.njit(cache=True, parallel=True)
def round_block(
    weight: Floats,
    codes: NDArray[np.uint8],
    errors: Floats,
    factor: Floats,
    scale: Floats,
    zero: Floats,
    group: NDArray[np.int32],
    top: int,
) -> None:
    """GPTQ's inner loop over one block of B columns, all rows in parallel; fills `codes` and `errors`.

    Args:
        weight: [N, B] weights that earlier blocks' errors have been fed into; changed in place.
        codes: [N, B], out.
        errors: [N, B], out: (w - q) / U[j, j], which the caller feeds into the later blocks.
        factor: [B, B] the block's part of the upper factor U.
        scale: [N, G].
        zero: [N, G].
        group: [B] group of each column.
        top: Largest code.
    """
    rows, width = weight.shape
    for r in numba.prange(rows):
        w = weight[r]
        for j in range(width):
            s, z = scale[r, group[j]], zero[r, group[j]]
            code = min(max(np.rint(w[j] / s) + z, z - z), z - z + top)
            codes[r, j] = np.uint8(code)
            error = (w[j] - (code - z) * s) / factor[j, j]
            errors[r, j] = error
            for k in range(j + 1, width):
                w[k] -= error * factor[j, k]


@numba.njit(cache=True, parallel=True)
def descend_block(
    residual: Floats,
    quantized: Floats,
    codes: NDArray[np.uint8],
    steps: Floats,
    hessian: Floats,
    scale: Floats,
    zero: Floats,
    group: NDArray[np.int32],
    top: int,
) -> None:
    """Coordinate descent over one block of B columns: re-rounds each code under the exact Hessian.

    Args:
        residual: [N, B] (W - Q) H for these columns; changed in place.
        quantized: [N, B] dequantized Q; changed in place.
        codes: [N, B]; changed in place.
        steps: [N, B], out: the change of Q, which the caller feeds into the later columns' residual.
        hessian: [B, B] the block's part of H.
        scale: [N, G].
        zero: [N, G].
        group: [B] group of each column.
        top: Largest code.
    """
    rows, width = residual.shape
    for r in numba.prange(rows):
        rest = residual[r]
        for j in range(width):
            s, z = scale[r, group[j]], zero[r, group[j]]
            code = min(max(np.rint((quantized[r, j] + rest[j] / hessian[j, j]) / s) + z, z - z), z - z + top)
            value = (code - z) * s
            step = value - quantized[r, j]
            steps[r, j] = step
            if step != 0.0:
                quantized[r, j] = value
                codes[r, j] = np.uint8(code)
                for k in range(j + 1, width):
                    rest[k] -= step * hessian[j, k]
