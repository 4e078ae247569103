"""The formats by name."""

from collections.abc import Mapping

from quantcli.formats import awq, bnb, bnb_int8, codes_and_scales, compressed_tensors, dense, gguf, gptq
from quantcli.formats.codec import Codec

__all__ = ["CODECS"]

CODECS: Mapping[str, Codec] = {
    codec.name: codec
    for codec in (
        gptq.CODEC,
        awq.CODEC,
        compressed_tensors.CODEC,
        *codes_and_scales.CODECS,
        bnb.CODEC,
        bnb_int8.CODEC,
        gguf.CODEC,
        dense.CODEC,
    )
}
"""Formats that are written, by name."""
