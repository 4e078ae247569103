"""What every rounder owes, for each that the registry lists; no list to be kept by hand."""

import pytest
import torch

import literal
from quantcli.algorithms import ALGORITHMS, make_options
from quantcli.errors import UsageError
from quantcli.scheme import Scheme
from quantcli.tensors.affine import minmax_grid, round_to_grid
from quantcli.tensors.hessian import Statistics, output_error

ROUNDERS = [a for a in ALGORITHMS.values() if a.kind == "rounder"]


def solve(algorithm, weight, hessian, scheme):
    statistics = None if algorithm.calibration == "none" else Statistics(hessian, 1024)
    return algorithm.run(weight, scheme, algorithm.options(), statistics)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 48, 128, -1])
@pytest.mark.parametrize("algorithm", ROUNDERS, ids=lambda a: a.name)
def test_codes_scales_and_zeros_stay_in_range(algorithm, group_size, symmetric):
    if algorithm.group_size not in (None, group_size):
        pytest.skip("it makes other groups alone")
    weight, hessian, _ = (torch.from_numpy(a).float() for a in literal.layer(N=7, K=160))
    for bits in algorithm.bits:
        scheme = Scheme(bits, group_size, symmetric, lowest_zero=1)
        result = solve(algorithm, weight, hessian, scheme)
        groups = scheme.group_count(160)
        assert result.codes.shape == (7, 160) and result.codes.dtype == torch.uint8
        assert result.scale.shape == result.zero.shape == (7, groups)
        assert int(result.codes.max()) < scheme.levels
        assert torch.isfinite(result.scale).all() and (result.scale != 0).all()
        assert result.scheme.codebook == algorithm.codebook
        if algorithm.codebook is not None:
            assert result.scale.dtype == torch.float32 and not result.zero.any()
            assert result.codebook.shape == (scheme.levels,) and 1 <= result.codebook.abs().max() < 1.01
            continue
        assert result.scale.dtype == torch.float16 and result.codebook is None
        if result.has_float_zeros:
            assert result.zero.dtype == torch.float16 and torch.isfinite(result.zero).all()
        else:
            assert result.zero.dtype == torch.uint8
            assert int(result.zero.min()) >= 1 and int(result.zero.max()) < scheme.levels
        if symmetric:
            assert (result.zero == scheme.middle).all()


@pytest.mark.parametrize(
    ("algorithm", "bits"),
    [pytest.param(a, b, id=f"{a.name}-{b}") for a in ROUNDERS if a.beats_rtn for b in (2, 3, 4) if b in a.bits],
)
def test_error_on_held_out_inputs_is_clearly_below_rtn(algorithm, bits):
    weight, hessian, held_out = (torch.from_numpy(a).float() for a in literal.layer(N=48, K=256, T=2048))
    scheme = Scheme(bits, 64)
    rtn = round_to_grid(weight, *minmax_grid(weight, scheme), scheme)
    ours = output_error(weight, solve(algorithm, weight, hessian, scheme).dequantize(), held_out)
    margin = {"gptq": 0.3, "kquant": 0.9, "hqq": 0.98}.get(algorithm.name, 0.95)
    assert ours < margin * output_error(weight, rtn.dequantize(), held_out)


@pytest.mark.parametrize("algorithm", ROUNDERS, ids=lambda a: a.name)
def test_rows_are_independent(algorithm):
    weight, hessian, _ = (torch.from_numpy(a).double() for a in literal.layer(N=12))
    scheme = Scheme(4, 32)
    whole = solve(algorithm, weight, hessian, scheme)
    for start, stop in ((0, 5), (5, 12)):
        part = solve(algorithm, weight[start:stop].contiguous(), hessian, scheme)
        assert torch.equal(part.codes, whole.codes[start:stop])
        assert torch.equal(part.scale, whole.scale[start:stop])


@pytest.mark.parametrize("algorithm", ROUNDERS, ids=lambda a: a.name)
def test_a_weight_of_zeros_and_constant_groups_come_back(algorithm):
    weight = torch.zeros(4, 64)
    weight[1] = 0.75
    weight[2] = -3.0
    hessian = torch.eye(64) + 0.1
    result = solve(algorithm, weight, hessian, Scheme(4, 32))
    assert (result.dequantize() - weight).abs().max() < 2e-3


@pytest.mark.parametrize("algorithm", ROUNDERS, ids=lambda a: a.name)
def test_inputs_that_were_always_zero_do_no_harm(algorithm):
    weight, hessian, _ = (torch.from_numpy(a).float() for a in literal.layer(N=6, K=96))
    hessian[:, 5] = hessian[5] = 0
    result = solve(algorithm, weight, hessian, Scheme(4, 32))
    assert torch.isfinite(result.dequantize()).all()


def test_unknown_options_name_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'damp_percent'"):
        make_options(ALGORITHMS["gptq"], {"damp_procent": "0.1"})
    with pytest.raises(UsageError, match="order is one of static, none, dynamic, desc_act"):
        make_options(ALGORITHMS["gptq"], {"order": "random"})
    with pytest.raises(UsageError, match="sweeps is a int"):
        make_options(ALGORITHMS["gptq"], {"sweeps": "two"})
    with pytest.raises(UsageError, match="damp_percent must be"):
        make_options(ALGORITHMS["gptq"], {"damp_percent": "-1"})
