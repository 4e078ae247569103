"""Weights that stand behind nodes: a Cast of float16, a Transpose, a Reshape, a DequantizeLinear of stored codes.

What a matrix-reading node gets at the end of such a chain becomes an initializer of that value, exactly, computed when
it is asked for. The chain is remembered: a weight that stays float goes back behind it where that takes less space.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["FoldedWeight", "fold_weights", "lift_body_weights", "unfold_weights"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_READERS: Mapping[str, tuple[int, ...]] = {
    "MatMul": (0, 1),
    "Gemm": (0, 1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gather": (0,),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
}
"""Operators, and which of their inputs are weights."""
_RESHAPING = ("Reshape", "Unsqueeze", "Squeeze", "Flatten")


@dataclass(frozen=True)
class _Step:
    """One node of a chain, in words that every opset from 7 on has."""

    op: str
    """Cast, Transpose, Reshape or DequantizeLinear."""
    dtype: ir.DataType
    """Of the result."""
    shape: tuple[int, ...]
    """Of the result."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    constants: tuple[ir.TensorProtocol, ...] = ()
    """Scale and zero point of a DequantizeLinear."""

    @property
    def key(self) -> tuple[object, ...]:
        """The same for steps that do the same."""
        return self.op, self.dtype, self.shape, repr(dict(self.attributes)), tuple(map(id, self.constants))

    def apply(self, array: np.ndarray) -> np.ndarray:
        """What the node computes."""
        if self.op == "Cast":
            with np.errstate(over="ignore"):  # infinite in the graph too; found where the weight is read
                return array.astype(self.dtype.numpy())
        if self.op == "Transpose":
            return np.transpose(array, self.attributes["perm"])
        if self.op == "Reshape":
            return array.reshape(self.shape)
        return self._dequantize(array)

    def _dequantize(self, codes: np.ndarray) -> np.ndarray:
        scale, *zeros = (c.numpy() for c in self.constants)
        axis, block = self.attributes["axis"], self.attributes["block_size"]

        def spread(values: np.ndarray) -> np.ndarray:
            if block:
                return np.repeat(values, block, axis).take(np.arange(codes.shape[axis]), axis)
            return values.reshape([-1 if a == axis else 1 for a in range(codes.ndim)]) if values.size > 1 else values

        # the difference of integers is exact in float32, and the product is rounded once
        wide = codes.astype(np.float32)
        if zeros:
            wide -= spread(zeros[0]).astype(np.float32)
        return (wide * spread(scale).astype(np.float32)).reshape(codes.shape).astype(self.dtype.numpy())


class FoldedWeight(ir.LazyTensor):
    """The value at the end of a chain."""

    def __init__(self, source: ir.Value, steps: Sequence[_Step], name: str):
        """Nothing is computed yet.

        Args:
            source: The initializer that the chain begins with.
            steps: The chain.
            name: Of the value.
        """
        stored = source.const_value
        assert stored is not None

        def compute() -> ir.TensorProtocol:
            array = stored.numpy()
            for step in steps:
                array = step.apply(array)
            made = ir.Tensor(np.array(array, order="C"), dtype=steps[-1].dtype, name=name)
            del array  # a file that something looks into cannot be let go
            if isinstance(stored, ir.ExternalTensor):
                stored.release()
            return made

        super().__init__(compute, dtype=steps[-1].dtype, shape=ir.Shape(steps[-1].shape), name=name)
        self.source, self.steps = stored, tuple(steps)

    @property
    def requantized(self) -> bool:
        """Whether it was stored as codes."""
        return any(step.op == "DequantizeLinear" for step in self.steps)


def lift_body_weights(model: ir.Model) -> None:
    """Moves initializers of bodies of If, Loop and Scan into the main graph, under names that nothing else has."""
    taken = _names(model.graph)
    for graph in model.graphs():
        if graph is model.graph or not isinstance(graph, ir.Graph):
            continue
        for name, value in list(graph.initializers.items()):
            if value.is_graph_input() or value.is_graph_output() or value.const_value is None:
                continue
            del graph.initializers[name]
            if name in taken:
                new = _unused(f"{graph.name or 'body'}.{name}", taken)
                value, old = _value(value.const_value, new), value
                old.replace_all_uses_with(value)
            model.graph.register_initializer(value)
            taken.add(str(value.name))


def fold_weights(model: ir.Model, *, transposes: bool = False) -> list[FoldedWeight]:
    """Gives nodes that read matrices the value of the chain in front as an initializer of the main graph.

    Args:
        model: Its constants are initializers, none of them an input, and functions are inlined. Changed in place.
        transposes: Whether a Transpose of a matrix right in front of its reader is folded too.

    Returns:
        What was folded.
    """
    graph, found, made = model.graph, dict[tuple[object, ...], ir.Value](), list[FoldedWeight]()
    names = _names(graph)
    _skip_identities(model)
    for node in list(graph.all_nodes()):
        if node.domain not in ("", "ai.onnx"):
            continue
        for index in _READERS.get(node.op_type, ()):
            chain = _chain(node.inputs[index]) if index < len(node.inputs) else None
            steps = _steps(chain) if chain is not None else None
            if chain is None or not steps:
                continue
            if not transposes and _swaps(steps[-1]):
                chain, steps = chain[:-1], steps[:-1]  # the walk sees through it: one matrix for both its readers
            if not steps or steps[-1].dtype not in _FLOATS or any(v.is_graph_output() for v in chain[1:]):
                continue
            source, end = chain[0], chain[-1]
            key = (id(source.const_value), *(step.key for step in steps))
            if key not in found:
                alone = all(len(value.uses()) == 1 for value in chain[:-1])  # its name becomes free
                name = str(source.name) if alone else _unused(f"{source.name}.folded", names)
                made.append(FoldedWeight(source, steps, name))
                found[key] = _value(made[-1], name)
            end.replace_all_uses_with(found[key])
            _remove_unread(end)
            if found[key].graph is None:
                graph.register_initializer(found[key])
    return made


def unfold_weights(model: ir.Model) -> None:
    """Puts folded weights that stayed float back behind their chain, where that takes less space in a file."""
    graph = model.graph
    stored = {id(v.const_value): v for v in graph.initializers.values() if v.const_value is not None}
    names = _names(graph)
    for value in list(graph.initializers.values()):
        folded = value.const_value
        if not isinstance(folded, FoldedWeight):
            continue
        kept = id(folded.source) in stored
        if not kept and folded.source.nbytes >= folded.nbytes:
            continue
        source = stored.get(id(folded.source))
        if source is None:
            source = stored[id(folded.source)] = _register(graph, folded.source, _unused(f"{value.name}.stored", names))
        del graph.initializers[str(value.name)]
        end, nodes = source, []
        for number, step in enumerate(folded.steps):
            constants = list(step.constants)
            if step.op == "Reshape":
                constants = [ir.Tensor(np.array(step.shape, np.int64))]
            read = [_register(graph, c, _unused(f"{value.name}.{step.op}", names)) for c in constants]
            attributes = {k: v for k, v in step.attributes.items() if k != "block_size" or v}
            node = ir.node(step.op, [end, *read], attributes, name=f"{value.name}/{step.op}_{number}")
            end = node.outputs[0]
            end.name, end.dtype, end.shape = _unused(f"{node.name}/output", names), step.dtype, ir.Shape(step.shape)
            nodes.append(node)
        graph.insert_before(graph[0], nodes)
        value.replace_all_uses_with(end, replace_graph_outputs=True)


def _chain(value: ir.Value | None) -> list[ir.Value] | None:
    """An initializer, and what each node gives that a value is computed by from it alone."""
    values: list[ir.Value] = []
    while value is not None and not value.is_initializer():
        values.append(value)
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx") or not node.inputs:
            return None
        value = node.inputs[0]
    if value is None or value.const_value is None or not values:
        return None
    return [value, *reversed(values)]


def _steps(chain: Sequence[ir.Value]) -> list[_Step] | None:
    """What the nodes of a chain do; None where one of them is none of the steps."""
    source = chain[0].const_value
    assert source is not None
    dtype, shape = source.dtype, tuple(int(n) for n in source.shape.numpy())
    steps: list[_Step] = []
    for value in chain[1:]:
        node = value.producer()
        step = _step(node, dtype, shape) if node is not None else None
        if step is None:
            return None
        steps.append(step)
        dtype, shape = step.dtype, step.shape
    return steps


def _step(node: ir.Node, dtype: ir.DataType, shape: tuple[int, ...]) -> _Step | None:
    """What a node does to a stored tensor; None where it is none of the steps."""
    if node.op_type == "Identity":
        return _Step("Reshape", dtype, shape)
    if node.op_type == "Cast":
        to = ir.DataType(node.attributes.get_int("to", 0))
        plain = to in _FLOATS and (dtype in _FLOATS or dtype.is_integer())
        narrowed = dtype is ir.DataType.DOUBLE and to in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        return _Step("Cast", to, shape, {"to": int(to)}) if plain and not narrowed else None
    if node.op_type == "Transpose":
        perm = [int(p) for p in node.attributes.get_ints("perm", range(len(shape))[::-1])]
        if sorted(perm) != list(range(len(shape))):
            return None
        return _Step("Transpose", dtype, tuple(shape[p] for p in perm), {"perm": perm})
    if node.op_type in _RESHAPING:
        after = _reshaped(node, shape)
        return _Step("Reshape", dtype, after) if after is not None and math.prod(after) == math.prod(shape) else None
    return _dequantized(node, dtype, shape) if node.op_type == "DequantizeLinear" else None


def _dequantized(node: ir.Node, dtype: ir.DataType, shape: tuple[int, ...]) -> _Step | None:
    constants = [ir.convenience.get_const_tensor(v) for v in node.inputs[1:3] if v is not None]
    known = [c for c in constants if c is not None]
    if len(known) != len(constants) or not known or node.attributes.get_int("output_dtype", 0) != 0:
        return None
    if not dtype.is_integer() or known[0].dtype not in _FLOATS or known[0].dtype is ir.DataType.DOUBLE:
        return None
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    if known[0].size == 1 and not block:
        axis = 0
    elif not -len(shape) <= axis < len(shape):
        return None
    return _Step(
        "DequantizeLinear",
        known[0].dtype,
        shape,
        {"axis": axis % max(len(shape), 1), "block_size": block},
        tuple(known),
    )


def _reshaped(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape behind a node that moves nothing."""
    given = ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else None
    if len(node.inputs) > 1 and node.inputs[1] is not None and given is None:
        return None
    numbers = [int(n) for n in given.numpy().reshape(-1)] if given is not None else None
    if node.op_type == "Flatten":
        axis = node.attributes.get_int("axis", 1)
        axis += len(shape) if axis < 0 else 0
        return math.prod(shape[:axis]), math.prod(shape[axis:])
    if node.op_type == "Reshape":
        if numbers is None:
            return None
        if node.attributes.get_int("allowzero", 0) == 0:
            numbers = [shape[a] if n == 0 and a < len(shape) else n for a, n in enumerate(numbers)]
        rest = math.prod(n for n in numbers if n != -1)
        return tuple((math.prod(shape) // rest if rest else 0) if n == -1 else n for n in numbers)
    axes = numbers if numbers is not None else [int(a) for a in node.attributes.get_ints("axes", [])]
    if node.op_type == "Unsqueeze":
        rank = len(shape) + len(axes)
        wanted, rest_of = {a % rank for a in axes}, iter(shape)
        return tuple(1 if a in wanted else next(rest_of) for a in range(rank))
    dropped = {a % len(shape) for a in axes} if axes else {a for a, n in enumerate(shape) if n == 1}
    return tuple(n for a, n in enumerate(shape) if a not in dropped)


def _swaps(step: _Step) -> bool:
    return step.op == "Transpose" and step.attributes["perm"] == [1, 0]


def _renamed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """The same under another name; a tensor of a ModelProto has its own there, which is the user's."""
    if isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.LazyTensor(lambda: tensor, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _value(tensor: ir.TensorProtocol, name: str) -> ir.Value:
    if tensor.name != name:
        tensor = _renamed(tensor, name)
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)


def _register(graph: ir.Graph, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    value = _value(tensor, name)
    graph.register_initializer(value)
    return value


def _unused(name: str, taken: set[str]) -> str:
    chosen, number = name, 1
    while chosen in taken:
        number, chosen = number + 1, f"{name}_{number}"
    taken.add(chosen)
    return chosen


def _skip_identities(model: ir.Model) -> None:
    """Lets readers of a constant's Identity read the constant."""
    for node in list(model.graph.all_nodes()):
        if node.op_type == "Identity" and node.domain in ("", "ai.onnx") and not node.outputs[0].is_graph_output():
            read = node.inputs[0]
            if read is not None and (read.is_initializer() or _chain(read) is not None) and node.graph is not None:
                node.outputs[0].replace_all_uses_with(read)
                node.graph.remove(node, safe=True)


def _names(graph: ir.Graph) -> set[str]:
    """Names of the main graph's inputs and weights, of what bodies are given, and of what nodes make anywhere."""
    own = {str(v.name) for v in (*graph.inputs, *graph.initializers.values())}
    given = {str(v.name) for body in graph.subgraphs() for v in body.inputs}
    return own | given | {str(v.name) for node in graph.all_nodes() for v in node.outputs}


def _remove_unread(value: ir.Value) -> None:
    """Removes what computed a value, as far back as nothing else reads it."""
    if value.uses() or value.is_graph_output():
        return
    if value.is_initializer():
        if isinstance(value.graph, ir.Graph):
            del value.graph.initializers[str(value.name)]
        return
    node = value.producer()
    if node is None or any(v.uses() or v.is_graph_output() for v in node.outputs) or node.graph is None:
        return
    read = [v for v in node.inputs if v is not None]
    node.graph.remove(node, safe=True)
    for v in read:
        _remove_unread(v)
