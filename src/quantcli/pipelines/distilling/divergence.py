"""KL divergence with a gradient that takes the place of what it was computed from: logits are the largest tensors."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["divergence"]

_CHUNK = 64  # tokens whose distributions exist in several copies at once


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of KL(wanted || logits), in nats; differentiable in `logits`.

    Args:
        logits: [T, V] float32.
        wanted: [T, V] float32 logits; they are used up.
    """
    found: Tensor = _Divergence.apply(logits, wanted)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float64)
        for ours, theirs in zip(torch.split(logits, _CHUNK), torch.split(wanted, _CHUNK), strict=True):
            said, meant = ours.log_softmax(-1), theirs.log_softmax(-1)
            share = meant.exp()
            # a logit of -inf has no share, and 0 * inf is no number
            total += torch.where(share > 0, share * (meant - said), 0).sum(dtype=torch.float64)
            theirs.copy_(said.exp_() - share)
        ctx.gradient = wanted.div_(len(logits))
        return (total / len(logits)).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.mul_(grads[0]), None
