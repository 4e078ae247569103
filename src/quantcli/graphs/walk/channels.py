"""The weights and constants of single nodes: their channels, and other values for them."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

__all__ = [
    "LINEAR",
    "NORMS",
    "column_sizes",
    "constant_of",
    "has_weight",
    "new_constant",
    "scale_columns",
    "weight_columns",
    "weight_rows",
    "weight_width",
]

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
NORMS: Mapping[str, tuple[int, ...]] = {
    "LayerNormalization": (1, 2),
    "SimplifiedLayerNormalization": (1,),
    "RMSNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}
"""Inputs that hold the gain and, where there is one, the bias of output 0."""


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
    weight = node.inputs[1] if node.domain == "" and node.op_type in LINEAR and len(node.inputs) > 1 else None
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


def weight_width(node: ir.Node) -> int:
    """How many channels of the input a Conv's, Gemm's or MatMul's weight meets."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    shape = [int(n) for n in weight.const_value.shape.numpy()]
    if node.op_type == "Conv":
        return shape[1] * node.attributes.get_int("group", 1)
    return shape[-1] if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0 else shape[-2]


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
