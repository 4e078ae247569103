"""Where a factor per channel can go in an ONNX graph: into the constants of what makes a tensor, or of what reads it.

y / s is had by dividing the gain of the norm that makes y, or the rows of the linear in front of it, through operators
that commute with positive factors (Relu, pooling, Flatten); no node is added and the float function stays once the
readers' columns are multiplied by s. A tensor that anything else reads too is left alone.

Axes are counted from the back: constants that broadcast have fewer axes than what they are added to.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

__all__ = [
    "NORMS",
    "Edit",
    "Maker",
    "column_sizes",
    "constant_of",
    "find_maker",
    "has_weight",
    "new_constant",
    "scale_columns",
    "weight_columns",
    "weight_rows",
]

_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
# operators that commute with positive factors per channel, and those that do so where they work within a channel
_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "Abs")
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
NORMS: Mapping[str, tuple[int, ...]] = {
    "LayerNormalization": (1, 2),
    "SimplifiedLayerNormalization": (1,),
    "RMSNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}
"""Inputs that hold the gain and, where there is one, the bias of output 0."""


@dataclass(frozen=True)
class Edit:
    """A constant that takes the factors."""

    node: ir.Node
    """Its reader."""
    place: int
    """Which of the reader's inputs it is."""
    axis: int
    """Axis of the channels, from the back; a constant that has no such axis is spread over it."""
    inverse: bool = False
    """Whether it divides where the others multiply."""

    def apply(self, factors: np.ndarray) -> None:
        """Multiplies the constant by factors [channels]."""
        value = self.node.inputs[self.place]
        old = constant_of(value)
        assert value is not None and old is not None
        along = factors.reshape(-1, *[1] * (-self.axis - 1))
        new = old.astype(np.float64) * (1 / along if self.inverse else along)
        new_constant(self.node, self.place, new.astype(old.dtype))


@dataclass(frozen=True)
class Maker:
    """What makes a tensor's channels."""

    edits: tuple[Edit, ...]
    """Constants that the channels are proportional to, all of them together."""
    linear: ir.Node | None
    """The linear among their readers, None for a norm or a product with a constant."""
    repeat: int = 1
    """How many neighbours along the tensor's axis are one channel: a Flatten makes a pixel a column of its own."""

    def divide(self, scale: np.ndarray) -> None:
        """Divides the tensor's channels by scale [channels], float64 and positive, in the constants."""
        for edit in self.edits:
            edit.apply(1 / scale)


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The values of an initializer; None for anything else."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()


def new_constant(node: ir.Node, place: int, array: np.ndarray) -> None:
    """Gives one input of a node another constant; other readers of the old one keep it."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    if place >= len(node.inputs):
        node.resize_inputs(place + 1)
    old = node.inputs[place]
    if old is not None and len(old.uses()) == 1 and not old.is_graph_output():
        old.const_value = ir.Tensor(array, name=old.name)
        old.dtype, old.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        return
    stem = f"{node.name}.bias" if old is None else f"{old.name}.{node.name}"
    name, count = stem, 1
    while name in graph.initializers:
        name, count = f"{stem}.{count}", count + 1
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    node.replace_input_with(place, value)


def has_weight(node: ir.Node) -> bool:
    """Whether a node multiplies by a constant float matrix or kernel."""
    weight = node.inputs[1] if node.domain == "" and node.op_type in _LINEAR and len(node.inputs) > 1 else None
    return weight is not None and weight.is_initializer() and weight.dtype in _FLOATS


def weight_rows(node: ir.Node) -> int:
    """The axis of a weight's output channels, from the front."""
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    return {"Conv": 0, "ConvTranspose": 1}.get(node.op_type, len(weight.shape) - 1)


def weight_columns(node: ir.Node, weight: np.ndarray) -> np.ndarray:
    """A view of a Conv's, Gemm's or MatMul's weight as [channels of the input, rest], through which it can be written.

    In groups, only the outputs of its own group read a channel.
    """
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return split.transpose(0, 2, 1, 3)  # [groups, channels of a group, outputs of it, kernel]
    return weight.T if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0 else weight


def column_sizes(node: ir.Node) -> np.ndarray:
    """The largest magnitude of the weights that each input channel meets, [channels] float64."""
    weight = constant_of(node.inputs[1])
    assert weight is not None
    view = np.abs(weight_columns(node, weight.astype(np.float64)))
    return np.asarray(view.max((2, 3)).reshape(-1) if view.ndim == 4 else view.max(1))


def scale_columns(node: ir.Node, scale: np.ndarray) -> None:
    """Multiplies the weights that each input channel meets by scale [channels]."""
    weight = constant_of(node.inputs[1])
    assert weight is not None
    new = weight.astype(np.float64)
    view = weight_columns(node, new)
    view *= scale.reshape(*view.shape[:2], 1, 1) if view.ndim == 4 else scale[:, None]
    new_constant(node, 1, new.astype(weight.dtype))


def find_maker(value: ir.Value | None, axis: int, readers: Collection[ir.Node]) -> Maker | None:
    """What makes the channels of a tensor, where that can be scaled without anything else noticing.

    Args:
        value: The tensor.
        axis: Of its channels, from the back.
        readers: The nodes that may read it; where there are others, there is no maker.
    """
    if value is None or value.is_graph_output() or not {user for user, _ in value.uses()} <= set(readers):
        return None
    node = value.producer()
    if node is None or node.domain not in ("", "com.microsoft") or node.outputs[0] is not value:
        return None
    if node.op_type in _LINEAR:
        return _linear(node, axis, value)
    if node.op_type in NORMS:
        return _norm(node, axis)
    x = node.inputs[0]
    rank = len(x.shape) if x is not None and x.shape is not None else 0
    if node.op_type in _HOMOGENEOUS or (node.op_type in _POOLS and axis == 1 - rank):
        return find_maker(x, axis, [node])
    if node.op_type in ("Flatten", "Reshape"):
        return _flattened(node, axis)
    if node.op_type in ("Add", "Sub", "Mul", "Div"):
        return _elementwise(node, axis)
    return None


def _linear(node: ir.Node, axis: int, output: ir.Value) -> Maker | None:
    if not has_weight(node) or output.shape is None:
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        if axis != 1 - len(output.shape) or (node.op_type != "Conv" and node.attributes.get_int("group", 1) != 1):
            return None
    elif axis != -1:
        return None
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    if len(weight.shape) < 2:  # a vector leaves no channels
        return None
    edits = [Edit(node, 1, weight_rows(node) - len(weight.shape))]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        if constant_of(node.inputs[2]) is None:
            return None
        edits.append(Edit(node, 2, -1))
    return Maker(tuple(edits), node)


def _norm(node: ir.Node, axis: int) -> Maker | None:
    places = [p for p in NORMS[node.op_type] if p < len(node.inputs) and node.inputs[p] is not None]
    last = node.attributes.get_int("axis", -1)
    rank = len(node.outputs[0].shape) if node.outputs[0].shape is not None else 0
    if axis != -1 or last not in (-1, rank - 1) or any(constant_of(node.inputs[p]) is None for p in places):
        return None
    return Maker(tuple(Edit(node, p, -1) for p in places), None)


def _elementwise(node: ir.Node, axis: int) -> Maker | None:
    constants = [i for i, v in enumerate(node.inputs) if constant_of(v) is not None]
    if node.op_type in ("Mul", "Div") and len(constants) == 1:
        (place,) = constants
        if node.op_type == "Div" and place == 0:  # c / x is proportional to c alone
            return Maker((Edit(node, 0, axis),), None)
        return Maker((Edit(node, place, axis, inverse=node.op_type == "Div"),), None)
    if node.op_type == "Mul" and not constants:
        shapes = [v.shape for v in node.inputs if v is not None]
        same = len(shapes) == 2 and shapes[0] is not None and shapes[0] == shapes[1]
        found = [find_maker(v, axis, [node]) for v in node.inputs] if same and node.inputs[0] != node.inputs[1] else []
        return next((m for m in found if m is not None), None)
    if node.op_type in ("Add", "Sub") and len(constants) == 1:
        (place,) = constants
        behind = find_maker(node.inputs[1 - place], axis, [node])
        return behind and replace(behind, edits=(*behind.edits, Edit(node, place, axis)))
    return None


def _flattened(node: ir.Node, axis: int) -> Maker | None:
    """[n, C, H, W] to [n, C H W]."""
    x, output = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or output.shape is None or len(output.shape) != 2 or len(x.shape) < 3:
        return None
    inner = [n for n in x.shape[2:] if isinstance(n, int)]
    if axis != -1 or x.shape[0] != output.shape[0] or len(inner) != len(x.shape) - 2:
        return None
    behind = find_maker(x, 1 - len(x.shape), [node])
    return behind and replace(behind, repeat=behind.repeat * int(np.prod(inner)))
