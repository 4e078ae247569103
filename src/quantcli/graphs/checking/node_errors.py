"""Beside each node of a float graph, the same node as the quantized graph computes it, on the float graph's input.

What a twin gets wrong is its own doing: errors of earlier nodes do not reach it. Statistics of the difference are taken
inside the run, so no tensor of a twin is ever kept. The grids are read from the quantized graph that onnxruntime's
quantizers wrote, by the names that they give.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from quantcli.errors import InputError
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.model.inputs import CalibrationReader
from quantcli.graphs.model.session import open_session, run_sample
from quantcli.graphs.walk.channels import constant_of, has_weight, new_constant, weight_rows

__all__ = ["Grids", "TwinError", "correct_biases", "measure_twins"]

_REDUCE_AXES_AS_INPUT = 18
_DYNAMIC = {"MatMul": (0, 1), "Conv": (0,), "Attention": (0,), "LSTM": (0,)}


@dataclass(frozen=True)
class TwinError:
    """How a quantized node differs from the float node on the same input."""

    signal: float
    """Sum of squares of the float output."""
    noise: float
    """Sum of squares of the difference."""
    mean: np.ndarray | None
    """Mean of the difference per output channel, [C] float64; None for nodes without weights."""


class Grids:
    """Scales and zero points of a quantized graph, by the tensors of the float graph that it was made of."""

    def __init__(self, made: Path, ready: ir.Model):
        """Reads them.

        Args:
            made: File of the quantized graph.
            ready: The float graph.
        """
        model = open_graph(made)
        self._constants = model.graph.initializers
        self._ready = {str(v.name): v for n in ready.graph for v in n.outputs}
        self._quantizers: dict[str, tuple[str, str]] = {}
        for node in model.graph:
            if node.op_type == "QuantizeLinear":
                x, scale, zero = (str(v.name) if v is not None else "" for v in node.inputs[:3])
                self._quantizers[x.removesuffix("_QuantizeLinear_Input")] = (scale, zero)
        self.dynamic = any(n.op_type == "DynamicQuantizeLinear" for n in model.graph)
        """Whether activations get their grids anew at every run."""
        self.nodes = {str(n.name).removesuffix("_quant") for n in model.graph}
        """Names of the nodes that are still there."""
        names = {str(v.name) for n in model.graph for v in n.outputs}
        self.floats = names | {str(v.name) for v in model.graph.inputs}
        """Tensors of the quantized graph."""

    def of(self, tensor: str) -> tuple[ir.Value, ir.Value] | None:
        """Scale and zero point of an activation; None where it stays float."""
        names = self._quantizers.get(tensor, (f"{tensor}_scale", f"{tensor}_zero_point"))
        if names[0] in self._constants:
            return self._constants[names[0]], self._constants[names[1]]
        producer = self._ready[tensor].producer() if tensor in self._ready else None
        # operators that move integers have the grid of their input
        behind = producer.inputs[0] if producer is not None and f"{tensor}_quantized" in self.floats else None
        return self.of(str(behind.name)) if behind is not None else None

    def constant(self, node: ir.Node, place: int) -> np.ndarray | None:
        """A constant input of a node as its codes say; None where it stays float, as biases are taken to."""
        value = node.inputs[place]
        name = str(value.name) if value is not None else ""
        codes = constant_of(self._constants.get(f"{name}_quantized"))
        scale = constant_of(self._constants.get(f"{name}_scale"))
        if codes is None or scale is None:
            return None
        zero = constant_of(self._constants.get(f"{name}_zero_point"))
        offset = np.zeros(1) if zero is None else zero.astype(np.float64)
        shape = [1] * codes.ndim
        if scale.ndim == codes.ndim:
            shape = list(scale.shape)  # of a batch of matrices
        elif scale.size > 1:
            shape[weight_rows(node) if has_weight(node) else codes.shape.index(scale.size)] = -1
        steps = codes.astype(np.float64) - offset.reshape(shape if offset.size > 1 else [1] * codes.ndim)
        return (steps * scale.astype(np.float64).reshape(shape)).astype(np.float32)


def measure_twins(
    ready: Path, made: Path, names: Collection[str], reader: CalibrationReader, *, outputs: bool = True
) -> dict[str, TwinError]:
    """Runs samples through the float graph and a twin of each of these nodes.

    Args:
        ready: The float graph that was quantized.
        made: What became of it.
        names: Nodes to be compared.
        reader: Samples.
        outputs: Whether a twin's output is rounded to its grid too.

    Raises:
        InputError: no samples, or one that the graph cannot run.
    """
    model = open_graph(ready)
    kinds = {str(n.name): n for n in model.graph if n.name in names}
    grids = Grids(made, model)
    pairs = {}
    for name, node in kinds.items():
        twin = _add_twin(model.graph, node, grids, outputs)
        if twin is not None:
            pairs[name] = _float(model.graph, node.outputs[0]), _float(model.graph, twin)
    if not pairs:
        return {}
    asked = []
    for name, (output, twin) in pairs.items():
        difference = _node(model.graph, "Sub", [twin, output], ir.DataType.FLOAT)
        asked += [
            _node(model.graph, "ReduceSumSquare", [v], ir.DataType.FLOAT, keepdims=0) for v in (output, difference)
        ]
        if has_weight(kinds[name]):
            asked.append(_channel_mean(model, kinds[name], difference))
    model.graph.outputs[:] = asked
    sums: list[np.ndarray] = []
    with TemporaryDirectory(dir=ready.parent, prefix=".twins-") as folder:
        save_graph(model, Path(folder) / "twins.onnx")
        session = open_session(Path(folder) / "twins.onnx", optimized=False)
        samples = 0
        while feed := reader.get_next():
            found = [a.astype(np.float64) for a in run_sample(session, feed, samples)]
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
            samples += 1
    if not samples:
        raise InputError("there are no samples to compare with")
    totals = iter(sums)
    return {
        name: TwinError(
            float(next(totals)), float(next(totals)), next(totals) / samples if has_weight(kinds[name]) else None
        )
        for name in pairs
    }


def correct_biases(model: ir.Model, errors: dict[str, TwinError]) -> tuple[list[str], list[str]]:
    """Takes the mean error of each quantized linear off its bias, in place.

    Markus Nagel et al. (https://arxiv.org/abs/1906.04721), section 4.2: rounding weights shifts the mean of a layer's
    output by E[(W' - W) x], which a bias can undo. The expectation is over samples here, as the layer is given them by
    the float graph, its input rounded as in the quantized graph.

    Args:
        model: The float graph that was quantized.
        errors: Of its nodes, without rounding of their outputs.

    Returns:
        Names of the corrected nodes, and of those without a bias to correct (a MatMul that no constant is added to).
    """
    done, left = [], []
    for node in list(model.graph):
        mean = errors[str(node.name)].mean if node.name in errors and has_weight(node) else None
        if mean is None:
            continue
        reader, place = _bias_of(node)
        if reader is None:
            left.append(str(node.name))
            continue
        old = constant_of(reader.inputs[place]) if place < len(reader.inputs) else None
        dtype = np.float32 if node.inputs[1] is None or node.inputs[1].dtype is None else node.inputs[1].dtype.numpy()
        beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
        before = np.zeros_like(mean) if old is None else old.astype(np.float64)
        new_constant(reader, place, (before - mean / beta).astype(dtype))
        done.append(str(node.name))
    return done, left


def _bias_of(node: ir.Node) -> tuple[ir.Node | None, int]:
    """The node that adds the bias of a linear, and which of its inputs that is."""
    if node.op_type != "MatMul":
        given = node.inputs[2] if len(node.inputs) > 2 else None
        beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
        return (None, 0) if beta == 0 or (given is not None and constant_of(given) is None) else (node, 2)
    users = [user for user, _ in node.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Add" and not node.outputs[0].is_graph_output():
        for place, value in enumerate(users[0].inputs):
            constant = constant_of(value)
            if constant is not None and constant.ndim <= 1:
                return users[0], place
    return None, 0


def _add_twin(graph: ir.Graph, node: ir.Node, grids: Grids, outputs: bool) -> ir.Value | None:
    """The node once more, from codes; None where nothing of it is quantized."""
    inputs = list(node.inputs)
    for place, value in enumerate(node.inputs):
        if value is None:
            continue
        if constant_of(value) is not None:
            array = grids.constant(node, place)
            if array is not None:
                new = ir.Value(name=f"{node.name}.twin.{place}", const_value=ir.Tensor(array))
                new.dtype, new.shape = ir.DataType.FLOAT, ir.Shape(array.shape)
                graph.register_initializer(new)
                inputs[place] = (
                    new if value.dtype is not ir.DataType.FLOAT16 else _cast(graph, new, ir.DataType.FLOAT16)
                )
        elif value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            inputs[place] = _rounded(graph, value, grids, dynamic=place in _DYNAMIC.get(node.op_type, ()))
    if all(a is b for a, b in zip(inputs, node.inputs, strict=True)):
        return None
    twin = ir.node(node.op_type, inputs, dict(node.attributes), domain=node.domain, num_outputs=len(node.outputs))
    graph.append(twin)
    for index, value in enumerate(twin.outputs):
        value.name, value.type = f"{node.name}.twin.output{index}", node.outputs[index].type
    # what a Relu or Clip cuts off has no codes where the grid is in its place: it is no loss of this node
    cut = any(u.op_type in ("Relu", "Clip") and u.name not in grids.nodes for u, _ in node.outputs[0].uses())
    return _rounded(graph, twin.outputs[0], grids, of=node.outputs[0]) if outputs and not cut else twin.outputs[0]


def _rounded(
    graph: ir.Graph, value: ir.Value, grids: Grids, *, dynamic: bool = False, of: ir.Value | None = None
) -> ir.Value:
    """A value through its grid and back; itself where it has none."""
    source = value
    if grids.dynamic:
        if not dynamic:
            return value
        name = f"{value.name}.codes"
        made = ir.node("DynamicQuantizeLinear", [value], num_outputs=3)
        graph.append(made)
        for output, suffix in zip(made.outputs, ("", ".scale", ".zero"), strict=True):
            output.name = f"{name}{len(graph)}{suffix}"
        return _node(graph, "DequantizeLinear", list(made.outputs), ir.DataType.FLOAT)
    grid = grids.of(str((of or value).name))
    if grid is None:
        return value
    scale, zero = (_copied(graph, v) for v in grid)
    codes = _node(graph, "QuantizeLinear", [source, scale, zero], zero.dtype)
    return _node(graph, "DequantizeLinear", [codes, scale, zero], value.dtype)


def _copied(graph: ir.Graph, value: ir.Value) -> ir.Value:
    name = f"{value.name}.twin"
    if name not in graph.initializers:
        array = constant_of(value)
        assert array is not None
        new = ir.Value(name=name, const_value=ir.Tensor(array, dtype=value.dtype))
        new.type, new.shape = value.type, ir.Shape(array.shape)
        graph.register_initializer(new)
    return graph.initializers[name]


def _float(graph: ir.Graph, value: ir.Value) -> ir.Value:
    return value if value.dtype is ir.DataType.FLOAT else _cast(graph, value, ir.DataType.FLOAT)


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    return _node(graph, "Cast", [value], dtype, to=dtype.value)


def _node(
    graph: ir.Graph, op_type: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None, **attributes: int
) -> ir.Value:
    node = ir.node(op_type, inputs, attributes)
    graph.append(node)
    output = node.outputs[0]
    output.name = f"{op_type}.twin{len(graph)}"
    if dtype is not None:
        output.dtype = dtype
    return output


def _channel_mean(model: ir.Model, node: ir.Node, difference: ir.Value) -> ir.Value:
    """Mean over all axes but that of the output channels, [C]."""
    rank = len(node.outputs[0].shape or (0, 0))
    channels = 1 if node.op_type in ("Conv", "ConvTranspose") else rank - 1
    axes = [i for i in range(rank) if i != channels]
    if (model.opset_imports.get("") or 0) < _REDUCE_AXES_AS_INPUT:
        mean = ir.node("ReduceMean", [difference], {"axes": axes, "keepdims": 0})
    else:
        value = ir.Value(name=f"{node.name}.twin.axes", const_value=ir.Tensor(np.array(axes, np.int64)))
        value.dtype, value.shape = ir.DataType.INT64, ir.Shape((len(axes),))
        model.graph.register_initializer(value)
        mean = ir.node("ReduceMean", [difference, value], {"keepdims": 0})
    model.graph.append(mean)
    mean.outputs[0].name, mean.outputs[0].dtype = f"{node.name}.twin.mean", ir.DataType.FLOAT
    return mean.outputs[0]
