"""A quantized matrix in numpy, and round-to-nearest that makes one: graphs need nothing else, and torch costs seconds.

Codes, scales and zero points are those of `affine`, bit for bit.

Symbols: N output rows, K input columns, G groups per row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.scheme import Scheme

if TYPE_CHECKING:
    from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["QuantizedArray", "array_error", "column_groups", "concatenate_arrays", "round_array"]

_SMALLEST_SCALE, _LARGEST_SCALE = np.float32(2.0**-24), np.float32(65504.0)  # of float16, what scales are stored in
_TILE = 1 << 16
"""Weights that go through all steps together: they stay in the cache of a core."""


def column_groups(columns: int, scheme: Scheme) -> np.ndarray:
    """The group of each column in memory order: [K] int32 in [0, G), the last group possibly shorter."""
    return np.arange(columns, dtype=np.int32) // np.int32(scheme.columns_per_group(columns))


@dataclass(frozen=True)
class QuantizedArray:
    """A quantized [N, K] matrix: dequantized[n, k] = (codes[n, k] - zero[n, g]) * scale[n, g], g = group[k]."""

    codes: np.ndarray
    """[N, K] uint8 in [0, scheme.levels)."""
    scale: np.ndarray
    """[N, G] float16, as it is stored."""
    zero: np.ndarray
    """[N, G] uint8 in [scheme.lowest_zero, scheme.levels)."""
    scheme: Scheme
    group: np.ndarray
    """[K] int32 in [0, G), rising."""
    codebook: None = None
    """Uniform grids only; `QuantizedTensor` has the rest."""
    nested: None = None
    has_float_zeros: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> np.ndarray:
        """The [N, K] float32 matrix that a runtime sees."""
        out = np.empty(self.codes.shape, np.float32)

        def fill(rows: slice) -> None:
            scale, zero = self.scale[rows].astype(np.float32), self.zero[rows].astype(np.float32)
            np.subtract(self.codes[rows], zero[:, self.group], out=out[rows], dtype=np.float32)
            out[rows] *= scale[:, self.group]

        _by_rows(fill, *self.shape)
        return out

    def rows(self, start: int, stop: int) -> QuantizedArray:
        """The quantized rows [start, stop)."""
        return replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop], zero=self.zero[start:stop])


def concatenate_arrays(parts: Sequence[QuantizedArray | QuantizedTensor]) -> QuantizedArray:
    """Stacks matrices of one uniform scheme and one column grouping along the rows."""
    codes, scale, zero = (
        np.concatenate([np.asarray(getattr(p, name)) for p in parts]) for name in ("codes", "scale", "zero")
    )
    group = np.asarray(parts[0].group)
    return QuantizedArray(codes, scale, zero, parts[0].scheme, group, has_float_zeros=zero.dtype.kind == "f")


def round_array(weight: np.ndarray, scheme: Scheme, clip_ratio: float = 1.0) -> QuantizedArray:
    """Round to nearest on the grid that spans each group's range, or a share of it: `affine`'s, without torch.

    Args:
        weight: W [N, K] float32, finite.
        scheme: A uniform grid.
        clip_ratio: Share of the range.
    """
    rows, columns = weight.shape
    size, count = scheme.columns_per_group(columns), scheme.group_count(columns)
    starts, group = np.arange(count) * size, column_groups(columns, scheme)
    codes = np.empty(weight.shape, np.uint8)
    scale, zero = np.empty((rows, count), np.float16), np.empty((rows, count), np.uint8)
    top, clip = scheme.levels - 1, np.float32(clip_ratio)

    def fill(at: slice) -> None:
        w = weight[at]
        low, high = (f.reduceat(w, starts, axis=1) for f in (np.minimum, np.maximum))
        if scheme.symmetric:
            s = _stored(-clip * _first_extreme(w, low, high, starts) / np.float32(scheme.middle))
            z = np.full_like(s, scheme.middle)
        else:
            low, high = clip * np.minimum(low, 0), clip * np.maximum(high, 0)
            s = _stored((high - low) / np.float32(top))
            z = np.clip(np.rint(-low / s), scheme.lowest_zero, top)
        steps = w / s[:, group]
        np.rint(steps, out=steps)
        steps += z[:, group]
        codes[at] = np.clip(steps, 0, top, out=steps)
        scale[at], zero[at] = s, z

    _by_rows(fill, rows, columns)
    return QuantizedArray(codes, scale, zero, scheme, group)


def array_error(weight: np.ndarray, quantized: np.ndarray) -> float:
    """The relative squared error of W [N, K]: sum (W - Q)^2 / sum W^2."""
    flat = weight.reshape(-1)
    difference = (weight - quantized).reshape(-1)
    reference = float(np.dot(flat, flat))
    return float(np.dot(difference, difference)) / reference if reference > 0 else 0.0


def _first_extreme(w: np.ndarray, low: np.ndarray, high: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The value of largest magnitude of each group, the first of two that are equal but for their sign."""
    extreme = np.where(-low > high, low, high)
    for row, g in zip(*np.nonzero((-low == high) & (high != 0)), strict=True):
        stop = starts[g + 1] if g + 1 < len(starts) else w.shape[1]
        group = w[row, starts[g] : stop]
        extreme[row, g] = group[np.argmax(np.abs(group))]
    return extreme


def _stored(scale: np.ndarray) -> np.ndarray:
    """Scales as the file holds them: float16 values, never zero or infinite, as float32."""
    rounded = np.clip(scale, -_LARGEST_SCALE, _LARGEST_SCALE).astype(np.float16).astype(np.float32)
    return np.where(rounded == 0, _SMALLEST_SCALE, rounded)


def _by_rows(work: Callable[[slice], Any], rows: int, columns: int) -> None:
    """Calls `work` on all rows, some at a time; large matrices on all cores, for numpy lets go of the interpreter."""
    step = max(1, _TILE // max(columns, 1))
    tiles = [slice(at, min(at + step, rows)) for at in range(0, rows, step)]
    if len(tiles) < 4:
        for tile in tiles:
            work(tile)
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        list(pool.map(work, tiles))
