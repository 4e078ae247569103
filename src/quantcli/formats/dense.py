"""The dequantized weight as an ordinary float tensor: no gain in size, but every tool reads it.

It is written in the dtype of the tensors that stay float. In float32 it is the dequantized weight itself; float16 and
bfloat16 round once more.
"""

import torch
from torch import Tensor

from quantcli.formats.codec import Codec
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["CODEC", "pack"]


def pack(tensor: QuantizedTensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weight [N, K]."""
    return {"weight": tensor.dequantize(dtype)}


CODEC = Codec(
    name="float",
    lowest_zero=0,
    refuse=lambda held: None,
    pack=pack,
    unpack=None,
    config=lambda described: None,
    packed_bytes=None,
    float_zeros=True,
    takes_dtype=True,
    codebooks=True,
)
