"""A graph that grows node by node; each node is run as it comes, so that what does not run is never added."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import strategies as st

MAX_ELEMENTS = 20_000
IR_VERSIONS = {range(7, 9): 4, range(9, 14): 8, range(14, 22): 9, range(22, 24): 11, range(24, 26): 12}
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64))


class UnfitError(Exception):
    """This node cannot be had here."""


@dataclass(eq=False)
class Tensor:
    """A value of the graph, and what the first sample makes of it."""

    value: ir.Value
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def rank(self) -> int:
        return self.array.ndim


@dataclass
class Step:
    """A node of the main graph that can be run alone."""

    node: ir.Node
    session: ort.InferenceSession
    reads: list[str]
    writes: list[str]


def options() -> ort.SessionOptions:
    made = ort.SessionOptions()
    made.intra_op_num_threads = made.inter_op_num_threads = 1
    made.log_severity_level = 4
    return made


def declared(name: str, array: np.ndarray, batch: str | None = None) -> ir.Value:
    """A value with type and shape; the first axis is `batch` where that is given."""
    shape: list[int | str] = list(array.shape)
    if batch is not None:
        shape[0] = batch
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(shape))


class Scope:
    """The main graph, or the body of an If, Loop or Scan.

    Args:
        draw: hypothesis' draw.
        opset: Of the default domain.
        outer: The scope around this one.
        prefix: Of names.
    """

    def __init__(self, draw: Callable[[Any], Any], opset: int, outer: "Scope | None" = None, prefix: str = ""):
        self.draw, self.opset, self.outer, self.prefix = draw, opset, outer, prefix
        self.nodes: list[ir.Node] = []
        self.inputs: list[Tensor] = []
        self.initializers: list[Tensor] = []
        self.pool: list[Tensor] = []
        """What nodes compute from the inputs, and the inputs."""
        self.constant_values: set[ir.Value] = set() if outer is None else outer.constant_values
        """What depends on no input."""
        self.weights: list[Tensor] = []
        self.steps: list[Step] = []
        self.captured: dict[str, Tensor] = {}
        self.operators: set[str] = set() if outer is None else outer.operators
        self.nameless = False if outer is None else outer.nameless
        self._owned: set[ir.Value] = set()
        self._count = 0

    def outers(self) -> "list[Scope]":
        """The scopes around this one, the nearest first."""
        return [] if self.outer is None else [self.outer, *self.outer.outers()]

    def name(self, kind: str) -> str:
        self._count += 1
        return f"{self.prefix}{kind}{self._count}"

    def one_of(self, *values: Any) -> Any:
        """One of the values; hypothesis shrinks to the first."""
        return self.draw(st.sampled_from(values))

    def chance(self, one_in: int) -> bool:
        return self.draw(st.integers(0, one_in - 1)) == one_in - 1 if one_in > 1 else True

    def random(self) -> np.random.Generator:
        return np.random.default_rng(self.draw(st.integers(0, 999)))

    def pick(
        self, *ranks: int, when: Callable[[Tensor], bool] = lambda t: True, dtypes: Sequence[Any] = FLOATS
    ) -> Tensor:
        """A tensor of such a rank and type, the latest first."""
        found = [t for scope in (self, *self.outers()) for t in reversed(scope.pool)]
        found = [t for t in found if (not ranks or t.rank in ranks) and t.array.dtype in dtypes and when(t)]
        if not found:
            raise UnfitError
        return found[self.draw(st.integers(0, min(len(found), 6) - 1))]

    def pick_filled(self, *ranks: int) -> Tensor:
        """One with elements: of nothing, onnxruntime's recurrences, norms and poolings end the process."""
        return self.pick(*ranks, when=lambda t: t.array.size > 0)

    def draw_axis(self, tensor: Tensor) -> int:
        return tensor.rank - 1 - self.draw(st.integers(0, tensor.rank - 1))

    def own(self, tensor: Tensor) -> Tensor:
        self._owned.add(tensor.value)
        return tensor

    def constant(self, array: Any, kind: str = "c", *, as_node: bool | None = None) -> Tensor:
        """A constant: an initializer, or the output of a Constant node."""
        array = np.asarray(array)
        name = self.name(kind)
        if array.dtype != bool and (self.chance(5) if as_node is None else as_node):
            tensor = ir.Tensor(array, name=name)
            node = ir.node("Constant", [], {"value": tensor}, name=self._node_name("Constant"), num_outputs=1)
            made = self.own(Tensor(node.outputs[0], array))
            made.value.name = name
            self.nodes.append(node)
        else:
            value = declared(name, array)
            value.const_value = ir.Tensor(array, name=name)
            made = self.own(Tensor(value, array))
            self.initializers.append(made)
        self.constant_values.add(made.value)
        return made

    def ints(self, *values: int) -> Tensor:
        return self.constant(np.array(values, np.int64))

    def axes(self, since: int, name: str, *values: int) -> tuple[list[Tensor], dict[str, Any]]:
        """Inputs and attributes that say `values`: an input from opset `since` on."""
        return ([self.ints(*values)], {}) if self.opset >= since else ([], {name: list(values)})

    def add(
        self,
        op: str,
        inputs: Sequence[Tensor | None],
        outputs: int = 1,
        *,
        domain: str = "",
        masked: bool = False,
        reads: Sequence[Tensor] = (),
        **attributes: Any,
    ) -> Tensor:
        """The node's first output.

        Args:
            op: Operator.
            inputs: Its inputs, None where one is left out.
            outputs: How many.
            domain: Of the operator.
            masked: Whether infinities may come out.
            reads: What the bodies among the attributes read of this and outer scopes.
            attributes: Of the node.

        Raises:
            UnfitError: the opset has no such node, onnxruntime does not run it, or what it computes is not finite.
        """
        if not domain and not onnx.defs.has(op, self.opset, ""):
            raise UnfitError
        values = [None if t is None else t.value for t in inputs]
        node = ir.node(op, values, attributes, domain=domain, name=self._node_name(op), num_outputs=outputs)
        for value in node.outputs:
            value.name = self.name("t")
        read = {t.value.name: t for t in [*inputs, *reads] if t is not None}
        arrays, step = self._run(node, read)
        for array in arrays:
            fine = array.dtype.kind != "f" or masked or np.isfinite(array).all()
            if not fine or array.size > MAX_ELEMENTS:
                raise UnfitError
        self.nodes.append(node)
        self.steps.append(step)
        self.operators.add(op)
        for name, tensor in read.items():
            if tensor.value not in self._owned:
                self.captured[str(name)] = tensor
        made = [self.own(Tensor(v, a)) for v, a in zip(node.outputs, arrays, strict=True)]
        if not reads and all(t.value in self.constant_values for t in read.values()):
            self.constant_values.update(t.value for t in made)
        else:
            self.pool += made
        return made[0]

    def _node_name(self, op: str) -> str:
        return "" if self.nameless else self.name(op.lower())

    def _run(self, node: ir.Node, read: dict[str | None, Tensor]) -> tuple[list[np.ndarray], Step]:
        graph = onnx.GraphProto(name="step", node=[ir.to_proto(node)])
        feeds = {}
        for name, tensor in read.items():
            if tensor.array.dtype.name == "bfloat16":
                graph.initializer.append(ir.to_proto(ir.Tensor(tensor.array, name=name)))
            else:
                feeds[str(name)] = tensor.array
                shapeless = ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(tensor.array.dtype)))
                graph.input.append(ir.to_proto(shapeless))
        writes = [str(v.name) for v in node.outputs]
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in writes)
        version = next(v for opsets, v in IR_VERSIONS.items() if self.opset in opsets)
        domains = [
            onnx.OperatorSetIdProto(version=self.opset),
            onnx.OperatorSetIdProto(domain="com.microsoft", version=1),
        ]
        model = onnx.ModelProto(ir_version=version, graph=graph, opset_import=domains)
        try:
            session = ort.InferenceSession(model.SerializeToString(), options(), providers=["CPUExecutionProvider"])
            arrays = session.run(None, feeds)
        except Exception as error:  # whatever onnxruntime raises
            raise UnfitError(str(error)) from error
        if not all(isinstance(a, np.ndarray) for a in arrays):
            raise UnfitError
        return arrays, Step(node, session, list(feeds), writes)

    def graph(self, outputs: Sequence[Tensor], name: str) -> ir.Graph:
        """What has been added, as a graph with these outputs."""
        for tensor in outputs:
            value = tensor.value
            value.type = ir.TensorType(ir.DataType.from_numpy(tensor.array.dtype))
            value.shape = ir.Shape([None] * tensor.rank)
        return ir.Graph(
            [t.value for t in self.inputs],
            [t.value for t in outputs],
            nodes=self.nodes,
            initializers=[t.value for t in self.initializers],
            opset_imports={"": self.opset},
            name=name,
        )
