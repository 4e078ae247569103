"""NormalFloat of 4 bits (https://arxiv.org/abs/2305.14314): 16 levels at quantiles of the normal distribution.

Each block of a row is divided by its largest |w|, and every weight goes to the nearest level. Codes and scales are
those of bitsandbytes, bit for bit. There are no zero points, so that round-to-nearest on asymmetric grids is as good on
small blocks of weights that look normal; tails and larger blocks are where it gains. No data.
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

__all__ = ["ALGORITHM", "Nf4Options", "quantize"]


@dataclass(frozen=True)
class Nf4Options:
    """How scales are stored."""

    double_quant: bool = False
    """Store the scales as 8-bit codes too: 4.13 bits a weight at block size 64 in place of 4.5."""


def quantize(weight: Tensor, scheme: Scheme, options: Nf4Options, statistics: Statistics | None) -> QuantizedTensor:
    """Rounds W [N, K] to the nearest level of each block; the group size is the block size."""
    from quantcli.tensors.codebook import round_to_codebook

    return round_to_codebook(weight, replace(scheme, codebook="nf4", double_quant=options.double_quant))


ALGORITHM = Algorithm(
    name="nf4",
    kind="rounder",
    summary="nearest of 16 levels at quantiles of the normal distribution, as bitsandbytes; no data",
    bits=(4,),
    calibration="none",
    options=Nf4Options,
    run=quantize,
    inputs=("checkpoint", "onnx"),
    formats=("bnb", "float"),
    codebook="nf4",
    beats_rtn=False,
)
