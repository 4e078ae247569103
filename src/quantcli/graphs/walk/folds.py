"""Where a scale of the columns that products of a graph read can be undone: in what makes their input.

W (x / s) with W's columns times s is W x. Going back from x through operators that pass a division of columns on (a
gate's multiplication, Relu, the reshapes around attention), the walk ends at a gain that multiplies each column (of a
norm, or of a plain Mul) or at the rows of an earlier product (up -> down, value -> out). What anybody else reads on
the way, or is an output of the graph (a cache), is left alone.

Symbols: K columns.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from quantcli.graphs.walk.channels import NORMS, new_constant
from quantcli.graphs.walk.matrices import FLOATS, GraphTarget, stored_weight, weight_uses

__all__ = ["GraphFold", "Slot", "find_graph_folds", "read_initializer", "write_initializer"]

_PASSING = ("Relu", "LeakyRelu", "Identity", "Cast", "Dropout")
"""f(x / s) = f(x) / s for positive s."""


@dataclass(frozen=True)
class Slot:
    """An initializer as one node reads it; others may read it too, as it is."""

    node: ir.Node
    """The node."""
    index: int
    """Of its input."""

    def read(self) -> np.ndarray:
        """[K] in the stored type."""
        value = self.node.inputs[self.index]
        assert value is not None and value.const_value is not None
        return np.array(value.const_value.numpy()).reshape(-1)

    def write(self, values: np.ndarray) -> None:
        """Other values [K] for this node; other readers keep the initializer as it is."""
        old = self.node.inputs[self.index]
        assert old is not None and old.const_value is not None
        new_constant(self.node, self.index, values.reshape(old.const_value.shape.numpy()))


@dataclass(frozen=True)
class GraphFold:
    """What makes one tensor; a gain or a product."""

    gain: Slot | None = None
    """[K] that multiplies the columns."""
    product: str = ""
    """Initializer of the product whose output row k is column k; nothing else reads it."""
    rows_first: bool = False
    """Whether that is [K, ...]."""
    biases: tuple[Slot, ...] = ()
    """[K] each, added behind the gain or the product, hence divided too."""


def find_graph_folds(model: ir.Model, targets: Sequence[GraphTarget]) -> dict[str, GraphFold]:
    """What makes the tensors that targets are multiplied with, where scaling them changes nothing else.

    Args:
        model: As `walk.prepare` left it; not changed.
        targets: All that will be quantized.

    Returns:
        By the tensor's name; tensors that cannot be scaled have no entry.
    """
    scaled = [target for target in targets if len(target.inputs) == 1 and not target.inside]
    readers = {use.node: target for target in scaled for use in target.uses}
    widths = {target.inputs[0]: target.columns for target in scaled}
    walk = _Walk(_shapes(model))
    folds: dict[str, GraphFold] = {}
    for name, width in widths.items():
        value = next(v for node in readers for v in node.inputs[:1] if v is not None and v.name == name)
        if value.is_graph_output() or any(index or node not in readers for node, index in value.uses()):
            continue
        found = walk.back(value, (-1,), (width,))
        if found is not None:
            folds[name] = found
    return folds


def read_initializer(graph: ir.Graph, name: str) -> np.ndarray:
    """A copy of an initializer."""
    stored = graph.initializers[name].const_value
    assert stored is not None
    return np.array(stored.numpy())


def write_initializer(graph: ir.Graph, name: str, values: np.ndarray) -> None:
    """Other values of the same shape and type."""
    graph.initializers[name].const_value = ir.Tensor(values, name=name)


class _Walk:
    """Backwards from a tensor. Axes count from the end; columns are their joint index, the last axis fastest."""

    def __init__(self, shapes: Mapping[str, ir.Shape]):
        self._shapes = shapes

    def back(self, value: ir.Value, axes: tuple[int, ...], sizes: tuple[int, ...]) -> GraphFold | None:
        """The fold of a value's columns."""
        node = value.producer()
        if node is None or value.index() != 0:
            return None
        if node.op_type in NORMS:
            return self._norm(node, axes, sizes)
        if node.op_type in _PASSING:
            return self._follow(node.inputs[0], axes, sizes)
        if node.op_type in ("Mul", "Div", "Add", "Sub"):
            return self._elementwise(node, axes, sizes)
        if node.op_type in ("MatMul", "Gemm"):
            return self._product(node, axes, sizes)
        if node.op_type == "Transpose":
            perm = [int(p) for p in node.attributes["perm"].as_ints()] if "perm" in node.attributes else None
            if perm is None:
                return None
            return self._follow(node.inputs[0], tuple(perm[a] - len(perm) for a in axes), sizes)
        if node.op_type == "Reshape" and axes == tuple(range(-len(axes), 0)):
            return self._reshape(node.inputs[0], sizes)
        return None

    def _follow(self, value: ir.Value | None, axes: tuple[int, ...], sizes: tuple[int, ...]) -> GraphFold | None:
        if value is None or value.is_graph_output() or len(value.uses()) != 1:
            return None
        return self.back(value, axes, sizes)

    def _norm(self, node: ir.Node, axes: tuple[int, ...], sizes: tuple[int, ...]) -> GraphFold | None:
        gain, *bias = NORMS[node.op_type]
        over = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        if axes != (-1,) or not _is_row(_read(node, gain), sizes[0]):
            return None
        if node.op_type in ("LayerNormalization", "RMSNormalization") and over != -1:
            shape = self._shapes.get(str(node.inputs[0].name)) if node.inputs[0] is not None else None
            if shape is None or over != len(shape) - 1:
                return None
        added = [Slot(node, index) for index in bias if _read(node, index) is not None]
        if not all(_is_row(_read(node, slot.index), sizes[0]) for slot in added):
            return None
        return GraphFold(gain=Slot(node, gain), biases=tuple(added))

    def _elementwise(self, node: ir.Node, axes: tuple[int, ...], sizes: tuple[int, ...]) -> GraphFold | None:
        """One operand carries the scale; a constant one may hold it, or has to be divided where it is added."""
        factor = node.op_type in ("Mul", "Div")
        for index in (0, 1) if node.op_type != "Div" else (0,):
            other, carrier = _read(node, 1 - index), node.inputs[index]
            constant = other is not None and other.const_value is not None
            if constant and node.op_type == "Mul" and axes == (-1,) and _is_row(other, sizes[0]):
                return GraphFold(gain=Slot(node, 1 - index))
            if not factor and not (constant and axes == (-1,) and _is_row(other, sizes[0])):
                continue
            if carrier is None or carrier.const_value is not None or not self._is_whole(carrier, axes, sizes):
                continue
            found = self._follow(carrier, axes, sizes)
            if found is not None:
                return found if factor else replace(found, biases=(*found.biases, Slot(node, 1 - index)))
        return None

    def _product(self, node: ir.Node, axes: tuple[int, ...], sizes: tuple[int, ...]) -> GraphFold | None:
        weight = stored_weight(node.inputs[1])
        if weight is None:  # attention: probabilities times values
            second = node.inputs[1]
            batched = node.op_type == "MatMul" and axes[-1] == -1 and -2 not in axes
            if second is None or not batched or not self._is_whole(second, axes, sizes):
                return None
            return self._follow(second, axes, sizes)
        uses = weight_uses(weight)
        if axes != (-1,) or isinstance(uses, str) or len(uses) != 1 or weight.is_graph_output():
            return None
        assert weight.const_value is not None
        if weight.const_value.dtype not in FLOATS:
            return None
        shape = [int(n) for n in weight.const_value.shape.numpy()]
        if len(shape) != 2 or shape[0 if uses[0].rows_first else 1] != sizes[0]:
            return None
        biases: tuple[Slot, ...] = ()
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            if not _is_row(_read(node, 2), sizes[0]):
                return None
            biases = (Slot(node, 2),)
        return GraphFold(product=str(weight.name), rows_first=uses[0].rows_first, biases=biases)

    def _reshape(self, value: ir.Value | None, sizes: tuple[int, ...]) -> GraphFold | None:
        """The last axes of the input that make up as many columns: the same ones, in whatever way they are cut."""
        shape = self._shapes.get(str(value.name)) if value is not None else None
        total, found = _product_of(sizes), 1
        seen: list[int] = []
        for count, size in enumerate(reversed(tuple(shape or ())), 1):
            if not isinstance(size, int):
                return None
            seen.append(size)
            found *= size
            if found == total:
                return self._follow(value, tuple(range(-count, 0)), tuple(reversed(seen)))
        return None

    def _is_whole(self, value: ir.Value, axes: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
        """Whether an operand has the columns itself, rather than being broadcast along them."""
        shape = self._shapes.get(str(value.name))
        if shape is None:  # behind operators that are not ONNX's own; a single axis is compared where the walk ends
            return axes == (-1,)
        return all(-a <= len(shape) and shape[a] == size for a, size in zip(axes, sizes, strict=True))


def _read(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _is_row(value: ir.Value | None, width: int) -> bool:
    """Whether it is a constant [K], maybe with axes of 1 before."""
    if value is None or not value.is_initializer() or value.const_value is None or width == 1:
        return False
    if value.const_value.dtype not in FLOATS:
        return False
    shape = [int(n) for n in value.const_value.shape.numpy()]
    return bool(shape) and shape[-1] == width and _product_of(shape) == width


def _product_of(sizes: Sequence[int]) -> int:
    out = 1
    for size in sizes:
        out *= size
    return out


def _shapes(model: ir.Model) -> dict[str, ir.Shape]:
    """Shapes of all values; where the file does not say them, inferred as far as that goes."""
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
