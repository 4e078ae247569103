"""The one currency: what a rounder computed, what a codec packs, what a loader reads back.

Symbols: N output rows, K input columns, G groups per row.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantcli.scheme import Scheme
from quantcli.tensors import kernels

__all__ = ["QuantizedTensor", "concatenate_rows", "group_index"]


def group_index(columns: int, scheme: Scheme, device: torch.device | str = "cpu") -> Tensor:
    """The group of each column in memory order: [K] int32 in [0, G), the last group possibly shorter."""
    return torch.arange(columns, dtype=torch.int32, device=device) // scheme.columns_per_group(columns)


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized [N, K] matrix: dequantized[n, k] = (codes[n, k] - zero[n, g]) * scale[n, g], g = group[k]."""

    codes: Tensor
    """[N, K] uint8 in [0, scheme.levels)."""
    scale: Tensor
    """[N, G] in the dtype that is stored (float16); may be negative where the grid is symmetric."""
    zero: Tensor
    """[N, G] uint8 in [scheme.lowest_zero, scheme.levels), or float16 of any value where the format holds fractions."""
    scheme: Scheme
    group: Tensor
    """[K] int32 in [0, G): the group of each column; arange(K) // group_size unless act-order is `desc_act`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def has_float_zeros(self) -> bool:
        """Whether zero points are fractions of a step, which few formats hold."""
        return self.zero.is_floating_point()

    @property
    def ordered(self) -> bool:
        """Whether groups are runs of neighbouring columns, as kernels without `g_idx` need."""
        return bool(torch.equal(self.group, group_index(self.codes.shape[1], self.scheme, self.group.device)))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The [N, K] matrix that a loader sees; computed in float32, then cast to `dtype`."""
        if self.codes.device.type == "cpu":
            out = torch.empty(self.codes.shape, dtype=torch.float32)
            zero = self.zero.float() if self.has_float_zeros else self.zero
            arrays = (self.codes, self.scale.float(), zero, self.group)
            kernels.expand(*(a.contiguous().numpy() for a in arrays), out.numpy())
            return out.to(dtype)
        group = self.group.long()
        zero, scale = self.zero.float()[:, group], self.scale.float()[:, group]
        return ((self.codes.float() - zero) * scale).to(dtype)

    def rows(self, start: int, stop: int) -> "QuantizedTensor":
        """The quantized rows [start, stop): how one solve over q, k and v is taken apart again."""
        return replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop], zero=self.zero[start:stop])

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """The same tensor on another device."""
        return replace(
            self,
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            zero=self.zero.to(device),
            group=self.group.to(device),
        )


def concatenate_rows(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Stacks tensors of one scheme and one column grouping along the rows."""
    return replace(
        parts[0],
        codes=torch.cat([p.codes for p in parts]),
        scale=torch.cat([p.scale for p in parts]),
        zero=torch.cat([p.zero for p in parts]),
    )
