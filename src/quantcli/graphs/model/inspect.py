"""What the nodes and weights of an ONNX graph are, read without their values."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from quantcli.graphs.model.files import data_files, open_graph
from quantcli.graphs.weights.replace import BITS_KEY
from quantcli.tensors.inventory import WeightRecord

__all__ = ["GraphContents", "NodeRecord", "read_contents"]

_SMALL_INTEGERS = (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
# Inputs that hold codes, scales and zero points, per operator.
_QUANTIZED_INPUTS = {
    "MatMulNBits": (1, 2, 3),
    "MatMulBnb4": (1, 2),
    "GatherBlockQuantized": (0, 2, 3),
    "DequantizeLinear": (0, 1, 2),
    "MatMulInteger": (1, 3),
    "ConvInteger": (1, 3),
    "QLinearMatMul": (3, 4, 5),
    "QLinearConv": (3, 4, 5),
    "QGemm": (3, 4, 5),
}
# operators whose attribute may be left out
_FOUR_BITS = ("MatMulNBits", "GatherBlockQuantized", "MatMulBnb4")
# rotary tables are computed, not learned
_TABLES = ("cos_cache", "sin_cache")


@dataclass(frozen=True)
class NodeRecord:
    """One node that reads a stored matrix, table or kernel."""

    name: str
    """As stored; may be empty."""
    op_type: str
    """Operator."""
    weight: str
    """The initializer."""
    shape: tuple[int, ...]
    """Of the initializer as stored, packed codes included."""
    dtype: str
    """Its type."""


@dataclass(frozen=True)
class GraphContents:
    """What a graph file holds."""

    opsets: dict[str, int]
    """Versions by domain."""
    operators: Counter[str]
    """How many nodes of each operator there are."""
    nodes: list[NodeRecord]
    """Those with weights, in the graph's order; one of several weights stands for a node."""
    records: list[WeightRecord]
    """One per weight: codes that quantized operators read, and floats."""
    data: set[str]
    """Names of the files beside it that hold weights."""


def read_contents(path: Path) -> GraphContents:
    """Looks into a graph once; weights that sit in Constant nodes count as the others.

    Raises:
        InputError: the file is not an ONNX graph.
    """
    model = open_graph(path)
    operators = Counter(node.op_type for node in model.graph.all_nodes())
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    graph = model.graph
    return GraphContents(dict(model.opset_imports), operators, _nodes(graph), _records(graph), data_files(model))


def _nodes(graph: ir.Graph) -> list[NodeRecord]:
    found = []
    for node in graph.all_nodes():
        stored = [v for v in node.inputs if v is not None and v.const_value is not None and v.const_value.size > 1]
        if node.op_type in ("Reshape", "Slice") or not stored:
            continue
        largest = max(stored, key=lambda v: v.const_value.size if v.const_value is not None else 0)
        tensor = largest.const_value
        assert tensor is not None
        shape = tuple(int(n) for n in tensor.shape.numpy())
        if len(shape) > 1:
            found.append(NodeRecord(node.name or "", node.op_type, str(largest.name), shape, tensor.dtype.name.lower()))
    return found


def _records(graph: ir.Graph) -> list[WeightRecord]:
    """Codes that quantized operators read, and floats.

    Of what nothing of the kind reads, integers of 32 and 64 bits (shapes, indexes) and single ones (zero points) are
    left out; smaller ones are codes too, as the table of a Gather whose rows are dequantized behind it.
    """
    records: list[WeightRecord] = []
    seen: set[str] = set()
    for node in graph.all_nodes():
        places = _QUANTIZED_INPUTS.get(node.op_type)
        if places is None:
            continue
        values = [node.inputs[p] if p < len(node.inputs) else None for p in places]
        codes = None if values[0] is None else values[0].const_value
        if codes is None or values[0] is None or values[0].name in seen:
            continue
        parts = [v.const_value for v in values if v is not None and v.const_value is not None]
        seen |= {str(v.name) for v in values if v is not None}
        bits = _bits(node, codes)
        count = _parameters(node, codes, bits)
        size = sum(p.nbytes for p in parts)
        held = int(node.metadata_props.get(BITS_KEY, bits))
        records.append(WeightRecord(node.name or str(values[0].name), held, True, count, size))
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or name in seen or any(t in name for t in _TABLES):
            continue
        table = tensor.dtype in _SMALL_INTEGERS and tensor.size > 1
        if table or tensor.dtype in _FLOATS:
            bits = int(8 * tensor.dtype.itemsize)
            records.append(WeightRecord(name, bits, table, math.prod(tensor.shape.numpy()), tensor.nbytes))
    return records


def _bits(node: ir.Node, codes: ir.TensorProtocol) -> int:
    attribute = node.attributes.get("bits")
    if attribute is not None:
        return int(attribute.as_int())
    return 4 if node.op_type in _FOUR_BITS else int(8 * codes.dtype.itemsize)


def _parameters(node: ir.Node, codes: ir.TensorProtocol, bits: int) -> int:
    if node.op_type in ("MatMulNBits", "MatMulBnb4"):
        return node.attributes["K"].as_int() * node.attributes["N"].as_int()
    elements = math.prod(codes.shape.numpy())
    packed_bytes = node.op_type == "GatherBlockQuantized" and codes.dtype == ir.DataType.UINT8
    return elements * (8 // bits) if packed_bytes else elements
