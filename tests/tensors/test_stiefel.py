"""Steps along the Stiefel manifold: orthogonal, as the paper has them, and downhill to known optima."""

import numpy as np
import pytest
import torch

import literal
from quantcli.tensors.hadamard import make_rotation
from quantcli.tensors.stiefel import cayley_step, nearest_orthogonal

N = 24


def distance(x):
    return float((x.T @ x - torch.eye(len(x), dtype=x.dtype)).abs().max())


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_it_stays_orthogonal():
    x, momentum = make_rotation(N, "random", 0).matrix(), None
    for step in range(200):
        x, momentum = cayley_step(x, gaussian(N, N, seed=step), momentum, learning_rate=5.0, beta=0.9)
    assert distance(x) < 1e-12


@pytest.mark.parametrize("learning_rate", [0.01, 0.7, 100.0])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_it_is_the_papers_step(learning_rate, beta):
    x, momentum = make_rotation(N, "random", 1).matrix(), torch.zeros(N, N, dtype=torch.float64)
    wanted, wanted_momentum = x.numpy(), momentum.numpy()
    for step in range(3):
        gradient = 0.1 * gaussian(N, N, seed=step)
        x, momentum = cayley_step(x, gradient, momentum, learning_rate=learning_rate, beta=beta)
        wanted, wanted_momentum = literal.cayley_step(wanted, gradient.numpy(), wanted_momentum, learning_rate, beta)
        assert np.allclose(x.numpy(), wanted, atol=1e-10)
        assert np.allclose(momentum.numpy(), wanted_momentum, atol=1e-10)


def test_the_first_step_needs_no_momentum():
    x, gradient = make_rotation(N, "random", 1).matrix(), gaussian(N, N)
    first = cayley_step(x, gradient, None, learning_rate=0.1, beta=0.9)
    again = cayley_step(x, gradient, torch.zeros_like(x), learning_rate=0.1, beta=0.9)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_procrustes_reaches_its_optimum(beta):
    """The rotation that takes A nearest to B is U V^T of A^T B."""
    a, target = gaussian(60, N), make_rotation(N, "random", 2).matrix()
    b = a @ target + 0.3 * gaussian(60, N, seed=1)
    u, _, v = torch.linalg.svd(a.T @ b)
    best = float((a @ (u @ v) - b).square().sum())
    # steps cannot leave the component of the manifold that they begin in: a start with the optimum's determinant
    x = u @ v @ torch.linalg.matrix_exp(0.3 * (gaussian(N, N) - gaussian(N, N).T))
    momentum, losses = None, []
    for _ in range(400):
        losses.append(float((a @ x - b).square().sum()))
        gradient = 2 * a.T @ (a @ x - b)
        x, momentum = cayley_step(x, gradient, momentum, learning_rate=0.002 if beta else 0.005, beta=beta)
    assert losses[1] < losses[0]
    assert losses[0] > 2 * best
    assert losses[-1] < best * (1 + 1e-8)


def test_nearest_orthogonal():
    x = make_rotation(N, "random", 0).matrix()
    off = x + 1e-4 * gaussian(N, N)
    u, _, v = torch.linalg.svd(off)
    assert distance(nearest_orthogonal(off)) < 1e-14
    assert torch.allclose(nearest_orthogonal(off), u @ v, atol=1e-12)
    assert torch.allclose(nearest_orthogonal(x), x, atol=1e-14)
