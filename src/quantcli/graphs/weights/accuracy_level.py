"""Facts about the quantized nodes of a written graph, and the one attribute of them that may change afterwards."""

import os
from itertools import groupby
from pathlib import Path

import onnx_ir as ir

from quantcli.graphs.model.files import open_graph

__all__ = ["change_accuracy_level", "count_by_bits"]


def change_accuracy_level(path: Path, level: int) -> int:
    """Sets the arithmetic of every MatMulNBits of a graph file; the data file beside it stays as it is.

    Returns:
        How many nodes there are; without any the file is not touched.
    """
    model = open_graph(path)
    nodes = [n for n in model.graph.all_nodes() if n.op_type == "MatMulNBits"]
    for node in nodes:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    if nodes:
        temporary = path.with_suffix(".tmp")
        ir.save(model, temporary, format="protobuf")
        os.replace(temporary, path)
    return len(nodes)


def count_by_bits(path: Path) -> dict[str, int]:
    """How many quantized nodes there are by bits, and MatMul and Gather with a float weight, as `4`, `8`, `float`."""
    found: list[str] = []
    for node in open_graph(path).graph.all_nodes():
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            found.append(str(node.attributes["bits"].as_int()) if "bits" in node.attributes else "4")
        elif node.op_type in ("MatMul", "FusedMatMul") and any(
            v is not None and v.is_initializer() for v in node.inputs
        ):
            found.append("float")
    return {key: len(list(same)) for key, same in groupby(sorted(found))}
