"""Reads a written graph back and compares every weight with the checkpoint, bit for bit.

The arithmetic here is written apart from `blocks`: a mistake in packing must not hide behind the same mistake.
"""

from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quantcli.graphs.model.files import open_graph
from quantcli.graphs.weights.matmul_nbits import Placement, ReadMatrix

__all__ = ["dequantize_node", "stored_codes", "verify_weights"]

_ROWS = 256


def stored_codes(graph: ir.Graph) -> set[str]:
    """The initializers of a graph that hold codes."""
    return set(_quantized_nodes(graph))


def verify_weights(
    path: Path,
    placements: Sequence[Placement],
    read: ReadMatrix,
    expected: dict[str, int],
    before: Collection[str] = (),
) -> None:
    """Compares the graph's weights with the checkpoint's.

    Args:
        path: The written model.onnx.
        placements: What the rewrite says is where.
        read: Gives the checkpoint's matrices.
        expected: Rows of every matrix that must be in the graph, by module name.
        before: Initializers with codes that were in the graph before.

    Raises:
        AssertionError: a weight differs, is missing or is there twice: a bug of ours, not of the input.
    """
    graph = open_graph(path).graph
    nodes = _quantized_nodes(graph)
    seen: dict[str, list[tuple[int, int]]] = {name: [] for name in expected}
    for placement in placements:
        values = _values(graph, placement, nodes)
        at = 0
        for part in placement.ranges:
            matrix = read(part.name)
            wanted = np.asarray(matrix.dequantize() if hasattr(matrix, "codes") else matrix.float())
            count = part.stop - part.start
            if not np.array_equal(values[at : at + count, : wanted.shape[1]], wanted[part.start : part.stop]):
                raise AssertionError(f"{part.name} in the graph differs from the checkpoint")
            seen.setdefault(part.name, []).append((part.start, part.stop))
            at += count
        del values  # a view of the file, maybe
        for name in filter(None, (placement.weight, placement.scales, placement.zeros)):
            stored = graph.initializers[name].const_value
            if isinstance(stored, ir.ExternalTensor):
                stored.release()  # else what was read of every matrix stays in memory
    for name, rows in expected.items():
        covered = sorted(seen[name])
        if not covered or covered[0][0] != 0 or covered[-1][1] != rows:
            raise AssertionError(f"{name} is not whole in the graph: rows {covered} of {rows}")
        if any(a[1] != b[0] for a, b in pairwise(covered)):
            raise AssertionError(f"{name} is not in the graph exactly once: rows {covered}")
    unknown = set(nodes) - {p.weight for p in placements} - set(before)
    if unknown:
        raise AssertionError(f"the graph holds quantized weights of unknown origin: {sorted(unknown)[:3]}")


def _values(graph: ir.Graph, placement: Placement, nodes: dict[str, ir.Node]) -> np.ndarray:
    """The float32 matrix [N, at least K] that the graph has at a placement, its columns in the checkpoint's order."""
    if placement.layout is None:
        values = _array(graph, placement.weight)
        return values.T if placement.transposed else values
    values = dequantize_node(graph, nodes[placement.weight])
    return values if placement.layout.columns is None else values[:, placement.layout.inverse(placement.width)]


def _quantized_nodes(graph: ir.Graph) -> dict[str, ir.Node]:
    """MatMulNBits, MatMulBnb4, GatherBlockQuantized and DequantizeLinear nodes by the initializer of their codes."""
    found = {}
    for node in graph.all_nodes():
        if node.op_type in ("MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "DequantizeLinear"):
            codes = _parameters(node)[0]
            found[str(codes.name)] = node
    return found


def _parameters(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Codes, scales and zeros."""
    if node.op_type == "DequantizeLinear":
        codes, scales = node.inputs[0], node.inputs[1]
        zeros = node.inputs[2] if len(node.inputs) > 2 else None
    elif node.op_type in ("MatMulNBits", "MatMulBnb4"):
        codes, scales = node.inputs[1], node.inputs[2]
        zeros = node.inputs[3] if len(node.inputs) > 3 else None
    else:
        codes, scales, zeros = node.inputs[0], node.inputs[2], node.inputs[3]
        producer = codes.producer() if codes is not None else None  # a Reshape of codes that a tied head shares
        codes = producer.inputs[0] if producer is not None else codes
    assert codes is not None and scales is not None
    return codes, scales, zeros


def dequantize_node(graph: ir.Graph, node: ir.Node) -> np.ndarray:
    """The float32 [N, B*b] matrix that a quantized node multiplies or looks up."""
    codes, scales, zeros = _parameters(node)
    if node.op_type == "DequantizeLinear":
        return _dequantize_linear(graph, node)
    if node.op_type == "MatMulBnb4":
        return _dequantize_bnb4(graph, node)
    bits = node.attributes["bits"].as_int()
    code = _unpack(_array(graph, str(codes.name)), bits)
    rows = code.shape[0]
    scale = _array(graph, str(scales.name)).reshape(rows, -1)
    blocks = scale.shape[1]
    zero = np.full((rows, blocks), 1 << (bits - 1), np.uint8)
    if zeros is not None:
        zero = _array(graph, str(zeros.name)).reshape(rows, -1)
        zero = _unpack(zero, bits)[:, :blocks] if zero.dtype == np.uint8 else zero.astype(np.float32)
    values = code.reshape(rows, blocks, -1).astype(np.float32)
    values -= zero[..., None]
    values *= scale[..., None]
    return values.reshape(rows, -1)


def _dequantize_bnb4(graph: ir.Graph, node: ir.Node) -> np.ndarray:
    """The float32 [N, K] matrix of a MatMulBnb4."""
    from quantcli.tensors.codebook import codebook

    packed, scales = (_array(graph, str(v.name)) for v in node.inputs[1:3] if v is not None)
    table = codebook(("fp4", "nf4")[node.attributes["quant_type"].as_int()]).numpy()
    code = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)
    values: np.ndarray = table[code] * np.repeat(scales, node.attributes["block_size"].as_int())
    return values.reshape(node.attributes["N"].as_int(), node.attributes["K"].as_int())


def _dequantize_linear(graph: ir.Graph, node: ir.Node) -> np.ndarray:
    """The float32 [N, K] matrix of a DequantizeLinear with blocks, whichever way it is stored."""
    code, scale, zero = (_array(graph, str(v.name)) for v in node.inputs if v is not None)
    if node.attributes["axis"].as_int() == code.ndim - 2:  # [..., K, N]
        code, scale, zero = (a.swapaxes(-1, -2).reshape(-1, a.shape[-2]) for a in (code, scale, zero))
    block = np.arange(code.shape[1]) // node.attributes["block_size"].as_int()
    values: np.ndarray = code.astype(np.float32)
    for start in range(
        0, len(values), _ROWS
    ):  # in place, some rows at a time: zeros of every weight take as much again
        rows = slice(start, start + _ROWS)
        values[rows] -= zero[rows].astype(np.float32)[:, block]
        values[rows] *= scale[rows].astype(np.float32)[:, block]
    return values


def _array(graph: ir.Graph, name: str) -> np.ndarray:
    tensor = graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes from the bits of each byte, lowest first: [N, ...] uint8 to [N, n] uint8."""
    flat = packed.reshape(packed.shape[0], -1)
    out = np.empty((flat.shape[0], flat.shape[1], 8 // bits), np.uint8)
    for index in range(8 // bits):
        out[..., index] = (flat << np.uint8(8 - bits * (index + 1))) >> np.uint8(8 - bits)
    return out.reshape(flat.shape[0], -1)
