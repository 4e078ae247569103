"""Takes LoRA out of a graph that has it built in, as ONNX Runtime GenAI's model builder writes it for an adapter.

Its matrices become optional inputs and an adapter of their own: without an adapter the graph is its base again, and
other adapters fit in their place.
"""

import re
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantcli.adapters.slots import Slot, optional_input
from quantcli.errors import InputError
from quantcli.graphs.walk.products import Product, read_products, write_products
from quantcli.graphs.weights.rows import RowRange

__all__ = ["Lifted", "has_lora", "lift"]

_DOWN = re.compile(r"(?P<label>.+)\.lora_A(?P<rest>\..+)")
_ATTENTION = re.compile(r"(model\.layers\.\d+)\.attn\.")  # the builder's word for self_attn


@dataclass(frozen=True)
class Lifted:
    """An adapter that a graph had built in."""

    values: dict[str, np.ndarray]
    """Values [K, R] and [R, N] float32 of the new inputs."""
    linears: int
    """How many linears it changes."""
    ranks: tuple[int, ...]
    """Their ranks, each once, from the lowest."""


def has_lora(model: ir.Model) -> bool:
    """Whether a graph has LoRA matrices as constants."""
    return any(map(_DOWN.fullmatch, model.graph.initializers))


def lift(model: ir.Model) -> Lifted:
    """Takes all LoRA matrices out.

    Raises:
        InputError: matrices that are not multiplied by as x @ A @ B, for one those that were quantized.
    """
    values: dict[str, np.ndarray] = {}
    products: list[Product] = []
    for name in [n for n in model.graph.initializers if _DOWN.fullmatch(n)]:
        found = _DOWN.fullmatch(name)
        assert found is not None
        label, other = found["label"], f"{found['label']}.lora_B{found['rest']}"
        down, a = _product(model.graph, name)
        up, b = _product(model.graph, other)
        if up.inputs[0] is not down.outputs[0] or a.shape[1] != b.shape[0]:
            raise InputError(f"{other} {list(b.shape)} does not multiply what {name} {list(a.shape)} gives")
        module = _ATTENTION.sub(r"\1.self_attn.", label)
        product = Product(f"{label}.weight", (RowRange(module, 0, b.shape[1]),), a.shape[0])
        slot = Slot(product)
        rank = f"rank_{len(products)}"
        shapes = {slot.a: (a.shape[0], rank), slot.b: (rank, b.shape[1])}
        for node, old, new in ((down, name, slot.a), (up, other, slot.b)):
            node.replace_input_with(1, optional_input(model.graph, new, shapes[new]))
            del model.graph.initializers[old]
        # the builder says what rank it had; the runtime would reuse buffers of that size
        down.outputs[0].shape = None
        values[slot.a], values[slot.b] = a, b
        products.append(product)
    write_products(model, [*read_products(model), *products])
    ranks = {values[name].shape[1] for name in values if name.endswith("lora_A")}
    return Lifted(values, len(products), tuple(sorted(ranks)))


def _product(graph: ir.Graph, name: str) -> tuple[ir.Node, np.ndarray]:
    """The one MatMul by a constant, and its values [in, out] float32."""
    value = graph.initializers.get(name)
    tensor = None if value is None else value.const_value
    uses = [] if value is None else list(value.uses())
    kinds = sorted({node.op_type for node, _ in uses})
    if tensor is None or len(tensor.shape) != 2 or kinds != ["MatMul"] or len(uses) != 1 or uses[0][1] != 1:
        raise InputError(
            f"the LoRA matrix {name} is used by {', '.join(kinds) or 'nothing'}, expected one product x @ {name}",
            hint="give the base without adapter and --adapter-path; or, where the builder quantized the LoRA matrices, "
            "build the graph again with them in nodes_to_exclude",
        )
    return uses[0][0], np.ascontiguousarray(tensor.numpy(), np.float32)
