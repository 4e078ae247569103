"""What the weights of an ONNX graph are, read without their values."""

import math
from pathlib import Path

import onnx_ir as ir

from quantcli.graphs.files import open_graph
from quantcli.graphs.rewrite import BITS_KEY
from quantcli.tensors.inventory import WeightRecord

__all__ = ["graph_records"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
# Inputs that hold codes, scales and zero points, per operator.
_QUANTIZED_INPUTS = {
    "MatMulNBits": (1, 2, 3),
    "GatherBlockQuantized": (0, 2, 3),
    "DequantizeLinear": (0, 1, 2),
}
# rotary tables are computed, not learned
_TABLES = ("cos_cache", "sin_cache")


def graph_records(path: Path) -> list[WeightRecord]:
    """One record per weight of a graph: codes of MatMulNBits, GatherBlockQuantized and DequantizeLinear, and floats.

    Integer initializers that no such node reads (shapes, indexes) are left out.

    Raises:
        InputError: the file is not an ONNX graph.
    """
    graph = open_graph(path).graph
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
        if tensor is None or name in seen or tensor.dtype not in _FLOATS or any(t in name for t in _TABLES):
            continue
        records.append(
            WeightRecord(name, 8 * tensor.dtype.itemsize, False, math.prod(tensor.shape.numpy()), tensor.nbytes)
        )
    return records


def _bits(node: ir.Node, codes: ir.TensorProtocol) -> int:
    attribute = node.attributes.get("bits")
    if attribute is not None:
        return int(attribute.as_int())
    return int(8 * codes.dtype.itemsize) if node.op_type == "DequantizeLinear" else 4


def _parameters(node: ir.Node, codes: ir.TensorProtocol, bits: int) -> int:
    if node.op_type == "MatMulNBits":
        return node.attributes["K"].as_int() * node.attributes["N"].as_int()
    elements = math.prod(codes.shape.numpy())
    packed_bytes = node.op_type == "GatherBlockQuantized" and codes.dtype == ir.DataType.UINT8
    return elements * (8 // bits) if packed_bytes else elements
