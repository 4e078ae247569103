"""HQQ equals its literal statement, lowers the errors it says it lowers, and meets formats of either kind of zero."""

import numpy as np
import pytest
import torch

import literal
from quantcli.algorithms import find, make_options
from quantcli.algorithms.rounders.hqq import HqqOptions, quantize
from quantcli.errors import UsageError
from quantcli.formats.codec import Held
from quantcli.formats.codecs import CODECS
from quantcli.scheme import Scheme
from quantcli.tensors import half_quadratic
from quantcli.tensors.affine import minmax_grid, round_to_grid
from quantcli.tensors.quantized import concatenate_rows

SCHEMES = [(1, 32, False), (2, 64, False), (3, 48, True), (4, 64, False), (4, 32, True), (8, -1, False), (2, -1, True)]


def heavy_tailed(rows=96, columns=200, degrees=3, seed=0):
    return torch.from_numpy(0.02 * np.random.default_rng(seed).standard_t(degrees, (rows, columns)).astype(np.float32))


def rtn(weight, scheme):
    return round_to_grid(weight, *minmax_grid(weight, scheme), scheme)


def lp(weight, result, p):
    return float((result.dequantize(torch.float64) - weight.double()).abs().pow(p).sum())


@pytest.mark.parametrize(("bits", "g", "symmetric"), SCHEMES)
@pytest.mark.parametrize("zero", ["float", "integer"])
@pytest.mark.parametrize("fit_scale", ["true", "false"])
@pytest.mark.parametrize("times", [1.0, 60.0])  # errors below and above the threshold of shrinkage
def test_it_equals_the_literal_statement(bits, g, symmetric, zero, fit_scale, times):
    W = times * literal.layer(N=6, K=150)[0]
    size = g if g > 0 else W.shape[1]
    options = HqqOptions(zero=zero, fit_scale=fit_scale)
    result = quantize(torch.from_numpy(W), Scheme(bits, g, symmetric), options, None)
    C, S, Z = literal.hqq(W, bits, size, symmetric, zero == "integer", fit_scale == "true")
    assert np.array_equal(result.scale.double().numpy(), S)
    assert np.array_equal(result.zero.double().numpy(), Z)
    assert np.array_equal(result.codes.numpy().astype(float), C)
    assert result.has_float_zeros == (zero == "float" and not symmetric)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("zero", ["float", "integer"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_errors_on_heavy_tails_are_below_rtn(bits, zero, symmetric):
    weight, scheme = heavy_tailed(), Scheme(bits, 64, symmetric)
    ours, theirs = quantize(weight, scheme, HqqOptions(zero=zero), None), rtn(weight, scheme)
    margin = {1: 0.96, 2: 0.985, 3: 0.96, 4: 0.985, 8: 0.997}[bits]
    assert lp(weight, ours, 0.7) < margin * lp(weight, theirs, 0.7)
    assert lp(weight, ours, 1.0) < margin * lp(weight, theirs, 1.0)


@pytest.mark.parametrize(
    "settings", [{}, {"zero": "integer"}, {"fit_scale": "true"}, {"early_stop": False}, {"p": 1.0}]
)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_no_group_is_worse_than_rtn_in_its_norm(settings, bits):
    options = HqqOptions(**settings)
    for seed, degrees in enumerate((1, 2, 30)):
        weight, scheme = heavy_tailed(degrees=degrees, seed=seed), Scheme(bits, 16)
        ours, theirs = quantize(weight, scheme, options, None), rtn(weight, scheme)
        groups = [(r.dequantize() - weight).abs().double().pow(options.p) for r in (ours, theirs)]
        by_group = [torch.stack([part.sum(1) for part in e.split(16, dim=1)]) for e in groups]
        assert (by_group[0] <= by_group[1] * (1 + 1e-5)).all()


def test_the_papers_zero_alone_moves_fractions_and_nothing_else():
    """With whole zero points and the scale as it is, round-to-nearest's grid is what its codes ask for."""
    weight, scheme = heavy_tailed(), Scheme(4, 64)
    base = rtn(weight, scheme)
    whole = quantize(weight, scheme, HqqOptions(zero="integer", fit_scale="false"), None)
    assert torch.equal(whole.codes, base.codes) and torch.equal(whole.zero, base.zero)
    moved = quantize(weight, scheme, HqqOptions(fit_scale="false"), None)
    assert torch.equal(moved.scale, base.scale) and not torch.equal(moved.zero.float(), base.zero.float())
    assert lp(weight, moved, 0.7) < 0.97 * lp(weight, base, 0.7)


def test_the_scale_is_fitted_where_nothing_else_can_move():
    weight = heavy_tailed()
    for bits, zero, symmetric, fitted in (
        (4, "float", False, "false"), (1, "float", False, "true"), (4, "integer", False, "true"),
        (4, "auto", True, "true"),
    ):  # fmt: skip
        scheme = Scheme(bits, 64, symmetric)
        auto, named = (quantize(weight, scheme, HqqOptions(zero=zero, fit_scale=f), None) for f in ("auto", fitted))
        assert torch.equal(auto.codes, named.codes) and torch.equal(auto.scale, named.scale)


def test_turns_without_early_stop_find_no_worse_grids():
    weight, scheme = heavy_tailed(), Scheme(3, 64)
    stopped, went_on = (quantize(weight, scheme, HqqOptions(early_stop=stop), None) for stop in (True, False))
    assert lp(weight, went_on, 0.7) < lp(weight, stopped, 0.7)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("float_zeros", [False, True])
def test_the_device_path_finds_the_same_grids(symmetric, float_zeros):
    weight = heavy_tailed().double()
    how = half_quadratic.Splitting(0.7, 10.0, 1.01, 20, True, True, float_zeros)
    for bits in (1, 2, 4, 8):
        scheme = Scheme(bits, 64, symmetric, lowest_zero=1)
        expected = half_quadratic.split_grid(weight, scheme, how)
        found = half_quadratic._split_on_device(weight, scheme, how, *minmax_grid(weight, scheme))
        for a, b in zip(expected, found, strict=True):
            assert (a == b).double().mean() > 0.99 and torch.allclose(a, b, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize(("rows", "columns"), [(7, 50), (33, 100), (8, 96), (96, 8), (1, 17)])
def test_ragged_shapes_round_trip(codec, rows, columns):
    weight = heavy_tailed(rows, columns)
    for bits in (1, 2, 3, 4, 8):
        for group_size in (16, 48, -1):
            scheme = Scheme(bits, group_size, False, codec.lowest_zero)
            held = Held(rows, columns, scheme, is_default=True, ordered=True, float_zeros=codec.float_zeros)
            if codec.why_not(held) is not None:
                continue
            options = HqqOptions(zero="float" if codec.float_zeros else "integer")
            result = quantize(weight, scheme, options, None)
            stored = codec.pack(result)
            if codec.unpack is None:
                assert torch.equal(stored["weight"], result.dequantize())
            else:
                read = codec.unpack(stored, scheme)
                assert all(torch.equal(getattr(read, n), getattr(result, n)) for n in ("codes", "scale", "zero"))
            Q = literal.dequantize(
                *(t.double().numpy() for t in (result.codes, result.scale, result.zero)),
                scheme.columns_per_group(columns),
            )
            assert np.allclose(result.dequantize().numpy(), Q, rtol=1e-6, atol=1e-7)


def test_float_zeros_stay_with_their_rows():
    result = quantize(heavy_tailed(), Scheme(2, 64), HqqOptions(), None)
    parts = [result.rows(0, 30), result.rows(30, 96).to("cpu")]
    whole = concatenate_rows(parts)
    assert whole.has_float_zeros and torch.equal(whole.zero, result.zero)
    assert torch.equal(whole.dequantize(), result.dequantize())
    assert torch.equal(result.dequantize()[30:], parts[1].dequantize())


def test_codes_are_the_nearest_on_a_grid_with_fractions():
    weight = heavy_tailed()
    result = quantize(weight, Scheme(3, 64), HqqOptions(), None)
    values = (torch.arange(8)[:, None, None] - result.zero.float()) * result.scale.float()
    distances = (values[:, :, result.group.long()] - weight).abs()
    nearest = distances.amin(0)
    assert torch.allclose((result.dequantize() - weight).abs(), nearest, atol=1e-6)


@pytest.mark.parametrize(
    "codec",
    [c for c in CODECS.values() if not c.float_zeros and c.name not in ("bnb-int8", "gguf")],
    ids=lambda c: c.name,
)
def test_a_format_of_whole_zeros_never_packs_fractions(codec):
    result = quantize(heavy_tailed(16, 64), Scheme(4, 32), HqqOptions(), None)
    assert codec.why_not(Held(16, 64, result.scheme, True, True, float_zeros=True)) == "it holds whole zero points only"
    with pytest.raises(AssertionError, match="whole zero points"):
        codec.pack(result)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p": "0"}, "p must be above 0"),
        ({"p": "1.5"}, "at most 1, got 1.5"),
        ({"beta": "-1"}, "beta must be above 0"),
        ({"kappa": "0.5"}, "kappa 1 or more"),
        ({"iterations": "0"}, "iterations must be 1"),
        ({"zero": "half"}, "zero is one of auto, float, integer"),
    ],
)
def test_options_that_cannot_be(settings, message):
    with pytest.raises(UsageError, match=message):
        make_options(find("hqq"), settings)
