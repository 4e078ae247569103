"""Quantized matrices as DequantizeLinear nodes: codes, scales and zero points of opset 21's blocks, all nodes kept.

Only the initializer changes: a DequantizeLinear gives the matrix in the orientation in which the graph stored it, and
whatever read it (MatMul, Gemm, Transpose, Gather) reads that. Kernels of Conv are matrices of one row per output
channel, brought into their shape by a Reshape. Runtimes fuse the pair into a kernel of their own.

Symbols: N rows, K columns, B blocks per row, b block size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.graphs.walk.matrices import GraphTarget
from quantcli.graphs.weights.blocks import plan_blocks
from quantcli.graphs.weights.matmul_nbits import Placement
from quantcli.graphs.weights.rows import RowRange

if TYPE_CHECKING:
    from quantcli.tensors.quantized import QuantizedTensor
    from quantcli.tensors.quantized_array import QuantizedArray

__all__ = ["LOWEST_OPSET", "dequantize_in_graph"]

LOWEST_OPSET = {2: 25, 4: 21, 8: 21}
"""The first opset whose DequantizeLinear knows blocks of a container's width."""
_TYPES = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


def dequantize_in_graph(
    graph: ir.Graph, targets: Sequence[GraphTarget], read: Callable[[str], QuantizedTensor | QuantizedArray]
) -> list[Placement]:
    """Puts a DequantizeLinear in the place of every target's initializer.

    Args:
        graph: Changed in place.
        targets: The matrices.
        read: Gives their codes; called again when the file is written, so nothing need be kept in memory.
    """
    return [_replace(graph, target, read) for target in targets]


def _replace(
    graph: ir.Graph, target: GraphTarget, read: Callable[[str], QuantizedTensor | QuantizedArray]
) -> Placement:
    value, tensor = graph.initializers[target.name], read(target.name)
    assert value.const_value is not None
    layout = plan_blocks(tensor.group, tensor.scheme.bits)
    kind = _TYPES[layout.bits]
    turn = target.as_stored
    label, axis = target.name.removesuffix(".weight"), len(target.stack) if target.transposed else 1

    def register(part: str, made: ir.TensorProtocol) -> ir.Value:
        shape = ir.Shape(made.shape.numpy())
        new = ir.Value(name=f"{label}.{part}", type=ir.TensorType(made.dtype), shape=shape, const_value=made)
        graph.register_initializer(new)
        return new

    def codes() -> ir.TensorProtocol:
        array = turn(layout.unpacked(read(target.name))[:, : layout.width])
        return ir.Tensor(np.ascontiguousarray(array).astype(kind.numpy()), dtype=kind, name=f"{label}.qweight")

    shape = (
        (*target.stack, layout.width, target.rows // math.prod(target.stack))
        if target.transposed
        else (target.rows, layout.width)
    )
    weight = register("qweight", ir.LazyTensor(codes, dtype=kind, shape=ir.Shape(shape), name=f"{label}.qweight"))
    scale_type = value.const_value.dtype.numpy()
    scales = np.ascontiguousarray(turn(layout.scales(tensor))).astype(scale_type)
    zeros = np.ascontiguousarray(turn(np.asarray(tensor.zero)[:, layout.group])).astype(kind.numpy())
    inputs = [
        weight,
        register("scales", ir.Tensor(scales, name=f"{label}.scales")),
        register("zeros", ir.Tensor(zeros, dtype=kind, name=f"{label}.zeros")),
    ]
    attributes = {"axis": axis, "block_size": layout.block_size}
    nodes = [ir.node("DequantizeLinear", inputs, attributes, name=f"{label}/DequantizeLinear")]
    if layout.columns is not None:
        index = register("columns", ir.Tensor(layout.inverse(target.columns), name=f"{label}.columns"))
        nodes.append(ir.node("Gather", [nodes[0].outputs[0], index], {"axis": axis}, name=f"{label}/Columns"))
    if len(value.const_value.shape) > 2 and not target.stack:
        whole = np.array(value.const_value.shape.numpy(), np.int64)
        shaped = register("shape", ir.Tensor(whole, name=f"{label}.shape"))
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shaped], name=f"{label}/Reshape"))
    for node in nodes:
        node.outputs[0].name, node.outputs[0].dtype = f"{node.name}/output_0", value.const_value.dtype
    graph.insert_before(graph[0], nodes)
    ir.convenience.replace_all_uses_with(value, nodes[-1].outputs[0])
    del graph.initializers[target.name]
    return Placement(
        f"{label}.qweight",
        (RowRange(target.name, 0, target.rows),),
        target.columns,
        layout,
        f"{label}.scales",
        f"{label}.zeros",
        transposed=target.transposed,
    )
