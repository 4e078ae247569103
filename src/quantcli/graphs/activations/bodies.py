"""Bodies of If, Loop and Scan, each a graph of its own while onnxruntime's quantizers work.

Those quantizers see one graph at a time, and not what a body reads of the graphs around it. Here every body becomes a
model: values from outside are inputs of it, constants from outside are initializers of it. In its place stands a node
that names what the body reads, so nothing that a body needs is taken for unused. Afterwards all are put back.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.walk.bodies import bodies_of, is_control_flow, replace_node

__all__ = ["quantize_bodies"]

_DOMAIN = "quantcli"
_SHARED_BYTES = 1024


@dataclass
class _Node:
    """A node with bodies, while a stand-in is in its place."""

    op_type: str
    domain: str
    attributes: dict[str, ir.Attr]
    """Those that are no bodies."""
    bodies: dict[str, str]
    """Part by attribute."""
    own_inputs: int
    """How many inputs are the node's; those that follow are what its bodies read."""


@dataclass
class _Part:
    """A graph that is quantized by itself."""

    model: ir.Model
    names: set[str]
    """Of the values that are its own."""
    captured: dict[str, int]
    """Place among the stand-in's inputs, by the input's name."""


def quantize_bodies(
    source: Path,
    made: Path,
    names: Collection[str],
    run: Callable[[Path, Path, set[str]], None],
    hidden: Collection[str] = (),
) -> None:
    """Quantizes a graph file and the bodies in it, one after the other.

    Args:
        source: Float graph file; no name occurs twice in it, in bodies neither.
        made: File to write, with `made`.data beside it.
        names: Nodes that are quantized.
        run: Quantizes a graph file without bodies to another, given its nodes among `names`.
        hidden: Operators that the quantizer gets wrong even where it is to leave them float; it does not see them.
    """
    model = open_graph(source)

    def hide(node: ir.Node) -> bool:
        return is_control_flow(node) or (node.op_type in hidden and node.domain == "")

    if not any(map(hide, model.graph)):
        run(source, made, set(names))
        return
    stand_ins: dict[str, _Node] = {}
    parts = {"": _Part(model, set(), {})}
    _take_out(model, "", parts, stand_ins, hide)
    with TemporaryDirectory(dir=made.parent, prefix=".bodies-") as name:
        for index, part in enumerate(parts.values()):
            chosen = {str(n.name) for n in part.model.graph} & set(names)
            if chosen:
                before, after = (Path(name) / f"{index}.{kind}.onnx" for kind in ("float", "integers"))
                save_graph(part.model, before)
                run(before, after, chosen)
                part.model = ir.load(after)
        whole = parts[""].model
        for part in parts.values():
            for domain, version in part.model.opset_imports.items():
                if domain != _DOMAIN:
                    whole.opset_imports.setdefault(domain, version)
        whole.opset_imports.pop(_DOMAIN, None)
        _put_back(whole.graph, parts, stand_ins)
        _share_constants(whole.graph)
        save_graph(whole, made)


def _take_out(
    model: ir.Model, key: str, parts: dict[str, _Part], stand_ins: dict[str, _Node], hide: Callable[[ir.Node], bool]
) -> None:
    """Puts stand-ins into a graph, in place, and adds a part for every body in it."""
    for node in [n for n in model.graph if hide(n)]:
        bodies = bodies_of(node)
        read: dict[ir.Value, None] = {}
        for body in bodies.values():
            read |= dict.fromkeys(_read_outside(body))
        outside = [v for v in read if not v.is_initializer()]
        attributes = {k: a for k, a in node.attributes.items() if k not in bodies}
        keys = {attribute: f"{key}{node.name}.{attribute}." for attribute in bodies}
        stand_ins[str(node.name)] = _Node(node.op_type, node.domain, attributes, keys, len(node.inputs))
        found = []
        for attribute, body in bodies.items():
            node.attributes.pop(attribute)
            part = _part(body, read, model, {str(v.name): len(node.inputs) + i for i, v in enumerate(outside)})
            parts[keys[attribute]] = part
            found.append((part.model, keys[attribute]))
        stand_in = ir.Node(_DOMAIN, f"Hidden{node.op_type}", [*node.inputs, *outside], num_outputs=len(node.outputs))
        replace_node(model.graph, node, stand_in, stand_in.outputs)
        model.opset_imports[_DOMAIN] = 1
        for part_model, part_key in found:
            _take_out(part_model, part_key, parts, stand_ins, hide)


def _read_outside(body: ir.Graph) -> Iterator[ir.Value]:
    """Values of outer graphs that a body reads, in bodies of its own too."""
    inside = {body, *body.subgraphs()}
    for node in body.all_nodes():
        yield from (v for v in node.inputs if v is not None and v.graph not in inside)
    for graph in inside:
        yield from (v for v in graph.outputs if v.graph not in inside)


def _part(body: ir.Graph, read: Collection[ir.Value], outer: ir.Model, places: dict[str, int]) -> _Part:
    """A model of a body."""
    names = {str(v.name) for v in (*body.inputs, *body.initializers.values())}
    names |= {str(v.name) for n in body.all_nodes() for v in n.outputs}
    needed = set(_read_outside(body))
    inside = {body, *body.subgraphs()}
    captured: dict[str, int] = {}
    for value in (v for v in read if v in needed):
        new = ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=value.const_value)
        for user, place in list(value.uses()):
            if user.graph in inside:
                user.replace_input_with(place, new)
        for graph in inside:
            for index, output in enumerate(graph.outputs):
                if output is value:
                    graph.outputs[index] = new
        if value.is_initializer():
            body.register_initializer(new)
        else:
            body.inputs.append(new)
            captured[str(new.name)] = places[str(new.name)]
    body.opset_imports.update({k: v for k, v in outer.opset_imports.items() if k != _DOMAIN})
    model = ir.Model(body, ir_version=outer.ir_version, metadata_props=dict(outer.metadata_props))
    return _Part(model, names, captured)


def _put_back(graph: ir.Graph, parts: dict[str, _Part], stand_ins: dict[str, _Node]) -> None:
    """Puts the bodies where the stand-ins are, in place."""
    for node in [n for n in graph if n.domain == _DOMAIN]:
        told = stand_ins[str(node.name)]
        attributes = dict(told.attributes)
        for attribute, key in told.bodies.items():
            part = parts[key]
            body = part.model.graph
            _put_back(body, parts, stand_ins)
            for value in [v for v in body.inputs if v.name in part.captured]:
                outer = node.inputs[part.captured[str(value.name)]]
                assert outer is not None
                value.replace_all_uses_with(outer, replace_graph_outputs=True)
                body.inputs.remove(value)
            _rename(body, part.names, key)
            body.opset_imports.clear()
            attributes[attribute] = ir.AttrGraph(attribute, body)
        new = ir.Node(
            told.domain,
            told.op_type,
            node.inputs[: told.own_inputs],
            list(attributes.values()),
            num_outputs=len(node.outputs),
        )
        replace_node(graph, node, new, new.outputs)


def _share_constants(graph: ir.Graph) -> None:
    """Keeps one of the equal constants that what several bodies read has become, in place."""
    seen: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    for inner in (graph, *graph.subgraphs()):
        for value in list(inner.initializers.values()):
            stored = value.const_value
            if stored is None or stored.nbytes < _SHARED_BYTES or value.is_graph_output():
                continue
            key = stored.dtype, tuple(stored.shape.numpy()), sha256(stored.tobytes()).digest()
            first = seen.setdefault(key, value)
            if first is value or inner is graph:
                continue
            if first.graph is not graph:
                assert first.graph is not None and first.name is not None
                first.graph.initializers.pop(first.name)
                graph.register_initializer(first)
            value.replace_all_uses_with(first)
            inner.initializers.pop(str(value.name))


def _rename(body: ir.Graph, names: Collection[str], key: str) -> None:
    """Gives names of its own to what the quantizer added; the same names are in other bodies."""
    values = [*body.initializers.values(), *(v for n in body for v in n.outputs)]
    for value in values:
        if value.name and value.name not in names and not value.name.startswith(key):
            value.name = f"{key}{value.name}"
