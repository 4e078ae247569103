"""A float model that computes what its rotated and quantized self would, differentiable in the rotations.

Nothing is rotated for good. The residual stream stays as it is; each linear's input x is seen in the rotated basis,
rounded there and turned back: Q(x R) R^T in place of x, which costs two products with R per token and leaves weights
alone, while rotating the weights W R would cost as much as hundreds of tokens at every step. Where weights are to be
rounded as well, there is no way around it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quantcli.models.layout import Layout
from quantcli.models.rotate import Part, RotatedCheckpoint
from quantcli.models.skeleton import disk_name

__all__ = ["Reading", "RotatedForward", "turn"]


@dataclass(frozen=True)
class Reading:
    """What linears read in a float model, where a rotation has a say in it."""

    part: Part
    """Of one of the linears."""
    x: Tensor
    """[..., K] the input."""
    probe: Tensor
    """Zeros that were added to it: their gradient is the loss's by the input."""


class RotatedForward:
    """Runs a model with or without rotations in its linears; the model is changed for good."""

    def __init__(
        self,
        model: Any,
        layout: Layout,
        checkpoint: RotatedCheckpoint,
        inputs: Callable[[Tensor], Tensor],
        weights: Callable[[Tensor], Tensor] | None = None,
    ):
        """Gives the model's linears another forward.

        Args:
            model: With the tensors of `checkpoint` under rotations that do nothing: norm gains are in the linears.
            layout: Its parts.
            checkpoint: Knows which linear reads and writes what.
            inputs: Rounds what a linear reads, along the last axis.
            weights: Rounds weights [N, K] along the last axis; None leaves them float.
        """
        self._inputs, self._weights = inputs, weights
        self._rotations: tuple[Tensor, Sequence[Tensor]] | None = None
        self._readings: list[Reading] | None = None
        self._seen: tuple[Tensor, Tensor] | None = None
        for name in layout.linears:
            disk = disk_name(f"{name}.weight", model, checkpoint.entries)
            assert disk is not None
            module = model.get_submodule(name)
            module.forward = partial(self._linear, module, checkpoint.parts[disk])

    @contextmanager
    def rotated(self, stream: Tensor, heads: Sequence[Tensor]) -> Iterator[None]:
        """Within, the model runs rotated by stream [D, D] and one heads[i] [H, H] per block, and quantized."""
        self._rotations = stream, heads
        try:
            yield
        finally:
            self._rotations = self._seen = None

    @contextmanager
    def probed(self) -> Iterator[list[Reading]]:
        """Within, the float model notes what its linears read."""
        self._readings = []
        try:
            yield self._readings
        finally:
            self._readings = self._seen = None

    def _linear(self, module: nn.Linear, part: Part, x: Tensor) -> Tensor:
        if self._rotations is None:
            return linear(self._probe(x, part), module.weight, module.bias)
        stream, head = self._rotations[0], self._rotations[1][part.block]
        if self._weights is None:
            return linear(self._read(x, part, stream, head), module.weight, module.bias)
        weight = turn(module.weight, part, stream, head)
        if part.rotate_rows:
            weight = stream.T @ weight
        if part.value_rows:
            weight = _last(weight.T, part.value_rows, head).T
        out = linear(self._read(x, part, stream, head), self._weights(weight))
        if part.rotate_rows:
            out = out @ stream.T
        if part.value_rows:
            out = _last(out, part.value_rows, head.T)
        return out if module.bias is None else out + module.bias

    def _probe(self, x: Tensor, part: Part) -> Tensor:
        """The input itself, noted once."""
        if self._readings is None or not (part.rotate_columns or part.value_columns):
            return x
        if self._seen is None or self._seen[0] is not x:
            probe = torch.zeros_like(x, requires_grad=True)
            self._readings.append(Reading(part, x.detach(), probe))
            self._seen = x, x + probe
        return self._seen[1]

    def _read(self, x: Tensor, part: Part, stream: Tensor, head: Tensor) -> Tensor:
        """What a linear reads of x: in the rotated basis where its weight is, else turned back; made once per x."""
        if self._seen is not None and self._seen[0] is x:
            return self._seen[1]
        seen = self._inputs(turn(x, part, stream, head))
        if self._weights is None:
            seen = turn(seen, part, stream.T, head.T)
        self._seen = x, seen
        return seen


def turn(x: Tensor, part: Part, stream: Tensor, head: Tensor) -> Tensor:
    """The columns of x [..., K] through the rotation of what they are: residual stream, value heads, or neither."""
    if part.rotate_columns:
        return x @ stream
    return _heads(x, head) if part.value_columns else x


def _heads(x: Tensor, head: Tensor) -> Tensor:
    """Each run of columns of x [..., heads * H] times head [H, H]."""
    parts = x.reshape(*x.shape[:-1], -1, len(head)) @ head
    return parts.reshape(x.shape)


def _last(x: Tensor, count: int, head: Tensor) -> Tensor:
    """The last `count` columns of x as value heads."""
    first = x.shape[-1] - count
    turned = _heads(x[..., first:], head)
    return turned if first == 0 else torch.cat([x[..., :first], turned], dim=-1)
