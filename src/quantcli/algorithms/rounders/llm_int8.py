"""LLM.int8() (https://arxiv.org/abs/2208.07339): vector-wise int8, and outlier features in 16 bits.

Each row of W is scaled by its largest |w| and rounded to [-127, 127]; codes and scales are those of bitsandbytes, bit
for bit. Activations are rounded the same way, token by token, as the model runs; columns in which some token reaches
the threshold stay out of the int8 product and are multiplied in the model's own type. So the weights need no data: the
calibration text shows where outliers are, which the report tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantcli.algorithms import Algorithm
from quantcli.errors import UsageError
from quantcli.scheme import PER_CHANNEL

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.scheme import Scheme
    from quantcli.tensors.hessian import Statistics
    from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["ALGORITHM", "LlmInt8Options", "quantize"]


@dataclass(frozen=True)
class LlmInt8Options:
    """What counts as an outlier."""

    threshold: float = 6.0
    """Magnitude of an activation from which on its column is multiplied in 16 bits; 0: all columns are int8."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 65504:
            raise UsageError(f"threshold is a float16 number from 0 on, got {self.threshold:g}")


def quantize(weight: Tensor, scheme: Scheme, options: LlmInt8Options, statistics: Statistics | None) -> QuantizedTensor:
    """Rounds each row of W [N, K] on its own; the threshold is for activations alone."""
    from quantcli.tensors.vectorwise import round_rows

    return round_rows(weight)


ALGORITHM = Algorithm(
    name="llm-int8",
    kind="rounder",
    summary="LLM.int8(): vector-wise int8 weights and activations, outlier columns in 16 bits, as bitsandbytes",
    bits=(8,),
    calibration="required",
    options=LlmInt8Options,
    run=quantize,
    formats=("bnb-int8", "float"),
    codebook="int8",
    beats_rtn=False,
    group_size=PER_CHANNEL,
    sees="outliers",
)
