"""What QNN's provider wants of a graph: fused operators, channels last, and QDQ nodes of its types around everything.

onnxruntime's `get_qnn_qdq_config` says the types: one scale for weights of MatMul, the fixed grids of Sigmoid and Tanh
in 16 bits, the least range of a tensor, and conversions around tensors of another width. What it leaves out is added:
operators that only move values (Transpose, Reshape, MaxPool) get integers where they come first too, so that they do
not stay float in front of the graph.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from quantcli.errors import InputError, UsageError, nearest
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.model.inputs import CalibrationReader, Feed, check_feed, input_specs, rewound
from quantcli.graphs.model.session import open_session, run_sample
from quantcli.graphs.rewrite.channel_last import make_channel_last, turn_feed
from quantcli.graphs.rewrite.fusions import fuse_operators
from quantcli.graphs.rewrite.prepare import infer_types, name_nodes

__all__ = ["QnnGraph", "QnnReader", "prepare_qnn", "qnn_extra_options", "qnn_operators"]

_STAY = ("Cast", "Constant", "QuantizeLinear", "DequantizeLinear", "Shape", "Size")
"""Operators whose inputs and outputs get no grid: conversions, and those that read no values."""
_NORMS = ("LayerNormalization", "InstanceNormalization", "BatchNormalization")
_TOLERANCE = {np.dtype(np.float32): 1e-4, np.dtype(np.float16): 2e-2, np.dtype(np.float64): 1e-4}
"""Of outputs before and after, relative to the largest."""


@dataclass(frozen=True)
class QnnGraph:
    """What was done to a graph for QNN."""

    fused: Mapping[str, int]
    """How many of each operator were made of several."""
    notes: tuple[str, ...]
    """What users must know."""


def prepare_qnn(
    source: Path,
    target: Path,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    sizes: Mapping[str, int] = MappingProxyType({}),
    *,
    fuse_layernorm: bool = False,
) -> QnnGraph:
    """Writes the float graph that is quantized for QNN; its function is that of the source, but for the layout.

    Args:
        source: Float graph file as `prepare` wrote it.
        target: File to write in the same folder, with `target`.data beside it.
        inputs: Names of inputs to make channel-last.
        outputs: Names of outputs to make channel-last.
        sizes: Of axes that may have any, by their name.
        fuse_layernorm: Whether LayerNormalization is made of its parts.

    Raises:
        UsageError: nothing to fuse, or names that are none.
    """
    if sizes:
        source = _fix_sizes(source, sizes)
    model, fused = fuse_operators(source, layer_norms=fuse_layernorm)
    if fuse_layernorm and "LayerNormalization" not in fused:
        whole = any(n.op_type == "LayerNormalization" for n in model.graph)
        raise UsageError(
            "the graph has no parts of a LayerNormalization to fuse"
            + (", it has the operator itself" if whole else ""),
            hint="leave fuse_layernorm out",
        )
    said = make_channel_last(model, inputs, outputs)
    name_nodes(model)
    save_graph(model, target)
    counts = ", ".join(f"{count} {name}" for name, count in fused.items())
    notes = [*([f"fused for QNN: {counts}"] if fused else []), *said]
    axes = [axis for v in model.graph.inputs for axis in _axes(v) if isinstance(axis, str)]
    if axes:
        told = ", ".join(dict.fromkeys(axes))
        notes.append(f"QNN takes inputs of fixed sizes, these axes may have any: {told}; say fixed_dims={axes[0]}=1")
    return QnnGraph(fused, tuple(notes))


def _axes(value: ir.Value) -> list[int | str]:
    """Sizes, and names of the axes that may have any: INPUT.NUMBER where there is none."""
    return [d if isinstance(d, int) else str(d.value or f"{value.name}.{i}") for i, d in enumerate(value.shape or ())]


def _fix_sizes(path: Path, sizes: Mapping[str, int]) -> Path:
    """A file beside it whose axes have these sizes, in every shape."""
    model = open_graph(path)
    known = {axis for v in model.graph.inputs for axis in _axes(v) if isinstance(axis, str)}
    for name in sizes:
        if name not in known:
            raise UsageError(f"no input has an axis {name!r} that may have any size, {nearest(name, sorted(known))}")
    for value in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs)):
        if value.shape is not None:
            fixed = [sizes.get(str(axis), d) for axis, d in zip(_axes(value), value.shape, strict=True)]
            value.shape = ir.Shape(fixed)
    target = path.with_name(f"{path.stem}.fixed.onnx")
    save_graph(model, target)
    infer_types(target)
    return target


def qnn_operators(model: ir.Model) -> set[str]:
    """The operators that are quantized for QNN: all that the graph has."""
    return {n.op_type for n in model.graph if n.op_type not in _STAY}


def qnn_extra_options(
    path: Path, names: Collection[str], wide: Collection[str], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """What `quantize_static` is told beyond its arguments.

    Args:
        path: The graph that is quantized.
        names: Its nodes that are quantized.
        wide: Nodes whose outputs get 16 bits where activations have 8.
        arguments: Of `get_qnn_qdq_config`: types, symmetry, per_channel.

    Raises:
        UsageError: nodes whose outputs cannot have another width.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    proto = onnx.load(str(path), load_external_data=False)
    types = {v.name: v.type.tensor_type.elem_type for v in (*proto.graph.value_info, *proto.graph.output)}
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    outputs = [o for n in proto.graph.node if n.name in wide for o in n.output if types.get(o) in floats]
    kind = QuantType.QUInt16 if arguments["activation_type"] is QuantType.QUInt8 else QuantType.QInt16
    try:
        config = get_qnn_qdq_config(
            proto,
            None,
            init_overrides={output: [{"quant_type": kind}] for output in outputs},
            op_types_to_quantize=sorted({n.op_type for n in proto.graph.node if n.name in names}),
            nodes_to_exclude=[n.name for n in proto.graph.node if n.name not in names],
            **arguments,
        )
    except ValueError as error:
        raise UsageError(
            f"nodes_16bit: {error}", hint="name other nodes, or use 16 bits for all activations"
        ) from error
    overridden = config.extra_options["TensorQuantOverrides"]
    if arguments["per_channel"]:  # a gain has no second axis, which onnxruntime looks for and then does without
        for node in proto.graph.node:
            if node.op_type in _NORMS and node.name in names:
                plain = {"quant_type": arguments["weight_type"], "symmetric": arguments["weight_symmetric"]}
                overridden.setdefault(node.input[1], [plain])
    extra: dict[str, Any] = config.extra_options | {"ForceQuantizeNoInputCheck": True}
    return extra


class QnnReader:
    """Samples of the graph as it was given, in the layout of the graph for QNN.

    The first one is run through both graphs, which must agree.
    """

    def __init__(
        self, reader: CalibrationReader, before: Path, after: Path, inputs: Sequence[str], outputs: Sequence[str]
    ):
        """Nothing is read yet.

        Args:
            reader: Samples in the old layout.
            before: The graph as it was given.
            after: The graph for QNN.
            inputs: Names of inputs that are channel-last there.
            outputs: Names of outputs that are.
        """
        self._reader, self._before, self._after = reader, before, after
        self._inputs, self._outputs = inputs, outputs
        self._specs = input_specs(before), input_specs(after)
        self._compared = False

    def get_next(self) -> Feed | None:
        """The next sample by input name; None after the last.

        Raises:
            InputError: the two graphs differ.
        """
        feed = self._reader.get_next()
        if not feed:
            return None
        turned = turn_feed(check_feed(self._specs[0], feed, "a sample"), self._inputs)
        check_feed(self._specs[1], turned, "a sample for QNN")
        if not self._compared:
            self._compare(feed, turned)
            self._compared = True
        return turned

    def rewind(self) -> None:
        """Begins once more."""
        rewound(self._reader, "quantization for QNN")

    def _compare(self, feed: Feed, turned: Feed) -> None:
        found = [_outputs(path, sample) for path, sample in ((self._before, feed), (self._after, turned))]
        for name, before in found[0].items():
            if before.dtype not in _TOLERANCE:
                continue
            after = np.moveaxis(found[1][name], -1, 1) if name in self._outputs else found[1][name]
            most = _TOLERANCE[before.dtype] * max(1.0, float(np.abs(before).max(initial=0)))
            if before.shape != after.shape or not np.allclose(before, after, rtol=0, atol=most, equal_nan=True):
                raise InputError(
                    f"the graph gives another {name} with its operators fused for QNN, on the first sample",
                    hint="leave fuse_layernorm out; if that is not it, use preprocess=none",
                )


def _outputs(path: Path, feed: Feed) -> dict[str, np.ndarray]:
    session = open_session(path, optimized=False)
    return dict(zip([o.name for o in session.get_outputs()], run_sample(session, feed, 0), strict=True))
