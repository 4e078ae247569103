"""Dynamic int8 of ONNX graphs: integer weights, and activations whose range is taken anew at every run. No data.

MatMul (Gemm becomes MatMul and Add) and Conv compute with uint8 activations and 8-bit weights, by onnxruntime's
quantizer. Left out, for onnxruntime cannot run it: 4-bit weights; and scales per channel for Conv, which its quantizer
takes per tensor without a word.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quantcli.algorithms import Algorithm
from quantcli.errors import InputError, UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

    from quantcli.graphs.activations.nodes import IntegerGraph
    from quantcli.graphs.model.inputs import CalibrationReader

__all__ = ["ALGORITHM", "DynamicOptions", "quantize"]


@dataclass(frozen=True)
class DynamicOptions:
    """What to quantize, and how weights are held."""

    weight_type: Literal["uint8", "int8"] = "uint8"
    """Type of weights. int8 with its full range overflows on x86 processors without VNNI: take reduce_range along."""
    weight_grid: Literal["auto", "sym", "asym"] = "auto"
    """sym: zero in the middle; asym: a zero point of their own; auto: sym for int8, asym for uint8."""
    per_channel: bool = False
    """One scale per output channel of MatMul instead of one per weight."""
    reduce_range: bool = False
    """7 bits for weights, so that sums of products fit into 16 bits."""
    op_types: tuple[str, ...] = ()
    """Operators to quantize, with commas: MatMul,Gemm,Conv,Gather,Attention,LSTM; empty: all."""
    nodes_include: tuple[str, ...] = ()
    """Names or regular expressions, with commas; empty: all nodes."""
    nodes_exclude: tuple[str, ...] = ()
    """Names or regular expressions of nodes that stay float."""


_ABLE = ("MatMul", "Gemm", "Conv", "Gather", "Attention", "LSTM", "EmbedLayerNormalization", "Transpose")


def quantize(
    source: Path,
    target: Path,
    options: DynamicOptions,
    reader: CalibrationReader | None = None,
    cache: None = None,
    debug: bool = False,
) -> IntegerGraph:
    """Writes the quantized graph.

    Args:
        source: Float graph file.
        target: File to write, with `target`.data beside it.
        options: See there.
        reader: Samples for `debug`; nothing is calibrated.
        cache: There is nothing to keep.
        debug: Whether float and quantized graph are compared, node by node.

    Raises:
        UsageError: options that would have no effect on this graph.
        InputError: a graph that cannot be prepared, a node in float16, or one that was asked for and stays float.
    """
    from tempfile import TemporaryDirectory

    from onnxruntime.quantization import QuantType, quantize_dynamic

    from quantcli.graphs.activations import nodes as integers
    from quantcli.graphs.activations import unfit
    from quantcli.graphs.activations.bodies import quantize_bodies
    from quantcli.graphs.activations.weight_extremes import with_stand_ins
    from quantcli.graphs.checking import compare
    from quantcli.graphs.model.files import open_graph, save_graph
    from quantcli.graphs.model.inputs import rewound
    from quantcli.graphs.rewrite.gemms import split_gemms
    from quantcli.graphs.rewrite.prepare import prepare
    from quantcli.graphs.walk.matrices import refuse_quantized

    with TemporaryDirectory(dir=target.parent, prefix=".dynamic-") as name:
        folder = Path(name)
        prepared = prepare(source, folder / "prepared.onnx")
        model = open_graph(folder / "prepared.onnx")
        chosen = integers.select_nodes(model, _ABLE, options.op_types, options.nodes_include, options.nodes_exclude)
        integers.require_float32(chosen)
        reasons = unfit.find_unfit_constants(model, chosen)
        chosen = [n for n in chosen if n.name not in reasons]
        kinds = integers.kinds_of(chosen)
        names = set(kinds)
        reasons |= unfit.recurrent_without_integers(model, _ABLE)
        weighted = [str(n.name) for n in model.graph.all_nodes() if _holds_weights(n)]
        if options.per_channel and (convs := [n.name for n in chosen if n.op_type == "Conv"]):
            raise UsageError(
                f"dynamic Conv has one scale per weight, per_channel would have no effect on {convs[0]}",
                hint="use -a static, or op_types=MatMul,Gemm",
            )
        split_gemms(model, names)
        save_graph(model, folder / "ready.onnx")
        asked = {(str(n.name), n.op_type) for n in model.graph.all_nodes() if n.name in names and _holds_weights(n)}
        if not asked:
            refuse_quantized(model)
            computed = f"what its products multiply is computed ({', '.join(str(n.name) for n in chosen[:3])})"
            why = unfit.list_float(model, reasons) or [computed]
            raise InputError(
                f"{source} has no weight to quantize: {why[0]}",
                hint="give a graph with constant weights, or use -a static",
            )
        extra = {} if options.weight_grid == "auto" else {"WeightSymmetric": options.weight_grid == "sym"}

        def run(source: Path, made: Path, some: Collection[str]) -> None:
            quantize_dynamic(
                source,
                made,
                op_types_to_quantize=[t for t in _ABLE if t != "Gemm"],
                per_channel=options.per_channel,
                reduce_range=options.reduce_range,
                weight_type=QuantType.QInt8 if options.weight_type == "int8" else QuantType.QUInt8,
                nodes_to_quantize=sorted(some),
                use_external_data_format=True,
                extra_options=extra,
            )

        def stand_in(source: Path, made: Path, some: Collection[str]) -> None:
            with_stand_ins(source, made, some, lambda bare, small: run(bare, small, some))

        def part(source: Path, made: Path, some: Collection[str]) -> None:
            reasons.update(integers.quantize_what_goes(stand_in, source, made, some))

        with integers.captured_warnings() as notes:
            quantize_bodies(folder / "ready.onnx", folder / "made.onnx", names, part)
        result = open_graph(folder / "made.onnx")
        for float_name in integers.float_nodes(result, asked):
            reasons.setdefault(float_name, integers.NOT_QUANTIZED)
        done = {name for name, _ in asked} - set(reasons)
        told = unfit.list_float(model, reasons)
        if not done:
            raise InputError(f"no node with a weight is left to quantize: {told[0]}")
        names -= set(reasons)
        full = integers.full_int8(result, options.reduce_range)
        integers.finish(result, target)
        compared = None
        if debug:
            compared = compare.compare(folder / "ready.onnx", target, names, rewound(reader, "a comparison"))
    notes = [*told, *notes, *full]
    return integers.IntegerGraph(
        quantized=tuple(n for n in weighted if n in done),
        kept=tuple(n for n in weighted if n not in done),
        prepared=prepared,
        notes=tuple(notes),
        comparison=compared,
        reasons=reasons,
        nodes={name: kind for name, kind in kinds.items() if name not in reasons},
    )


def _holds_weights(node: ir.Node) -> bool:
    """Whether a node has a constant matrix or kernel, or those of a recurrent layer."""
    from quantcli.graphs.activations.unfit import RECURRENT
    from quantcli.graphs.walk.channels import constant_of, has_weight

    return has_weight(node) or (node.op_type in RECURRENT and constant_of(node.inputs[1]) is not None)


ALGORITHM = Algorithm(
    name="dynamic",
    kind="graph",
    summary="int8 weights, activations rounded as they come, for ONNX graphs; no data",
    bits=(8,),
    calibration="none",
    options=DynamicOptions,
    run=quantize,
    inputs=("onnx",),
    formats=("qoperator",),
)
