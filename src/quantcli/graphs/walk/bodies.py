"""Nodes whose attributes are graphs: If, Loop, Scan and their like."""

from collections.abc import Sequence

import onnx_ir as ir

__all__ = ["bodies_of", "is_control_flow", "replace_node"]


def is_control_flow(node: ir.Node) -> bool:
    """Whether a node has bodies."""
    return any(attr.type is ir.AttributeType.GRAPH for attr in node.attributes.values())


def bodies_of(node: ir.Node) -> dict[str, ir.Graph]:
    """The bodies of a node by attribute."""
    return {k: a.as_graph() for k, a in node.attributes.items() if a.type is ir.AttributeType.GRAPH}


def replace_node(graph: ir.Graph, old: ir.Node, new: ir.Node, outputs: Sequence[ir.Value]) -> None:
    """Puts a node in another's place.

    Args:
        graph: Where the old node is.
        old: Goes.
        new: Comes, under the same name.
        outputs: Of the new node, those that stand for the old one's; they get the same names.
    """
    new.name = old.name
    for before, after in zip(old.outputs, outputs, strict=True):
        after.name, after.type, after.shape = before.name, before.type, before.shape
    graph.insert_before(old, new)
    for before, after in zip(old.outputs, outputs, strict=True):
        before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
