"""Least and greatest values of tensors inside the bodies of If, Loop and Scan, as outputs of the graph around them.

Each body gives two vectors more, [K] of its K tensors. A loop carries them from round to round; the branch of an If
that is not taken says inf and -inf, as does a loop without rounds: there was no value.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from quantcli.graphs.walk.bodies import bodies_of, is_control_flow, replace_node

__all__ = ["add_body_extremes"]

_ENDS = (("ReduceMin", "Min", np.inf), ("ReduceMax", "Max", -np.inf))


def add_body_extremes(graph: ir.Graph, wanted: Collection[str]) -> list[tuple[list[str], ir.Value, ir.Value]]:
    """Rewrites the nodes with bodies, in place.

    Args:
        graph: A graph with names that are unique in bodies too.
        wanted: Names of tensors of float32; those in bodies are found.

    Returns:
        For each such node with tensors among them: their names, and the values that hold their extremes, [K] each.
    """
    found = []
    for node in [n for n in graph if is_control_flow(n)]:
        told = _Bodies(graph, node, set(wanted)).report()
        if told is not None:
            found.append(told)
    return found


class _Bodies:
    """One node with bodies."""

    def __init__(self, graph: ir.Graph, node: ir.Node, wanted: set[str]):
        self.graph, self.node = graph, node
        self.bodies = bodies_of(node)
        self.told = {attribute: _report_graph(body, wanted) for attribute, body in self.bodies.items()}
        self.names = [name for names, _ in self.told.values() for name in names]

    def report(self) -> tuple[list[str], ir.Value, ir.Value] | None:
        if not self.names:
            return None
        node, count = self.node, len(self.names)
        if node.op_type == "If":
            inputs, place = list(node.inputs), len(node.outputs)
            self._end_branches()
        else:
            place = len(node.inputs) - (2 if node.op_type == "Loop" else node.attributes.get_int("num_scan_inputs"))
            inputs = list(node.inputs)
            at = 2 + place if node.op_type == "Loop" else place
            first = [_constant(self.graph, f"{node.name}.first{end}", np.full(count, end)) for *_, end in _ENDS]
            inputs[at:at] = first
            self._carry(place)
        new = ir.Node(
            node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs) + 2
        )
        new.name = node.name
        replace_node(self.graph, node, new, [*new.outputs[:place], *new.outputs[place + 2 :]])
        for (reduce, *_), value in zip(_ENDS, new.outputs[place : place + 2], strict=True):
            value.name, value.dtype, value.shape = f"{node.name}.{reduce}", ir.DataType.FLOAT, ir.Shape((count,))
        return self.names, new.outputs[place], new.outputs[place + 1]

    def _end_branches(self) -> None:
        """Both branches give the extremes of both, each those of its own."""
        for attribute, body in self.bodies.items():
            for side, (reduce, _, end) in enumerate(_ENDS):
                parts = []
                for other, (names, values) in self.told.items():
                    if names:
                        nothing = f"{self.node.name}.{attribute}.{other}.none{end}"
                        own = other == attribute
                        parts.append(values[side] if own else _constant(body, nothing, np.full(len(names), end)))
                output = _add(body, "Concat", parts, f"{self.node.name}.{attribute}.{reduce}", axis=0)
                body.outputs.append(output)

    def _carry(self, place: int) -> None:
        """The extremes so far come in, and go out with those of this round."""
        (body,), ((_, values),) = self.bodies.values(), self.told.values()
        loop = self.node.op_type == "Loop"
        for side, (_, merge, _) in enumerate(_ENDS):
            before = ir.Value(name=f"{self.node.name}.{merge}.before", type=ir.TensorType(ir.DataType.FLOAT))
            before.shape = ir.Shape((len(self.names),))
            body.inputs.insert((2 if loop else 0) + place + side, before)
            output = _add(body, merge, [before, values[side]], f"{self.node.name}.{merge}.after")
            body.outputs.insert((1 if loop else 0) + place + side, output)


def _report_graph(body: ir.Graph, wanted: set[str]) -> tuple[list[str], tuple[ir.Value, ...]]:
    """Names of the tensors in a body and in those inside it, and their extremes."""
    inner = add_body_extremes(body, wanted)
    own = [v for v in (*body.inputs, *(v for n in body for v in n.outputs)) if v.name in wanted]
    names = [str(v.name) for v in own] + [name for told, *_ in inner for name in told]
    if not names:
        return [], ()
    one = _constant(body, f"{names[0]}.one", np.array([1], np.int64))
    ends = []
    for side, (reduce, *_) in enumerate(_ENDS):
        parts = []
        for value in own:
            least = _add(body, reduce, [value], f"{value.name}.{reduce}", keepdims=0)
            parts.append(_add(body, "Reshape", [least, one], f"{value.name}.{reduce}.vector"))
        parts += [ends_of_inner[side] for _, *ends_of_inner in inner]
        ends.append(_add(body, "Concat", parts, f"{names[0]}.{reduce}.all", axis=0))
    return names, tuple(ends)


def _add(graph: ir.Graph, op_type: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
    node = ir.node(op_type, inputs, attributes)
    graph.append(node)
    node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.FLOAT
    return node.outputs[0]


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    array = array if array.dtype == np.int64 else array.astype(np.float32)
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value
