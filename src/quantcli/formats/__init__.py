"""How quantized linears look on disk, one file per format."""

from collections.abc import Mapping

from quantcli.formats import awq, compressed_tensors, dense, gptq
from quantcli.formats.codec import Codec

__all__ = ["CODECS"]

CODECS: Mapping[str, Codec] = {
    codec.name: codec for codec in (gptq.CODEC, awq.CODEC, compressed_tensors.CODEC, dense.CODEC)
}
"""Formats that are written, by name."""
