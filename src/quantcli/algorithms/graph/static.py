"""Static quantization of ONNX graphs: integer weights and activations, whose ranges are measured on samples before.

onnxruntime's quantizer places the nodes; ranges are ours (`graphs.calibration.tensor_ranges`). With preprocess=qnn,
graph and types are made for Qualcomm's provider (`graphs.rewrite.qnn`); the result runs on the CPU too. Left out: the
Distribution calibrator, whose ranges are made for float8; uint16 weights, which lost most of their accuracy with one
scale per channel (relative error 0.03 where int16 has 0.0007, onnxruntime 1.31).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quantcli.algorithms import Algorithm
from quantcli.errors import InputError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from quantcli.graphs.activations.nodes import IntegerGraph
    from quantcli.graphs.model.inputs import CalibrationReader

__all__ = ["ALGORITHM", "StaticOptions", "quantize"]


@dataclass(frozen=True)
class StaticOptions:
    """Types, grids, ranges and nodes."""

    encoding: Literal["qdq", "qoperator"] = "qdq"
    """qdq: QuantizeLinear and DequantizeLinear around float operators; qoperator: operators on integers."""
    activation_type: Literal["uint8", "int8", "uint16", "int16"] = "uint8"
    """Type of activations; 16 bits with qdq only."""
    weight_type: Literal["uint8", "int8", "uint4", "int4", "int16"] = "uint8"
    """Type of weights; 4 and 16 bits with qdq only. int8 with its full range overflows on x86 processors without VNNI:
    take reduce_range along."""
    calibrate_method: Literal["minmax", "entropy", "percentile", "distribution"] = "minmax"
    """minmax: all values; entropy: the threshold of least divergence; percentile: so many percent of the values."""
    percentile: float = 99.999
    """Of percentile: how many percent of the values are within the range."""
    per_channel: bool = False
    """One scale per output channel of a weight instead of one."""
    reduce_range: bool = False
    """7 bits for weights of 8, so that sums of products fit into 16 bits."""
    activation_symmetric: bool = False
    """Zero in the middle of the activations' range."""
    weight_grid: Literal["auto", "sym", "asym"] = "auto"
    """sym: zero in the middle; asym: a zero point of their own; auto: sym for int types, asym for uint."""
    op_types: tuple[str, ...] = ()
    """Operators to quantize, with commas; empty: all that onnxruntime can, and MatMul,Gemm,Gather,Conv in transformers
    (graphs with LayerNormalization or the like), whose sums have outliers that 8 bits cannot hold."""
    nodes_include: tuple[str, ...] = ()
    """Names or regular expressions, with commas; empty: all nodes."""
    nodes_exclude: tuple[str, ...] = ()
    """Names or regular expressions of nodes that stay float."""
    equalize: bool = False
    """Share out the ranges of channels between neighbouring layers beforehand, so that one scale fits them all."""
    bias_correction: bool = False
    """Take the mean error of each layer off its bias; the samples are read once more."""
    preprocess: Literal["none", "qnn"] = "none"
    """qnn: for Qualcomm's provider. Gelu, LpNormalization and SpaceToDepth are made of their parts, every operator gets
    integers, with the types and grids that QNN wants."""
    fuse_layernorm: bool = False
    """Of qnn: make LayerNormalization of its parts too."""
    inputs_to_make_channel_last: tuple[str, ...] = ()
    """Of qnn: names of inputs [N, C, ...] that become [N, ..., C]. Samples are given as before, and turned."""
    outputs_to_make_channel_last: tuple[str, ...] = ()
    """Of qnn: names of outputs that become [N, ..., C]."""
    fixed_dims: tuple[str, ...] = ()
    """Of qnn, which takes fixed sizes alone: those of axes of inputs that may have any, as batch=1,x.2=224: the name of
    an axis, or that of an input and the axis' number."""
    nodes_16bit: tuple[str, ...] = ()
    """Of qnn: names or regular expressions of nodes that work in 16 bits where activations have 8."""
    keep_removable_activations: bool = False
    """Of qnn: Relu and Clip stay nodes where the grid behind them cuts as they do."""

    def __post_init__(self) -> None:
        if self.calibrate_method == "distribution":
            raise UsageError(
                "distribution finds ranges for float8, integers would be cut at one standard deviation",
                hint="use calibrate_method=minmax, entropy or percentile",
            )
        if not 50 < self.percentile <= 100:
            raise UsageError(f"percentile is above 50 and at most 100, got {self.percentile}")
        if self.percentile != StaticOptions.percentile and self.calibrate_method != "percentile":
            raise UsageError(
                f"percentile has no effect with {self.calibrate_method}", hint="add calibrate_method=percentile"
            )
        wide = [t for t in (self.activation_type, self.weight_type) if not t.endswith("int8")]
        if self.encoding == "qoperator" and wide:
            raise UsageError(f"operators on integers take 8 bits, not {wide[0]}", hint="use encoding=qdq")
        if (self.activation_type, self.weight_type) == ("int8", "uint8"):
            raise UsageError("onnxruntime has no int8 activations with uint8 weights", hint="use weight_type=int8")
        if self.reduce_range and not self.weight_type.endswith("int8"):
            raise UsageError(f"reduce_range is for weights of 8 bits, it has no effect on {self.weight_type}")
        if self.calibrate_method == "entropy" and not self.activation_type.endswith("int8"):
            raise UsageError(f"entropy is a search for 8 bits, not {self.activation_type}", hint="use percentile")
        self._check_qnn()

    def _check_qnn(self) -> None:
        if self.preprocess == "none":
            given = [name for name in _OF_QNN if getattr(self, name)]
            if given:
                raise UsageError(f"{given[0]} is a step of preprocess=qnn", hint="add --preprocess qnn")
            return
        if self.encoding != "qdq":
            raise UsageError("QNN reads graphs with QDQ nodes, not operators on integers", hint="use encoding=qdq")
        for text in self.fixed_dims:
            if not re.fullmatch(r"[^=]+=[1-9]\d*", text):
                raise UsageError(f"fixed_dims {text!r} is no size of an axis", hint="write fixed_dims=batch=1,x.2=224")
        if self.nodes_16bit and not self.activation_type.endswith("int8"):
            raise UsageError(f"nodes_16bit has no effect, all activations are {self.activation_type}")
        if self.keep_removable_activations and self.activation_symmetric:
            raise UsageError(
                "keep_removable_activations has no effect: symmetric activations keep Relu and Clip anyway"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """What fixed_dims says."""
        return {name: int(size) for name, _, size in (text.partition("=") for text in self.fixed_dims)}

    @property
    def grid(self) -> tuple[int, int, bool, bool, bool]:
        """The same for `graphs.activations.unfit.Grid`."""
        bits = [int(t.strip("uint")) for t in (self.activation_type, self.weight_type)]
        operators = self.encoding == "qoperator"
        return bits[0], bits[1] - self.reduce_range, self.per_channel, operators, self.activation_symmetric

    @property
    def opset(self) -> int:
        """The lowest opset that has these types and operators."""
        if not (self.activation_type.endswith("int8") and self.weight_type.endswith("int8")) or self.nodes_16bit:
            return 21
        return 17 if self.fuse_layernorm else 13


_OF_QNN = (
    "fuse_layernorm",
    "inputs_to_make_channel_last",
    "outputs_to_make_channel_last",
    "fixed_dims",
    "nodes_16bit",
    "keep_removable_activations",
)

_LOST_FLOATS = {"Where"}
"""onnxruntime forgets to give these floats, where they stay float between operators on integers (1.31)."""
_QDQ_ONLY = {"ConvTranspose"}
"""No operator on integers: with encoding=qoperator, these stand between QuantizeLinear and DequantizeLinear too."""
_ORT_TYPES = {
    "uint8": "QUInt8",
    "int8": "QInt8",
    "uint16": "QUInt16",
    "int16": "QInt16",
    "uint4": "QUInt4",
    "int4": "QInt4",
}


def quantize(
    source: Path,
    target: Path,
    options: StaticOptions,
    reader: CalibrationReader | None,
    cache: Path | None = None,
    debug: bool = False,
) -> IntegerGraph:
    """Writes the quantized graph.

    Args:
        source: Float graph file.
        target: File to write, with `target`.data beside it.
        options: See there.
        reader: Samples; may be None where the cache file is there. bias_correction and `debug` read them again, from
            the start after `rewind()`.
        cache: File of ranges: read where it is there, else written.
        debug: Whether float and quantized graph are compared, node by node.

    Raises:
        UsageError: nodes or operators that the graph or the quantizer does not have, or neither samples nor cache.
        InputError: a graph that cannot be prepared, a node in float16, samples that do not fit, a cache of something
            else, or a node that was asked for and stays float.
    """
    from tempfile import TemporaryDirectory

    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    from quantcli.graphs.activations import nodes as integers
    from quantcli.graphs.activations import unfit
    from quantcli.graphs.calibration import tensor_ranges as ranges
    from quantcli.graphs.checking import compare
    from quantcli.graphs.checking import node_errors as twins
    from quantcli.graphs.model.files import open_graph, save_graph
    from quantcli.graphs.model.inputs import rewound
    from quantcli.graphs.rewrite import qnn
    from quantcli.graphs.rewrite.equalize import equalize
    from quantcli.graphs.rewrite.prepare import prepare
    from quantcli.graphs.walk.channels import has_weight

    assert options.calibrate_method != "distribution"
    if reader is None and (cache is None or not cache.is_file()):
        raise UsageError("static quantization measures ranges on samples, there are none", hint="give calibration data")
    able = set(QLinearOpsRegistry)
    able = able | set(QDQRegistry) if options.encoding == "qdq" else (able | _QDQ_ONLY) - _LOST_FLOATS
    with TemporaryDirectory(dir=target.parent, prefix=".static-") as name:
        folder = Path(name)
        ready, made, file = folder / "ready.onnx", folder / "made.onnx", folder / "ranges.json"
        prepared = prepare(source, ready, opset=options.opset)
        said: tuple[str, ...] = ()
        if options.preprocess == "qnn":
            before, ready = ready, folder / "qnn.onnx"
            turned = options.inputs_to_make_channel_last, options.outputs_to_make_channel_last
            said = qnn.prepare_qnn(before, ready, *turned, options.sizes, fuse_layernorm=options.fuse_layernorm).notes
            reader = qnn.QnnReader(reader, before, ready, *turned) if reader is not None else None
        model = open_graph(ready)
        if options.preprocess == "qnn":
            able = qnn.qnn_operators(model)
        pairs: list[tuple[str, str]] = []
        if options.equalize:
            pairs = equalize(model)
            if not pairs:
                raise UsageError("the graph has no neighbouring layers to equalize", hint="leave equalize out")
            ready = folder / "equal.onnx"
            save_graph(model, ready)
        whole = options.preprocess == "qnn"  # floats inside the graph are what such processors lack
        wanted = options.op_types or (() if whole else integers.default_types(model, able))
        chosen = integers.select_nodes(model, able, wanted, options.nodes_include, options.nodes_exclude)
        integers.require_float32(chosen)
        wide: set[str] = set()
        if options.nodes_16bit:
            wide = {str(n.name) for n in integers.select_nodes(model, able, include=options.nodes_16bit)}
            if left := sorted(wide - {str(n.name) for n in chosen}):
                raise UsageError(f"{left[0]} stays float, it has no 16 bits", hint="leave it out of nodes_16bit")
        weighted = [str(n.name) for n in model.graph.all_nodes() if has_weight(n)]
        # every tensor that a chosen node touches, and those that are put together or taken apart on the way
        tensors = ranges.tensors_of(model, {n.op_type for n in chosen} | unfit.MIXING_TYPES)
        how = ranges.RangeOptions(options.calibrate_method, options.percentile, options.activation_symmetric)
        if cache is not None and cache.is_file():
            found = ranges.read_ranges(cache, ready, tensors, how)
        else:
            assert reader is not None
            found = ranges.measure_ranges(ready, tensors, reader, how)
        ranges.write_ranges(file, found, ready, how)
        if cache is not None and not cache.is_file():
            cache.write_bytes(file.read_bytes())
        odd = unfit.find_unfit(model, chosen, found, unfit.Grid(*options.grid)) if not whole else unfit.Unfit({}, {})
        chosen = [n for n in chosen if n.name not in odd.reasons]
        if not chosen:
            raise InputError(f"no node is left to quantize: {next(iter(unfit.list_float(model, odd.reasons)))}")
        asked = {(str(n.name), n.op_type) for n in chosen if has_weight(n)}
        told, failing = _write(ready, made, options, chosen, wide, file, odd.spans)
        chosen = [n for n in chosen if n.name not in failing]
        corrected: list[str] = []
        if options.bias_correction:
            again = rewound(reader, "bias_correction")
            model = open_graph(ready)
            errors = twins.measure_twins(ready, made, {n for n, _ in asked}, again, outputs=False)
            corrected, without = twins.correct_biases(model, errors)
            if not corrected:
                raise UsageError("no quantized node has a bias to correct", hint="leave bias_correction out")
            if without:
                told.append(f"{without[0]} and {len(without) - 1} more have no bias to correct")
            save_graph(model, folder / "corrected.onnx")
            # the ranges are still right: corrected layers give what float layers gave
            more, _ = _write(folder / "corrected.onnx", made, options, chosen, wide, file, odd.spans)
            told += [n for n in more if n not in told]
        reasons = odd.reasons | unfit.recurrent_without_integers(model, able) | failing
        result = open_graph(made)
        reasons |= dict.fromkeys(integers.float_nodes(result, asked), integers.NOT_QUANTIZED)
        done = {name for name, _ in asked} - set(reasons)
        if asked and not done:
            raise InputError(f"no node with a weight is left to quantize: {unfit.list_float(model, reasons)[0]}")
        names = {str(n.name) for n in chosen}
        full = integers.full_int8(result, options.reduce_range) if options.activation_type.endswith("int8") else []
        integers.finish(result, target)
        compared = compare.compare(ready, target, names, rewound(reader, "a comparison")) if debug else None
    notes = [*said, *unfit.list_float(model, reasons), *_left_out(model, chosen, options), *told, *full]
    return integers.IntegerGraph(
        quantized=tuple(n for n in weighted if n in done),
        kept=tuple(n for n in weighted if n not in done),
        prepared=prepared,
        notes=tuple(notes),
        samples=found.samples,
        equalized=tuple(pairs),
        corrected=tuple(corrected),
        comparison=compared,
        nodes=integers.kinds_of(chosen),
        reasons=reasons,
    )


def _left_out(model: ir.Model, chosen: Sequence[ir.Node], options: StaticOptions) -> list[str]:
    """What was asked for and is had in part only."""
    from quantcli.graphs.walk.channels import has_weight

    notes = []
    batched = [
        str(n.name)
        for n in chosen
        if n.op_type == "MatMul" and has_weight(n) and n.inputs[1] is not None and len(n.inputs[1].shape or ()) > 2
    ]
    if batched and options.per_channel and options.encoding == "qdq":
        few = f"{batched[0]} and {len(batched) - 1} more" if len(batched) > 1 else batched[0]
        notes.append(f"{few}: one scale for a batch of matrices, onnxruntime runs no others between QDQ nodes")
    inside = [str(n.name) for n in chosen if n.graph is not model.graph]
    if inside and options.calibrate_method != "minmax":
        notes.append(f"ranges inside of If, Loop and Scan are of all values, not by {options.calibrate_method}")
    return notes


def _write(
    ready: Path,
    made: Path,
    options: StaticOptions,
    chosen: Sequence[ir.Node],
    wide: Collection[str],
    ranges: Path,
    spans: Mapping[str, np.ndarray],
) -> tuple[list[str], dict[str, str]]:
    """Lets onnxruntime place the integer nodes; what it had to say, and why nodes stay float."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    from quantcli.graphs.activations import nodes as integers
    from quantcli.graphs.activations.bodies import quantize_bodies
    from quantcli.graphs.activations.weight_extremes import with_stand_ins
    from quantcli.graphs.rewrite import qnn

    names = [str(n.name) for n in chosen]
    method = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}[options.calibrate_method]
    activations, weights = (
        QuantType.from_string(_ORT_TYPES[name]) for name in (options.activation_type, options.weight_type)
    )
    extra: dict[str, object] = {"ActivationSymmetric": options.activation_symmetric}
    if options.encoding == "qdq":
        # products on integers can give floats: rounded are those that the next node takes as integers, and no other
        extra["OpTypesToExcludeOutputQuantization"] = ["MatMul", "Gemm"]
    if options.weight_grid != "auto":
        extra["WeightSymmetric"] = options.weight_grid == "sym"

    def place(source: Path, target: Path, encoding: str, some: Collection[str]) -> None:
        quantize_static(
            source,
            target,
            None,
            quant_format=QuantFormat.QDQ if encoding == "qdq" else QuantFormat.QOperator,
            op_types_to_quantize=sorted({n.op_type for n in chosen if n.name in some}),
            per_channel=options.per_channel,
            reduce_range=options.reduce_range,
            activation_type=activations,
            weight_type=weights,
            nodes_to_quantize=sorted(some),
            use_external_data_format=True,
            calibrate_method=CalibrationMethod[method],
            extra_options=extra,
            calibration_cache_path=ranges,
        )

    def run(source: Path, target: Path, some: Collection[str]) -> None:
        apart = {str(n.name) for n in chosen if n.op_type in _QDQ_ONLY and n.name in some}
        if options.encoding == "qdq" or not apart:
            place(source, target, options.encoding, some)
        elif apart == set(some):
            place(source, target, "qdq", some)
        else:
            between = target.with_name(f"between-{target.name}")
            place(source, between, options.encoding, set(some) - apart)
            place(between, target, "qdq", apart)

    with integers.captured_warnings() as notes:
        if options.preprocess == "qnn":
            arguments = {
                "activation_type": activations,
                "weight_type": weights,
                "activation_symmetric": options.activation_symmetric,
                # left to itself, it takes int4 for asymmetric
                "weight_symmetric": extra.get("WeightSymmetric", options.weight_type.startswith("int")),
                "per_channel": options.per_channel,
                "keep_removable_activations": options.keep_removable_activations,
            }
            extra = qnn.qnn_extra_options(ready, names, wide, arguments)

        def stand_in(source: Path, target: Path, some: Collection[str]) -> None:
            alike = options.encoding == "qdq"
            with_stand_ins(source, target, some, lambda a, b: run(a, b, some), spans, batches_alike=alike)

        def part(source: Path, target: Path, some: Collection[str]) -> None:
            failing.update(integers.quantize_what_goes(stand_in, source, target, some))

        failing: dict[str, str] = {}
        quantize_bodies(ready, made, names, part, () if options.encoding == "qdq" else _LOST_FLOATS)
    return notes, failing


ALGORITHM = Algorithm(
    name="static",
    kind="graph",
    summary="integer weights and activations with measured ranges, for ONNX graphs; for QNN with --preprocess qnn",
    bits=(4, 8, 16),
    calibration="required",
    options=StaticOptions,
    run=quantize,
    inputs=("onnx",),
    formats=("qdq", "qoperator"),
)
