"""Where a scale of the columns that products of a graph read can be undone: in what makes their input.

W (x / s) with W's columns times s is W x. `walk.origins` finds what makes x; here it is named by initializers, since
products may be quantized already, and large weights are read one at a time.

Symbols: K columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantcli.graphs.walk.channels import new_constant
from quantcli.graphs.walk.matrices import FLOATS, GraphTarget, stored_weight, weight_uses
from quantcli.graphs.walk.origins import Origin, find_origin, is_row, shapes_of

__all__ = ["GraphFold", "Slot", "find_graph_folds", "read_initializer", "write_initializer"]


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
    shapes = shapes_of(model)
    folds: dict[str, GraphFold] = {}
    for name, width in widths.items():
        value = next(v for node in readers for v in node.inputs[:1] if v is not None and v.name == name)
        if value.is_graph_output() or any(index or node not in readers for node, index in value.uses()):
            continue
        found = _fold(find_origin(value, -1, width, list(readers), shapes), width)
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


def _fold(origin: Origin | None, width: int) -> GraphFold | None:
    """The same with the weight by its initializer; None where a constant would have to be spread, or rows be shared."""
    if origin is None or origin.repeat != 1 or not all(is_row(c.value, width) for c in origin.added):
        return None
    biases = tuple(Slot(c.node, c.place) for c in origin.added)
    if origin.kind != "linear":
        plain = is_row(origin.main.value, width) and not origin.inverse
        return GraphFold(gain=Slot(origin.main.node, origin.main.place), biases=biases) if plain else None
    weight = stored_weight(origin.main.value)
    uses = weight_uses(weight) if weight is not None else "it is computed"
    if weight is None or weight.const_value is None or isinstance(uses, str) or len(uses) != 1:
        return None
    shape = [int(n) for n in weight.const_value.shape.numpy()]
    rows_first = uses[0].rows_first
    if weight.is_graph_output() or weight.const_value.dtype not in FLOATS or len(shape) != 2:
        return None
    if shape[0 if rows_first else 1] != width:
        return None
    return GraphFold(product=str(weight.name), rows_first=rows_first, biases=biases)
