"""What makes the columns of a tensor: the one walk back that scales of columns go.

y / s is had by dividing a gain (of a norm, or of a plain Mul) or the rows of a linear, through operators that pass a
positive factor per column on: Relu and its like, pooling, a gate's multiplication, the reshapes around attention. No
node is added, and the float function stays once whatever reads y has its own columns multiplied by s. What anybody else
reads on the way, or is an output of the graph (a cache), is left alone.

Axes count from the back. Columns may be several axes together, the last one fastest.
"""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from quantcli.graphs.walk.channels import LINEAR, NORMS, has_weight
from quantcli.graphs.walk.matrices import FLOATS, stored_weight

__all__ = ["Origin", "find_origin", "is_row", "shapes_of"]

_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "Abs", "Cast")
"""f(x / s) = f(x) / s for positive s."""
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
"""The same within a channel."""
Axes = tuple[int, ...]


@dataclass(frozen=True)
class Constant:
    """A constant as one node reads it; others may read it too, as it is."""

    node: ir.Node
    """The node."""
    place: int
    """Which of its inputs."""
    axis: int
    """Axis of the columns in what the node computes, from the back; the constant may be spread over it."""

    @property
    def value(self) -> ir.Value:
        """The constant."""
        found = self.node.inputs[self.place]
        assert found is not None
        return found


@dataclass(frozen=True)
class Origin:
    """What makes the columns of a tensor."""

    kind: Literal["norm", "linear", "factor"]
    """A norm with a gain, a linear with rows, or a product with a constant."""
    main: Constant
    """The gain, the linear's weight, or the constant."""
    added: tuple[Constant, ...] = ()
    """Constants added behind it, hence divided too."""
    inverse: bool = False
    """Whether columns are divided by the constant where others are multiplied."""
    repeat: int = 1
    """How many neighbours along the tensor's axis are one column: a Flatten makes a pixel a column of its own."""


def find_origin(
    value: ir.Value | None, axis: int, width: int, readers: Collection[ir.Node], shapes: Mapping[str, ir.Shape]
) -> Origin | None:
    """What makes the columns of a tensor, where scaling them changes nothing else.

    Args:
        value: The tensor.
        axis: Of its columns, from the back.
        width: How many there are.
        readers: The nodes that may read it.
        shapes: From `shapes_of`.
    """
    if value is None or value.is_graph_output() or not {user for user, _ in value.uses()} <= set(readers):
        return None
    return _Walk(shapes).back(value, (axis,), (width,))


class _Walk:
    """Backwards from a tensor."""

    def __init__(self, shapes: Mapping[str, ir.Shape]):
        self._shapes = shapes

    def back(self, value: ir.Value, axes: Axes, sizes: Axes) -> Origin | None:
        """The origin of a value's columns."""
        node = value.producer()
        if node is None or value.index() != 0 or node.domain not in ("", "com.microsoft"):
            return None
        if node.op_type in LINEAR:
            return self._linear(node, axes, sizes)
        if node.op_type in NORMS:
            return self._norm(node, axes, sizes)
        if node.op_type in _HOMOGENEOUS:
            source = node.inputs[0]
            floats = node.op_type != "Cast" or (source is not None and source.dtype in FLOATS)
            return self._follow(source, axes, sizes) if floats else None
        if node.op_type in _POOLS:
            rank = self._rank(node.inputs[0])
            return self._follow(node.inputs[0], axes, sizes) if rank is not None and axes == (1 - rank,) else None
        if node.op_type in ("Mul", "Div", "Add", "Sub"):
            return self._elementwise(node, axes, sizes)
        if node.op_type == "Transpose":
            perm = [int(p) for p in node.attributes["perm"].as_ints()] if "perm" in node.attributes else None
            if perm is None:
                return None
            return self._follow(node.inputs[0], tuple(perm[a] - len(perm) for a in axes), sizes)
        if node.op_type in ("Reshape", "Flatten") and axes == tuple(range(-len(axes), 0)):
            return self._reshape(node.inputs[0], sizes)
        return None

    def _follow(self, value: ir.Value | None, axes: Axes, sizes: Axes) -> Origin | None:
        if value is None or value.is_graph_output() or len(value.uses()) != 1:
            return None
        return self.back(value, axes, sizes)

    def _norm(self, node: ir.Node, axes: Axes, sizes: Axes) -> Origin | None:
        gain, *bias = NORMS[node.op_type]
        over = node.attributes.get_int("axis", -1)
        if axes != (-1,) or not is_row(_read(node, gain), sizes[0]):
            return None
        if node.op_type in ("LayerNormalization", "RMSNormalization") and over != -1:
            rank = self._rank(node.inputs[0])
            if rank is None or over != rank - 1:
                return None
        added = [Constant(node, place, -1) for place in bias if _read(node, place) is not None]
        if not all(is_row(constant.value, sizes[0]) for constant in added):
            return None
        return Origin("norm", Constant(node, gain, -1), tuple(added))

    def _elementwise(self, node: ir.Node, axes: Axes, sizes: Axes) -> Origin | None:
        """One operand carries the columns; a constant one may hold them, or is divided where it is added."""
        factor, single = node.op_type in ("Mul", "Div"), len(axes) == 1
        held = [place for place in (0, 1) if _is_constant(_read(node, place))]
        if len(held) == 2:
            return None
        if node.op_type == "Mul" and held and axes == (-1,) and is_row(node.inputs[held[0]], sizes[0]):
            return Origin("factor", Constant(node, held[0], -1))
        if node.op_type == "Div" and held == [0] and single:  # c / x is proportional to c
            return Origin("factor", Constant(node, 0, axes[0]))
        for place in (0, 1) if node.op_type != "Div" else (0,):
            carrier = node.inputs[place]
            if place in held or carrier is None or not (factor or (held and single)):
                continue
            found = self._follow(carrier, axes, sizes) if self._is_whole(carrier, axes, sizes) else None
            if found is not None:
                added = () if factor else (Constant(node, held[0], axes[0]),)
                return replace(found, added=(*found.added, *added))
        if factor and held and single:
            return Origin("factor", Constant(node, held[0], axes[0]), inverse=node.op_type == "Div")
        return None

    def _linear(self, node: ir.Node, axes: Axes, sizes: Axes) -> Origin | None:
        if node.op_type in ("Conv", "ConvTranspose"):
            rank = self._rank(node.outputs[0])
            grouped = node.op_type == "ConvTranspose" and node.attributes.get_int("group", 1) != 1
            return None if rank is None or axes != (1 - rank,) or grouped else self._rows(node)
        weight = stored_weight(_read(node, 1))
        if weight is not None:
            return self._rows(node) if axes == (-1,) and len(weight.const_value.shape) > 1 else None  # type: ignore[union-attr]
        second = _read(node, 1)  # attention: probabilities times values
        batched = node.op_type == "MatMul" and axes[-1] == -1 and -2 not in axes
        if second is None or not batched or not self._is_whole(second, axes, sizes):
            return None
        return self._follow(second, axes, sizes)

    def _rows(self, node: ir.Node) -> Origin | None:
        if node.op_type in ("Conv", "ConvTranspose") and not has_weight(node):
            return None
        bias = _read(node, 2)
        if bias is not None and not _is_constant(bias):
            return None
        return Origin("linear", Constant(node, 1, -1), (Constant(node, 2, -1),) if bias is not None else ())

    def _reshape(self, value: ir.Value | None, sizes: Axes) -> Origin | None:
        """The last axes of the input that make up as many columns: the same ones, in whatever way they are cut."""
        shape = self._shapes.get(str(value.name)) if value is not None else None
        total, found = math.prod(sizes), 1
        seen: list[int] = []
        for count, size in enumerate(reversed(tuple(shape or ())), 1):
            if not isinstance(size, int):
                return None
            seen.append(size)
            found *= size
            if found != total:
                continue
            cut = tuple(reversed(seen))
            origin = self._follow(value, tuple(range(-count, 0)), cut)
            if origin is None and shape is not None and 1 < count == len(shape) - 1:  # pixels of channels
                origin = self._follow(value, (-count,), cut[:1])
                origin = origin and replace(origin, repeat=origin.repeat * math.prod(cut[1:]))
            if origin is not None:
                return origin
        return None

    def _is_whole(self, value: ir.Value, axes: Axes, sizes: Axes) -> bool:
        """Whether an operand has the columns itself, rather than being broadcast along them."""
        shape = self._shapes.get(str(value.name))
        if shape is None:  # behind operators that are not ONNX's own; a single axis is compared where the walk ends
            return axes == (-1,)
        return all(-a <= len(shape) and shape[a] == size for a, size in zip(axes, sizes, strict=True))

    def _rank(self, value: ir.Value | None) -> int | None:
        shape = self._shapes.get(str(value.name)) if value is not None else None
        return len(shape) if shape is not None else None


def is_row(value: ir.Value | None, width: int) -> bool:
    """Whether it is a constant of floats [width], maybe with axes of 1 before; never where there is one column."""
    if value is None or not _is_constant(value) or width == 1:
        return False
    stored = value.const_value
    if stored is None or stored.dtype not in FLOATS:
        return False
    shape = [int(n) for n in stored.shape.numpy()]
    return bool(shape) and shape[-1] == width and math.prod(shape) == width


def shapes_of(model: ir.Model) -> dict[str, ir.Shape]:
    """Shapes of all values by name; where the file does not say them, inferred as far as that goes."""
    if any(v.shape is None for node in model.graph for v in node.outputs):
        model = model.clone()
        logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
        before, logger.disabled = logger.disabled, True  # it logs a traceback where some operator is unknown
        try:
            ShapeInferencePass()(model)
        finally:
            logger.disabled = before
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    return {str(v.name): v.shape for v in values if v.shape is not None}


def _read(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None
