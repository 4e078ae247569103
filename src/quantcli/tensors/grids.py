"""Where weights may go: uniform grids, codebooks of bitsandbytes, small floats, under one set of functions.

Symbols: W [N, K] weight, G groups per row, S [N, G] scale, Z [N, G] zero.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantcli.scheme import FLOATS, Scheme
from quantcli.tensors import affine, block_grids, codebook, floats, kernels
from quantcli.tensors.block_types import fitted_type
from quantcli.tensors.quantized import BlockScales, QuantizedTensor, group_index

__all__ = [
    "Grid",
    "block_grid",
    "divide_rows",
    "divides_rows",
    "find_divisor",
    "round_nearest",
    "searched_grid",
    "span_grid",
]

_WIDEST = 1.5
"""Of FP4's search: the largest magnitude on 4, the next to the largest value."""
_ROWS = 256


@dataclass(frozen=True)
class Grid:
    """A uniform grid or one of small floats, with the scale of every group."""

    scheme: Scheme
    scale: Tensor
    """S, as stored, in the weight's dtype."""
    zero: Tensor
    """Z in the weight's dtype; unused with small floats."""
    divisor: Tensor | None = None
    """[1] float32: of FP8 scales."""
    blocks: BlockScales | None = None
    """Of GGML's block types, how S and minimums are stored; Z is then the minimum over S, a fraction."""

    def steps(self, codes: Tensor, at: Tensor) -> Tensor:
        """What scales multiply, [N, K]: code - zero, or the small float; `at` [K] int64 is the group of each column."""
        if self.scheme.codebook is None:
            return codes.to(self.scale.dtype) - self.zero[:, at]
        return floats.values(self.scheme.codebook).to(self.scale)[codes.long()]

    def rescaled(self, scale: Tensor) -> "Grid":
        """With scales [N, G] as near to these as can be stored."""
        if self.scheme.codebook is None:
            return replace(self, scale=affine.stored_scale(scale))
        return replace(self, scale=floats.stored(scale, self.scheme, self.divisor))

    def tensor(self, codes: Tensor, group: Tensor) -> QuantizedTensor:
        """Codes [N, K] on it; `group` [K] int32."""
        if self.blocks is not None:
            return block_grids.holding(codes, self.scheme, self.blocks)
        if self.scheme.codebook is None:
            scale = self.scale.to(affine.SCALE_DTYPE)
            return QuantizedTensor(codes, scale, self.zero.to(torch.uint8), self.scheme, group)
        zero = torch.zeros(self.scale.shape, dtype=torch.uint8, device=codes.device)
        table = floats.values(self.scheme.codebook).to(codes.device)
        return QuantizedTensor(
            codes, self.scale.float(), zero, self.scheme, group, codebook=table, divisor=self.divisor
        )

    def round(self, weight: Tensor) -> QuantizedTensor:
        """Every weight to the nearest code of its group."""
        if self.blocks is not None:
            free = self.blocks.d_min is not None
            nearest = affine.round_to_grid(weight, self.scale, self.zero, self.scheme, float_zeros=free)
            return self.tensor(nearest.codes, nearest.group)
        if self.scheme.codebook is None:
            return affine.round_to_grid(weight, self.scale, self.zero, self.scheme)
        group = group_index(weight.shape[1], self.scheme, weight.device)
        found = floats.levels(self.scheme.codebook, weight.dtype)
        if weight.device.type == "cpu":
            codes = torch.empty(weight.shape, dtype=torch.uint8)
            arrays = (weight, self.scale, group, found.bounds, found.codes)
            kernels.round_floats(*(a.contiguous().numpy() for a in arrays), codes.numpy())
        else:
            codes = self._nearest(weight / self.scale[:, group.long()])
        return self.tensor(codes, group)

    def round_block(self, block: Tensor, factor: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds B columns one after another, the error of each fed into those behind it.

        Args:
            block: [N, B] weights; consumed.
            factor: [B, B] the block's part of the upper factor U.
            group: [B] int32, of each column.

        Returns:
            Codes [N, B] uint8 and errors (w - q) / U[j, j] [N, B].
        """
        codes = torch.empty(block.shape, dtype=torch.uint8, device=block.device)
        errors = torch.empty_like(block)
        if block.device.type == "cpu":
            arrays = [a.contiguous().numpy() for a in (block, codes, errors, factor, self.scale)]
            places = group.contiguous().numpy()
            if self.scheme.codebook is None:
                kernels.round_block(*arrays, self.zero.contiguous().numpy(), places, self.scheme.levels - 1)
            else:
                kernels.round_block_floats(*arrays, places, *self._tables(block.dtype))
            return codes, errors
        for j, at in enumerate(group.tolist()):
            code, value = self._column(block[:, j], at)
            codes[:, j] = code
            errors[:, j] = (block[:, j] - value) / factor[j, j]
            block[:, j + 1 :] -= errors[:, j, None] * factor[j, None, j + 1 :]
        return codes, errors

    def descend_block(
        self, residual: Tensor, quantized: Tensor, codes: Tensor, hessian: Tensor, group: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Re-rounds B columns one after another under the exact Hessian.

        Args:
            residual: [N, B] (W - Q) H of these columns; consumed.
            quantized: [N, B] Q.
            codes: [N, B] uint8, of Q.
            hessian: [B, B] the block's part of H.
            group: [B] int32, of each column.

        Returns:
            New codes [N, B], and how far their values moved [N, B].
        """
        codes, values, steps = codes.clone(), quantized.clone(), torch.empty_like(residual)
        if residual.device.type == "cpu":
            arrays = [a.contiguous() for a in (residual, values, codes, steps, hessian, self.scale)]
            places = group.contiguous().numpy()
            data = [a.numpy() for a in arrays]
            if self.scheme.codebook is None:
                kernels.descend_block(*data, self.zero.contiguous().numpy(), places, self.scheme.levels - 1)
            else:
                kernels.descend_block_floats(*data, places, *self._tables(residual.dtype))
            return arrays[2], arrays[3]
        for j, at in enumerate(group.tolist()):
            codes[:, j], value = self._column(values[:, j] + residual[:, j] / hessian[j, j], at)
            steps[:, j] = value - values[:, j]
            residual[:, j + 1 :] -= steps[:, j, None] * hessian[j, None, j + 1 :]
        return codes, steps

    def _column(self, column: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """The nearest codes of one column of group `at`, and their values."""
        scale = self.scale[:, at]
        if self.scheme.codebook is None:
            zero = self.zero[:, at]
            whole = zero.floor()
            code = ((column / scale + (zero - whole)).round() + whole).clamp(0, self.scheme.levels - 1)
            return code.to(torch.uint8), (code - zero) * scale
        code = self._nearest(column / scale)
        return code, floats.values(self.scheme.codebook).to(column)[code.long()] * scale

    def _nearest(self, scaled: Tensor) -> Tensor:
        assert self.scheme.codebook is not None
        found = floats.levels(self.scheme.codebook, scaled.dtype)
        places = torch.bucketize(scaled.contiguous(), found.bounds.to(scaled.device), out_int32=True)
        return found.codes.to(scaled.device)[places]

    def _tables(self, dtype: torch.dtype) -> list[object]:
        assert self.scheme.codebook is not None
        found = floats.levels(self.scheme.codebook, dtype)
        return [a.numpy() for a in (found.values, found.bounds, found.codes)]


def block_grid(scheme: Scheme, blocks: BlockScales, dtype: torch.dtype) -> Grid:
    """The grid of a block type whose scales have been chosen."""
    scale, minimum = blocks.scale().to(dtype), blocks.minimum()
    zero = torch.full_like(scale, scheme.middle) if minimum is None else minimum.to(dtype) / scale
    return Grid(scheme, scale, zero, blocks=blocks)


def find_divisor(weight: Tensor, scheme: Scheme) -> Tensor | None:
    """[1] float32 by which the FP8 scales of a matrix, or of several that are run as one, are divided, if they are."""
    return floats.tensor_divisor(weight.abs().amax()) if scheme.scale == "e4m3" else None


def span_grid(weight: Tensor, scheme: Scheme, clip_ratio: float = 1.0, divisor: Tensor | None = None) -> Grid:
    """The grid that spans each group's range, or a share of it.

    Args:
        weight: W float32 or float64; all of it, or columns of it.
        scheme: Uniform or of small floats.
        clip_ratio: The share.
        divisor: Of the whole W's scales; None finds it.
    """
    if fitted_type(scheme) is not None:
        return block_grid(scheme, block_grids.fit_blocks(weight, scheme, clip_ratio=clip_ratio), weight.dtype)
    if scheme.codebook is None:
        return Grid(scheme, *affine.minmax_grid(weight, scheme, clip_ratio))
    divisor = find_divisor(weight, scheme) if divisor is None else divisor
    scale = floats.span(weight, scheme, divisor, clip_ratio)
    return Grid(scheme, scale, torch.zeros_like(scale), divisor)


def searched_grid(
    weight: Tensor,
    scheme: Scheme,
    importance: Tensor,
    *,
    steps: int = 60,
    smallest: float = 0.45,
    refine: int = 0,
    divisor: Tensor | None = None,
) -> Grid:
    """Per group, the grid of least importance-weighted squared rounding error; see `affine.searched_grid`.

    Of FP4 the same ranges are tried, and wider ones; of powers of two the neighbours too. FP8 is about as precise at
    any scale, and takes the range.
    """
    if fitted_type(scheme) is not None:
        blocks = block_grids.fit_blocks(weight, scheme, importance, steps=steps, smallest=smallest, refine=refine)
        return block_grid(scheme, blocks, weight.dtype)
    if scheme.codebook is None:
        found = affine.searched_grid(weight, scheme, importance, steps=steps, smallest=smallest, refine=refine)
        return Grid(scheme, *found)
    grid = span_grid(weight, scheme, divisor=divisor)
    if scheme.codebook != "e2m1" or scheme.block_rows > 1:
        return grid
    factors = [0.5, 2.0] if scheme.scale == "e8m0" else torch.linspace(_WIDEST, smallest, steps).tolist()
    best = _search_floats(weight, grid, importance, [1.0, *factors])
    return replace(grid, scale=best)


def round_nearest(weight: Tensor, scheme: Scheme, clip_ratio: float = 1.0) -> QuantizedTensor:
    """Rounds W to the nearest code: of a codebook, or of the grid that spans each group's range or a share of it."""
    if scheme.codebook is not None and scheme.codebook not in FLOATS:
        return codebook.round_to_codebook(weight, scheme)
    return span_grid(weight, scheme, clip_ratio).round(weight)


def divides_rows(scheme: Scheme) -> bool:
    """Whether single rows can be divided by any number without rounding anew: powers of two, FP8 and blocks cannot."""
    return scheme.scale == "float" and scheme.block_rows == 1


def divide_rows(tensor: QuantizedTensor, rows: Tensor, divisor: Tensor) -> QuantizedTensor:
    """With the weights of row rows[i] divided by divisor[i]: the same codes, other scales, as they are stored."""
    if tensor.blocks is not None:
        return block_grids.divide_rows(tensor, rows, divisor)
    scheme = tensor.scheme
    if tensor.codebook is None:
        return affine.divide_rows(tensor, rows, divisor)
    assert divides_rows(scheme)
    scale = tensor.scale.clone()
    scale[rows] = scale[rows] / divisor[:, None]
    if scheme.codebook in FLOATS:
        return replace(tensor, scale=floats.stored(scale, scheme, None))
    return codebook.with_scale(tensor, scale)


def _search_floats(weight: Tensor, grid: Grid, importance: Tensor, factors: list[float]) -> Tensor:
    """The best of the scales that are `factors` of the grid's, [N, G]."""
    assert grid.scheme.codebook is not None
    size = grid.scheme.columns_per_group(weight.shape[1])
    importance = (importance if importance.ndim == 2 else importance[None]).to(weight.dtype)
    best = torch.empty_like(grid.scale)
    for first in range(0, len(weight), _ROWS):
        part = slice(first, first + _ROWS)
        tried = torch.stack([grid.rescaled(f * grid.scale[part]).scale for f in factors])
        counts = importance[part] if len(importance) > 1 else importance
        found = _least_error(weight[part], counts, tried, size, floats.levels(grid.scheme.codebook, weight.dtype))
        best[part] = tried.gather(0, found[None])[0]
    return best


def _least_error(weight: Tensor, importance: Tensor, tried: Tensor, size: int, found: floats.Levels) -> Tensor:
    """Which of the scales [F, N, G] is best, [N, G] int64."""
    if weight.device.type == "cpu":
        arrays = (weight, importance, tried)
        data = [a.contiguous().numpy() for a in arrays]
        tables = found.values.numpy(), found.bounds.numpy()
        return torch.from_numpy(kernels.search_floats(*data, size, *tables))
    at = torch.arange(weight.shape[1], device=weight.device) // size
    bounds, values = found.bounds.to(weight.device), found.values.to(weight.device)
    errors = []
    for scale in tried:
        near = values[torch.bucketize(weight / scale[:, at], bounds, out_int32=True)] * scale[:, at]
        error = (near - weight).square() * importance
        errors.append(torch.zeros_like(scale).index_add_(1, at, error))
    return torch.stack(errors).argmin(0)
