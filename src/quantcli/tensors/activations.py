"""Activations on grids of their own: what few-bit arithmetic would see, in float.

Symbols: x [..., D], groups of g entries of the last axis (a shorter last one counted), b bits, c the clip ratio.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantcli.errors import InputError
from quantcli.scheme import ActivationScheme
from quantcli.tensors import floats

__all__ = ["InputRounding", "quantize_per_token", "stored_input_scale"]

_EIGHTH = 0.125
"""Takes the place of FP8 scales that would be zero, in compressed-tensors' arithmetic."""


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


def stored_input_scale(largest: Tensor, scheme: ActivationScheme) -> Tensor:
    """What is stored of an input whose largest magnitude in calibration was `largest`; [1] float32."""
    if scheme.scale == "e4m3":
        return floats.tensor_divisor(largest, scheme.element)
    top = floats.LARGEST.get(scheme.element, (2**scheme.bits - 1) / 2)
    scale = _nonzero(largest.float() / top).to(torch.bfloat16).float()  # which readers in any dtype have exactly
    return scale.reshape(1)


@dataclass(frozen=True)
class InputRounding:
    """Rounds what a linear reads as the layout of its checkpoint says, and as compressed-tensors computes it.

    With a the largest magnitude of a group, token or tensor:

    - integers: scale = a / (2^b - 1) * 2, code = round(x / scale) in [-2^(b-1), 2^(b-1) - 1]; asymmetric ones spread
      the range over all codes;
    - small floats: scale = a / 448 or a / 6, as FP8 under the stored divisor, or the power of two of MX formats; the
      value is the nearest float to x / scale, times the scale.
    """

    scheme: ActivationScheme
    stored: Tensor | None = None
    """[1] float32: the static scale, or what divides FP8 scales."""
    zero: Tensor | None = None
    """[1]: the zero point of static asymmetric integers."""

    def __post_init__(self) -> None:
        if self.scheme.stored and self.stored is None:
            name = "input_scale" if self.scheme.scale == "float" else "input_global_scale"
            raise InputError(f"{name} is missing")

    def __call__(self, x: Tensor) -> Tensor:
        """Rounds x [..., K] of any float dtype; the arithmetic is float32. Groups of NaN stay NaN."""
        size, columns = self.scheme.group_size, x.shape[-1]
        if size is None:
            groups = x.float().reshape(1, -1)
        else:
            size = columns if size == -1 else min(size, columns)
            groups = pad(x.float(), (0, -columns % size)).reshape(*x.shape[:-1], -1, size)
        if not x.numel():
            return x
        values = self._integers(groups) if self.scheme.element == "int" else self._floats(groups)
        if size is not None:
            values = values.flatten(-2)[..., :columns]
        return values.reshape(x.shape).to(x.dtype)

    def _integers(self, groups: Tensor) -> Tensor:
        bits = self.scheme.bits
        least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        if not self.scheme.dynamic:
            assert self.stored is not None
            scale = self.stored.to(groups)
            zero = scale.new_zeros(()) if self.zero is None else self.zero.to(groups)
        else:
            low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
            if self.scheme.symmetric:
                scale, zero = _nonzero(torch.maximum(-low, high) / ((most - least) / 2)), low.new_zeros(())
            else:
                scale = _nonzero((high - low) / (most - least))
                zero = (least - low / scale).clamp(least, most).round()
        codes = (groups / scale + zero).clamp(least, most).round()
        return (codes - zero) * scale

    def _floats(self, groups: Tensor) -> Tensor:
        name = self.scheme.element
        largest = groups.abs().amax(-1, keepdim=True)
        stored = None if self.stored is None else self.stored.to(groups)
        if not self.scheme.dynamic:
            assert stored is not None
            scale = stored
        elif self.scheme.scale == "e8m0":
            scale = floats.mx_scale(largest, name)
        else:
            scale = largest / floats.LARGEST[name]
            if self.scheme.scale == "e4m3":
                assert stored is not None
                fp8 = floats.round_values(scale * stored, "e4m3")
                scale = torch.where(fp8 == 0, torch.full_like(fp8, _EIGHTH), fp8) / stored
        scale = _nonzero(scale)
        return floats.round_values(groups / scale, name) * scale
