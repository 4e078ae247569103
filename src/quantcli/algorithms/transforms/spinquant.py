"""SpinQuant: rotations as QuaRot's, trained so that rounding hurts the model least (https://arxiv.org/abs/2405.16406).

R1 of the residual stream and R2 of the value heads, one per block, start as Hadamard matrices after random signs. The
model is frozen; rounding passes gradients straight through; Cayley SGD (tensors/stiefel.py) keeps the matrices
orthogonal. The float function stays what it was, whatever is learned.

The paper descends the loss of the whole model (objective=divergence here: KL divergence to the float model, which,
unlike cross entropy, has no gradient where nothing is rounded). Its gradient by R is mostly noise at 8 bits: the
rounding errors of all layers meet in it, and it takes far more text than a CPU can read in minutes. objective=local
descends what that loss is in expectation, for rounding errors that know nothing of each other: the sum over inputs x
of linears of |Q(x R) - x R|^2 |g|^2, with g the gradient by x of the log-probability of a token drawn from the float
model, averaged over tokens. x and g are gathered once, by one pass forwards and backwards; each step draws from them.

Left out: R3 and R4, which would have to be computed at run time, and rounding of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quantcli.algorithms import Algorithm
from quantcli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALGORITHM", "SpinquantOptions", "fake_quantize", "train"]

FLOAT = 16
"""Bits that stand for no rounding."""


@dataclass(frozen=True)
class SpinquantOptions:
    """How rotations are trained."""

    a_bits: int = 8
    """Bits of the inputs of linears in training, 2 to 8; one asymmetric grid per token. 16: not rounded."""
    w_bits: int = 16
    """Bits of weights in training, 2 to 8; one symmetric grid per row. 16: not rounded, for a rounder that follows."""
    objective: Literal["local", "divergence"] = "local"
    """local: expected effect of each rounding error by itself; divergence: the whole model's, at far more time."""
    steps: int = 100
    """Steps of training."""
    batch_rows: int = 16
    """Rows of text per step; with objective=local, as many tokens are drawn from those of all layers."""
    row_len: int = 128
    """Tokens per row of training: calibration rows are cut into rows of this length."""
    learning_rate: float = 0.3
    """Longest step at the beginning; it falls to zero along a line."""
    momentum: float = 0.9
    """Share of the earlier steps' direction that stays."""
    rotate_mode: Literal["hadamard", "random"] = "hadamard"
    """Where training starts, as in quarot."""
    rotation_seed: int = 0
    """Seed of the start."""

    def __post_init__(self) -> None:
        for name in ("a_bits", "w_bits"):
            value = getattr(self, name)
            if not (2 <= value <= 8 or value == FLOAT):
                raise UsageError(f"spinquant: {name} must be 2 to 8, or 16 for none, got {value}")
        if self.a_bits == self.w_bits == FLOAT:
            raise UsageError("spinquant: with a_bits and w_bits 16 nothing is rounded", hint="use -a quarot")
        if self.objective == "local" and self.w_bits != FLOAT:
            raise UsageError(
                f"spinquant: objective local rounds no weights, w_bits {self.w_bits} would have no effect",
                hint="add --set objective=divergence",
            )
        for name in ("steps", "batch_rows", "row_len"):
            if getattr(self, name) < 1:
                raise UsageError(f"spinquant: {name} must be 1 or more, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise UsageError(f"spinquant: learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"spinquant: momentum must be 0 or more and below 1, got {self.momentum}")


def fake_quantize(x: Tensor, bits: int, *, symmetric: bool) -> Tensor:
    """Rounds the last axis of x [..., D] to a grid of its own range, with gradients.

    The value is `quantize_per_token`'s. Rounding itself passes gradients straight through (one for one); the error of
    rounding grows with the range of the grid, so that a gradient also reaches the largest and the smallest entry.
    """
    from quantcli.tensors.activations import quantize_per_token

    if bits == FLOAT:
        return x
    fixed = x.detach()
    error = quantize_per_token(fixed, bits, symmetric=symmetric) - fixed
    if symmetric:
        spread = x.abs().amax(-1, keepdim=True)
    else:
        spread = x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)
    return x + error * (spread / spread.detach().clamp(min=1e-30))


def train(
    start: Sequence[Tensor],
    loss: Callable[[Sequence[Tensor], int], Tensor],
    options: SpinquantOptions,
    note: Callable[[float], None] = lambda value: None,
) -> tuple[list[Tensor], list[float]]:
    """Trains orthogonal matrices.

    Args:
        start: Matrices [n, n], orthogonal.
        loss: Of the matrices at a step, differentiable in them.
        options: Steps, learning rate, momentum.
        note: Told of each step's loss.

    Returns:
        The matrices, float64 and orthogonal to rounding, and the loss at each step. Training ends early where a loss
        is not finite.
    """
    import torch

    from quantcli.tensors.stiefel import cayley_step, nearest_orthogonal

    found = [matrix.detach().double() for matrix in start]
    momenta: list[Tensor | None] = [None] * len(found)
    curve: list[float] = []
    for step in range(options.steps):
        leaves = [matrix.clone().requires_grad_() for matrix in found]
        value = loss(leaves, step)
        gradients = torch.autograd.grad(value, leaves)
        if not all(bool(torch.isfinite(part).all()) for part in (value, *gradients)):
            break
        curve.append(float(value.detach()))
        rate = options.learning_rate * (1 - step / options.steps)
        for i, gradient in enumerate(gradients):
            found[i], momenta[i] = cayley_step(
                found[i], gradient, momenta[i], learning_rate=rate, beta=options.momentum
            )
        note(curve[-1])
    return [nearest_orthogonal(matrix) for matrix in found], curve


ALGORITHM = Algorithm(
    name="spinquant",
    kind="transform",
    summary="rotate as quarot does, by rotations trained against rounded activations; alone it writes a float model",
    bits=(2, 3, 4, 5, 6, 7, 8),
    calibration="required",
    options=SpinquantOptions,
    run=train,
    scope="model",
)
