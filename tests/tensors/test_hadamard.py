"""Orthogonal matrices: exact Hadamard matrices of the orders of real models, and rotations of any size."""

from functools import reduce

import pytest
import torch

from quantcli.tensors.hadamard import hadamard_factors, make_rotation

# hidden and head sizes of models that people run
REAL = [1, 2, 4, 12, 20, 28, 36, 64, 80, 96, 128, 256, 576, 640, 768, 896, 960, 1152, 1536, 2304, 2560, 3584]


@pytest.mark.parametrize("size", REAL)
def test_entries_are_one_and_rows_orthogonal(size):
    h = reduce(torch.kron, hadamard_factors(size))
    assert (h.abs() == 1).all()
    assert torch.equal(h @ h.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [6, 52, 92, 100])
def test_orders_that_are_not_known(size):
    with pytest.raises(ValueError, match=f"order {size}"):
        hadamard_factors(size)


@pytest.mark.parametrize("mode", ["hadamard", "random"])
@pytest.mark.parametrize("size", [7, 52, 100, 576])
def test_any_size_can_be_rotated(size, mode):
    rotation = make_rotation(size, mode, seed=3)
    q = rotation.matrix()
    assert torch.allclose(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(q, make_rotation(size, mode, seed=3).matrix())
    assert not torch.equal(q, make_rotation(size, mode, seed=4).matrix())


def test_a_spike_is_spread_evenly():
    rotation = make_rotation(576, "hadamard", seed=0)
    spike = torch.zeros(576, dtype=torch.float64)
    spike[17] = 24.0
    assert torch.allclose(rotation.rows(spike).abs(), torch.ones(576, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["hadamard", "random"])
def test_factors_apply_as_the_matrix_does(mode):
    rotation = make_rotation(576, mode, seed=0)
    q, x = rotation.matrix(), torch.randn(5, 576, dtype=torch.float64)
    assert torch.allclose(rotation.rows(x), x @ q, atol=1e-12)
    assert torch.allclose(rotation.columns(x.T), q.T @ x.T, atol=1e-12)
