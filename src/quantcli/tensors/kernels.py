"""Loops that are too fine for whole-tensor operations, compiled by numba: rows in parallel, a tile of them in cache.

Every kernel takes float32 arrays (or float64, in the tests that compare it with a literal reference).
"""

import math
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "as_float16",
    "descend_block",
    "descend_block_floats",
    "expand",
    "expand_codebook",
    "round_block",
    "round_block_floats",
    "round_codebook",
    "round_floats",
    "round_nearest",
    "search_floats",
    "search_grid",
]

Floats = NDArray[np.floating]

# the default (tbb, omp) would add a second OpenMP pool that fights torch's for the cores
numba.config.THREADING_LAYER = "workqueue"

_LANES = 64  # rows that go through a block together: each operation then is a few full vectors wide


@numba.njit(cache=True)
def as_float16(value: Any) -> Any:
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
                    scale = as_float(as_float16(-extreme * factors[f] / as_float(middle)))
                    error = _grid_error(w, h, scale, as_float(middle), as_float(top))
                    if error < best:
                        best, best_scale, best_zero = error, scale, as_float(middle)
                else:
                    span = (high - low) * factors[f] / as_float(top)
                    position = -low * factors[f] / max(span, as_float(2.0**-24))
                    scale = as_float(as_float16(span))
                    for side in range(2):
                        zero = np.floor(position) if side == 0 else np.ceil(position)
                        zero = min(max(as_float(zero), as_float(lowest_zero)), as_float(top))
                        error = _grid_error(w, h, scale, zero, as_float(top))
                        if error < best:
                            best, best_scale, best_zero = error, scale, zero
            for _ in range(refine):
                scale = as_float(as_float16(_best_scale(w, h, best_scale, best_zero, as_float(top))))
                error = _grid_error(w, h, scale, best_zero, as_float(top))
                if not error < best:
                    break
                best, best_scale = error, scale
            scales[r, g], zeros[r, g] = best_scale, best_zero
    return scales, zeros


@numba.njit(cache=True, parallel=True)
def round_nearest(
    weight: Floats,
    scale: Floats,
    zero: Floats,
    group: NDArray[np.int32],
    top: int,
    float_zeros: bool,
    codes: NDArray[np.uint8],
) -> None:
    """Fills `codes` [N, K] with the nearest code of each weight; scale and zero are [N, G], group [K]."""
    for r in numba.prange(weight.shape[0]):
        for k in range(weight.shape[1]):
            z = zero[r, group[k]]
            steps = weight[r, k] / scale[r, group[k]]
            code = np.rint(steps + z) if float_zeros else np.rint(steps) + z
            codes[r, k] = np.uint8(min(max(code, z - z), z - z + top))


@numba.njit(cache=True, parallel=True)
def expand(codes: NDArray[np.uint8], scale: Floats, zero: NDArray[Any], group: NDArray[np.int32], out: Floats) -> None:
    """Fills `out` [N, K] with (code - zero) * scale; scale [N, G] is of `out`'s dtype, zero uint8 or float32."""
    for r in numba.prange(codes.shape[0]):
        for k in range(codes.shape[1]):
            g = group[k]
            out[r, k] = (np.float32(codes[r, k]) - np.float32(zero[r, g])) * scale[r, g]


@numba.njit(cache=True, parallel=True)
def expand_codebook(
    codes: NDArray[np.uint8], scale: Floats, codebook: Floats, group: NDArray[np.int32], out: Floats
) -> None:
    """Fills `out` [N, K] with codebook[code] * scale; scale [N, G] and codebook [levels] are of `out`'s dtype."""
    for r in numba.prange(codes.shape[0]):
        for k in range(codes.shape[1]):
            out[r, k] = codebook[codes[r, k]] * scale[r, group[k]]


@numba.njit(cache=True, parallel=True)
def round_codebook(
    weight: Floats, size: int, bounds: Floats, order: NDArray[np.uint8], scale: Floats, codes: NDArray[np.uint8]
) -> None:
    """Fills `scale` [N, G] with the largest |w| of each block of `size` columns and `codes` [N, K] by it.

    Args:
        weight: [N, K] float32.
        size: Columns of a block.
        bounds: [levels - 1] float32, rising: the middles between neighbouring values of the codebook.
        order: [levels] the codes in the order of their values.
        scale: Out.
        codes: Out: a weight over its scale that lies above i bounds gets order[i].
    """
    columns = weight.shape[1]
    one, tiny = np.float32(1.0), np.float32(1e-38)  # a block of zeros is divided by something
    for r in numba.prange(weight.shape[0]):
        for g in range(scale.shape[1]):
            first, last = g * size, min((g + 1) * size, columns)
            largest = np.float32(0.0)
            for k in range(first, last):
                largest = max(largest, abs(weight[r, k]))
            scale[r, g] = largest
            inverse = one / max(largest, tiny)
            for k in range(first, last):
                value, above = min(max(weight[r, k] * inverse, -one), one), 0
                for i in range(bounds.size):
                    above += bounds[i] < value
                codes[r, k] = order[above]


@numba.njit(cache=True)
def _tile(matrix: Floats, first: int) -> Floats:
    """Rows `first` to `first + _LANES` of [N, B] as [B, _LANES], filled up with zeros."""
    count = min(_LANES, matrix.shape[0] - first)
    out = np.zeros((matrix.shape[1], _LANES), matrix.dtype)
    for r in range(count):
        for j in range(matrix.shape[1]):
            out[j, r] = matrix[first + r, j]
    return out


@numba.njit(cache=True)
def _feed_forward(tile: Floats, j: int, change: Floats, factor: Floats) -> None:
    """Feeds the change of column j [_LANES] into the later columns of a tile [B, _LANES]."""
    for k in range(j + 1, tile.shape[0]):
        share, column = factor[j, k], tile[k]
        for r in range(_LANES):
            column[r] -= change[r] * share


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
        weight: [N, B] weights that earlier blocks' errors have been fed into.
        codes: [N, B], out.
        errors: [N, B], out: (w - q) / U[j, j], which the caller feeds into the later blocks.
        factor: [B, B] the block's part of the upper factor U.
        scale: [N, G].
        zero: [N, G], whole numbers or, where grids begin anywhere, fractions.
        group: [B] group of each column.
        top: Largest code.
    """
    rows, width = weight.shape
    lowest, highest = weight.dtype.type(0), weight.dtype.type(top)
    for part in numba.prange((rows + _LANES - 1) // _LANES):
        first = part * _LANES
        count, tile = min(_LANES, rows - first), _tile(weight, first)
        s, z = np.ones(_LANES, weight.dtype), np.zeros(_LANES, weight.dtype)
        code, error = np.zeros(_LANES, weight.dtype), np.zeros(_LANES, weight.dtype)
        for j in range(width):
            if j == 0 or group[j] != group[j - 1]:
                for r in range(count):
                    s[r], z[r] = scale[first + r, group[j]], zero[first + r, group[j]]
            pivot, w = factor[j, j], tile[j]
            for r in range(_LANES):
                whole = np.floor(z[r])
                code[r] = min(max(np.rint(w[r] / s[r] + (z[r] - whole)) + whole, lowest), highest)
                error[r] = (w[r] - (code[r] - z[r]) * s[r]) / pivot
            for r in range(count):
                codes[first + r, j], errors[first + r, j] = np.uint8(code[r]), error[r]
            _feed_forward(tile, j, error, factor)


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
        residual: [N, B] (W - Q) H for these columns.
        quantized: [N, B] dequantized Q; changed in place.
        codes: [N, B], out.
        steps: [N, B], out: the change of Q, which the caller feeds into the later columns' residual.
        hessian: [B, B] the block's part of H.
        scale: [N, G].
        zero: [N, G].
        group: [B] group of each column.
        top: Largest code.
    """
    rows, width = residual.shape
    lowest, highest = residual.dtype.type(0), residual.dtype.type(top)
    for part in numba.prange((rows + _LANES - 1) // _LANES):
        first = part * _LANES
        count, tile, values = min(_LANES, rows - first), _tile(residual, first), _tile(quantized, first)
        s, z = np.ones(_LANES, residual.dtype), np.zeros(_LANES, residual.dtype)
        code, step = np.zeros(_LANES, residual.dtype), np.zeros(_LANES, residual.dtype)
        for j in range(width):
            if j == 0 or group[j] != group[j - 1]:
                for r in range(count):
                    s[r], z[r] = scale[first + r, group[j]], zero[first + r, group[j]]
            pivot, rest, value = hessian[j, j], tile[j], values[j]
            for r in range(_LANES):
                whole, wanted = np.floor(z[r]), (value[r] + rest[r] / pivot) / s[r]
                code[r] = min(max(np.rint(wanted + (z[r] - whole)) + whole, lowest), highest)
                new = (code[r] - z[r]) * s[r]
                step[r] = new - value[r]
                value[r] = new
            for r in range(count):
                codes[first + r, j], steps[first + r, j] = np.uint8(code[r]), step[r]
                quantized[first + r, j] = value[r]
            _feed_forward(tile, j, step, hessian)


@numba.njit(cache=True)
def _place(bounds: Floats, x: Any) -> Any:
    """How many of the rising bounds lie below x."""
    low, high = 0, bounds.size
    while low < high:
        middle = (low + high) >> 1
        if bounds[middle] < x:
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(cache=True, parallel=True)
def round_floats(
    weight: Floats,
    scale: Floats,
    group: NDArray[np.int32],
    bounds: Floats,
    order: NDArray[np.uint8],
    codes: NDArray[np.uint8],
) -> None:
    """Fills `codes` [N, K] with the nearest small float of each weight over its scale [N, G].

    Args:
        weight: [N, K].
        scale: [N, G].
        group: [K].
        bounds: [levels - 1], rising: where the nearest level changes.
        order: [levels] the codes in the order of their values.
        codes: Out.
    """
    for r in numba.prange(weight.shape[0]):
        for k in range(weight.shape[1]):
            codes[r, k] = order[_place(bounds, weight[r, k] / scale[r, group[k]])]


@numba.njit(cache=True, parallel=True)
def search_floats(
    weight: Floats, importance: Floats, candidates: Floats, group_size: int, values: Floats, bounds: Floats
) -> NDArray[np.int64]:
    """Per group, which of the scales [F, N, G] has the least importance-weighted squared error, the first of equals.

    `importance` is [1 or N, K]; `values` [levels] and `bounds` [levels - 1] are rising.
    """
    rows, groups = candidates.shape[1:]
    best = np.zeros((rows, groups), np.int64)
    per_row = np.intp(1 if importance.shape[0] > 1 else 0)
    for r in numba.prange(rows):
        for g in range(groups):
            w = weight[r, g * group_size : (g + 1) * group_size]
            h = importance[np.intp(r) * per_row, g * group_size : (g + 1) * group_size]
            least = np.inf
            for f in range(candidates.shape[0]):
                scale, total = candidates[f, r, g], 0.0
                for i in range(w.size):
                    error = values[_place(bounds, w[i] / scale)] * scale - w[i]
                    total += h[i] * error * error
                if total < least:
                    least, best[r, g] = total, f
    return best


@numba.njit(cache=True, parallel=True)
def round_block_floats(
    weight: Floats,
    codes: NDArray[np.uint8],
    errors: Floats,
    factor: Floats,
    scale: Floats,
    group: NDArray[np.int32],
    values: Floats,
    bounds: Floats,
    order: NDArray[np.uint8],
) -> None:
    """`round_block` on a grid of small floats: `values` and `order` [levels] rising, `bounds` between them."""
    rows, width = weight.shape
    for part in numba.prange((rows + _LANES - 1) // _LANES):
        first = part * _LANES
        count, tile = min(_LANES, rows - first), _tile(weight, first)
        error = np.zeros(_LANES, weight.dtype)
        for j in range(width):
            for r in range(count):
                s = scale[first + r, group[j]]
                place = _place(bounds, tile[j, r] / s)
                error[r] = (tile[j, r] - values[place] * s) / factor[j, j]
                codes[first + r, j], errors[first + r, j] = order[place], error[r]
            _feed_forward(tile, j, error, factor)


@numba.njit(cache=True, parallel=True)
def descend_block_floats(
    residual: Floats,
    quantized: Floats,
    codes: NDArray[np.uint8],
    steps: Floats,
    hessian: Floats,
    scale: Floats,
    group: NDArray[np.int32],
    values: Floats,
    bounds: Floats,
    order: NDArray[np.uint8],
) -> None:
    """`descend_block` on a grid of small floats."""
    rows, width = residual.shape
    for part in numba.prange((rows + _LANES - 1) // _LANES):
        first = part * _LANES
        count, tile = min(_LANES, rows - first), _tile(residual, first)
        step = np.zeros(_LANES, residual.dtype)
        for j in range(width):
            for r in range(count):
                s, value = scale[first + r, group[j]], quantized[first + r, j]
                place = _place(bounds, (value + tile[j, r] / hessian[j, j]) / s)
                new = values[place] * s
                step[r] = new - value
                codes[first + r, j], steps[first + r, j], quantized[first + r, j] = order[place], step[r], new
            _feed_forward(tile, j, step, hessian)
