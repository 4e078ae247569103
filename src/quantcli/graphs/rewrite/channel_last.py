"""Inputs and outputs of a graph with their channels last: [N, C, ...] becomes [N, ..., C], by a Transpose inside.

onnxruntime's `update_io_to_channel_last` is not used, as of 1.31: with several names it numbers its nodes in another
order each time, leaves subgraphs reading the turned tensor, and gives an input that no node reads a wrong inner shape.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from quantcli.errors import UsageError, nearest
from quantcli.graphs.model.inputs import Feed

__all__ = ["make_channel_last", "turn_feed"]

_LEAST_RANK = 3


def make_channel_last(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> list[str]:
    """Turns inputs and outputs, in place; names stay.

    Args:
        model: A graph whose inputs and outputs have shapes.
        inputs: Names.
        outputs: Names.

    Returns:
        What became of each, in words.

    Raises:
        UsageError: a name that the graph does not have, or a tensor without channels.
    """
    graph = model.graph
    for names, values, what in ((inputs, graph.inputs, "input"), (outputs, graph.outputs, "output")):
        for name in names:
            _refuse(name, values, what)
    said = []
    for name in inputs:
        first = next(v for v in graph.inputs if v.name == name)
        if first.is_graph_output():
            raise UsageError(f"input {name} is an output as it is, it cannot be channel-last", hint="leave it out")
        last = ir.Value(name=name, type=first.type, shape=_moved(first.shape))
        node = ir.node("Transpose", [last], {"perm": _to_first(len(first.shape or ()))})
        inner = node.outputs[0]
        inner.name, inner.type, inner.shape = _unused(graph, f"{name}_channel_first"), first.type, first.shape
        node.name = _unused(graph, f"Transpose_{name}")
        first.replace_all_uses_with(inner)
        graph.inputs[list(graph.inputs).index(first)] = last
        graph.insert_before(graph[0], node)
        said.append(f"input {name} is channel-last now, {_told(last.shape)}: feed it so")
    for name in outputs:
        first = next(v for v in graph.outputs if v.name == name)
        node = ir.node("Transpose", [first], {"perm": _to_last(len(first.shape or ()))})
        node.name = _unused(graph, f"Transpose_{name}")
        first.name = _unused(graph, f"{name}_channel_first")
        last = node.outputs[0]
        last.name, last.type, last.shape = name, first.type, _moved(first.shape)
        graph.append(node)
        graph.outputs[list(graph.outputs).index(first)] = last
        said.append(f"output {name} is channel-last now, {_told(last.shape)}")
    return said


def turn_feed(feed: Feed, names: Sequence[str]) -> Feed:
    """A sample with those inputs channel-last."""
    return {n: np.ascontiguousarray(a.transpose(_to_last(a.ndim))) if n in names else a for n, a in feed.items()}


def _refuse(name: str, values: Sequence[ir.Value], what: str) -> None:
    found = next((v for v in values if v.name == name and not v.is_initializer()), None)
    if found is None:
        raise UsageError(f"the graph has no {what} {name!r}, {nearest(name, [str(v.name) for v in values])}")
    if found.shape is None or len(found.shape) < _LEAST_RANK:
        axes = "is of unknown shape" if found.shape is None else f"has {len(found.shape)} axes"
        raise UsageError(f"{what} {name} {axes}, channels can be put last from {_LEAST_RANK} axes on")


def _to_first(rank: int) -> list[int]:
    return [0, rank - 1, *range(1, rank - 1)]


def _to_last(rank: int) -> list[int]:
    return [0, *range(2, rank), 1]


def _moved(shape: ir.Shape | None) -> ir.Shape:
    assert shape is not None
    return ir.Shape([shape[i] for i in _to_last(len(shape))])


def _told(shape: ir.Shape | None) -> str:
    return "x".join(str(d) if isinstance(d, int) else str(d.value) for d in shape or ())


def _unused(graph: ir.Graph, stem: str) -> str:
    """A name that neither a tensor nor a node has."""
    taken = {v.name for n in graph.all_nodes() for v in (*n.inputs, *n.outputs) if v is not None}
    taken |= {n.name for n in graph.all_nodes()} | set(graph.initializers)
    name, count = stem, 0
    while name in taken:
        name, count = f"{stem}_{count}", count + 1
    return name
