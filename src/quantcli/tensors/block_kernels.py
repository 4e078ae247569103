"""The search for the grids of GGML's block types, compiled by numba: rows in parallel, a super-block at a time.

Symbols: w, h weights and importance of one super-block; q codes; s, m scale and minimum of a group as real numbers;
a, b the integers that they are stored as; d, d_min what those are multiplied by.
"""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from quantcli.tensors.kernels import as_float16

__all__ = ["expand_minimum", "fit_affine", "fit_symmetric"]

Floats = NDArray[np.floating]


@numba.njit(cache=True)
def _affine_error(w: Floats, h: Floats, scale: Any, minimum: Any, top: Any) -> Any:
    """Weighted squared error of one group whose values are q * scale - minimum."""
    inverse, shift, total = w.dtype.type(1.0) / scale, minimum / scale, w.dtype.type(0.0)
    for i in range(w.size):
        code = min(max(np.rint(w[i] * inverse + shift), w.dtype.type(0.0)), top)
        error = code * scale - minimum - w[i]
        total += h[i] * error * error
    return total


@numba.njit(cache=True)
def _affine_group(w: Floats, h: Floats, top: Any, factors: Floats, below_zero: bool) -> tuple[Any, Any]:
    """The real s and m of least weighted error: ranges are tried, s and m are refitted to the codes of each.

    Args:
        w: Weights of a group.
        h: Their importance.
        top: Largest code.
        factors: Shares of the range that are tried; one alone is taken as it is, without a refit.
        below_zero: Whether m has to be 0 or more, so that the grid holds 0 or lies below it.
    """
    real = w.dtype.type
    low, high = w.min(), w.max()
    if below_zero:
        low, high = min(low, real(0.0)), max(high, real(0.0))
    if factors.size == 1 or not high > low:  # nothing to search
        return max((high - low) * factors[0] / top, real(0.0)), -low * factors[0]
    best, best_scale, best_minimum = real(np.inf), (high - low) / top, -low
    for f in range(factors.size):
        step = (high - low) * factors[f] / top
        weight, codes, squares, products, values = real(0.0), real(0.0), real(0.0), real(0.0), real(0.0)
        for i in range(w.size):
            code = min(max(np.rint((w[i] - low) / step), real(0.0)), top)
            weight += h[i]
            codes += h[i] * code
            squares += h[i] * code * code
            products += h[i] * code * w[i]
            values += h[i] * w[i]
        determinant = weight * squares - codes * codes
        if not determinant > 0:
            continue
        scale = (weight * products - codes * values) / determinant
        minimum = (codes * products - squares * values) / determinant
        if below_zero and minimum < 0:
            scale, minimum = products / squares, real(0.0)
        if not scale > 0:
            continue
        error = _affine_error(w, h, scale, minimum, top)
        if error < best:
            best, best_scale, best_minimum = error, scale, minimum
    return best_scale, best_minimum


@numba.njit(cache=True)
def _refit_affine(w: Floats, h: Floats, a: Any, b: Any, d: Any, d_min: Any, size: int, top: Any) -> tuple[Any, Any]:
    """The d and d_min that suit the codes which the present ones give, by least squares; zero or less where none do."""
    real = w.dtype.type
    xx, xy, yy, xw, yw = real(0.0), real(0.0), real(0.0), real(0.0), real(0.0)
    for i in range(w.size):
        g = i // size
        scale = d * a[g]
        code = min(max(np.rint((w[i] + d_min * b[g]) / scale), real(0.0)), top)
        x, y = a[g] * code, -real(b[g])
        xx += h[i] * x * x
        xy += h[i] * x * y
        yy += h[i] * y * y
        xw += h[i] * x * w[i]
        yw += h[i] * y * w[i]
    determinant = xx * yy - xy * xy
    if determinant > 0:
        return (yy * xw - xy * yw) / determinant, (xx * yw - xy * xw) / determinant
    return (xw / xx if xx > 0 else real(0.0)), d_min


@numba.njit(cache=True)
def _settle_affine(
    w: Floats, h: Floats, a: Any, b: Any, d: Any, d_min: Any, size: int, top: Any, scale_top: int, minimum_top: int
) -> Any:
    """Moves the integers of each group to neighbours while these are better; returns the error of the super-block."""
    total = w.dtype.type(0.0)
    for g in range(a.size):
        part = slice(g * size, (g + 1) * size)
        best, best_a, best_b, moved = w.dtype.type(np.inf), a[g], b[g], True
        while moved:
            at_a, at_b = best_a, best_b
            for i in range(max(at_a - 1, 1), min(at_a + 1, scale_top) + 1):
                for j in range(max(at_b - 1, 0), min(at_b + 1, minimum_top) + 1):
                    error = _affine_error(w[part], h[part], d * w.dtype.type(i), d_min * w.dtype.type(j), top)
                    if error < best:
                        best, best_a, best_b = error, i, j
            moved = best_a != at_a or best_b != at_b
        a[g], b[g] = best_a, best_b
        total += best
    return total


@numba.njit(cache=True, parallel=True)
def fit_affine(
    weight: Floats,
    importance: Floats,
    factors: Floats,
    refine: int,
    columns: int,
    size: int,
    top: int,
    scale_top: int,
    minimum_top: int,
    d: Floats,
    d_min: Floats,
    scales: NDArray[np.int16],
    minimums: NDArray[np.int16],
) -> None:
    """Fills d, d_min [N, S] with float16 values and scales, minimums [N, G]; see `block_grids.fit_blocks`.

    Args:
        weight: [N, K].
        importance: [1 or N, K].
        factors: Shares of a group's range that are tried; one alone: no search at all.
        refine: Rounds of "integers fixed, best d; d fixed, best integers" at most.
        columns: Of a super-block.
        size: Columns of a group.
        top: Largest code.
        scale_top: Largest integer scale; 0 where the groups are the blocks and d, d_min are theirs.
        minimum_top: Largest integer minimum.
        d: Out.
        d_min: Out; below 0 where minimums are float16 and lie above zero.
        scales: Out.
        minimums: Out.
    """
    real = weight.dtype.type
    per_row = np.intp(1 if importance.shape[0] > 1 else 0)
    inside = columns // size
    for r in numba.prange(weight.shape[0]):
        for s in range(d.shape[1]):
            w = weight[r, s * columns : (s + 1) * columns]
            h = importance[np.intp(r) * per_row, s * columns : (s + 1) * columns]
            steps, lows = np.empty(inside, weight.dtype), np.empty(inside, weight.dtype)
            for g in range(inside):
                part = slice(g * size, (g + 1) * size)
                steps[g], lows[g] = _affine_group(w[part], h[part], real(top), factors, scale_top > 0)
            if scale_top == 0:
                d[r, s], d_min[r, s] = as_float16(steps[0]), _any_float16(lows[0])
                scales[r, s], minimums[r, s] = 1, 1
                continue
            big, small = real(as_float16(steps.max() / scale_top)), real(as_float16(lows.max() / minimum_top))
            a, b = scales[r, s * inside : (s + 1) * inside], minimums[r, s * inside : (s + 1) * inside]
            for g in range(inside):
                a[g] = min(max(np.rint(steps[g] / big), 1), scale_top)
                b[g] = min(max(np.rint(lows[g] / small), 0), minimum_top)
            if factors.size > 1:
                least = _settle_affine(w, h, a, b, big, small, size, real(top), scale_top, minimum_top)
                for _ in range(refine):
                    found, other = _refit_affine(w, h, a, b, big, small, size, real(top))
                    found, other = real(as_float16(found)), real(as_float16(other))
                    if not (found > 0 and other > 0):
                        break
                    tried, shifts = a.copy(), b.copy()
                    error = _settle_affine(w, h, tried, shifts, found, other, size, real(top), scale_top, minimum_top)
                    if not error < least:
                        break
                    least, big, small = error, found, other
                    a[:], b[:] = tried, shifts
            d[r, s], d_min[r, s] = big, small


@numba.njit(cache=True)
def _any_float16(value: Any) -> Any:
    """The nearest float16, zero included."""
    return 0.0 if value == 0.0 else as_float16(value)


@numba.njit(cache=True)
def _symmetric_error(w: Floats, h: Floats, scale: Any, middle: Any) -> Any:
    """Weighted squared error of one group whose values are (q - middle) * scale."""
    inverse, total = w.dtype.type(1.0) / scale, w.dtype.type(0.0)
    for i in range(w.size):
        level = min(max(np.rint(w[i] * inverse), -middle), middle - w.dtype.type(1.0))
        error = level * scale - w[i]
        total += h[i] * error * error
    return total


@numba.njit(cache=True)
def _symmetric_group(w: Floats, h: Floats, middle: Any, factors: Floats) -> Any:
    """The real scale of least weighted error; that of the range where one factor alone is given."""
    real = w.dtype.type
    low, high = w.min(), w.max()
    extreme = low if -low > high else high
    start = -extreme / middle
    if factors.size == 1 or start == 0.0:
        return start * factors[0]
    best, best_scale = real(np.inf), start
    for f in range(factors.size):
        step = start * factors[f]
        products, squares = real(0.0), real(0.0)
        for i in range(w.size):
            level = min(max(np.rint(w[i] / step), -middle), middle - real(1.0))
            products += h[i] * level * w[i]
            squares += h[i] * level * level
        scale = products / squares if squares > 0 else step
        if scale == 0.0:
            continue
        error = _symmetric_error(w, h, scale, middle)
        if error < best:
            best, best_scale = error, scale
    return best_scale


@numba.njit(cache=True)
def _settle_symmetric(w: Floats, h: Floats, a: Any, d: Any, size: int, middle: Any, low: int, top: int) -> Any:
    """Moves the integer of each group to neighbours while these are better; returns the error of the super-block."""
    total = w.dtype.type(0.0)
    for g in range(a.size):
        part = slice(g * size, (g + 1) * size)
        best, best_a, moved = w.dtype.type(np.inf), a[g], True
        while moved:
            at = best_a
            for i in range(max(at - 1, low), min(at + 1, top) + 1):
                if i != 0:
                    error = _symmetric_error(w[part], h[part], d * w.dtype.type(i), middle)
                    if error < best:
                        best, best_a = error, i
            moved = best_a != at
        a[g] = best_a
        total += best
    return total


@numba.njit(cache=True, parallel=True)
def fit_symmetric(
    weight: Floats,
    importance: Floats,
    factors: Floats,
    refine: int,
    columns: int,
    size: int,
    middle: int,
    low: int,
    top: int,
    d: Floats,
    scales: NDArray[np.int16],
) -> None:
    """Fills d [N, S] with float16 values and scales [N, G] with integers from `low` to `top`, never 0.

    The other arguments are as of `fit_affine`; `middle` is the code of zero.
    """
    real = weight.dtype.type
    per_row = np.intp(1 if importance.shape[0] > 1 else 0)
    inside = columns // size
    for r in numba.prange(weight.shape[0]):
        for s in range(d.shape[1]):
            w = weight[r, s * columns : (s + 1) * columns]
            h = importance[np.intp(r) * per_row, s * columns : (s + 1) * columns]
            steps = np.empty(inside, weight.dtype)
            largest = real(0.0)
            for g in range(inside):
                part = slice(g * size, (g + 1) * size)
                steps[g] = _symmetric_group(w[part], h[part], real(middle), factors)
                if abs(steps[g]) > abs(largest):
                    largest = steps[g]
            big = real(as_float16(largest / low))  # the largest scale takes the longer side of the integers
            a = scales[r, s * inside : (s + 1) * inside]
            for g in range(inside):
                a[g] = min(max(np.rint(steps[g] / big), low), top)
                if a[g] == 0:
                    a[g] = 1
            if factors.size > 1:
                least = _settle_symmetric(w, h, a, big, size, real(middle), low, top)
                for _ in range(refine):
                    products, squares = real(0.0), real(0.0)
                    for i in range(w.size):
                        x = real(a[i // size])
                        level = min(max(np.rint(w[i] / (big * x)), -real(middle)), real(middle - 1)) * x
                        products += h[i] * level * w[i]
                        squares += h[i] * level * level
                    found = real(as_float16(products / squares)) if squares > 0 else big
                    tried = a.copy()
                    error = _settle_symmetric(w, h, tried, found, size, real(middle), low, top)
                    if not error < least:
                        break
                    least, big = error, found
                    a[:] = tried
            d[r, s] = big


@numba.njit(cache=True, parallel=True)
def expand_minimum(
    codes: NDArray[np.uint8], scale: Floats, minimum: Floats, group: NDArray[np.int32], out: Floats
) -> None:
    """Fills `out` [N, K] with code * scale - minimum; scale and minimum [N, G] are of `out`'s dtype."""
    for r in numba.prange(codes.shape[0]):
        for k in range(codes.shape[1]):
            g = group[k]
            out[r, k] = np.float32(codes[r, k]) * scale[r, g] - minimum[r, g]
