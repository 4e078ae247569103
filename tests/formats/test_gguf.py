"""GGML's block types: what is packed is what was computed, and what the gguf package dequantizes, bit for bit."""

import gguf as package
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import literal
from quantcli.algorithms import find
from quantcli.formats import gguf
from quantcli.tensors import grids
from quantcli.tensors.block_grids import fit_blocks
from quantcli.tensors.block_types import BLOCK_TYPES, fitted_type, scheme_of
from quantcli.tensors.hessian import Statistics, output_error

COLUMNS = 512
ROUNDERS = {
    "rtn": ("rtn", {}),
    "rtn, clipped": ("rtn", {"clip_ratio": 0.8}),
    "kquant": ("kquant", {}),
    "gptq": ("gptq", {}),
    "gptq, refined": ("gptq", {"refit": True, "sweeps": 2}),
    "gptq, minmax": ("gptq", {"grid": "minmax", "order": "none"}),
}


def layer(rows=48, columns=COLUMNS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(2048, 48, generator=generator) @ torch.randn(48, columns, generator=generator)
    inputs += 0.3 * torch.randn(2048, columns, generator=generator)
    return weight, Statistics(inputs.T @ inputs / 2048, 2048)


def solve(method, weight, kind, statistics):
    name, options = ROUNDERS[method]
    algorithm = find(name)
    return algorithm.run(weight, scheme_of(kind), algorithm.options(**options), statistics)


def dequantized_by_the_package(tensor):
    stored = gguf.pack(tensor)["blocks"]
    kind = package.GGMLQuantizationType[tensor.scheme.block_type.upper()]
    return torch.from_numpy(package.quants.dequantize(stored.numpy(), kind))


def assert_reads_back(tensor):
    assert torch.equal(dequantized_by_the_package(tensor), tensor.dequantize())
    read = gguf.unpack(gguf.pack(tensor), tensor.scheme)
    for part in ("codes", "scale", "zero", "group", "minimum"):
        ours, theirs = getattr(tensor, part), getattr(read, part)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), part


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_sizes_are_those_of_ggml(kind):
    columns, size = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind.upper()]]
    assert (BLOCK_TYPES[kind].columns, BLOCK_TYPES[kind].size_bytes) == (columns, size)
    packed = gguf.pack(grids.round_nearest(torch.randn(3, COLUMNS), scheme_of(kind)))["blocks"]
    assert packed.numel() == gguf.CODEC.packed_bytes(3, COLUMNS, scheme_of(kind))


@pytest.mark.parametrize("method", ROUNDERS)
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_what_a_rounder_computed_is_what_readers_see(kind, method):
    weight, statistics = layer()
    assert_reads_back(solve(method, weight, kind, statistics))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_each_step_lowers_the_error(kind):
    weight, statistics = layer()
    errors = {
        method: output_error(weight, solve(method, weight, kind, statistics).dequantize(), statistics.hessian)
        for method in ("rtn", "kquant", "gptq", "gptq, refined")
    }
    assert errors["gptq"] < 0.3 * errors["kquant"] < 0.3 * errors["rtn"]
    assert errors["gptq, refined"] < errors["gptq"]


def literal_affine(w, h, kind, a, b, d, d_min):
    """Squared error of a super-block: nearest codes on the grid of these integers."""
    total = 0.0
    for g in range(len(a)):
        part = slice(g * kind.group, (g + 1) * kind.group)
        scale, minimum = d * a[g], d_min * b[g]
        codes = np.clip(np.round(w[part] / scale + minimum / scale), 0, 2**kind.bits - 1)
        total += (h[part] * (codes * scale - minimum - w[part]) ** 2).sum()
    return total


@pytest.mark.parametrize("kind", ["q2_k", "q4_k", "q5_k"])
def test_no_neighbouring_integer_is_better(kind):
    """A slow look at what the search left: each group's scale and minimum are the best of their neighbours."""
    weight, statistics = layer(rows=3)
    weight, importance = weight.double(), statistics.hessian.diagonal().double()
    kind = BLOCK_TYPES[kind]
    blocks = fit_blocks(weight, scheme_of(kind.name), importance, refine=3)
    groups = kind.columns // kind.group
    for r in range(len(weight)):
        for s in range(blocks.d.shape[1]):
            w = weight[r, s * kind.columns : (s + 1) * kind.columns].numpy()
            h = importance[s * kind.columns : (s + 1) * kind.columns].numpy()
            a, b = (x[r, s * groups : (s + 1) * groups].numpy().astype(int) for x in (blocks.scales, blocks.minimums))
            d, d_min = float(blocks.d[r, s]), float(blocks.d_min[r, s])
            least = literal_affine(w, h, kind, a, b, d, d_min)
            for g in range(groups):
                for da, db in ((-1, 0), (1, 0), (0, -1), (0, 1), (1, 1), (-1, -1)):
                    other, shift = a.copy(), b.copy()
                    other[g], shift[g] = other[g] + da, shift[g] + db
                    if 1 <= other[g] <= kind.scale_top and 0 <= shift[g] <= kind.minimum_top:
                        assert literal_affine(w, h, kind, other, shift, d, d_min) >= least * (1 - 1e-9)


@pytest.mark.parametrize("kind", [name for name, kind in BLOCK_TYPES.items() if kind.fitted])
def test_error_feedback_is_the_literal_one(kind):
    """On the grid that is stored, GPTQ column by column, in float64, code for code."""
    weight, hessian, _ = literal.layer(N=6, K=256)
    options, given = find("gptq").options(), torch.from_numpy(weight)
    tensor = find("gptq").run(given, scheme_of(kind), options, Statistics(torch.from_numpy(hessian), 1024))
    diagonal = np.diag(hessian).copy()
    grid = grids.searched_grid(given, scheme_of(kind), torch.from_numpy(diagonal), steps=options.grid_steps, refine=3)
    scale, zero, kept = grid.scale.numpy(), grid.zero.numpy(), BLOCK_TYPES[kind]
    order = np.argsort(-diagonal, kind="stable")
    expected = literal.gptq(weight, hessian, kept.bits, kept.group, scale, zero, order)
    assert np.array_equal(tensor.codes.numpy(), expected)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(sorted(BLOCK_TYPES)),
    scale=st.sampled_from([0.0, 1e-9, 1e-4, 1.0, 300.0]),
    offset=st.sampled_from([0.0, -1.0, 1.0]),
    lone=st.booleans(),
    searched=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_weights_are_stored_and_finite(kind, scale, offset, lone, searched, seed):
    weight = scale * (torch.randn(2, 256, generator=torch.Generator().manual_seed(seed)) + offset)
    if lone:
        weight[:, :128] = 0
        weight[0, 200] = 50.0
    tensor = find("kquant" if searched else "rtn").run(
        weight, scheme_of(kind), find("kquant").options() if searched else find("rtn").options(), None
    )
    assert_reads_back(tensor)
    read = tensor.dequantize()
    assert bool(torch.isfinite(read).all())
    step = weight.abs().max() / 2 ** (BLOCK_TYPES[kind].bits - 1)
    assert float((read - weight).abs().max()) <= 2.1 * float(step) + 1e-4


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_rows_can_be_divided_and_taken_apart(kind):
    tensor = grids.round_nearest(torch.randn(5, 256), scheme_of(kind))
    part = tensor.rows(1, 4)
    assert torch.equal(part.dequantize(), tensor.dequantize()[1:4])
    assert_reads_back(part)
    divided = grids.divide_rows(tensor, torch.tensor([0, 2]), torch.tensor([2.0, 0.5]))
    assert torch.equal(divided.codes, tensor.codes)
    assert_reads_back(divided)
    expected = tensor.dequantize() / torch.tensor([2.0, 1.0, 0.5, 1.0, 1.0])[:, None]
    torch.testing.assert_close(divided.dequantize(), expected, rtol=2**-10, atol=1e-4)


def test_rounding_takes_the_nearest_code():
    weight, _ = layer(rows=4, columns=256)
    for name in (name for name in BLOCK_TYPES if fitted_type(scheme_of(name)) is not None):
        grid = grids.searched_grid(weight, scheme_of(name), torch.ones(256))
        best = grid.round(weight)
        error = (best.dequantize() - weight).abs()
        for step in (-1, 1):
            codes = (best.codes.to(torch.int16) + step).clamp(0, best.scheme.levels - 1).to(torch.uint8)
            assert bool(((grid.tensor(codes, best.group).dequantize() - weight).abs() >= error - 1e-6).all())
