"""Activations on a grid of their own per token: what few-bit arithmetic would see, in float.

Symbols: x [..., D], groups of g entries of the last axis (a shorter last one counted), b bits, c the clip ratio.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["quantize_per_token"]


def quantize_per_token(
    x: Tensor, bits: int, *, symmetric: bool, group_size: int = -1, clip_ratio: float = 1.0
) -> Tensor:
    """Rounds each token to a grid that its own range sets, and returns the values that the codes stand for.

    The grids of QuaRot (https://arxiv.org/abs/2404.00456), per group, with low = c min(x, 0) and high = c max(x, 0):

    - symmetric: scale = max(high, -low) / (2^(b-1) - 1); code = round(x / scale) in [-2^(b-1), 2^(b-1) - 1];
      value = code * scale;
    - asymmetric: scale = (high - low) / (2^b - 1); zero = round(-low / scale); code = round(x / scale) + zero in
      [0, 2^b - 1]; value = (code - zero) * scale.

    A group of zeros stays zeros. A group that holds NaN or infinity has no grid: all of it becomes NaN, so that a
    broken model does not pass for a quantized one. Values never leave the range of x's dtype.

    Args:
        x: [..., D], any float dtype; the arithmetic is float32, ties round to even.
        bits: b, 2 to 8.
        symmetric: Whether zero is code 0 of a signed grid.
        group_size: g; -1 is one group per token.
        clip_ratio: c, in (0, 1]: the share of the range that the grid spans; what lies outside is clipped.

    Returns:
        Like x, in x's dtype.

    Raises:
        ValueError: bits, group size or clip ratio that cannot be.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group size must be 1 or more, or -1 for one per token, got {group_size}")
    if not 0 < clip_ratio <= 1:
        raise ValueError(f"clip ratio must be above 0 and at most 1, got {clip_ratio}")
    columns = x.shape[-1]
    if x.numel() == 0:
        return x.clone()
    size = columns if group_size == -1 else min(group_size, columns)
    # zeros lie in every grid, so they may fill up the last group
    groups = pad(x.float(), (0, -columns % size)).reshape(*x.shape[:-1], -1, size)
    low = groups.amin(-1, keepdim=True).clamp(max=0) * clip_ratio
    high = groups.amax(-1, keepdim=True).clamp(min=0) * clip_ratio
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = _nonzero(torch.maximum(high, -low) / top)
        values = (groups / scale).round().clamp(-top - 1, top) * scale
    else:
        top = 2**bits - 1
        scale = _nonzero((high - low) / top)
        zero = (-low / scale).round()
        values = (((groups / scale).round() + zero).clamp(0, top) - zero) * scale
    largest = min(torch.finfo(x.dtype).max, torch.finfo(torch.float32).max)
    found: Tensor = values.flatten(-2)[..., :columns].clamp(-largest, largest).to(x.dtype)
    return found


def _nonzero(scale: Tensor) -> Tensor:
    """Scales as divisors: 1 where a group is all zero or too small for float32 to divide."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
