"""Distillation of a quantized model from its float one: codes stay, scales, norms and biases are trained end to end.

The second phase of EfficientQAT (https://arxiv.org/abs/2407.11062). Any rounder decides codes and zero points; then
the scale of every group is trained so that the whole model's next-token distribution comes near the float model's.
The loss is the KL divergence over the full vocabulary, where the paper takes cross entropy: on the little text of a
calibration, the float model's distribution says more than the one token that came.

AdamW without decay, a warm-up of a few steps, then half a cosine. A step is relative to the mean magnitude of the
tensor that it changes, and to the grid: learning_rate / 2**bits, which is 0.4% at 2 bits and 0.1% at 4. Every forward
sees the tensors rounded to the dtype that they are stored in; the gradient passes the rounding straight through.

Left out: training of zero points, and the paper's first phase, block by block, that trains weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantcli.algorithms import Algorithm
from quantcli.errors import DivergedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALGORITHM", "DistillOptions", "Progressed", "rate_at", "train"]

_WARM_UP = 5
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class DistillOptions:
    """How scales are trained."""

    train_rows: int = 128
    """Rows of text, as long as calibration rows: from the same source, but not the same rows, since what has decided
    the codes is learned by heart soonest. A sixteenth of them, 8 at most, only judge."""
    epochs: int = 1
    """How often each row is seen; on little text, a second time begins to overfit."""
    batch_rows: int = 2
    """Rows per step."""
    learning_rate: float = 0.016
    """Longest step: learning_rate / 2**bits, relative to the mean magnitude of each tensor."""

    def __post_init__(self) -> None:
        if self.train_rows < 2:
            raise UsageError(f"distill: train_rows must be 2 or more, one of them to judge, got {self.train_rows}")
        for name in ("epochs", "batch_rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"distill: {name} must be 1 or more, got {getattr(self, name)}")
        if not 0 < self.learning_rate < 1:
            raise UsageError(f"distill: learning_rate must be above 0 and below 1, got {self.learning_rate}")

    @property
    def judges(self) -> int:
        """Rows that only judge, where there are as many as asked for."""
        return min(8, max(1, self.train_rows // 16))

    def steps(self, rows: int) -> int:
        """Steps of the optimizer over so many training rows; an epoch's last batch may be smaller."""
        return self.epochs * math.ceil(rows / self.batch_rows)


@dataclass
class Progressed:
    """Where a training stands: all that a run needs which goes on with it."""

    values: list[Tensor]
    """The trained tensors, float32."""
    averages: list[Tensor]
    """Of their gradients."""
    squares: list[Tensor]
    """Of the gradients' squares."""
    losses: list[float] = field(default_factory=list)
    """Of the steps that are done."""

    @classmethod
    def begin(cls, values: Sequence[Tensor]) -> Progressed:
        """Before the first step."""
        import torch

        return cls(list(values), [torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values])


def rate_at(step: int, steps: int) -> float:
    """The share of the longest step that a step takes: a short rise, then half a cosine down to almost nothing."""
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    state: Progressed,
    rates: Sequence[float],
    steps: int,
    loss: Callable[[int], float],
    done: Callable[[Progressed], None] = lambda state: None,
) -> None:
    """Takes the steps that are left, in place.

    Args:
        state: Where the training stands; its values are leaves that take gradients.
        rates: Longest step of each tensor.
        steps: Of the whole training.
        loss: Of a step: computes it from the values, adds its gradients to them, returns it.
        done: Told after each step.

    Raises:
        DivergedError: a loss or a gradient is not finite; the state is that of the step before.
    """
    import torch

    optimizer = torch.optim.AdamW(
        [{"params": [value], "lr": rate} for value, rate in zip(state.values, rates, strict=True)],
        betas=_BETAS,
        weight_decay=0.0,
    )
    begun = len(state.losses)
    for value, average, square in zip(state.values, state.averages, state.squares, strict=True):
        # tensors that no step has reached are stepped with gradient 0, so that all have taken as many steps
        optimizer.state[value] = {"step": torch.tensor(float(begun)), "exp_avg": average, "exp_avg_sq": square}
    for step in range(begun, steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rate_at(step, steps)
        for value in state.values:
            value.grad = torch.zeros_like(value)
        found = loss(step)
        finite = math.isfinite(found) and all(
            bool(torch.isfinite(v.grad).all()) for v in state.values if v.grad is not None
        )
        if not finite:
            raise DivergedError(
                f"distill: the loss or a gradient is no longer finite at step {step + 1} of {steps} (loss {found:g})",
                hint="lower --set distill.learning_rate (0.016 by default); what was rounded is kept",
            )
        optimizer.step()
        state.losses.append(found)
        done(state)


ALGORITHM = Algorithm(
    name="distill",
    kind="trainer",
    summary="train scales, norms and biases of what a rounder made by distillation from the float model; codes stay",
    bits=(2, 3, 4, 5, 6, 7, 8),
    calibration="required",
    options=DistillOptions,
    run=train,
    formats=("gptq", "awq", "compressed-tensors"),
)
