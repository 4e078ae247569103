"""Grids of small floats: nearest values with ties to even, scales as they are stored, a slow literal error feedback."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from quantcli.algorithms.rounders.gptq import GptqOptions
from quantcli.algorithms.rounders.gptq import quantize as gptq
from quantcli.algorithms.rounders.kquant import KquantOptions
from quantcli.algorithms.rounders.kquant import quantize as kquant
from quantcli.algorithms.rounders.rtn import RtnOptions
from quantcli.algorithms.rounders.rtn import quantize as rtn
from quantcli.scheme import FLOATS, PER_CHANNEL, Scheme
from quantcli.tensors import floats
from quantcli.tensors.grids import span_grid
from quantcli.tensors.hessian import Statistics, inverse_factor

GRIDS = {
    "fp8 per channel": Scheme(8, PER_CHANNEL, True, codebook="e4m3"),
    "fp8 blocks": Scheme(8, 32, True, codebook="e4m3", block_rows=16),
    "nvfp4": Scheme(4, 16, True, codebook="e2m1", scale="e4m3"),
    "mxfp4": Scheme(4, 32, True, codebook="e2m1", scale="e8m0"),
    "mxfp8": Scheme(8, 32, True, codebook="e4m3", scale="e8m0"),
    "fp4": Scheme(4, 32, True, codebook="e2m1"),
}
BY_GRID = pytest.mark.parametrize("scheme", GRIDS.values(), ids=GRIDS)


def correlated(rows=24, columns=70, tokens=300, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=g) @ mix * torch.logspace(-1, 1, columns)[None]
    return torch.randn(rows, columns, generator=g), Statistics(x.T @ x / tokens, tokens)


def literal_nearest(x, name):
    """The nearest of all values; at a tie the one whose code is even; the largest for what lies beyond."""
    table = floats.values(name).double()
    best = None
    for code, value in enumerate(table.tolist()):
        if value != value or (value == 0 and code):
            continue
        distance = abs(value - x)
        if best is None or distance < best[0] or (distance == best[0] and code % 2 == 0):
            best = distance, code
    return best[1]


@pytest.mark.parametrize("name", FLOATS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_number_goes_to_the_nearest_value_and_ties_to_even(name, data):
    table = floats.values(name)
    known = table[torch.isfinite(table)].double().tolist()
    near = st.sampled_from(known)
    middle = st.tuples(near, near).map(lambda pair: (pair[0] + pair[1]) / 2)
    number = data.draw(st.one_of(middle, st.floats(-600, 600, width=32)))
    x = torch.tensor([[number]])
    code = span_grid(x, Scheme(FLOATS[name], PER_CHANNEL, codebook=name))
    code = code.__class__(code.scheme, torch.ones(1, 1), code.zero).round(x).codes.item()
    assert table[code] == table[literal_nearest(float(x), name)]
    assert floats.round_values(x, name).item() == table[code]


def test_fp8_is_torch_own_fp8():
    x = torch.randn(64, 64) * 200
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    grid = span_grid(x, Scheme(8, PER_CHANNEL, codebook="e4m3"))
    codes = grid.__class__(grid.scheme, torch.ones(64, 1), grid.zero).round(x).codes
    assert torch.equal(codes.view(torch.float8_e4m3fn).float(), expected.float())


@BY_GRID
def test_scales_are_what_a_file_can_hold(scheme):
    weight, _ = correlated()
    found = rtn(weight, scheme, RtnOptions(), None)
    scale = found.scale
    assert bool((scale > 0).all())
    if scheme.scale == "e8m0":
        assert torch.equal(scale, 2.0 ** scale.log2().round())
    elif scheme.scale == "e4m3":
        fp8 = (scale * found.divisor).to(torch.float8_e4m3fn)
        assert torch.equal(fp8.float() / found.divisor, scale)
    else:
        assert torch.equal(scale.bfloat16().float(), scale)
    if scheme.block_rows > 1:
        assert torch.equal(scale[0], scale[scheme.block_rows - 1])
        assert not torch.equal(scale[0], scale[scheme.block_rows])
    largest = floats.LARGEST[scheme.codebook]
    share = (weight - found.dequantize()).abs() / scale[:, found.group.long()]
    assert float(share.max()) <= largest * (0.34 if scheme.scale == "e8m0" else 0.2)


@BY_GRID
@pytest.mark.parametrize("order", ["none", "static", "dynamic"])
@pytest.mark.parametrize("block_size", [7, 128])
def test_error_feedback_equals_a_literal_one(scheme, order, block_size):
    """Column by column in float64, each error fed into the columns that are still to come."""
    weight, statistics = correlated()
    weight, hessian = weight.double(), statistics.hessian.double()
    options = GptqOptions(order=order, grid="minmax", block_size=block_size)
    found = gptq(weight, scheme, options, Statistics(hessian, 300))
    columns = weight.shape[1]
    by_size = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    at = by_size if order == "static" else torch.arange(columns)
    upper = inverse_factor(hessian, 0.01, at)
    # dynamic: the grids that it has chosen
    scale = found.scale.double() if order == "dynamic" else span_grid(weight, scheme).scale
    left, table = weight[:, at].clone(), floats.values(scheme.codebook).double()
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for j in range(columns):
        s = scale[:, found.group[at[j]]]
        for r in range(len(weight)):
            codes[r, at[j]] = literal_nearest(float(left[r, j] / s[r]), scheme.codebook)
        error = (left[:, j] - table[codes[:, at[j]].long()] * s) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, None, j + 1 :]
    assert (found.codes != codes).float().mean() < 2e-3  # float32 scales decide ties
    assert torch.allclose(found.scale.double(), scale)


@BY_GRID
def test_error_feedback_beats_nearest(scheme):
    weight, statistics = correlated()

    def error(found):
        difference = weight - found.dequantize()
        return float(((difference @ statistics.hessian) * difference).sum())

    nearest = error(rtn(weight, scheme, RtnOptions(), None))
    assert error(gptq(weight, scheme, GptqOptions(), statistics)) < 0.75 * nearest
    best = GptqOptions(sweeps=2, refit=scheme.block_rows == 1)
    assert error(gptq(weight, scheme, best, statistics)) < 0.75 * nearest


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp4"])
def test_a_search_of_scales_beats_the_range(name):
    weight, _ = correlated(rows=200, columns=64)
    weight = weight**3 if name == "mxfp4" else weight  # tails, for which half the power of two may be better
    scheme = GRIDS[name]

    def error(found):
        return float((weight - found.dequantize()).square().sum())

    searched = error(kquant(weight, scheme, KquantOptions(), None))
    assert searched < (0.999 if name == "mxfp4" else 0.95) * error(rtn(weight, scheme, RtnOptions(), None))


def test_groups_of_zeros_stay_zeros():
    weight = torch.zeros(16, 64)
    weight[3, 40:] = 1.0
    for scheme in GRIDS.values():
        for found in (rtn(weight, scheme, RtnOptions(), None), kquant(weight, scheme, KquantOptions(), None)):
            assert torch.isfinite(found.dequantize()).all()
            assert torch.equal(found.dequantize() == 0, weight == 0)
