"""Rounding with gradients, and training of orthogonal matrices on functions whose optimum is known."""

import pytest
import torch

from quantcli.algorithms import ALGORITHMS, make_options
from quantcli.algorithms.transforms.spinquant import SpinquantOptions, fake_quantize, train
from quantcli.errors import UsageError
from quantcli.tensors.activations import quantize_per_token
from quantcli.tensors.hadamard import make_rotation


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_that_of_activations(bits, symmetric):
    x = tokens(3, 5, 40)
    assert torch.equal(fake_quantize(x, bits, symmetric=symmetric), quantize_per_token(x, bits, symmetric=symmetric))


def test_sixteen_bits_are_left_alone():
    x = tokens(5, 40)
    assert fake_quantize(x, 16, symmetric=True) is x


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_pass_straight_through_but_for_the_ends_of_the_range(symmetric):
    x, v = tokens(6, 40).requires_grad_(), tokens(6, 40, seed=1)
    found = fake_quantize(x, 3, symmetric=symmetric)
    (gradient,) = torch.autograd.grad((found * v).sum(), x)
    error = ((found - x) * v).sum(-1).detach()
    for row in range(6):
        wanted = v[row].clone()
        if symmetric:
            end = int(x[row].abs().argmax())
            wanted[end] += error[row] / x[row, end].detach()
        else:
            high, low = int(x[row].argmax()), int(x[row].argmin())
            spread = (x[row, high] - x[row, low]).detach()
            wanted[high] += error[row] / spread
            wanted[low] -= error[row] / spread
        assert torch.allclose(gradient[row], wanted, atol=1e-5)


def test_the_gradient_along_x_is_exact():
    """Codes do not change when x grows, so that the derivative along x is the rounded x itself."""
    x, v = tokens(6, 40).requires_grad_(), tokens(6, 40, seed=1)
    found = fake_quantize(x, 3, symmetric=False)
    (gradient,) = torch.autograd.grad((found * v).sum(), x)
    assert torch.allclose((gradient * x).sum(-1), (found * v).sum(-1), rtol=1e-4)


def test_tokens_of_zeros_have_gradients():
    x = torch.zeros(2, 8, requires_grad=True)
    found = fake_quantize(x, 4, symmetric=False)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(found, x) and torch.equal(gradient, torch.ones_like(x))


def test_several_matrices_reach_their_optimum_at_once():
    wanted = [make_rotation(n, "random", n).matrix() for n in (12, 8)]
    turns = [torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (12, 8)]
    start = [w @ torch.linalg.matrix_exp(0.2 * (t - t.T)) for w, t in zip(wanted, turns, strict=True)]
    seen = []

    def loss(matrices, step):
        assert step == len(seen)
        return sum((m - w).square().sum() for m, w in zip(matrices, wanted, strict=True))

    options = SpinquantOptions(steps=300, learning_rate=0.05, momentum=0.5)
    found, curve = train(start, loss, options, seen.append)
    assert seen == curve and len(curve) == 300
    assert curve[1] < curve[0] and curve[-1] < 1e-6 * curve[0]
    for matrix, aim in zip(found, wanted, strict=True):
        assert (matrix - aim).abs().max() < 1e-3
        assert (matrix.T @ matrix - torch.eye(len(aim))).abs().max() < 1e-14


def test_outliers_are_rotated_away():
    """Vectors with three loud channels: training finds a basis in which four bits cost less than in Hadamard's."""
    loud = torch.ones(32)
    loud[[1, 9, 30]] = 30.0
    rows, held_out = (tokens(256, 32, seed=s) * loud for s in (0, 1))

    def error(matrix, x):
        y = x @ matrix.float()
        return (fake_quantize(y, 4, symmetric=False) - y).square().sum(-1).mean()

    start = make_rotation(32, "hadamard", 0).matrix()
    first = float(error(start, rows))
    options = SpinquantOptions(steps=100, learning_rate=0.3, momentum=0.9)
    (found,), _ = train([start], lambda m, _: error(m[0], rows) / first, options)
    assert error(found, held_out) < 0.8 * error(start, held_out)


def test_training_ends_where_the_loss_breaks_down():
    start = make_rotation(8, "random", 0).matrix()

    def loss(matrices, step):
        return matrices[0].sum() * (float("nan") if step == 3 else 1.0)

    (found,), curve = train([start], loss, SpinquantOptions(steps=9))
    assert len(curve) == 3
    assert (found.T @ found - torch.eye(8)).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a_bits": "16"}, "nothing is rounded"),
        ({"w_bits": "4"}, "objective local rounds no weights, w_bits 4 would have no effect"),
        ({"a_bits": "16", "w_bits": "4"}, "objective local rounds no weights"),
        ({"objective": "kl"}, "objective is one of local, divergence"),
        ({"a_bits": "9"}, "a_bits must be 2 to 8, or 16 for none, got 9"),
        ({"w_bits": "1"}, "w_bits must be 2 to 8, or 16 for none, got 1"),
        ({"steps": "0"}, "steps must be 1 or more"),
        ({"batch_rows": "0"}, "batch_rows must be 1 or more"),
        ({"row_len": "-1"}, "row_len must be 1 or more"),
        ({"learning_rate": "0"}, "learning_rate must be above 0"),
        ({"learning_rate": "nan"}, "learning_rate must be above 0"),
        ({"momentum": "1"}, "momentum must be 0 or more and below 1"),
        ({"rotate_mode": "dct"}, "rotate_mode is one of hadamard, random"),
        ({"step": "3"}, "did you mean 'steps'"),
    ],
)
def test_options_that_cannot_be(values, message):
    with pytest.raises(UsageError, match=message):
        make_options(ALGORITHMS["spinquant"], values)
