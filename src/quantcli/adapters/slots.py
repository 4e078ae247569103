"""Gives every linear of a captured graph a place for LoRA: y becomes y + (x @ A) @ B.

A [K, R] and B [R, N] are graph inputs whose default has rank 0: without an adapter they add an exact zero. Weights
stay what they are, codes included. A node that stands for several linears (q, k and v joined) gets one pair: A holds
their matrices side by side, B theirs on the diagonal. Two more products per node instead of two per linear.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantcli.adapters.peft_folder import LoraLayer
from quantcli.errors import InputError, UsageError, nearest
from quantcli.graphs.walk.products import Product, read_products

__all__ = ["Slot", "add_slots", "find_slots", "fit", "optional_input"]

_PRODUCTS = ("MatMul", "MatMulNBits")
_GATHERED = "/columns_"  # an input whose columns were put in the order of the codes (desc_act)


@dataclass(frozen=True)
class Slot:
    """A pair of optional graph inputs."""

    product: Product
    """The node that it adds to."""

    @property
    def a(self) -> str:
        """Input [K, R] float32."""
        return self._name("lora_A")

    @property
    def b(self) -> str:
        """Input [R, N] float32."""
        return self._name("lora_B")

    def _name(self, part: str) -> str:
        return f"{self.product.weight.rpartition('.')[0]}.{part}"


def find_slots(model: ir.Model) -> list[Slot]:
    """The slots that a graph has."""
    inputs = {value.name for value in model.graph.inputs}
    return [slot for slot in map(Slot, read_products(model)) if slot.a in inputs]


def add_slots(model: ir.Model, only: Collection[str] | None = None) -> list[Slot]:
    """Adds a slot to every linear of the blocks; a graph that has them stays as it is.

    Args:
        model: The graph, changed in place.
        only: Linears by module name; others get none, and cost no time where the graph runs.

    Raises:
        InputError: the graph does not say where its linears are.
        UsageError: `only` some are to have slots, and the graph has them already.
    """
    found = find_slots(model)
    if found and only is not None:
        raise UsageError(
            "--only-adapted: the base takes adapters already, its inputs stay",
            hint="leave it out, or give the captured graph or the checkpoint",
        )
    if found:
        return found
    products = read_products(model)
    if not products:
        raise InputError(
            "the graph does not say which of its products belongs to which linear",
            hint="capture it again with `quantcli capture-onnx-graph --exporter genai`",
        )
    slots = [Slot(p) for p in products if only is None or any(r.name in only for r in p.ranges)]
    for number, slot in enumerate(slots):
        _add(model.graph, slot, number)
    return slots


def fit(layers: Sequence[LoraLayer], slots: Sequence[Slot]) -> dict[str, np.ndarray]:
    """An adapter as values of the graph's inputs; slots that it does not touch are left out.

    Raises:
        InputError: a linear that the base does not have, or one of other shape.
    """
    rows: dict[str, int] = {}
    for slot in slots:
        for part in slot.product.ranges:
            rows[part.name] = max(rows.get(part.name, 0), part.stop)
    by_name = {layer.module: layer for layer in layers}
    for layer in layers:
        if layer.module not in rows:
            raise InputError(
                f"the adapter changes {layer.module}, where the base takes none: {nearest(layer.module, rows)[:200]}",
                hint="give the model that the adapter was trained on; a base of --only-adapted takes its own alone",
            )
    values: dict[str, np.ndarray] = {}
    for slot in slots:
        _fit_one(slot, by_name, rows, values)
    return values


def _fit_one(
    slot: Slot, layers: Mapping[str, LoraLayer], rows: Mapping[str, int], values: dict[str, np.ndarray]
) -> None:
    width, at = slot.product.width, 0
    down: list[np.ndarray] = []
    up: list[np.ndarray] = []
    for part in slot.product.ranges:
        count = part.stop - part.start
        layer = layers.get(part.name)
        if layer is not None:
            shape, wanted = (layer.b.shape[0], layer.a.shape[1]), (rows[part.name], width)
            if shape != wanted:
                raise InputError(
                    f"the adapter is for a {part.name} of {list(shape)} weights, the base has {list(wanted)}",
                    hint="give the model that the adapter was trained on",
                )
            down.append(layer.a.T.numpy())
            whole = np.zeros((layer.a.shape[0], slot.product.rows), np.float32)
            whole[:, at : at + count] = (layer.b[part.start : part.stop] * layer.scaling).T.numpy()
            up.append(whole)
        at += count
    if down:
        values[slot.a] = np.ascontiguousarray(np.concatenate(down, 1), np.float32)
        values[slot.b] = np.concatenate(up, 0)


def _add(graph: ir.Graph, slot: Slot, number: int) -> None:
    weight = graph.initializers[slot.product.weight]
    nodes = [node for node, index in weight.uses() if node.op_type in _PRODUCTS and index == 1]
    if len(nodes) != 1:
        raise InputError(f"{slot.product.weight} is used by {len(nodes)} products, expected one")
    node = nodes[0]
    x = node.inputs[0]
    assert x is not None
    producer = x.producer()
    if producer is not None and producer.op_type == "Gather" and _GATHERED in str(producer.name):
        x = producer.inputs[0]
    a = optional_input(graph, slot.a, (slot.product.width, f"rank_{number}"))
    b = optional_input(graph, slot.b, (f"rank_{number}", slot.product.rows))
    node, y = _with_bias(node)
    uses = list(y.uses())
    down = ir.node("MatMul", [x, a], name=f"{node.name}/lora_A")
    up = ir.node("MatMul", [down.outputs[0], b], name=f"{node.name}/lora_B")
    total = ir.node("Add", [y, up.outputs[0]], name=f"{node.name}/lora_Add")
    for new in (down, up, total):
        new.outputs[0].name, new.outputs[0].dtype = f"{new.name}/output_0", ir.DataType.FLOAT
    total.outputs[0].shape = y.shape
    for user, index in uses:
        user.replace_input_with(index, total.outputs[0])
    graph.insert_after(node, [down, up, total])


def _with_bias(node: ir.Node) -> tuple[ir.Node, ir.Value]:
    """Where the slot's sum goes: behind a bias, which the runtime fuses into the product, with other rounding."""
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and uses[0][0].op_type == "Add":
        add, index = uses[0]
        other = add.inputs[1 - index]
        if other is not None and other.const_value is not None:
            return add, add.outputs[0]
    return node, node.outputs[0]


def optional_input(graph: ir.Graph, name: str, shape: tuple[int | str, int | str]) -> ir.Value:
    """A new float32 input whose default has size 0 where the shape has a name."""
    default = [size if isinstance(size, int) else 0 for size in shape]
    tensor = ir.Tensor(np.zeros(default, np.float32), name=name)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape), const_value=tensor)
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value
