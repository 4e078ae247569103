"""What a graph does with an input, as far as its nodes say it: tables that it indexes, numbers it is compared with.

A value is followed from node to node and into bodies of If, Loop and Scan, as long as it stays what it is: cast,
reshaped, shifted by a constant.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import onnx_ir as ir

__all__ = ["InputUse", "use_of"]

_SAME_SHAPE = {
    *("Identity", "Cast", "CastLike", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Abs", "Neg", "Not", "Clip", "Dropout"),
    *("Sqrt", "Exp", "Log", "Erf", "Floor", "Ceil", "Round", "Sign", "IsNaN", "Pow", "Gelu", "QuickGelu"),
}
_TWO_SIDED = {"Add", "Sub", "Mul", "Div", "PRelu", "Max", "Min", "Where"}
_SAME_VALUES = {
    *("Identity", "Cast", "CastLike", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Slice", "Concat"),
    *("Expand", "Tile", "Split", "Where", "Max", "Min", "Clip", "SequenceConstruct", "SequenceAt", "Optional"),
    *("OptionalGetElement", "ConcatFromSequence", "ReduceMax", "ReduceMin", "Pad", "Neg", "Abs"),
}
_COMPARED = {"Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"}
# operator and input that takes indexes: input that is the table, and its axis (None: the node's own, 0 by default)
_INDEXES: dict[tuple[str, int], tuple[int, int | None]] = {
    ("Gather", 1): (0, None),
    ("GatherElements", 1): (0, None),
    ("GatherND", 1): (0, 0),
    ("ScatterElements", 1): (0, None),
    ("ScatterND", 1): (0, 0),
    ("NegativeLogLikelihoodLoss", 1): (0, 1),
    ("SoftmaxCrossEntropyLoss", 1): (0, 1),
    ("EmbedLayerNormalization", 0): (2, 0),
    ("EmbedLayerNormalization", 1): (4, 0),
}
_SIZES = {
    ("Reshape", 1): "reshape",
    ("Expand", 1): "ones",
    ("Tile", 1): "ones",
    ("ConstantOfShape", 0): "ones",
    ("TopK", 1): "ones",
    ("Loop", 0): "few",
    ("Range", 0): "zeros",
    ("Range", 1): "few",
    ("Range", 2): "ones",
    ("Slice", 1): "zeros",
    ("Slice", 2): "many",
    ("Slice", 3): "axes",
    ("Slice", 4): "ones",
    ("Pad", 1): "zeros",
    ("Unsqueeze", 1): "axes",
    ("ReverseSequence", 1): "ones",
    ("LSTM", 4): "ones",
    ("GRU", 4): "ones",
    ("RNN", 4): "ones",
}
"""Inputs that are sizes, places or counts, and which numbers serve there."""
_MOST_STEPS = 20_000


@dataclass
class InputUse:
    """What is known of one input from the nodes that it reaches."""

    low: int = 0
    """Smallest index that no table refuses."""
    high: int | None = None
    """Largest one; None where it indexes none."""
    compared: list[int] = field(default_factory=list)
    """Constants that it is compared with: a sampling rate, a mode."""
    size: str = ""
    """What serves where it is a size, as `_SIZES` says; empty where it is none."""
    axes: dict[int, int] = field(default_factory=dict)
    """Lengths of its axes that weights ask for."""
    rank: int | None = None
    """How many axes weights ask for."""


@dataclass(frozen=True)
class _Place:
    """A value on the way, and how it follows from the input."""

    value: ir.Value
    scale: float = 1
    shift: float = 0
    """The value is input * scale + shift, where it still holds the input's numbers."""
    exact: bool = True
    """Whether it does."""
    axes: tuple[int, ...] | None = None
    """Which axis of the input each of its axes is; None where that is lost."""


def use_of(value: ir.Value) -> InputUse:
    """Follows an input through the graph.

    Args:
        value: An input of a graph without functions.
    """
    found = InputUse()
    rank = len(value.shape) if value.shape is not None else None
    waiting = [_Place(value, axes=tuple(range(rank)) if rank is not None else None)]
    seen: set[tuple[int, bool, bool]] = set()
    for _ in range(_MOST_STEPS):
        if not waiting:
            break
        place = waiting.pop()
        key = (id(place.value), place.exact, place.axes is not None)
        if key in seen:
            continue
        seen.add(key)
        for node, index in place.value.uses():
            _note(node, index, place, found)
            waiting += _behind(node, index, place)
    return found


def _note(node: ir.Node, index: int, place: _Place, found: InputUse) -> None:
    """Writes down what one reader says."""
    if place.exact:
        rows = _table_rows(node, index)
        if rows is not None and place.scale > 0:
            highest = math.floor((rows - 1 - place.shift) / place.scale)
            found.high = highest if found.high is None else min(found.high, highest)
            found.low = max(found.low, math.ceil(-place.shift / place.scale))
        if node.op_type in _COMPARED and place.scale == 1:
            constants = _constant(node.inputs[1 - index])
            found.compared += [int(c - place.shift) for c in constants or () if float(c).is_integer()]
        found.size = found.size or _SIZES.get((node.op_type, index), "")
    for axis, length in _asked_axes(node, index, found, place):
        if place.axes is not None and -len(place.axes) <= axis < len(place.axes):
            found.axes.setdefault(place.axes[axis], length)


def _table_rows(node: ir.Node, index: int) -> int | None:
    """Entries of the table that a node looks an index up in: 1 where nobody says how long it is."""
    if (node.op_type, index) == ("OneHot", 0):
        depth = _constant(node.inputs[1])
        return int(depth[0]) if depth else 1
    place = _INDEXES.get((node.op_type, index))
    if place is None:
        return None
    table, axis = node.inputs[place[0]], place[1]
    if axis is None:
        axis = _integer(node, "axis", 0)
    shape = _shape(table)
    length = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
    return length if isinstance(length, int) and length > 0 else 1


def _asked_axes(node: ir.Node, index: int, found: InputUse, place: _Place) -> Iterator[tuple[int, int]]:
    """Axes of what a node reads whose lengths its other input, a weight, settles."""
    op = node.op_type
    shapes = [_stored_shape(v) for v in node.inputs]
    weight = shapes[1] if len(shapes) > 1 else None
    if op in ("Conv", "ConvTranspose") and index == 0 and weight is not None:
        groups = _integer(node, "group", 1) if op == "Conv" else 1
        found.rank = found.rank or len(weight)
        yield 1, weight[1 if op == "Conv" else 0] * groups
    elif op == "MatMul" and index == 0 and weight is not None and weight:
        yield -1, weight[max(len(weight) - 2, 0)]
    elif op == "MatMul" and index == 1 and shapes[0]:
        yield -2, shapes[0][-1]
    elif op == "Gemm" and index == 0 and weight is not None:
        found.rank = 2
        across = _integer(node, "transB", 0)
        yield (0 if _integer(node, "transA", 0) else 1), weight[1 if across else 0]
    elif op in ("LSTM", "GRU", "RNN") and weight is not None:
        found.rank = found.rank or (3 if index in (0, 5, 6) else None)
        yield from [(2, weight[2])] if index == 0 else []
        hidden = shapes[2] if len(shapes) > 2 else None
        yield from [(0, hidden[0]), (2, hidden[2])] if index in (5, 6) and hidden is not None else []
    elif op in ("BatchNormalization", "InstanceNormalization") and index == 0 and weight:
        yield 1, weight[0]
    elif op == "LayerNormalization" and index == 0 and weight:
        yield -1, weight[-1]
    elif op in _TWO_SIDED:
        for other, shape in enumerate(shapes):
            if other != index and shape is not None:
                yield from ((axis - len(shape), n) for axis, n in enumerate(shape) if n != 1)


def _behind(node: ir.Node, index: int, place: _Place) -> Iterator[_Place]:
    """Where a value goes from a node that reads it."""
    yield from (replace(place, value=v) for v in _inside(node, index))
    op = node.op_type
    axes = place.axes if op in _SAME_SHAPE or op in _TWO_SIDED else None
    if op == "Transpose" and place.axes is not None:
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(place.axes))[::-1]
        axes = tuple(place.axes[i] for i in order) if sorted(order) == list(range(len(place.axes))) else None
    scale, shift, exact = place.scale, place.shift, place.exact and op in _SAME_VALUES
    if op in ("Add", "Sub", "Mul") and place.exact:
        other = node.inputs[1 - index]
        constants = _constant(other)
        if constants and op == "Mul":
            scale, shift, exact = scale * max(constants), shift * max(constants), True
        elif constants and not (op == "Sub" and index == 1):
            shift, exact = shift + (max(constants) if op == "Add" else -min(constants)), True
        elif op == "Add":  # half of the table for each
            scale, shift, exact = scale * 2, shift * 2, True
    if exact or axes is not None:
        yield from (_Place(v, scale, shift, exact, axes) for v in node.outputs)


def _inside(node: ir.Node, index: int) -> Iterator[ir.Value]:
    """What a node's input is called in its body."""
    body = node.attributes.get("body")
    if body is not None and body.type is ir.AttributeType.GRAPH and index < len(body.as_graph().inputs):
        yield body.as_graph().inputs[index]  # what a Loop or Scan carries stands in the same place


def _integer(node: ir.Node, name: str, default: int) -> int:
    """An attribute; its default where it is no number."""
    given = node.attributes.get(name)
    return int(given.as_int()) if given is not None and given.type is ir.AttributeType.INT else default


def _shape(value: ir.Value | None) -> list[int | None] | None:
    if value is None:
        return None
    stored = _stored_shape(value)
    if stored is not None:
        return list(stored)
    return [n if isinstance(n, int) else None for n in value.shape] if value.shape is not None else None


def _stored_shape(value: ir.Value | None) -> list[int] | None:
    """Lengths of a weight's axes; None for what the graph computes."""
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return [int(n) for n in constant.shape.numpy()] if constant is not None else None


def _constant(value: ir.Value | None) -> list[float] | None:
    """The numbers of a small constant."""
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    if constant is None or constant.dtype is ir.DataType.STRING or not 0 < constant.size <= 64:
        return None
    return [float(n) for n in constant.numpy().ravel().tolist()]
