"""Fake quantization per token: equal to the formulas written out, on ordinary and on odd input."""

import numpy as np
import pytest
import torch

import literal
from quantcli.tensors.activations import quantize_per_token


def tokens(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 20
    return x


@pytest.mark.parametrize("clip_ratio", [1.0, 0.9])
@pytest.mark.parametrize("group_size", [-1, 8, 7, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_the_formulas(bits, symmetric, group_size, clip_ratio):
    x = tokens(2, 5, 24)
    x[0, 0] = x[0, 0].abs()
    x[0, 1] = -x[0, 1].abs()
    x[0, 2] = 0
    found = quantize_per_token(x, bits, symmetric=symmetric, group_size=group_size, clip_ratio=clip_ratio)
    wanted = literal.per_token(x.numpy(), bits, symmetric, group_size, clip_ratio)
    assert np.array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("symmetric", [True, False])
def test_few_values_near_the_input(symmetric):
    x = tokens(64, 32)
    found = quantize_per_token(x, 4, symmetric=symmetric)
    span = x.abs().amax(1, keepdim=True) / 7 if symmetric else (x.amax(1) - x.amin(1))[:, None] / 15
    assert ((found - x).abs() <= 0.51 * span + span * (not symmetric)).all()
    assert all(len(row.unique()) <= 16 for row in found)
    assert not torch.equal(found, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_arithmetic_is_float32(dtype):
    x = tokens(4, 16).to(dtype)
    found = quantize_per_token(x, 8, symmetric=False)
    assert found.dtype == dtype
    assert torch.equal(found, quantize_per_token(x.float(), 8, symmetric=False).to(dtype))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_value_spoils_its_group_and_no_other(bad, symmetric):
    x = tokens(3, 16)
    x[1, 5] = bad
    found = quantize_per_token(x, 4, symmetric=symmetric, group_size=8)
    assert found[1, :8].isnan().all()
    assert found[1, 8:].isfinite().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zeros_tiny_and_huge_values_stay_finite(dtype, symmetric):
    largest = torch.finfo(dtype).max
    x = torch.zeros(4, 8, dtype=dtype)
    x[1, 2] = 1e-45
    x[2, 2] = largest / 4
    x[3] = torch.tensor([largest, -0.3, 7, 1, 1, 1, 1, 1]).to(dtype) / (1 if dtype == torch.float16 else 4)
    found = quantize_per_token(x, 4, symmetric=symmetric)
    assert found.isfinite().all() and found.dtype == dtype
    assert (found[:2] == 0).all()
    assert found[2, 2] > 0.9 * x[2, 2]


def test_empty_input():
    assert quantize_per_token(torch.zeros(0, 8), 4, symmetric=True).shape == (0, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 1}, "bits must be 2 to 8, got 1"),
        ({"bits": 16}, "bits must be 2 to 8, got 16"),
        ({"group_size": 0}, "group size"),
        ({"clip_ratio": 0.0}, "clip ratio"),
        ({"clip_ratio": 1.5}, "clip ratio"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(ValueError, match=message):
        quantize_per_token(tokens(2, 8), values.pop("bits", 4), symmetric=True, **values)
