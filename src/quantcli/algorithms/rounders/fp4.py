"""Floats of 4 bits: a sign, two bits of exponent, one of mantissa, as bitsandbytes scales them to [-1, 1].

The magnitudes are 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3 and 1 of the block's largest |w|. Codes and scales are those of
bitsandbytes, bit for bit. nf4 is the better one on weights that look normal. No data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantcli.algorithms import Algorithm

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.scheme import Scheme
    from quantcli.tensors.hessian import Statistics
    from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["ALGORITHM", "Fp4Options", "quantize"]


@dataclass(frozen=True)
class Fp4Options:
    """How scales are stored."""

    double_quant: bool = False
    """Store the scales as 8-bit codes too: 4.13 bits a weight at block size 64 in place of 4.5."""


def quantize(weight: Tensor, scheme: Scheme, options: Fp4Options, statistics: Statistics | None) -> QuantizedTensor:
    """Rounds W [N, K] to the nearest level of each block; the group size is the block size."""
    from quantcli.tensors.codebook import round_to_codebook

    return round_to_codebook(weight, replace(scheme, codebook="fp4", double_quant=options.double_quant))


ALGORITHM = Algorithm(
    name="fp4",
    kind="rounder",
    summary="nearest of 16 levels of a 4-bit float (1 sign, 2 exponent, 1 mantissa), as bitsandbytes; no data",
    bits=(4,),
    calibration="none",
    options=Fp4Options,
    run=quantize,
    inputs=("checkpoint", "onnx"),
    formats=("bnb", "float"),
    codebook="fp4",
    beats_rtn=False,
)
