"""Weighted scale and zero search per group, then least-squares refinement of the scale: k-quant's idea on plain grids.

llama.cpp's k-quants (https://github.com/ggml-org/llama.cpp/pull/1684) weigh each squared error by how much the weight
matters: by its own size where there is no data, by the mean square of its input (the "importance matrix") where there
is. Here the search ends in one scale and one integer zero per group, so that every format can hold it. The super-blocks
that k-quants put on top of their scales are there where the format is GGUF, which holds them (`tensors.block_grids`).

Symbols: W [N, K]; h [K] mean square of each input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantcli.algorithms import UNIFORM_FORMATS, Algorithm
from quantcli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.scheme import Scheme
    from quantcli.tensors.hessian import Statistics
    from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["ALGORITHM", "KquantOptions", "importance", "quantize"]


@dataclass(frozen=True)
class KquantOptions:
    """How hard to search."""

    steps: int = 40
    """Ranges tried per group."""
    smallest: float = 0.5
    """Smallest share of a group's range that is tried."""
    refine: int = 2
    """Rounds of least-squares refinement of the scale."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.refine < 0 or not 0 < self.smallest <= 1:
            raise UsageError("kquant: steps must be 1 or more, refine 0 or more, smallest above 0 and at most 1")


def importance(weight: Tensor, statistics: Statistics | None) -> Tensor:
    """How much each weight's squared error counts, [N, K]: |w| plus the row's root mean square, times h where known."""
    own = weight.abs() + weight.square().mean(1, keepdim=True).sqrt()
    return own if statistics is None else own * statistics.hessian.diagonal().to(weight.dtype)


def quantize(weight: Tensor, scheme: Scheme, options: KquantOptions, statistics: Statistics | None) -> QuantizedTensor:
    """Rounds W [N, K] onto the grids of least weighted error."""
    from quantcli.tensors.grids import searched_grid

    return searched_grid(
        weight,
        scheme,
        importance(weight, statistics),
        steps=options.steps,
        smallest=options.smallest,
        refine=options.refine,
    ).round(weight)


ALGORITHM = Algorithm(
    name="kquant",
    kind="rounder",
    summary="weighted scale and zero search per group; better with data, good without",
    bits=(2, 3, 4, 5, 6, 7, 8),
    calibration="optional",
    options=KquantOptions,
    run=quantize,
    inputs=("checkpoint", "onnx"),
    formats=(*UNIFORM_FORMATS, "gguf"),
)
