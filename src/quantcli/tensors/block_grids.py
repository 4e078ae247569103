"""Grids of GGML's block types: the two-level scales are chosen first, then weights are rounded onto what is stored.

Symbols: W [N, K] weight, G groups and S super-blocks per row. A group's scale is d * a, its minimum d_min * b, with d
and d_min float16 per super-block and a, b small integers per group; dequantized = code * scale - minimum, or
(code - middle) * scale on symmetric grids.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from quantcli.scheme import Scheme
from quantcli.tensors import block_kernels
from quantcli.tensors.affine import SCALE_DTYPE, stored_scale
from quantcli.tensors.block_types import fitted_type
from quantcli.tensors.quantized import BlockScales, QuantizedTensor, group_index

__all__ = ["divide_rows", "fit_blocks", "holding"]


def holding(codes: Tensor, scheme: Scheme, blocks: BlockScales) -> QuantizedTensor:
    """The tensor of codes [N, K] uint8 on a grid that is stored so."""
    scale, minimum = blocks.scale(), blocks.minimum()
    middle = scheme.middle if minimum is None else 0
    zero = torch.full(scale.shape, middle, dtype=torch.uint8, device=scale.device)
    group = group_index(codes.shape[1], scheme, codes.device)
    return QuantizedTensor(codes, scale, zero, scheme, group, minimum=minimum, blocks=blocks)


def fit_blocks(
    weight: Tensor,
    scheme: Scheme,
    importance: Tensor | None = None,
    *,
    steps: int = 20,
    smallest: float = 0.45,
    refine: int = 0,
    clip_ratio: float = 1.0,
) -> BlockScales:
    """The grids of least importance-weighted squared error, or those of each group's range.

    Args:
        weight: W [N, K] float32 or float64, K a multiple of the type's block.
        scheme: Of a block type whose grids are its own (`BlockType.fitted`).
        importance: [K], such as the diagonal of the Hessian, or [N, K]; None: ranges alone, no search.
        steps: Ranges that the search tries per group, each refitted.
        smallest: Smallest share of a group's range that it tries.
        refine: Rounds of "integers fixed, best d; d fixed, best integers" after it.
        clip_ratio: Without a search, the share of each group's range that its grid spans.
    """
    kind = fitted_type(scheme)
    assert kind is not None
    rows, columns = weight.shape
    weights = np.ascontiguousarray(weight.cpu().numpy())
    given = torch.ones(1, columns) if importance is None else importance
    weighing = np.ascontiguousarray((given if given.ndim == 2 else given[None]).cpu().numpy().astype(weights.dtype))
    factors = np.array([clip_ratio]) if importance is None else np.linspace(1.05, smallest, max(steps, 2))
    shape, groups = (rows, columns // kind.columns), (rows, columns // kind.group)
    d, d_min = np.empty(shape, weights.dtype), np.zeros(shape, weights.dtype)
    scales, minimums = np.empty(groups, np.int16), np.zeros(groups, np.int16)
    common = (weights, weighing, factors.astype(weights.dtype), refine, kind.columns, kind.group)
    if kind.symmetric:
        levels = (scheme.middle, kind.scale_low, kind.scale_top)
        block_kernels.fit_symmetric(*common, *levels, d, scales)
    else:
        levels = (scheme.levels - 1, kind.scale_top, kind.minimum_top)
        block_kernels.fit_affine(*common, *levels, d, d_min, scales, minimums)

    def stored(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(SCALE_DTYPE).to(weight.device)

    integers = torch.from_numpy(scales).to(weight.device)
    if kind.symmetric:
        return BlockScales(stored(d), integers)
    return BlockScales(stored(d), integers, stored(d_min), torch.from_numpy(minimums).to(weight.device))


def divide_rows(tensor: QuantizedTensor, rows: Tensor, divisor: Tensor) -> QuantizedTensor:
    """With the weights of row rows[i] divided by divisor[i]: the same codes, other scales, as they are stored."""
    blocks = tensor.blocks
    assert blocks is not None

    def divided(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        out = values.float()
        out[rows] = stored_scale(out[rows] / divisor[:, None])
        return out.to(SCALE_DTYPE)

    d = divided(blocks.d)
    assert d is not None
    return holding(tensor.codes, tensor.scheme, replace(blocks, d=d, d_min=divided(blocks.d_min)))
