"""A linear that runs from codes of small floats, FP8 and FP4: blocks of outputs dequantized, used, dropped.

Symbols: K inputs, N outputs, G groups.
"""

from dataclasses import replace

import torch
from torch import Tensor

from quantcli.models.linear import QuantizedLinear
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["FloatLinear"]


class FloatLinear(QuantizedLinear):
    """Keeps one code of FP8, or two of FP4, in a byte."""

    codes: Tensor
    scale: Tensor
    frozen = ("codes", "scale")

    def __init__(self, tensor: QuantizedTensor, *, bias: Tensor | None = None, cache: bool = False):
        """Takes over the codes and scales.

        Args:
            tensor: On e4m3, or e2m1 with an even K.
            bias: [N], any float dtype.
            cache: Keep the float weight once it was computed.
        """
        super().__init__(*tensor.shape, bias, cache)
        self.scheme, codes = tensor.scheme, tensor.codes
        self.register_buffer("codes", codes if self.bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4)
        self.register_buffer("scale", tensor.scale[:: self.scheme.block_rows].contiguous())
        none = codes.new_empty(0, codes.shape[1])
        self._like = replace(tensor, codes=none, scale=tensor.scale[:0], zero=tensor.zero[:0])

    @property
    def bits(self) -> int:
        """Bits per code."""
        return self.scheme.bits

    def quantized(self) -> QuantizedTensor:
        """The codes and scales, unpacked."""
        return self._rows(0, self.out_features)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        scheme = self.scheme
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, codebook={scheme.codebook}, "
            f"group_size={scheme.group_size}, scales={scheme.scale}, bias={self.bias is not None}"
        )

    def _rows(self, start: int, stop: int) -> QuantizedTensor:
        codes, height = self.codes[start:stop], self.scheme.block_rows
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], 2).flatten(1)
        first = start // height
        blocks = self.scale[first : -(-stop // height)].repeat_interleave(height, 0)
        scale = blocks[start - first * height : stop - first * height]
        zero = torch.zeros(scale.shape, dtype=torch.uint8, device=codes.device)
        return replace(self._like.to(codes.device), codes=codes, scale=scale, zero=zero)

    def _transposed(self, start: int, stop: int) -> Tensor:
        return self._rows(start, stop).dequantize().T
