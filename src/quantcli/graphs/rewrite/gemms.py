"""Gemm as every integer format has it: no alpha, no beta, no transposed input, and a bias [N] or none.

What alpha and beta say goes into constant weights and biases. Where that cannot be, MatMul, Mul and Add take a Gemm's
place: with an attribute, onnxruntime's operators on integers give something else (1 dB in QGemm with alpha and beta).
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from quantcli.graphs.walk.channels import constant_of, has_weight

__all__ = ["normalize_gemms", "split_gemms"]


def normalize_gemms(model: ir.Model) -> None:
    """Brings all Gemm nodes of float32, in bodies too, to that form, in place; the function stays."""
    rewriter = _Rewriter()
    for node in _gemms(model):
        if not _is_plain(node):
            rewriter.rewrite(node, keep_gemm=True)


def split_gemms(model: ir.Model, names: Collection[str]) -> None:
    """Makes MatMul, of the same name, and Add of these Gemm nodes with constant weights, in place; the function stays.

    onnxruntime does this itself, transposing a weight in place even where two nodes share it.
    """
    rewriter = _Rewriter()
    for node in _gemms(model):
        if node.name in names and has_weight(node):
            rewriter.rewrite(node, keep_gemm=False)
    passes.RemoveUnusedNodesPass()(model)


def _gemms(model: ir.Model) -> list[ir.Node]:
    return [
        n
        for n in model.graph.all_nodes()
        if n.op_type == "Gemm" and n.domain == "" and n.inputs[0] is not None and _is_float(n)
    ]


def _is_float(node: ir.Node) -> bool:
    known = {v.dtype for v in (*node.inputs, *node.outputs) if v is not None and v.dtype is not None}
    return known == {ir.DataType.FLOAT}


def _bias(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _is_plain(node: ir.Node) -> bool:
    bias = _bias(node)
    plain = node.attributes.get_float("alpha", 1.0) == 1.0 and not node.attributes.get_int("transA", 0)
    plain = plain and (bias is None or node.attributes.get_float("beta", 1.0) == 1.0)
    return plain and has_weight(node) and (bias is None or _is_row(node, constant_of(bias)))


def _columns(node: ir.Node) -> int | None:
    weight = constant_of(node.inputs[1])
    return None if weight is None else int(weight.shape[0 if node.attributes.get_int("transB", 0) else 1])


def _is_row(node: ir.Node, bias: np.ndarray | None) -> bool:
    return bias is not None and bias.shape == (_columns(node),)


def _row(node: ir.Node, bias: np.ndarray | None) -> np.ndarray | None:
    """A bias as [N]; None where it has a value for each row, or is not known."""
    columns = _columns(node)
    if bias is None or columns is None or (bias.size != 1 and bias.shape not in ((columns,), (1, columns))):
        return None
    return np.broadcast_to(bias.reshape(-1), (columns,))


class _Rewriter:
    """Puts other nodes in the place of Gemms; constants that are made of the same are made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[ir.Value, ir.Graph, bool, float], ir.Value] = {}

    def rewrite(self, node: ir.Node, *, keep_gemm: bool) -> None:
        graph, output = node.graph, node.outputs[0]
        assert isinstance(graph, ir.Graph)
        x, weight, bias = node.inputs[0], node.inputs[1], _bias(node)
        alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
        turn = bool(node.attributes.get_int("transB", 0))
        made: list[ir.Node] = []

        def add(op_type: str, inputs: list[ir.Value | None], suffix: str, **attributes: Any) -> ir.Value:
            new = ir.node(op_type, inputs, attributes, name=f"{node.name}{suffix}")
            new.outputs[0].name, new.outputs[0].dtype = f"{output.name}{suffix}", ir.DataType.FLOAT
            made.append(new)
            return new.outputs[0]

        def scaled(value: ir.Value | None, factor: float, suffix: str) -> ir.Value | None:
            if factor == 1.0 or value is None:
                return value
            array = constant_of(value)
            if array is not None:
                return _constant(graph, f"{node.name}{suffix}", array * np.float32(factor))
            return add("Mul", [value, _constant(graph, f"{node.name}{suffix}", np.array(factor, np.float32))], suffix)

        if node.attributes.get_int("transA", 0):
            x = add("Transpose", [x], ".transposed", perm=[1, 0])
        bias = scaled(bias, beta, ".beta") if beta != 0.0 else None
        row = _row(node, constant_of(bias))
        keep_gemm = keep_gemm and has_weight(node) and (bias is None or row is not None)
        if keep_gemm and row is not None and not _is_row(node, constant_of(bias)):
            bias = _constant(graph, f"{node.name}.row", row)
        assert weight is not None
        if constant_of(weight) is not None:
            if alpha != 1.0 or (turn and not keep_gemm):
                weight = self._weight(node, weight, graph, turn and not keep_gemm, alpha)
            alpha = 1.0
        elif turn:
            weight = add("Transpose", [weight], ".weight_transposed", perm=[1, 0])
        if keep_gemm:
            result: ir.Value | None = add("Gemm", [x, weight, bias], "", transB=int(turn))
        else:
            product = add("MatMul", [x, weight], ".product")
            made[-1].name, product.shape = node.name, output.shape
            result = scaled(product, alpha, ".alpha")
            if bias is not None:
                result = add("Add", [result, bias], "_bias")
        assert result is not None
        graph.insert_before(node, made)
        output.replace_all_uses_with(result, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        result.name, result.type, result.shape = output.name, output.type, output.shape

    def _weight(self, node: ir.Node, weight: ir.Value, graph: ir.Graph, turn: bool, alpha: float) -> ir.Value:
        key = (weight, graph, turn, alpha)
        if key not in self._made:
            array = constant_of(weight)
            assert array is not None
            array = (array.T if turn else array) * array.dtype.type(alpha)
            self._made[key] = _constant(graph, f"{node.name}.weight", array)
        return self._made[key]


def _constant(graph: ir.Graph, stem: str, array: np.ndarray) -> ir.Value:
    array = np.ascontiguousarray(array)
    name, count = stem, 0
    while name in graph.initializers:
        name, count = f"{stem}.{count}", count + 1
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value
