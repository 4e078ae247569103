"""LLM.int8() (https://arxiv.org/abs/2208.07339): vector-wise int8, and outlier features in 16 bits.

Each row of W is scaled by its largest |w| and rounded to [-127, 127]; codes and scales are those of bitsandbytes, bit
for bit. Activations are rounded the same way, token by token, as the model runs; columns in which some token reaches
the threshold stay out of the int8 product and are multiplied in the model's own type. So the weights need no data: the
calibration text shows where outliers are, which the report tells. In an ONNX graph these columns are fixed by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.algorithms import Algorithm
from quantcli.errors import UsageError
from quantcli.scheme import PER_CHANNEL

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.graphs.model.inputs import CalibrationReader
    from quantcli.graphs.rewrite.decompose import Decomposed
    from quantcli.scheme import Scheme
    from quantcli.tensors.hessian import Statistics
    from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["ALGORITHM", "LlmInt8Options", "quantize", "quantize_graph"]


@dataclass(frozen=True)
class LlmInt8Options:
    """What counts as an outlier, and which products of a graph are meant."""

    threshold: float = 6.0
    """Magnitude of an activation from which on its column is multiplied in 16 bits; 0: all columns are int8."""
    nodes_include: tuple[str, ...] = ()
    """Names or regular expressions, with commas; empty: all nodes."""
    nodes_exclude: tuple[str, ...] = ()
    """Names or regular expressions of nodes that stay float."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 65504:
            raise UsageError(f"threshold is a float16 number from 0 on, got {self.threshold:g}")


def quantize(weight: Tensor, scheme: Scheme, options: LlmInt8Options, statistics: Statistics | None) -> QuantizedTensor:
    """Rounds each row of W [N, K] on its own; the threshold is for activations alone."""
    from quantcli.tensors.vectorwise import round_rows

    return round_rows(weight)


def quantize_graph(
    source: Path,
    target: Path,
    options: LlmInt8Options,
    reader: CalibrationReader | None = None,
    cache: Path | None = None,
    debug: bool = False,
) -> Decomposed:
    """Writes a graph whose MatMul and Gemm multiply int8 codes, but for the channels in which samples show outliers.

    Args:
        source: Float graph file.
        target: File to write, with `target`.data beside it.
        options: See there.
        reader: Samples.
        cache: Ranges are none of its business.
        debug: Whether float and quantized graph are compared, node by node.

    Raises:
        UsageError: no samples, or no node is left.
        InputError: see `decompose`.
    """
    from quantcli.graphs.rewrite.decompose import decompose

    if reader is None:
        raise UsageError("llm-int8 finds outliers on samples, there are none", hint="give calibration data")
    return decompose(
        source,
        target,
        reader,
        options.threshold,
        include=options.nodes_include,
        exclude=options.nodes_exclude,
        debug=debug,
    )


_ON_GRAPHS = Algorithm(
    name="llm-int8",
    kind="graph",
    summary="LLM.int8(): int8 products by vectors, outlier channels found on samples in float beside them",
    bits=(8,),
    calibration="required",
    options=LlmInt8Options,
    run=quantize_graph,
    inputs=("onnx",),
    formats=("qoperator",),
)

ALGORITHM = Algorithm(
    name="llm-int8",
    kind="rounder",
    summary="LLM.int8(): vector-wise int8 weights and activations, outlier columns in 16 bits, as bitsandbytes",
    bits=(8,),
    calibration="required",
    options=LlmInt8Options,
    run=quantize,
    inputs=("checkpoint", "onnx"),
    formats=("bnb-int8", "float"),
    codebook="int8",
    beats_rtn=False,
    group_size=PER_CHANNEL,
    sees="outliers",
    idle=("nodes_include", "nodes_exclude"),
    on_graphs=_ON_GRAPHS,
)
