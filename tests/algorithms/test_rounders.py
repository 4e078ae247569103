"""Each rounder equals its slow literal statement, in float64, code for code."""

import numpy as np
import pytest
import torch

import literal
from quantcli.algorithms.rounders import gptq, kquant, rtn
from quantcli.algorithms.rounders.gptq import GptqOptions
from quantcli.scheme import Scheme
from quantcli.tensors.hessian import Moments, Statistics, inverse_factor, output_error

SCHEMES = [(4, 64, False), (4, 32, True), (3, 64, False), (2, 32, False), (8, 128, True), (2, -1, True)]


def codes_of(result):
    return result.codes.numpy().astype(float)


def assert_equals(result, C, S, Z):
    assert np.array_equal(codes_of(result), C)
    assert np.array_equal(result.scale.double().numpy(), S)
    assert np.array_equal(result.zero.numpy().astype(float), Z)


@pytest.mark.parametrize(("bits", "g", "symmetric"), SCHEMES)
def test_rtn(bits, g, symmetric):
    W, _, _ = literal.layer()
    size = g if g > 0 else W.shape[1]
    S, Z = literal.minmax_grid(W, bits, size, symmetric)
    result = rtn.quantize(torch.from_numpy(W), Scheme(bits, g, symmetric), rtn.RtnOptions(), None)
    assert_equals(result, literal.rtn(W, S, Z, bits, size), S, Z)


@pytest.mark.parametrize(("bits", "g", "symmetric"), SCHEMES)
def test_rtn_on_a_share_of_the_range(bits, g, symmetric):
    W, _, _ = literal.layer()
    size = g if g > 0 else W.shape[1]
    S, Z = literal.minmax_grid(0.75 * W, bits, size, symmetric)
    scheme, options = Scheme(bits, g, symmetric), rtn.RtnOptions(clip_ratio=0.75)
    result = rtn.quantize(torch.from_numpy(W), scheme, options, None)
    assert_equals(result, literal.rtn(W, S, Z, bits, size), S, Z)
    whole = rtn.quantize(torch.from_numpy(W), scheme, rtn.RtnOptions(), None)
    assert float((result.scale / whole.scale).mean()) == pytest.approx(0.75, rel=1e-3)


@pytest.mark.parametrize(("bits", "g", "symmetric"), SCHEMES)
@pytest.mark.parametrize("with_data", [True, False])
def test_kquant(bits, g, symmetric, with_data):
    W, H, _ = literal.layer(N=8)
    size = g if g > 0 else W.shape[1]
    importance = np.abs(W) + np.sqrt((W**2).mean(1, keepdims=True))
    if with_data:
        importance = importance * np.diag(H)
    S, Z = literal.searched_grid(W, bits, size, symmetric, importance, steps=40, smallest=0.5, refine=2)
    statistics = Statistics(torch.from_numpy(H), 1024) if with_data else None
    options = kquant.KquantOptions()
    result = kquant.quantize(torch.from_numpy(W), Scheme(bits, g, symmetric), options, statistics)
    assert_equals(result, literal.rtn(W, S, Z, bits, size), S, Z)


@pytest.mark.parametrize(("bits", "g", "symmetric"), SCHEMES)
@pytest.mark.parametrize("order", ["static", "none"])
@pytest.mark.parametrize("block_size", [7, 128])
def test_gptq_on_a_static_grid(bits, g, symmetric, order, block_size):
    W, H, _ = literal.layer()
    size = g if g > 0 else W.shape[1]
    columns = np.argsort(-np.diag(H), kind="stable") if order == "static" else np.arange(W.shape[1])
    S, Z = literal.searched_grid(W, bits, size, symmetric, np.diag(H), steps=20)
    options = GptqOptions(order=order, block_size=block_size, grid_steps=20)
    statistics = Statistics(torch.from_numpy(H), 1024)
    result = gptq.quantize(torch.from_numpy(W), Scheme(bits, g, symmetric), options, statistics)
    assert_equals(result, literal.gptq(W, H, bits, size, S, Z, columns), S, Z)


@pytest.mark.parametrize(("bits", "g", "symmetric"), [(4, 32, False), (3, 48, True), (2, 64, False)])
@pytest.mark.parametrize("order", ["dynamic", "desc_act"])
def test_gptq_with_grids_chosen_on_the_way(bits, g, symmetric, order):
    W, H, _ = literal.layer()
    columns = np.argsort(-np.diag(H), kind="stable") if order == "desc_act" else np.arange(W.shape[1])

    def grid(V, importance):
        return literal.searched_grid(V, bits, V.shape[1], symmetric, importance, steps=20)

    C, S, Z = literal.gptq_dynamic(W, H, bits, g, grid, columns)
    options = GptqOptions(order=order, grid_steps=20)
    result = gptq.quantize(torch.from_numpy(W), Scheme(bits, g, symmetric), options, Statistics(torch.from_numpy(H), 9))
    assert_equals(result, C, S, Z)
    rank = np.empty(len(columns), int)
    rank[columns] = np.arange(len(columns))
    assert np.array_equal(result.group.numpy(), rank // g)
    assert result.ordered == (order == "dynamic")


@pytest.mark.parametrize(("bits", "g", "symmetric"), SCHEMES[:4])
def test_best(bits, g, symmetric):
    W, H, _ = literal.layer()
    order = np.argsort(-np.diag(H), kind="stable")
    S, Z = literal.searched_grid(W, bits, g, symmetric, np.diag(H))
    C = literal.gptq(W, H, bits, g, S, Z, order)
    S = literal.refit(W, H, C, Z, g, S)
    C = literal.descend(W, H, C, S, Z, bits, g, order, sweeps=2)
    S = literal.refit(W, H, C, Z, g, S)
    options = GptqOptions(refit=True, sweeps=2)
    result = gptq.quantize(torch.from_numpy(W), Scheme(bits, g, symmetric), options, Statistics(torch.from_numpy(H), 9))
    assert np.array_equal(codes_of(result), C)
    assert np.array_equal(result.zero.numpy().astype(float), Z)
    # the refit solves a system: its float16 scales may fall on the neighbouring value
    assert np.mean(result.scale.double().numpy() == S) > 0.99
    assert np.allclose(result.scale.double().numpy(), S, rtol=2**-10)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_step_lowers_the_error(bits):
    """best < static act-order < memory order < rtn, on inputs that no solver saw."""
    W, H, held_out = (torch.from_numpy(a).float() for a in literal.layer(N=64, K=256, T=4096))
    scheme = Scheme(bits, 64)

    def error(**settings):
        result = gptq.quantize(W, scheme, GptqOptions(**settings), Statistics(H, 4096))
        return output_error(W, result.dequantize(), held_out)

    plain = error(order="none", grid="minmax")
    ordered = error(grid="minmax")
    weighted = error()
    best = error(refit=True, sweeps=2)
    assert best < 0.97 * weighted < weighted < 0.95 * ordered < ordered < 0.8 * plain


def test_correction_aims_at_the_float_output():
    """With the float model's inputs known, the quantized input must reproduce the float output better."""
    rng = np.random.default_rng(3)
    W, _, _ = literal.layer(N=32, K=96)
    F = rng.standard_normal((2048, 24)) @ rng.standard_normal((24, 96)) + 0.2 * rng.standard_normal((2048, 96))
    X = F @ (np.eye(96) + 0.08 * rng.standard_normal((96, 96)))
    H, C = X.T @ X / 2048, F.T @ X / 2048
    statistics = {"hessian": torch.from_numpy(H), "tokens": 2048, "cross": torch.from_numpy(C)}

    def miss(correction):
        options = GptqOptions(correction=correction)
        result = gptq.quantize(torch.from_numpy(W), Scheme(4, 32), options, Statistics(**statistics))
        return float(((F @ W.T - X @ result.dequantize(torch.float64).numpy().T) ** 2).sum())

    assert miss(1.0) < 0.5 * miss(0.0)
    assert miss(1.0) < miss(0.5) < miss(0.0)


def test_held_out_tokens_decide_what_is_kept():
    """Statistics from too few tokens: refit and sweeps fit noise, and the held-out tokens must say so."""
    rng = np.random.default_rng(5)
    W, H, held_out = (torch.from_numpy(a) for a in literal.layer(N=16, K=128, T=4096))
    few = torch.from_numpy(rng.standard_normal((40, 128))) @ torch.linalg.cholesky(H).T
    noisy = few.T @ few / 40
    options = GptqOptions(refit=True, sweeps=3)
    chosen = gptq._choose(W, Scheme(4, 32), options, Statistics(noisy, 40, held_out=held_out, held_out_tokens=4096))
    results = gptq._solve(W, Scheme(4, 32), options, Statistics(noisy, 40))
    errors = [output_error(W, r.dequantize(torch.float64), held_out) for r in results]
    expected = [GptqOptions(), GptqOptions(refit=True), options][int(np.argmin(errors))]
    assert (chosen.refit, chosen.sweeps) == (expected.refit, expected.sweeps)


def test_the_factor_equals_inverse_then_cholesky():
    _, H, _ = literal.layer(K=300)
    U = inverse_factor(torch.from_numpy(H), 0.01).numpy()
    assert np.allclose(U, literal.inverse_factor(H, 0.01), rtol=1e-8, atol=1e-10)
    assert np.array_equal(U, np.triu(U))


def test_damping_grows_until_the_factor_exists():
    X = torch.randn(3, 50, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    U = inverse_factor(X.T @ X, 0.0)
    assert torch.isfinite(U).all()


@pytest.mark.parametrize("columns", [1, 96, 300, 1000])
def test_moments_of_many_batches(columns):
    """Summed in tiles of a triangle: the same as X^T X."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 25, columns, generator=generator) for _ in range(3)]
    moments = Moments(columns)
    for batch in batches:
        moments.add(batch, batch + 1)
    x = torch.cat(batches).reshape(-1, columns).double()
    assert moments.tokens == len(x) == 150
    assert torch.allclose(moments.cross().double(), (x + 1).T @ x / len(x), atol=1e-4)
    assert torch.allclose(moments.energies().double(), x.square().sum(0), rtol=1e-5)
    assert torch.allclose(moments.matrix().double(), x.T @ x / len(x), atol=1e-4)
    moments.add(batches[0])
    assert moments.cross() is None  # not every token has one


def test_a_factor_in_another_order_is_that_of_the_permuted_matrix():
    _, H, _ = literal.layer(N=2, K=300)
    H, order = torch.from_numpy(H), torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(inverse_factor(H, 0.01, order), inverse_factor(H[order][:, order], 0.01), rtol=1e-9)
