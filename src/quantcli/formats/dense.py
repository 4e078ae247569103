"""The dequantized weight as an ordinary float tensor: no gain in size, but every tool reads it.

It is written in the dtype of the tensors that stay float. In float32 it is the dequantized weight itself; float16 and
bfloat16 round once more.
"""

from torch import Tensor

from quantcli.formats.codec import Codec
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["CODEC", "pack"]


def pack(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The float32 weight [N, K]."""
    return {"weight": tensor.dequantize()}


CODEC = Codec(
    name="float",
    lowest_zero=0,
    refuse=lambda held: None,
    pack=pack,
    unpack=None,
    config=lambda described: None,
    packed_bytes=None,
    float_zeros=True,
)
