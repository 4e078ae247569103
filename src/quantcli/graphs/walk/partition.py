"""Cuts a graph into parts that run one after the other, each node once: what later parts read is kept between them.

A stage is a list of tensors that are wanted together. Its part holds the nodes that those tensors need and no earlier
part has run. Nodes that compute from constants alone (a weight's transpose, a shape) belong to every part that reads
them, so that no weight is ever carried along.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from quantcli.errors import InputError

__all__ = ["Part", "crossing_bytes", "parts_of", "reads_of"]


@dataclass(frozen=True)
class Part:
    """What is run for one stage."""

    watched: tuple[str, ...]
    """The tensors that are wanted."""
    nodes: tuple[ir.Node, ...]
    """In the order of the graph."""
    reads: tuple[ir.Value, ...]
    """What the nodes take from earlier parts and from the graph's inputs."""
    keeps: tuple[ir.Value, ...]
    """What later parts read of all that is known behind this one."""


def parts_of(graph: ir.Graph, stages: Sequence[Sequence[str]]) -> list[Part]:
    """One part for each stage, in their order.

    Args:
        graph: In topological order; a node with subgraphs is one node, what those capture is what it reads.
        stages: Names of tensors that the graph computes or is given.

    Raises:
        InputError: no node gives a tensor of that name.
    """
    cut = _Cut(graph, stages)
    return [cut.part(number) for number in range(len(stages))]


def crossing_bytes(parts: Sequence[Part], tokens: int) -> int | None:
    """Estimate of the most that is kept at once, for so many tokens.

    Axes of unknown length are together those of the tokens; the graph's inputs do not count. None where the graph does
    not say the shapes of its tensors.
    """
    most, known = 0, False
    for part in parts:
        total = 0.0
        for value in part.keeps:
            if value.shape is None or value.dtype is None or value.producer() is None:
                continue
            known, size = True, 1
            for axis in value.shape:
                size *= axis if isinstance(axis, int) else 1
            total += size * value.dtype.itemsize * (1 if value.shape.is_static() else tokens)
        most = max(most, int(total))
    return most if known or not any(part.keeps for part in parts) else None


class _Cut:
    """Who makes, who reads, and when."""

    def __init__(self, graph: ir.Graph, stages: Sequence[Sequence[str]]):
        self._order = {node: place for place, node in enumerate(graph)}
        self._stages = stages
        self._reads = {node: list(reads_of(node)) for node in graph}
        varying = {value for value in graph.inputs if not value.is_initializer()}
        for node in graph:
            if any(value in varying for value in self._reads[node]):
                varying.update(node.outputs)
        self._varying = varying
        values = {str(v.name): v for v in (*graph.inputs, *(o for node in graph for o in node.outputs))}
        missing = next((name for stage in stages for name in stage if name not in values), None)
        if missing is not None:
            raise InputError(f"the graph computes no tensor {missing!r}")
        self._watched = [[values[name] for name in stage] for stage in stages]
        due = {value: number for number in reversed(range(len(stages))) for value in self._watched[number]}
        last = {value: number for number, stage in enumerate(self._watched) for value in stage}
        self._nodes: list[list[ir.Node]] = [[] for _ in stages]
        for node in reversed(graph):
            number = min((due[value] for value in node.outputs if value in due), default=None)
            if number is None or not any(value in varying for value in node.outputs):
                continue
            self._nodes[number].append(node)
            for value in self._reads[node]:
                due[value] = min(due.get(value, number), number)
                last[value] = max(last.get(value, number), number)
        made = {value: number for number, nodes in enumerate(self._nodes) for node in nodes for value in node.outputs}
        self._keeps: list[list[ir.Value]] = [[] for _ in stages]
        for value, end in last.items():
            if value in varying:
                for number in range(made.get(value, 0), end):
                    self._keeps[number].append(value)

    def part(self, number: int) -> Part:
        """That of one stage."""
        nodes = {*self._nodes[number], *self._constants(number)}
        ordered = sorted(nodes, key=self._order.__getitem__)
        made = {value for node in ordered for value in node.outputs}
        taken = dict.fromkeys(v for node in ordered for v in self._reads[node] if v in self._varying and v not in made)
        return Part(tuple(self._stages[number]), tuple(ordered), tuple(taken), tuple(self._keeps[number]))

    def _constants(self, number: int) -> Iterator[ir.Node]:
        """The nodes without inputs that vary, behind what the part reads or is watched in it."""
        wanted = [v for node in self._nodes[number] for v in self._reads[node]] + self._watched[number]
        seen: set[ir.Node] = set()
        while wanted:
            value = wanted.pop()
            node = value.producer()
            if node is None or value in self._varying or node in seen:
                continue
            seen.add(node)
            yield node
            wanted += self._reads[node]


def reads_of(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads of the graph that it is in, through its subgraphs too."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from _captured(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from _captured(graph)


def _captured(graph: ir.Graph) -> Iterator[ir.Value]:
    own = {*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)}
    for node in graph:
        yield from (value for value in reads_of(node) if value not in own)
    yield from (value for value in graph.outputs if value not in own)
