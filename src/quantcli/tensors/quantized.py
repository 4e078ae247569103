"""The one currency: what a rounder computed, what a codec packs, what a loader reads back.

Symbols: N output rows, K input columns, G groups per row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantcli.scheme import Scheme
from quantcli.tensors import kernels
from quantcli.tensors.block_kernels import expand_minimum

__all__ = ["BlockScales", "NestedScale", "QuantizedTensor", "concatenate_rows", "group_index"]


def group_index(columns: int, scheme: Scheme, device: torch.device | str = "cpu") -> Tensor:
    """The group of each column in memory order: [K] int32 in [0, G), the last group possibly shorter."""
    return torch.arange(columns, dtype=torch.int32, device=device) // scheme.columns_per_group(columns)


@dataclass(frozen=True)
class NestedScale:
    """Scales as 8-bit codes: scale = code_map[codes] * absmax of their run of `size` + offset, runs over all rows."""

    codes: Tensor
    """[N, G] uint8."""
    absmax: Tensor
    """[ceil(N G / size)] float32, of runs of the flattened codes."""
    code_map: Tensor
    """[256] float32, rising."""
    offset: float
    """A float32 value: the mean of the scales."""
    size: int = 256
    """Scales of a run."""

    def expand(self) -> Tensor:
        """The scales [N, G] float32 that readers compute."""
        runs = self.absmax.float().repeat_interleave(self.size)[: self.codes.numel()].view(self.codes.shape)
        return self.code_map[self.codes.long()] * runs + self.offset

    def to(self, device: torch.device | str) -> "NestedScale":
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("codes", "absmax", "code_map")}
        return replace(self, **moved)


@dataclass(frozen=True)
class BlockScales:
    """Scales as integers times a float16 per super-block, of which a row has S: GGML's block types."""

    d: Tensor
    """[N, S] float16: a group's scale is d of its super-block times its integer."""
    scales: Tensor
    """[N, G] int16, never 0; ones where each group has a d of its own."""
    d_min: Tensor | None = None
    """[N, S] float16: the same of the minimums; None on symmetric grids."""
    minimums: Tensor | None = None
    """[N, G] int16."""

    def scale(self) -> Tensor:
        """[N, G] float32, as readers compute it."""
        return _expanded(self.d, self.scales)

    def minimum(self) -> Tensor | None:
        """[N, G] float32: what is taken away from code * scale."""
        if self.d_min is None or self.minimums is None:
            return None
        return _expanded(self.d_min, self.minimums)

    def rows(self, start: int, stop: int) -> "BlockScales":
        """Those of the rows [start, stop)."""
        return self.mapped(lambda part: part[start:stop])

    def to(self, device: torch.device | str) -> "BlockScales":
        """The same on another device."""
        return self.mapped(lambda part: part.to(device))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "BlockScales":
        """With each part changed."""
        d_min, minimums = self.d_min, self.minimums
        return BlockScales(
            change(self.d),
            change(self.scales),
            None if d_min is None else change(d_min),
            None if minimums is None else change(minimums),
        )


def _expanded(d: Tensor, integers: Tensor) -> Tensor:
    return d.float().repeat_interleave(integers.shape[1] // d.shape[1], 1) * integers.float()


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized [N, K] matrix: dequantized[n, k] = (codes[n, k] - zero[n, g]) * scale[n, g], g = group[k].

    With a codebook it is codebook[codes[n, k]] * scale[n, g], with minimums codes[n, k] * scale[n, g] - minimum[n, g].
    """

    codes: Tensor
    """[N, K] uint8 in [0, scheme.levels)."""
    scale: Tensor
    """[N, G] in the dtype that is stored (float16; float32 with a codebook); negative only on symmetric grids. Rows
    that share a scale (`scheme.block_rows`) repeat it."""
    zero: Tensor
    """[N, G] uint8 in [scheme.lowest_zero, scheme.levels), or float16 of any value where the format holds fractions;
    zeros, and unused, with a codebook."""
    scheme: Scheme
    group: Tensor
    """[K] int32 in [0, G): the group of each column; arange(K) // group_size unless act-order is `desc_act`."""
    codebook: Tensor | None = None
    """[scheme.levels] float32: the value of each code, before its scale; None on uniform grids."""
    nested: NestedScale | None = None
    """How `scale` is stored where it is codes itself (`scheme.double_quant`); `scale` is what they expand to."""
    divisor: Tensor | None = None
    """[1] float32: what the FP8 scales of an NVFP4 matrix are divided by; `scale` is what comes out."""
    input_scale: Tensor | None = None
    """[1] float32: what is stored of its input, where that is rounded by it: a scale, or the divisor of FP8 scales."""
    minimum: Tensor | None = None
    """[N, G] float32, where grids begin anywhere and not at a whole number of steps; zeros are unused then."""
    blocks: BlockScales | None = None
    """How `scale` and `minimum` are stored in GGML's block types; they are what it expands to."""

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
            if self.minimum is not None:
                parts = (self.codes, self.scale, self.minimum, self.group)
                expand_minimum(*(a.contiguous().numpy() for a in parts), out.numpy())
                return out.to(dtype)
            kernel, values = (
                (kernels.expand_codebook, self.codebook)
                if self.codebook is not None
                else (kernels.expand, self.zero.float() if self.has_float_zeros else self.zero)
            )
            arrays = (self.codes, self.scale.float(), values, self.group)
            kernel(*(a.contiguous().numpy() for a in arrays), out.numpy())
            return out.to(dtype)
        group = self.group.long()
        scale = self.scale.float()[:, group]
        if self.codebook is not None:
            return (self.codebook[self.codes.long()] * scale).to(dtype)
        if self.minimum is not None:
            return (self.codes.float() * scale - self.minimum[:, group]).to(dtype)
        return ((self.codes.float() - self.zero.float()[:, group]) * scale).to(dtype)

    def rows(self, start: int, stop: int) -> "QuantizedTensor":
        """The quantized rows [start, stop): how one solve over q, k and v is taken apart again.

        Nested scales run over all rows: a part has the scales that they expand to, stored as they are.
        """
        if (start, stop) == (0, len(self.codes)):
            return self
        plain = self._with_plain_scales()
        return replace(
            plain,
            codes=self.codes[start:stop],
            scale=self.scale[start:stop],
            zero=self.zero[start:stop],
            minimum=None if self.minimum is None else self.minimum[start:stop],
            blocks=None if self.blocks is None else self.blocks.rows(start, stop),
        )

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """The same tensor on another device."""
        return replace(
            self,
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            zero=self.zero.to(device),
            group=self.group.to(device),
            codebook=None if self.codebook is None else self.codebook.to(device),
            nested=None if self.nested is None else self.nested.to(device),
            divisor=None if self.divisor is None else self.divisor.to(device),
            input_scale=None if self.input_scale is None else self.input_scale.to(device),
            minimum=None if self.minimum is None else self.minimum.to(device),
            blocks=None if self.blocks is None else self.blocks.to(device),
        )

    def _with_plain_scales(self) -> "QuantizedTensor":
        if self.nested is None:
            return self
        return replace(self, nested=None, scheme=replace(self.scheme, double_quant=False))


def concatenate_rows(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Stacks tensors of one scheme and one column grouping along the rows; nested scales become plain ones."""
    return replace(
        parts[0] if len(parts) == 1 else parts[0]._with_plain_scales(),
        codes=torch.cat([p.codes for p in parts]),
        scale=torch.cat([p.scale for p in parts]),
        zero=torch.cat([p.zero for p in parts]),
    )
