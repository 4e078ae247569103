"""GPTQ: round column by column, feed each column's error into those still to come (https://arxiv.org/abs/2210.17323).

Symbols: W [N, K] weight; H [K, K] second moment of the input; U [K, K] upper factor, U^T U = (H + damping)^-1; C [N, K]
codes; S, Z [N, G] scale and zero; Q = (C - Z) S.

Beyond the paper, each step measured (docs/algorithms.md):

- act-order with static groups: columns of large diag(H) first, while groups stay in memory order and their grids are
  fixed beforehand, so that nothing changes at run time;
- grids by a search that weighs squared errors with diag(H);
- `refit`: for fixed codes, the scales that minimize tr((W-Q) H (W-Q)^T), one G x G system per row;
- `sweeps`: coordinate descent over the codes under the exact H (QuantEase, https://arxiv.org/abs/2309.01885);
- on GGML's block types the two-level scales are chosen first, as they will be stored, and errors are fed back through
  the codes on that grid; `refit` then moves the float16 scales of super-blocks, whose integers stay;
- correction of earlier layers: where the input of the float model is known, W is first replaced by the least-squares
  map from the quantized model's input to the float output (GPTAQ, https://arxiv.org/abs/2504.02692; Qronos,
  https://arxiv.org/abs/2505.11695).

Where tokens were held out, each of refit, sweeps and correction is kept only if it lowers the error on those.
The paper's natural order with lazily chosen grids is `order=dynamic`; `order=desc_act` permutes groups as AutoGPTQ
does. Left out: mixture of group orders (GAR), which measured behind static act-order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from quantcli.algorithms import UNIFORM_FORMATS, Algorithm
from quantcli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.scheme import Scheme
    from quantcli.tensors.grids import Grid
    from quantcli.tensors.hessian import Statistics
    from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["ALGORITHM", "GptqOptions", "quantize"]

_JUDGED_ROWS = 256
"""Rows that decide whether an improvement is kept for a stage: their errors differ by per cents."""
_SHARED = 3
"""Rounds of refinement of the scales of super-blocks."""


@dataclass(frozen=True)
class GptqOptions:
    """How GPTQ orders columns, chooses grids and improves the result."""

    damp_percent: float = 0.01
    """Share of the Hessian's mean diagonal that is added to it; doubled while it cannot be factored."""
    order: Literal["static", "none", "dynamic", "desc_act"] = "static"
    """static: columns by falling diag(H), groups and grids fixed beforehand, no run-time cost; none: memory order,
    grids fixed beforehand; dynamic: memory order, each group's grid from the weights as corrected so far; desc_act:
    columns by falling diag(H) and groups along that order (needs g_idx at run time)."""
    grid: Literal["weighted", "minmax"] = "weighted"
    """weighted: search scale and zero under diag(H); minmax: each group's range."""
    grid_steps: int = 60
    """Ranges that the weighted search tries."""
    refit: bool = False
    """Refit the scales to the final codes in closed form."""
    sweeps: int = 0
    """Sweeps of coordinate descent over the codes."""
    correction: float = 1.0
    """Share of the earlier layers' error that is corrected, where the walk brings the float model's inputs."""
    block_size: int = 128
    """Columns between two feedbacks by matrix product; results do not depend on it."""

    def __post_init__(self) -> None:
        if not 0 <= self.damp_percent < 10:
            raise UsageError(f"gptq: damp_percent must be 0 to 10, got {self.damp_percent}")
        if self.sweeps < 0 or self.grid_steps < 1 or self.block_size < 1:
            raise UsageError("gptq: sweeps must be 0 or more, grid_steps and block_size 1 or more")
        if not 0 <= self.correction <= 1:
            raise UsageError(f"gptq: correction must be 0 to 1, got {self.correction}")


def quantize(weight: Tensor, scheme: Scheme, options: GptqOptions, statistics: Statistics | None) -> QuantizedTensor:
    """Quantizes W [N, K] under the statistics of its input.

    Rows are independent given the factor: q, k and v of one input may come stacked, at the cost of one.
    """
    if statistics is None:
        raise AssertionError("gptq needs statistics")
    if statistics.held_out is None:
        return _solve(weight, scheme, options, statistics)[-1]
    options = _choose(weight, scheme, options, statistics)
    return _solve(weight, scheme, options, statistics.everything())[-1]


def _choose(weight: Tensor, scheme: Scheme, options: GptqOptions, statistics: Statistics) -> GptqOptions:
    """The options, less what does not lower the error on held-out tokens; a sample of the rows tells."""
    weight = weight[:: max(1, len(weight) // _JUDGED_ROWS)].contiguous()
    plain = replace(options, correction=0.0)
    corrected = options.correction > 0 and statistics.cross is not None
    if not (corrected or options.refit or options.sweeps):
        return options
    best, best_error = options, float("inf")
    for candidate in [plain, options] if corrected else [plain]:
        results = _solve(weight, scheme, candidate, statistics)
        stages = [
            replace(candidate, refit=False, sweeps=0),
            replace(candidate, sweeps=0),
            candidate,
        ]
        # _solve returns the plain result, then one per improvement that the options ask for
        kept = [stages[0], *([stages[1]] if candidate.refit else []), *([stages[2]] if candidate.sweeps else [])]
        for chosen, result in zip(kept, results, strict=True):
            error = _held_out_error(weight, result.dequantize(weight.dtype), statistics)
            if error < best_error:
                best, best_error = chosen, error
    return best


def _held_out_error(weight: Tensor, quantized: Tensor, statistics: Statistics) -> float:
    """Squared output error on held-out tokens, less a constant: tr(Q H Q^T) - 2 tr(W C Q^T)."""
    hessian = statistics.held_out
    assert hessian is not None
    target = statistics.held_out_cross if statistics.held_out_cross is not None else hessian
    hessian, target = hessian.to(weight.dtype), target.to(weight.dtype)
    # written around W so that small differences are not lost between two large numbers
    difference = weight - quantized
    drift = target - hessian
    return float(((difference @ hessian) * difference).sum() - 2 * ((weight @ drift) * quantized).sum())


def _solve(weight: Tensor, scheme: Scheme, options: GptqOptions, statistics: Statistics) -> list[QuantizedTensor]:
    """The result of error feedback, then one after refit and one after the sweeps where they are asked for."""
    import torch

    from quantcli.tensors.grids import find_divisor
    from quantcli.tensors.quantized import group_index

    columns = weight.shape[1]
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    hessian = statistics.hessian.to(dtype)
    diagonal = hessian.diagonal()
    dead = diagonal <= 0  # inputs that were always zero: their weights are irrelevant, keep them from the solve
    if bool(dead.any()):
        hessian = hessian.clone()
        hessian.diagonal()[dead] = diagonal[~dead].mean() if bool((~dead).any()) else 1.0
    natural = torch.arange(columns, device=weight.device)
    by_size = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    order = by_size if options.order in ("static", "desc_act") else natural
    group = group_index(columns, scheme, weight.device)
    if options.order == "desc_act":
        group = torch.empty_like(group).scatter_(0, order, group)

    def factor() -> Tensor:
        from quantcli.tensors.hessian import inverse_factor

        return inverse_factor(hessian, options.damp_percent, order)

    upper = statistics.cached(("factor", options.damp_percent, options.order, dtype), factor)
    target = weight.to(dtype)
    if options.correction > 0 and statistics.cross is not None:
        target = _corrected(target, hessian, statistics.cross.to(dtype), upper, order, options.correction)

    grid_order = order if options.order == "desc_act" else natural
    divisor = find_divisor(target, scheme)
    if options.order == "dynamic" or (options.order == "desc_act" and scheme.group_size != -1):
        codes, grid = _feed_back_dynamic(target, upper, order, hessian.diagonal(), scheme, options, divisor)
    else:
        grid = _grid(target[:, grid_order], hessian.diagonal()[grid_order], scheme, options, divisor)
        codes = _feed_back(target[:, order].contiguous(), upper, grid, group[order], options.block_size)
    at = group[order]

    def result() -> QuantizedTensor:
        in_memory = torch.empty_like(codes)
        in_memory[:, order] = codes
        return grid.tensor(in_memory, group)

    results = [result()]
    if options.refit or options.sweeps:
        goal, ordered = target[:, order], hessian[order][:, order]
        if options.refit:
            grid = _refit(goal, ordered, codes, grid, at)
            results.append(result())
        if options.sweeps:
            codes = _descend(goal, ordered, codes.clone(), grid, at, options)
            if options.refit:
                grid = _refit(goal, ordered, codes, grid, at)
            results.append(result())
    return results


def _grid(weight: Tensor, diagonal: Tensor, scheme: Scheme, options: GptqOptions, divisor: Tensor | None) -> Grid:
    from quantcli.tensors.grids import searched_grid, span_grid

    if options.grid == "minmax":
        return span_grid(weight, scheme, divisor=divisor)
    refine = 0 if scheme.block_type is None else _SHARED  # scales that many groups share have to be refitted to them
    return searched_grid(weight, scheme, diagonal, steps=options.grid_steps, refine=refine, divisor=divisor)


def _corrected(weight: Tensor, hessian: Tensor, cross: Tensor, upper: Tensor, order: Tensor, share: float) -> Tensor:
    """W + share * W (C - H) (H + damping)^-1: the float output as well as the quantized model's input can tell it."""
    drift = (weight @ (cross - hessian))[:, order]
    step = (drift @ upper.T) @ upper
    out = weight.clone()
    out[:, order] += share * step
    return out


def _feed_back(weight: Tensor, upper: Tensor, grid: Grid, group: Tensor, block_size: int) -> Tensor:
    """Codes [N, K] uint8 in solving order; `weight` [N, K], `upper` and `group` are in that order and W is consumed."""
    import torch

    columns = weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, columns, block_size):
        _round_block(weight, codes, upper, grid, group, start, min(start + block_size, columns))
    return codes


def _feed_back_dynamic(
    weight: Tensor,
    upper: Tensor,
    order: Tensor,
    diagonal: Tensor,
    scheme: Scheme,
    options: GptqOptions,
    divisor: Tensor | None,
) -> tuple[Tensor, Grid]:
    """Like `_feed_back`, with each group's grid chosen when its turn comes; codes and the grid of all.

    A block is a group: its grid must see the errors of every earlier column.
    """
    import torch

    weight, diagonal = weight[:, order].contiguous(), diagonal[order]
    columns = weight.shape[1]
    size = scheme.columns_per_group(columns)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    alone = torch.zeros(columns, dtype=torch.int32, device=weight.device)
    grids = []
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        grids.append(_grid(weight[:, start:stop], diagonal[start:stop], scheme, options, divisor))
        _round_block(weight, codes, upper, grids[-1], alone, start, stop)
    scale, zero = torch.cat([g.scale for g in grids], 1), torch.cat([g.zero for g in grids], 1)
    return codes, replace(grids[0], scale=scale, zero=zero)


def _round_block(
    weight: Tensor, codes: Tensor, upper: Tensor, grid: Grid, group: Tensor, start: int, stop: int
) -> None:
    """Rounds columns [start, stop) with feedback among themselves and into those behind them."""
    block, factor = weight[:, start:stop].contiguous(), upper[start:stop, start:stop]
    codes[:, start:stop], errors = grid.round_block(block, factor, group[start:stop])
    if stop < weight.shape[1]:
        weight[:, stop:] -= errors @ upper[start:stop, stop:]


def _refit(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid, group: Tensor) -> Grid:
    """For fixed codes, the grid whose scales minimize the output error."""
    at = group.long()
    if grid.blocks is not None:
        return _refit_blocks(weight, hessian, codes, grid, group)

    def levels(rows: slice) -> Tensor:
        return replace(grid, scale=grid.scale[rows], zero=grid.zero[rows]).steps(codes[rows], at)

    def stored(scale: Tensor) -> Tensor:
        return grid.rescaled(scale).scale

    # small floats have positive scales
    fitted = _fit_scales(weight, hessian, levels, grid.scale, group, stored, positive=grid.scheme.codebook is not None)
    return replace(grid, scale=fitted)


def _refit_blocks(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid, group: Tensor) -> Grid:
    """For fixed codes and integers, d and then d_min of every super-block."""
    from quantcli.tensors.affine import SCALE_DTYPE, stored_scale
    from quantcli.tensors.grids import block_grid

    blocks, dtype, at = grid.blocks, weight.dtype, group.long()
    assert blocks is not None
    minimum, integers, shifts = blocks.minimum(), blocks.scales, blocks.minimums
    middle = grid.scheme.middle if minimum is None else 0
    super_block = group // (integers.shape[1] // blocks.d.shape[1])

    def levels(rows: slice) -> Tensor:
        return (codes[rows].to(dtype) - middle) * integers[rows].to(dtype)[:, at]

    target = weight if minimum is None else weight + minimum.to(dtype)[:, at]
    d = _fit_scales(target, hessian, levels, blocks.d.to(dtype), super_block, stored_scale)
    blocks = replace(blocks, d=d.to(SCALE_DTYPE))
    if blocks.d_min is not None and shifts is not None:
        target = weight - codes.to(dtype) * blocks.scale().to(dtype)[:, at]

        def minimums(rows: slice) -> Tensor:
            return -shifts[rows].to(dtype)[:, at]

        d_min = _fit_scales(target, hessian, minimums, blocks.d_min.to(dtype), super_block, stored_scale)
        blocks = replace(blocks, d_min=d_min.to(SCALE_DTYPE))
    return block_grid(grid.scheme, blocks, dtype)


def _fit_scales(
    weight: Tensor,
    hessian: Tensor,
    levels_of: Callable[[slice], Tensor],
    scale: Tensor,
    group: Tensor,
    stored: Callable[[Tensor], Tensor],
    positive: bool = False,
) -> Tensor:
    """The scales [N, G] that minimize the output error: (P^T H P) s = P^T H w per row.

    P [K, G] holds a row's levels, C - Z as a rule, in the column of each weight's group; `levels_of` gives them [n, K]
    for a run of rows, `stored` rounds scales to what can be stored. Kept per row only where the error falls.
    """
    import torch

    order = torch.argsort(group, stable=True)  # columns of one group side by side: sums over groups are sums over runs
    at, groups = group.long()[order], scale.shape[1]
    ends = torch.bincount(at, minlength=groups).cumsum(0).tolist()
    ridge = hessian[order][:, order]
    ridge.diagonal().add_(1e-4 * hessian.diagonal().mean())
    weight = weight[:, order]
    out = torch.empty_like(scale)

    def by_group(x: Tensor, count: int) -> Tensor:
        """Sums over the columns of each of the first `count` groups."""
        if x.shape[1] == count * ends[0]:
            return x.view(len(x), count, ends[0]).sum(2)
        return x.new_zeros(len(x), count).index_add_(1, at[: x.shape[1]], x)

    rows = max(1, (1 << 26) // max(groups * groups, weight.shape[1]))
    for first in range(0, weight.shape[0], rows):
        part = slice(first, first + rows)
        levels = levels_of(part)[:, order]
        right = by_group((weight[part] @ ridge) * levels, groups).double()
        system = right.new_zeros(len(levels), groups, groups)
        for g, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):  # it is symmetric: half is enough
            half = by_group((levels[:, start:stop] @ ridge[start:stop, :stop]) * levels[:, :stop], g + 1)
            system[:, g, : g + 1] = half
            system[:, : g + 1, g] = half
        trace = system.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
        system.diagonal(dim1=1, dim2=2).add_(1e-9 * trace / groups + 1e-12)
        solved = torch.linalg.solve(system, right)
        usable = torch.isfinite(solved) & ((solved if positive else solved.abs()) >= 1e-8)
        candidate = stored(torch.where(usable, solved, scale[part].double()))

        def error(s: Tensor, a: Tensor = system, b: Tensor = right) -> Tensor:
            return torch.einsum("ng,ngh,nh->n", s, a, s) - 2 * (b * s).sum(1)

        better = error(candidate) < error(scale[part].double())
        out[part] = torch.where(better[:, None], candidate, scale[part].double()).to(scale.dtype)
    return out


def _descend(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid, group: Tensor, options: GptqOptions) -> Tensor:
    """Sweeps of cyclic coordinate descent over the codes [N, K], all in solving order."""
    columns = weight.shape[1]
    at = group.long()
    for _ in range(options.sweeps):
        quantized = grid.steps(codes, at) * grid.scale[:, at]
        residual = (weight - quantized) @ hessian
        changed = False
        for start in range(0, columns, options.block_size):
            stop = min(start + options.block_size, columns)
            part = slice(start, stop)
            rest, block = residual[:, part].contiguous(), hessian[part, part].contiguous()
            codes[:, part], steps = grid.descend_block(rest, quantized[:, part], codes[:, part], block, group[part])
            changed = changed or bool(steps.any())
            if stop < columns:
                residual[:, stop:] -= steps @ hessian[part, stop:]
        if not changed:
            break
    return codes


ALGORITHM = Algorithm(
    name="gptq",
    kind="rounder",
    summary="error feedback under the Hessian of the layer's input; needs calibration text",
    bits=(2, 3, 4, 5, 6, 8),
    calibration="required",
    options=GptqOptions,
    run=quantize,
    inputs=("checkpoint", "onnx"),
    formats=(*UNIFORM_FORMATS, "gguf"),
)
