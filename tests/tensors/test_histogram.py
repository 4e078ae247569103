import math

import numpy as np
import pytest

from quantcli.tensors.histogram import StreamedHistogram, entropy_range, percentile_range


def streamed(values, parts=1, bins=8192):
    histogram = StreamedHistogram(bins)
    for part in np.array_split(values, parts):
        histogram.update(part)
    return histogram


def literal_threshold(counts, levels, step):
    """Migacz' search, bin by bin."""
    counts = [counts[1], *counts[1:]]
    used = max(i for i, c in enumerate(counts) if c) + 1
    best = None
    for stop in [*range(levels, used, step), used]:
        p = list(counts[:stop])
        p[-1] += sum(counts[stop:])
        q = [0.0] * stop
        for level in range(levels):
            inside = range(level * stop // levels, (level + 1) * stop // levels)
            filled = [i for i in inside if p[i] > 0]
            for i in filled:
                q[i] = sum(counts[j] for j in inside) / len(filled)
        total_p, total_q = sum(p), sum(counts[:stop])
        kl = sum(a / total_p * math.log(a / total_p / max(b / total_q, 1e-12)) for a, b in zip(p, q, strict=True) if a)
        if best is None or kl < best[0] - 1e-12:
            best = (kl, stop)
    return best[1]


def test_parts_count_as_the_whole():
    values = np.random.default_rng(0).standard_t(3, 50_000)
    values = values[np.argsort(np.abs(values))]  # the range widens again and again
    parts, whole = streamed(values, 40, 512), streamed(values, 1, 512)
    assert (parts.counts == whole.counts).all() and (parts.edges == whole.edges).all()
    assert parts.counts.sum() == 50_000
    assert (parts.lowest, parts.highest) == (values.min(), values.max())
    expected, _ = np.histogram(values, whole.edges)
    assert (whole.counts == expected).all()


def test_zeros_and_empty_arrays():
    histogram = streamed(np.zeros(5), bins=16)
    histogram.update(np.zeros((0, 3)))
    assert entropy_range(histogram) == (0, 0) == percentile_range(histogram, 99, False)
    histogram.update(np.array([300.0]))
    assert histogram.counts[8] == 5 and histogram.counts.sum() == 6


def test_percentiles_are_those_of_the_values():
    values = np.random.default_rng(1).normal(1, 2, 200_000)
    histogram = streamed(values, 7)
    low, high = percentile_range(histogram, 99, symmetric=False)
    assert np.allclose([low, high], np.percentile(values, [0.5, 99.5]), atol=0.01)
    low, high = percentile_range(histogram, 99, symmetric=True)
    assert high == pytest.approx(np.percentile(np.abs(values), 99), abs=0.01) and low == -high
    assert percentile_range(histogram, 100, symmetric=False) == (values.min(), values.max())


@pytest.mark.parametrize("one_sided", [False, True])
def test_entropy_equals_the_literal_search(one_sided):
    values = np.random.default_rng(2).standard_t(4, 20_000)
    if one_sided:
        values = np.maximum(values, 0)
    histogram = streamed(values, 3, 1024)
    counts, edges = histogram.magnitudes()
    stop = literal_threshold(counts.tolist(), 1 << (5 if one_sided else 4), 8)
    _, high = entropy_range(histogram, bits=5)
    assert high == min(edges[stop], values.max())


def test_entropy_keeps_what_a_few_frequent_values_hide():
    # a blank background behind a convolution: the same small value most of the time, and strokes ten times as large
    random = np.random.default_rng(4)
    values = np.concatenate([np.full(90_000, 0.137), np.full(60_000, 0.211), random.uniform(0, 2, 15_000)])
    _, high = entropy_range(streamed(values, 5))
    assert high > 1.8


def test_entropy_cuts_lonely_outliers():
    values = np.append(np.random.default_rng(3).normal(size=100_000), [40.0, -35.0])
    low, high = entropy_range(streamed(values, 5))
    assert 3 < high < 12 and low == -high
