"""Vector-wise int8 and the product that leaves outlier columns out of it equal their literal statement."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import literal
from quantcli.tensors.outliers import OutlierCounts
from quantcli.tensors.vectorwise import codes_of, decomposed_product, integer_product, round_rows


@given(
    rows=st.integers(1, 6), columns=st.integers(1, 40), seed=st.integers(0, 99), size=st.sampled_from([1e-7, 1, 900])
)
@settings(max_examples=60, deadline=None)
def test_codes_and_scales_equal_the_literal_ones(rows, columns, seed, size):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, columns)) * size).astype(np.float32)
    weight[rng.integers(rows)] *= rng.integers(2)  # a row of zeros
    found = round_rows(torch.from_numpy(weight))
    codes, largest = codes_of(found)
    expected = literal.int8_rows(weight)
    assert np.array_equal(codes.numpy(), expected[0]) and np.array_equal(largest.numpy(), expected[1])
    values = expected[0].astype(np.float64) * expected[1][:, None] / 127
    np.testing.assert_allclose(found.dequantize().numpy(), values, rtol=1e-6)


@given(
    tokens=st.integers(1, 5), rows=st.integers(1, 5), columns=st.integers(1, 30), seed=st.integers(0, 99),
    threshold=st.sampled_from([0.0, 0.5, 2.0, 6.0]), size=st.sampled_from([0.0, 1.0, 5.0, 1e4]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_the_product_equals_the_literal_one(tokens, rows, columns, seed, threshold, size):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((tokens, columns)) * min(size, 1)).astype(np.float32)
    x[:, rng.integers(columns)] *= size
    codes, largest = literal.int8_rows(rng.standard_normal((rows, columns)).astype(np.float32))
    found = decomposed_product(torch.from_numpy(x), torch.from_numpy(codes), torch.from_numpy(largest), threshold)
    expected = literal.int8_product(x, codes, largest, threshold)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=1e-5 * max(1.0, float(np.abs(x).max())))


def test_outliers_cost_everybody_else_nothing():
    """The paper's point: one channel of large values ruins plain int8, and not the decomposed product."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(32, 64, generator=g), torch.randn(48, 64, generator=g)
    x[:, 7] *= 100
    rounded = round_rows(weight)
    exact = x @ rounded.dequantize().T  # weights are int8 in either way, those of outlier columns too

    def error(threshold):
        return float((decomposed_product(x, *codes_of(rounded), threshold) - exact).norm())

    assert error(6.0) < 0.2 * error(0.0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2500, 5), (0, 8, 4), (4, 8, 0)])
def test_whole_numbers_add_up_exactly(shape):
    tokens, columns, rows = shape
    a, b = torch.full((tokens, columns), 127, dtype=torch.int8), torch.full((rows, columns), -127, dtype=torch.int8)
    assert torch.equal(integer_product(a, b), torch.full((tokens, rows), -columns * 127**2, dtype=torch.int32))


def test_a_broken_token_does_not_pass_for_a_good_one():
    codes, largest = codes_of(round_rows(torch.ones(2, 4)))
    x = torch.ones(2, 4)
    x[1, 2] = torch.nan
    found = decomposed_product(x, codes, largest, 6.0)
    assert torch.isfinite(found[0]).all() and torch.isnan(found[1]).all()


def test_counts():
    counts = OutlierCounts(4, 6.0)
    counts.add(torch.tensor([[[0.0, 6.0, 1, 0], [0, -9, 7, 0]]]))
    counts.add(torch.tensor([[0.0, 1, 0, 5.9]], dtype=torch.bfloat16).float())
    counts.add(torch.zeros(0, 4))
    assert (counts.tokens, counts.touched, counts.columns()) == (3, 2, [1, 2])
    assert counts.hits.tolist() == [0, 2, 1, 0] and counts.largest[1] == 9
    counts.add(torch.full((1, 4), torch.nan))
    assert not counts.is_finite()
