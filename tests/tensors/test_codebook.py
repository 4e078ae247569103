"""nf4 and fp4: codes equal the literal statement, scales nest, and what a tensor's parts mean stays with them."""

import numpy as np
import pytest
import torch

import literal
from quantcli.errors import UsageError
from quantcli.scheme import Scheme
from quantcli.tensors.codebook import (
    VALUES,
    _round_on_device,
    codebook,
    dynamic_map,
    nest_scale,
    round_to_codebook,
    with_scale,
)
from quantcli.tensors.grids import divide_rows, round_nearest
from quantcli.tensors.quantized import concatenate_rows

NAMES = pytest.mark.parametrize("name", VALUES)


def weights(N=12, K=160, seed=0):
    W = torch.from_numpy(literal.layer(N=N, K=K, seed=seed)[0]).float()
    W[0, :64] = 0
    W[1, 3], W[1, 4] = 0.0, -0.0
    return W


@NAMES
@pytest.mark.parametrize("size", [16, 32, 64, -1])
def test_codes_and_scales_equal_the_literal_ones(name, size):
    W, scheme = weights(), Scheme(4, size, codebook=name)
    result = round_to_codebook(W, scheme)
    codes, scale = literal.codebook(W.numpy(), np.array(VALUES[name]), scheme.columns_per_group(160))
    assert np.array_equal(result.codes.numpy(), codes)
    assert np.array_equal(result.scale.numpy(), scale)
    expected = np.array(VALUES[name], np.float32)[codes] * literal.expand(scale, scheme.columns_per_group(160), 160)
    assert np.array_equal(result.dequantize().numpy(), expected)


@NAMES
@pytest.mark.parametrize("size", [32, 48, -1])
def test_the_device_path_gives_the_same(name, size):
    W, scheme = weights(), Scheme(4, size, codebook=name)
    result = round_to_codebook(W, scheme)
    scale, codes = _round_on_device(W, scheme.columns_per_group(160), codebook(name))
    assert torch.equal(scale, result.scale) and torch.equal(codes, result.codes)


def test_nf4_has_less_error_than_grids_without_zero_points():
    """And than those with, on heavy tails; fp4 has more."""
    rng = np.random.default_rng(0)
    normal, heavy = (
        torch.from_numpy(0.02 * w).float() for w in (rng.normal(size=(64, 512)), rng.standard_t(5, (64, 512)))
    )

    def error(weight, scheme):
        return float((round_nearest(weight, scheme).dequantize() - weight).square().sum())

    for size, share in ((64, 0.96), (128, 0.9)):
        assert error(normal, Scheme(4, size, codebook="nf4")) < share * error(normal, Scheme(4, size, True))
        assert error(heavy, Scheme(4, size, codebook="nf4")) < 0.92 * error(heavy, Scheme(4, size))
        assert error(heavy, Scheme(4, size, codebook="fp4")) > error(heavy, Scheme(4, size))


@NAMES
def test_a_weight_half_way_goes_to_the_lower_value(name):
    table = codebook(name).sort().values
    middles = (table[:-1] + table[1:]) / 2
    W = torch.cat([middles, torch.ones(1)])[None]
    result = round_to_codebook(W, Scheme(4, 16, codebook=name))
    assert torch.equal(result.dequantize()[0, :15], table[:-1])


@NAMES
def test_values_of_the_codebook_come_back(name):
    W = codebook(name).repeat(3, 4) * torch.tensor([[0.5], [2.0], [3e-3]])
    result = round_to_codebook(W, Scheme(4, 16, codebook=name))
    torch.testing.assert_close(result.dequantize(), W, rtol=1e-6, atol=0)


def test_the_tables_are_what_they_are_called():
    normal = torch.distributions.Normal(0, 1)
    # QLoRA: 8 quantiles of the negative half, 9 of the positive one, divided by the largest
    offset = 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    made = torch.cat([above, below, torch.zeros(1)]).sort().values
    torch.testing.assert_close((made / made.abs().max()).float(), codebook("nf4"), rtol=0, atol=2e-6)
    floats = {0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0}
    assert {round(abs(v) * 12, 6) for v in VALUES["fp4"]} == floats
    table = dynamic_map()
    assert table.shape == (256,) and bool((table[1:] > table[:-1]).all()) and float(table[-1]) == 1.0


@pytest.mark.parametrize("shape", [(3, 5), (16, 16), (40, 20), (1, 1)])
def test_nested_scales_are_the_nearest_ones(shape):
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.02
    nested = nest_scale(scale)
    assert nested.codes.shape == shape and nested.absmax.shape == (-(-scale.numel() // 256),)
    expected = literal.nested(scale.numpy(), dynamic_map().double().numpy())
    np.testing.assert_allclose(nested.expand().numpy(), expected, rtol=1e-5, atol=1e-8)


@NAMES
def test_double_quantization_changes_scales_and_no_codes(name):
    W = weights(N=64)
    plain = round_to_codebook(W, Scheme(4, 32, codebook=name))
    double = round_to_codebook(W, Scheme(4, 32, codebook=name, double_quant=True))
    assert torch.equal(plain.codes, double.codes)
    assert torch.equal(double.scale, double.nested.expand())
    error = (plain.scale - double.scale).abs().max() / plain.scale.abs().max()
    assert 0 < error < 0.02


@NAMES
@pytest.mark.parametrize("double_quant", [False, True])
def test_parts_of_a_tensor_keep_their_meaning(name, double_quant):
    result = round_to_codebook(weights(), Scheme(4, 32, codebook=name, double_quant=double_quant))
    whole = result.dequantize()
    parts = [result.rows(0, 5), result.rows(5, 12).to("cpu")]
    for part, rows in zip(parts, (whole[:5], whole[5:]), strict=True):
        assert torch.equal(part.dequantize(), rows) and torch.equal(part.codebook, result.codebook)
        assert part.nested is None and not part.scheme.double_quant
    assert torch.equal(concatenate_rows(parts).dequantize(), whole)
    assert result.rows(0, 12) is result
    assert torch.equal(result.to("cpu").dequantize(), whole)
    index = result.group.long()
    on_device = result.codebook[result.codes.long()] * result.scale[:, index]  # as an accelerator computes it
    assert torch.equal(on_device, whole)


@pytest.mark.parametrize("double_quant", [False, True])
def test_rows_divided(double_quant):
    result = round_to_codebook(weights(N=16), Scheme(4, 32, codebook="nf4", double_quant=double_quant))
    rows, divisor = torch.tensor([2, 7]), torch.tensor([2.0, 0.5])
    divided = divide_rows(result, rows, divisor)
    expected = result.scale.clone()
    expected[rows] /= divisor[:, None]
    if double_quant:
        assert torch.equal(divided.scale, divided.nested.expand())
        torch.testing.assert_close(divided.scale, expected, rtol=0, atol=0.02 * float(expected.max()))
    else:
        assert torch.equal(divided.scale, expected)
    assert torch.equal(divided.codes, result.codes)
    assert torch.equal(with_scale(result, result.scale).dequantize(), result.dequantize()) or double_quant


def test_bits_per_weight_count_what_is_stored():
    assert Scheme(4, 64, codebook="nf4").bits_per_weight(256) == 4.5
    assert Scheme(4, 64, codebook="nf4", double_quant=True).bits_per_weight(256) == 4 + (8 + 32 / 256) / 64
    with pytest.raises(UsageError, match="codebooks are nf4 of 4, fp4 of 4, int8 of 8, e2m1 of 4, e4m3 of 8 bits"):
        Scheme(3, 64, codebook="nf4")
