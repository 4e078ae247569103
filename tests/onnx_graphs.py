"""Small ONNX graphs, written down as a list of nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True)
class N:
    """One node: operator, names of inputs and outputs parted by spaces, its own name, attributes."""

    op: str
    inputs: str
    outputs: str
    name: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    domain: str = ""


def graph_model(
    nodes: Sequence[N],
    weights: Mapping[str, np.ndarray],
    inputs: str = "x",
    outputs: str = "y",
    *,
    opset: int = 21,
    listed: str = "",
    ranks: Mapping[str, int] = MappingProxyType({}),
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Model:
    """A model of those nodes; inputs are float but for `ids` (int64); `listed` are weights that are inputs too.

    Inputs and outputs have two axes of any length, or as many as `ranks` says.
    """

    def shape(name: str) -> ir.Shape:
        return ir.Shape([f"{name}{axis}" for axis in range(ranks.get(name, 2))])

    values: dict[str, ir.Value] = {}
    for name in [*inputs.split(), *listed.split()]:
        kind = ir.DataType.INT64 if name == "ids" else dtype
        values[name] = ir.Value(name=name, type=ir.TensorType(kind), shape=shape(name))
    for name, array in weights.items():
        value = values.setdefault(name, ir.Value(name=name))
        value.const_value = ir.Tensor(array, name=name)
        if name not in listed.split():
            value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
    made = []
    for spec in nodes:
        read = [values[name] if name != "_" else None for name in spec.inputs.split()]
        names = spec.outputs.split()
        attributes = dict(spec.attributes)
        node = ir.node(spec.op, read, attributes, domain=spec.domain, name=spec.name, num_outputs=len(names))
        for value, name in zip(node.outputs, names, strict=True):
            value.name = name
            values[name] = value
        made.append(node)
    for name in outputs.split():
        values[name].type, values[name].shape = ir.TensorType(dtype), shape(name)
    graph = ir.Graph(
        [values[n] for n in [*inputs.split(), *listed.split()]],
        [values[n] for n in outputs.split()],
        nodes=made,
        initializers=[values[n] for n in weights],
        opset_imports={"": opset},
        name="g",
    )
    return ir.Model(graph, ir_version=10)
