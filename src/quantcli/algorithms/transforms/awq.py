"""AWQ: enlarge the weights that large inputs meet, so that rounding hurts them less (https://arxiv.org/abs/2306.00978).

Column k of W is multiplied by s[k] and whatever makes the input divided by it: the float function stays. s is searched
on a grid, s = a^r / w^(1-r), with a the size of each input and w that of each column within its groups.

Symbols: W [N, K]; H [K, K] second moment of the input; R scales, K columns (K is a multiple of R where heads share a
value head); rows [K] the scale of each column.

Where this differs from the paper, and why:

- a is the root mean square, diag(H)^1/2, not the mean magnitude: the walk has it already;
- a grid point is scored by tr(E H E^T), E = W - round(W s) / s, which is the squared output error that the paper
  measures by a forward; large layers are scored on a sample of their rows;
- where tokens were held out, the scale is kept only if it lowers the error on those too;
- the paper's clip search is left to the rounder that follows: kquant's weighted search tries clipped ranges for each
  group, with each input's mean square as weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantcli.algorithms import Algorithm
from quantcli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from quantcli.scheme import Scheme
    from quantcli.tensors.hessian import Statistics

__all__ = ["ALGORITHM", "AwqOptions", "find_scale"]


@dataclass(frozen=True)
class AwqOptions:
    """How hard to search."""

    n_grid: int = 20
    """Exponents tried between 0 (no scaling by the input) and 1."""
    duo_scaling: bool = True
    """Let the size of the weights take part, as AutoAWQ does; false: the inputs' size alone, as in the paper."""
    rows: int = 1024
    """Output rows that score a grid point, drawn evenly."""

    def __post_init__(self) -> None:
        if self.n_grid < 1 or self.rows < 1:
            raise UsageError("awq: n_grid and rows must be 1 or more")


def find_scale(
    weights: Sequence[Tensor],
    schemes: Sequence[Scheme],
    options: AwqOptions,
    statistics: Statistics,
    rows: Tensor,
) -> Tensor | None:
    """The scale of the inputs of linears that share them.

    Args:
        weights: [N, K] each, float32.
        schemes: The grid of each.
        options: The search.
        statistics: Of the input.
        rows: [K] int64: the scale that each column takes; several columns may share one.

    Returns:
        s [R] float32, positive; None where no scale is better than none.
    """
    import torch

    total = sum(len(w) for w in weights)
    step = max(1, total // options.rows)
    samples = [w[::step] for w in weights]
    count = int(rows.max()) + 1

    def shared(values: Tensor) -> Tensor:
        """Mean over the columns of one scale, [K] to [R]."""
        sums = torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, rows, values)
        return sums / torch.bincount(rows, minlength=count).clamp(min=1)

    inputs = shared(statistics.hessian.diagonal().float()).clamp(min=0).sqrt()
    inputs = torch.where(inputs > 0, inputs, inputs.mean())  # what never came is as good as anything
    sizes = shared(_column_sizes(weights, schemes))

    def error(scale: Tensor | None, hessian: Tensor) -> float:
        columns = None if scale is None else scale[rows]
        return sum(_error(w, s, columns, hessian) for w, s in zip(samples, schemes, strict=True))

    best, least = None, error(None, statistics.hessian)
    for number in range(options.n_grid):
        ratio = (number + 1) / options.n_grid if not options.duo_scaling else number / options.n_grid
        scale = inputs.pow(ratio)
        if options.duo_scaling:
            scale = scale / (sizes.pow(1 - ratio) + 1e-4)
        scale = _normalized(scale)
        found = error(scale, statistics.hessian)
        if found < least:
            best, least = scale, found
    if best is not None and statistics.held_out is not None:
        without = error(None, statistics.held_out)
        if not error(best, statistics.held_out) < without:
            return None
    return best


def _column_sizes(weights: Sequence[Tensor], schemes: Sequence[Scheme]) -> Tensor:
    """Mean over the rows of |w| / largest |w| of its group, [K]."""
    import torch
    from torch.nn.functional import pad

    total, count = torch.zeros(weights[0].shape[1], device=weights[0].device), 0
    for weight, scheme in zip(weights, schemes, strict=True):
        columns = weight.shape[1]
        size = scheme.columns_per_group(columns)
        groups = pad(weight.abs(), (0, -columns % size)).view(len(weight), -1, size)
        relative = groups / groups.amax(2, keepdim=True).clamp(min=1e-12)
        total += relative.view(len(weight), -1)[:, :columns].sum(0)
        count += len(weight)
    return total / count


def _normalized(scale: Tensor) -> Tensor:
    """Around 1, within what float16 scales can undo; 1 where there is no sensible value."""
    import torch

    scale = scale.clamp(min=1e-4)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return torch.where(torch.isfinite(scale), scale, torch.ones_like(scale)).clamp(2.0**-6, 2.0**6)


def _error(weight: Tensor, scheme: Scheme, scale: Tensor | None, hessian: Tensor) -> float:
    """tr(E H E^T) for rounding to nearest in the scaled domain."""
    from quantcli.tensors.grids import round_nearest

    scaled = weight if scale is None else weight * scale
    rounded = round_nearest(scaled, scheme).dequantize()
    difference = weight - (rounded if scale is None else rounded / scale)
    return float(((difference @ hessian) * difference).sum())


ALGORITHM = Algorithm(
    name="awq",
    kind="transform",
    summary="scale up the weights that large inputs meet, then round by another algorithm",
    bits=(2, 3, 4, 5, 6, 7, 8),
    calibration="required",
    options=AwqOptions,
    run=find_scale,
    inputs=("checkpoint", "onnx"),
    group_size=128,
    then="kquant",
)
