"""Histograms of tensors that are seen in parts: the memory is that of the bins, however much goes by.

The range is +-2^e. A value outside doubles it until it fits, and pairs of bins become one, so counts stay exact and the
order of the parts does not matter.
"""

import math

import numpy as np

__all__ = ["StreamedHistogram", "entropy_range", "percentile_range"]

_BINS = 8192
# candidates of the entropy search lie this many bins apart
_STEP = 8


class StreamedHistogram:
    """Counts of finite values in equal bins between -2^e and 2^e.

    Attributes:
        counts: [bins] int64.
        lowest: Least value seen; inf before the first.
        highest: Greatest value seen.
    """

    def __init__(self, bins: int = _BINS):
        self.counts = np.zeros(bins, np.int64)
        self.lowest, self.highest = math.inf, -math.inf
        self._exponent: int | None = None

    def update(self, values: np.ndarray) -> None:
        """Counts an array of any shape; its values are finite."""
        if values.size == 0:
            return
        flat = values.reshape(-1).astype(np.float64)
        self.lowest, self.highest = min(self.lowest, float(flat.min())), max(self.highest, float(flat.max()))
        bins = self.counts.size
        largest = max(-self.lowest, self.highest)
        if largest > 0:
            self._widen(math.frexp(largest)[1])
        places = np.full(flat.size, bins // 2)
        if self._exponent is not None:
            places = np.floor((np.ldexp(flat, -self._exponent) + 1) * (bins // 2)).astype(np.int64)
        self.counts += np.bincount(np.clip(places, 0, bins - 1), minlength=bins)

    def _widen(self, exponent: int) -> None:
        """Merges pairs of bins until 2^exponent fits; zeros alone stay in the bin right of the middle."""
        if self._exponent is None:
            self._exponent = exponent
        bins = self.counts.size
        while self._exponent < exponent:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.zeros_like(self.counts)
            self.counts[bins // 4 : bins // 4 + bins // 2] = merged
            self._exponent += 1

    @property
    def edges(self) -> np.ndarray:
        """[bins + 1] float64."""
        return np.linspace(-1, 1, self.counts.size + 1) * 2.0 ** (self._exponent or 0)

    def magnitudes(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts of absolute values [bins / 2] and their edges [bins / 2 + 1]."""
        middle = self.counts.size // 2
        return self.counts[middle:] + self.counts[:middle][::-1], self.edges[middle:]


def percentile_range(histogram: StreamedHistogram, percentile: float, symmetric: bool) -> tuple[float, float]:
    """The range that holds `percentile` percent of the values: as much cut off on both sides, or of magnitudes."""
    if symmetric:
        counts, edges = histogram.magnitudes()
        top = float(edges[_first_reaching(counts, percentile / 100) + 1])
        return _within(histogram, -top, top)
    cut = (100 - percentile) / 200
    low = histogram.edges[histogram.counts.size - 1 - _first_reaching(histogram.counts[::-1], 1 - cut)]
    high = histogram.edges[_first_reaching(histogram.counts, 1 - cut) + 1]
    return _within(histogram, float(low), float(high))


def _first_reaching(counts: np.ndarray, share: float) -> int:
    """Index of the bin at which `share` of all counts is reached."""
    sums = np.cumsum(counts)
    return int(np.searchsorted(sums, share * sums[-1]))


def entropy_range(histogram: StreamedHistogram, bits: int = 8) -> tuple[float, float]:
    """The threshold at which the codes tell most of the distribution: least Kullback-Leibler divergence.

    Szymon Migacz, "8-bit inference with TensorRT", GTC 2017. For each threshold, P is the histogram of magnitudes with
    all beyond counted in the last bin, and Q the same without them, spread evenly over the bins of each code. Codes for
    magnitudes are 2^(bits-1) where there are both signs, else 2^bits. Zeros, which every grid holds, do not vote.

    Where this differs: thresholds whose mean absolute error is above that of the full range are left out. Single values
    that make up most of a tensor, as a blank background does behind a convolution, draw the divergence to thresholds
    that cut off all the rest.
    """
    counts, edges = histogram.magnitudes()
    if histogram.lowest == histogram.highest == 0:
        return 0.0, 0.0
    levels = 1 << (bits - 1 if histogram.lowest < 0 < histogram.highest else bits)
    counts = counts.astype(np.float64)
    counts[0] = counts[1]
    used = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 1
    errors = _absolute_errors(counts, edges, levels)
    best, chosen = math.inf, used
    for stop in [*range(levels, used, _STEP), used]:
        if errors[stop] > errors[used]:
            continue
        divergence = _divergence(counts, stop, min(levels, stop))
        if divergence < best:
            best, chosen = divergence, stop
    top = float(edges[chosen])
    return _within(histogram, -top, top)


def _absolute_errors(counts: np.ndarray, edges: np.ndarray, levels: int) -> np.ndarray:
    """Sums of |x - x'| where codes end at each edge [bins + 1]: what is cut off, a quarter of a step of the rest."""
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.concatenate([[0.0], np.cumsum(counts)])
    mass = np.concatenate([[0.0], np.cumsum(counts * middles)])
    cut = (mass[-1] - mass) - (below[-1] - below) * edges
    return np.asarray(cut + below * edges / levels / 4)


def _divergence(counts: np.ndarray, stop: int, levels: int) -> float:
    """KL(P, Q) of the first `stop` bins that share `levels` codes."""
    kept = counts[:stop]
    p = kept.copy()
    p[-1] += counts[stop:].sum()
    starts = np.arange(levels) * stop // levels
    filled = np.add.reduceat((p > 0).astype(np.float64), starts)
    mass = np.add.reduceat(kept, starts)
    each = np.divide(mass, filled, out=np.zeros_like(mass), where=filled > 0)
    q = np.repeat(each, np.diff([*starts, stop]))
    held = p > 0
    p, q = p[held] / p.sum(), q[held] / max(kept.sum(), 1e-300)
    return float(np.sum(p * np.log(p / np.maximum(q, 1e-12))))


def _within(histogram: StreamedHistogram, low: float, high: float) -> tuple[float, float]:
    return max(low, histogram.lowest), min(high, histogram.highest)
