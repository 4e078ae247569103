"""AWQ's search equals its literal statement, lowers the error, and knows when to keep its hands off."""

import pytest
import torch

import literal
from quantcli.algorithms import ALGORITHMS
from quantcli.algorithms.transforms.awq import AwqOptions, find_scale
from quantcli.errors import UsageError
from quantcli.scheme import Scheme
from quantcli.tensors.affine import minmax_grid, round_to_grid
from quantcli.tensors.hessian import Statistics, output_error


def torched(*arrays):
    return [torch.from_numpy(a).float() for a in arrays]


def natural(columns):
    return torch.arange(columns)


def rounded(weight, scheme):
    return round_to_grid(weight, *minmax_grid(weight, scheme), scheme).dequantize()


@pytest.mark.parametrize("group_size", [32, 48, -1])
def test_equals_the_literal_search(group_size):
    W, H, _ = literal.layer(N=16, K=96)
    expected = literal.awq(W, H, 4, 96 if group_size == -1 else group_size, n_grid=10)
    weight, hessian = torched(W, H)
    found = find_scale([weight], [Scheme(4, group_size)], AwqOptions(n_grid=10), Statistics(hessian, 1), natural(96))
    assert torch.allclose(found.double(), torch.from_numpy(expected), rtol=1e-4)


def test_columns_of_shared_heads_take_one_scale():
    W, H, _ = literal.layer(N=16, K=96)
    rows = [(k // 16 // 2) * 16 + k % 16 for k in range(96)]  # pairs of heads of 16 read one value head
    expected = literal.awq(W, H, 3, 32, n_grid=10, rows=rows)
    weight, hessian = torched(W, H)
    found = find_scale([weight], [Scheme(3, 32)], AwqOptions(n_grid=10), Statistics(hessian, 1), torch.tensor(rows))
    assert found.shape == (48,)
    assert torch.allclose(found.double(), torch.from_numpy(expected), rtol=1e-4)


def test_linears_that_share_an_input_are_searched_together():
    W, H, _ = literal.layer(N=16, K=96)
    weight, hessian = torched(W, H)
    scheme, options = Scheme(4, 32), AwqOptions()
    whole = find_scale([weight], [scheme], options, Statistics(hessian, 1), natural(96))
    parts = find_scale([weight[:5], weight[5:]], [scheme] * 2, options, Statistics(hessian, 1), natural(96))
    assert torch.allclose(whole, parts, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_scaled_weights_has_less_error_on_held_out_inputs(bits):
    weight, hessian, held_out = torched(*literal.layer(N=48, K=256, T=2048))
    scheme = Scheme(bits, 64)
    scale = find_scale([weight], [scheme], AwqOptions(), Statistics(hessian, 1), natural(256))
    before = output_error(weight, rounded(weight, scheme), held_out)
    assert output_error(weight, rounded(weight * scale, scheme) / scale, held_out) < 0.8 * before


def test_a_scale_that_does_not_help_held_out_tokens_is_dropped():
    weight, hessian, _ = torched(*literal.layer(N=24, K=96))
    # the channels that matter on the held-out tokens are others
    held_out = torch.diag(1 / hessian.diagonal())
    statistics = Statistics(hessian, 1, held_out=held_out, held_out_tokens=1)
    assert find_scale([weight], [Scheme(4, 32)], AwqOptions(), statistics, natural(96)) is None
    statistics = Statistics(hessian, 1, held_out=hessian, held_out_tokens=1)
    assert find_scale([weight], [Scheme(4, 32)], AwqOptions(), statistics, natural(96)) is not None


def test_inputs_that_never_came_and_weights_of_zero_do_no_harm():
    weight, hessian, _ = torched(*literal.layer(N=8, K=96))
    hessian[:, 5] = hessian[5] = 0
    weight[:, 7] = 0
    scale = find_scale([weight], [Scheme(4, 32)], AwqOptions(), Statistics(hessian, 1), natural(96))
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert find_scale([weight * 0], [Scheme(4, 32)], AwqOptions(), Statistics(hessian, 1), natural(96)) is None


def test_options_are_checked():
    with pytest.raises(UsageError, match="1 or more"):
        AwqOptions(n_grid=0)
    assert ALGORITHMS["awq"].then == "kquant"
