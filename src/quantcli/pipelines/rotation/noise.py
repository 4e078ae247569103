"""What rounding the inputs of linears costs in expectation: a loss of rotations that needs the model only once.

An input x rounded in the basis R becomes x + e R^T with e = Q(x R) - x R. Where the entries of e are small and know
nothing of each other, the divergence that it causes is |e|^2 |g|^2 up to a factor, with g the gradient by x of the
log-probability of a token that the model itself draws: the mean of g g^T is the Fisher information, which is the
divergence's second derivative, and the sum over drawn tokens keeps the expectation right. |g|^2 is averaged over the
tokens of each place in the model: token by token, one in a hundred carries a third of the sum, and what is learned fits
those few.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.models.rotate import Part
from quantcli.models.rotated_forward import RotatedForward, turn

__all__ = ["RoundingNoise"]

_STRIDE = 2
"""One token in so many is kept of each row: neighbours are alike, and memory is not free."""
_FEWEST = 64
"""Tokens that every rotation of value heads sees at a step at least."""
_CHUNK = 4096


@dataclass
class _Pool:
    """Inputs that one matrix rotates."""

    part: Part
    x: Tensor
    """[M, K] float32."""
    cost: Tensor
    """[M] what rounding each of them costs under the start."""
    error: Tensor
    """[M] squared error of rounding under the start."""


class RoundingNoise:
    """The loss: relative to the start, summed over R1 and the R2 of every block."""

    def __init__(
        self,
        forward: RotatedForward,
        log_probabilities: Callable[[Tensor], Tensor],
        quantize: Callable[[Tensor], Tensor],
        rows: Tensor,
        start: Sequence[Tensor],
        draws: int,
    ):
        """Runs the float model over some rows, forwards and backwards.

        Args:
            forward: Of the model.
            log_probabilities: [1, T, V] of the float model on a row [1, T].
            quantize: Rounds the last axis, with gradients.
            rows: [rows, T] int64.
            start: R1 and an R2 per block.
            draws: Inputs that R1 sees at a step.
        """
        self._quantize, self._draws = quantize, draws
        found: dict[int, list[tuple[Part, Tensor, Tensor]]] = defaultdict(list)
        for row in torch.split(rows, 1):
            with forward.probed() as readings:
                logs = log_probabilities(row)[0]
                drawn = torch.multinomial(logs.detach().exp(), 1)
                probes = [reading.probe for reading in readings]
                gradients = torch.autograd.grad(logs.gather(-1, drawn).sum(), probes, allow_unused=True)
            for reading, gradient in zip(readings, gradients, strict=True):
                if gradient is not None and gradient.numel():  # an expert may see no token
                    number = 0 if reading.part.rotate_columns else 1 + reading.part.block
                    x = reading.x.flatten(0, -2)[::_STRIDE].clone()
                    weight = gradient.square().sum(-1).mean().expand(len(x))
                    found[number].append((reading.part, x, weight))
        self._pools = {number: self._pool(parts, start[number].float()) for number, parts in found.items()}

    def _pool(self, parts: list[tuple[Part, Tensor, Tensor]], matrix: Tensor) -> _Pool:
        part, x = parts[0][0], torch.cat([x for _, x, _ in parts])
        with torch.no_grad():
            error = torch.cat([self._error(chunk, part, matrix) for chunk in torch.split(x, _CHUNK)])
        return _Pool(part, x, error * torch.cat([weight for _, _, weight in parts]), error)

    def _error(self, x: Tensor, part: Part, matrix: Tensor) -> Tensor:
        """[M] squared error of rounding in the basis of a matrix."""
        turned = turn(x, part, matrix, matrix)
        return (self._quantize(turned) - turned).square().sum(-1)

    def __call__(self, matrices: Sequence[Tensor], step: int) -> Tensor:
        """The loss on inputs drawn by what they cost under the start, where it is one for every matrix."""
        total = sum((matrix.sum() for matrix in matrices), torch.zeros(())) * 0  # a matrix without inputs stays
        for number, pool in self._pools.items():
            if not float(pool.cost.sum()) > 0:
                continue
            draws = self._draws if number == 0 else max(_FEWEST, self._draws // len(matrices))
            chosen = torch.multinomial(pool.cost, draws, replacement=True)
            error = self._error(pool.x[chosen], pool.part, matrices[number].float())
            total = total + (error / pool.error[chosen]).mean()
        return total
