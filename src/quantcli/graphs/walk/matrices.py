"""Finds the matrices of an ONNX graph that can be quantized: products' weights, Gather's tables, Conv's kernels.

Whatever way a graph stores a matrix (as [K, N], as [N, K] behind a Transpose or a Gemm with transB, in a Constant node,
once for several nodes), a target is one [N, K] matrix that is quantized once, along the columns that are summed over;
a kernel [N, C, ...] has one row per output channel.
What stays float is named with the reason: nothing is skipped in silence.

Symbols: N output rows, K input columns.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass, RemoveInitializersFromInputsPass

from quantcli.errors import InputError, first_line
from quantcli.options import GRAPH_OP_TYPES

__all__ = [
    "FLOATS",
    "GraphTarget",
    "Selection",
    "WeightUse",
    "find_targets",
    "other_matrix",
    "prepare",
    "read_matrix",
    "stored_weight",
    "weight_uses",
]

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""Types of weights that can be quantized."""
# parts of names that say nothing about a matrix: exporters' numbers, and the operators that read it
_NAMELESS = re.compile(
    r"(onnx::|node_|_)?(weight|kernel|val|MatMul|Gemm|Gather|Conv|Transpose|Constant)?(_?\d+)*(_quantized)?", re.I
)
_LOWEST_OPSET = 7  # numpy-style broadcasting of Add and Gemm
_WHOLE = "export the model again from a sound checkpoint, or exclude the node with --nodes-exclude"
_QUANTIZED = ("MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "DequantizeLinear", "QLinearMatMul", "MatMulInteger")


@dataclass(frozen=True)
class WeightUse:
    """One node that reads a matrix."""

    node: ir.Node
    """MatMul, Gemm, Gather or Conv."""
    rows_first: bool
    """Whether the initializer is [N, K] as this node reads it; [K, N] otherwise."""


@dataclass(frozen=True)
class GraphTarget:
    """One matrix that can be quantized."""

    name: str
    """Its initializer."""
    rows: int
    """N: outputs of a product, entries of a table."""
    columns: int
    """K: what a product sums over, width of a table."""
    transposed: bool
    """Whether the initializer is [K, N]."""
    uses: tuple[WeightUse, ...]
    """Its nodes."""

    @property
    def kind(self) -> str:
        """What it is called in every block, for tables: `q_proj` of `model.layers.0.attn.q_proj.MatMul.weight`."""
        for name in (self.name, self.uses[0].node.name or ""):
            parts = [p for p in re.split(r"[./]", name) if p and not _NAMELESS.fullmatch(p)]
            if parts:
                return parts[-1]
        return self.uses[0].node.op_type

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors whose columns it is multiplied with, each once; none for a mere table or a kernel."""
        found = [u.node.inputs[0] for u in self.uses if u.node.op_type in ("MatMul", "Gemm")]
        return tuple(dict.fromkeys(str(v.name) for v in found if v is not None))


@dataclass(frozen=True)
class Selection:
    """Which nodes may be quantized."""

    op_types: tuple[str, ...] = ("MatMul", "Gemm")
    """Operators."""
    include: tuple[str, ...] = ()
    """Names or regular expressions of nodes; empty for all."""
    exclude: tuple[str, ...] = ()
    """Names or regular expressions of nodes that stay float."""
    last_product: bool = True
    """Whether products with no other product behind them (a language model's head) are quantized."""

    def refusal(self, node: ir.Node) -> str | None:
        """Why a node stays float; None where it may be quantized."""
        if node.op_type not in self.op_types:
            return f"{node.op_type} is not among the operators to quantize"
        if self.include and not _matches(self.include, node):
            return "not among the included nodes"
        if _matches(self.exclude, node):
            return "excluded"
        return None


def prepare(model: ir.Model) -> None:
    """Makes every weight an initializer of the main graph.

    Functions are inlined, Constant nodes lifted, and initializers are no inputs any more (old files list them there).

    Raises:
        InputError: the opset is too old, or the graph is quantized already.
    """
    graph = model.graph
    opset = graph.opset_imports.get("", _LOWEST_OPSET)
    if opset < _LOWEST_OPSET:
        raise InputError(f"the graph has opset {opset}, {_LOWEST_OPSET} or later is needed", hint="export it once more")
    if model.functions:
        InlinePass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=False)(model)
    RemoveInitializersFromInputsPass()(model)
    found = next((n for n in graph.all_nodes() if n.op_type in _QUANTIZED), None)
    if found is not None:
        raise InputError(
            f"the graph is quantized already: node {found.name!r} is a {found.op_type}", hint="give the float graph"
        )


def find_targets(graph: ir.Graph, selection: Selection) -> tuple[list[GraphTarget], dict[str, str]]:
    """The matrices to quantize, in the order in which the graph first reads them.

    Returns:
        The targets, and the reason for each matrix of a MatMul, Gemm or Gather that stays float, by its initializer.
    """
    targets: dict[str, GraphTarget] = {}
    kept: dict[str, str] = {}
    last = set() if selection.last_product else _last_products(graph)
    for node in graph:
        if node.op_type not in GRAPH_OP_TYPES:
            continue
        for value in map(stored_weight, node.inputs[:2]):
            if value is None or value.const_value is None or str(value.name) in targets or str(value.name) in kept:
                continue
            if value.const_value.dtype not in (*FLOATS, ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
                continue  # indexes and shapes
            found = _target(graph, value, selection, last)
            if isinstance(found, GraphTarget):
                targets[found.name] = found
            else:
                kept[str(value.name)] = found
    return list(targets.values()), kept


def weight_uses(value: ir.Value) -> list[WeightUse] | str:
    """The nodes that read an initializer as a matrix, or why one of them has no quantized form."""
    found: list[WeightUse] = []
    for node, index in value.uses():
        if node.op_type == "Transpose" and _swaps(node):
            behind = weight_uses(node.outputs[0])
            if isinstance(behind, str):
                return behind
            if node.outputs[0].is_graph_output() or any(u.node.op_type == "Gather" for u in behind):
                return "its transpose is read as a whole"
            found += [WeightUse(u.node, not u.rows_first) for u in behind]
        elif node.op_type == "MatMul" and index == 1:
            found.append(WeightUse(node, False))
        elif node.op_type == "Gemm" and index == 1:
            if _integer(node, "transA", 0):
                return f"the Gemm {node.name!r} transposes its input"
            found.append(WeightUse(node, bool(_integer(node, "transB", 0))))
        elif (node.op_type, index) == ("Conv", 1) or _is_lookup(node, index):
            found.append(WeightUse(node, True))
        else:
            return f"input {index} of the {node.op_type} {node.name!r} has no quantized form"
    return found


def read_matrix(graph: ir.Graph, target: GraphTarget) -> np.ndarray:
    """W [N, K] float32.

    Raises:
        InputError: it holds NaN or infinity, or its data cannot be read.
    """
    stored = graph.initializers[target.name].const_value
    assert stored is not None
    try:
        array = stored.numpy()
        array = array.T if target.transposed else array.reshape(target.rows, target.columns)
        values = np.array(array, np.float32, order="C")
        del array
    except (OSError, ValueError) as error:
        raise InputError(f"weight {target.name!r} cannot be read: {first_line(error)}", _WHOLE) from error
    if isinstance(stored, ir.ExternalTensor):
        stored.release()  # else the pages of every matrix that was read stay in memory
    if not np.isfinite([values.min(), values.max()]).all():  # NaN propagates through both
        raise InputError(f"weight {target.name!r} holds NaN or infinite values", _WHOLE)
    return values


def other_matrix(graph: ir.Graph, target: GraphTarget, make: Callable[[], np.ndarray]) -> ir.LazyTensor:
    """Other values for a matrix: W [N, K] float32, made when they are asked for, in the form that the graph stores."""
    stored = graph.initializers[target.name].const_value
    assert stored is not None
    dtype, shape = stored.dtype, ir.Shape(stored.shape.numpy())

    def read() -> ir.TensorProtocol:
        matrix = make()
        turned = matrix.T if target.transposed else matrix
        array = turned.reshape(shape.numpy()).astype(dtype.numpy())
        return ir.Tensor(np.ascontiguousarray(array), name=target.name)

    return ir.LazyTensor(read, dtype, shape, name=target.name)


def _target(graph: ir.Graph, value: ir.Value, selection: Selection, last: set[ir.Node]) -> GraphTarget | str:
    stored = value.const_value
    assert stored is not None
    if stored.dtype not in FLOATS:
        return f"its type {stored.dtype} is neither float32 nor float16"
    if value.is_graph_output():
        return "it is an output of the graph"
    uses = weight_uses(value)
    if isinstance(uses, str):
        return uses
    kernels = [use.node.op_type == "Conv" for use in uses]
    if not all(kernels) and len(stored.shape) != 2:
        return f"it has {len(stored.shape)} axes, a matrix has 2"
    if len({u.rows_first for u in uses}) > 1:
        return "it is multiplied as it is and transposed"
    for use in uses:
        if use.node.graph is not graph:
            return f"it is read in a subgraph, by {use.node.name!r}"
        refusal = "a last product" if use.node in last else selection.refusal(use.node)
        if refusal is not None:
            return refusal
    first, *rest = (int(n) for n in stored.shape.numpy())
    second = math.prod(rest)
    transposed = not uses[0].rows_first
    rows, columns = (second, first) if transposed else (first, second)
    if not rows or not columns:
        return "it is empty"
    return GraphTarget(str(value.name), rows, columns, transposed, tuple(uses))


def _last_products(graph: ir.Graph) -> set[ir.Node]:
    """Products with a weight from whose output no other one is reached."""
    followed: set[ir.Node] = set()
    last: set[ir.Node] = set()
    for node in reversed(graph):
        readers = {reader for output in node.outputs for reader, _ in output.uses()}
        product = _is_product(node)
        if any(reader in followed or _is_product(reader) for reader in readers):
            followed.add(node)
        elif product:
            last.add(node)
    return last


def _is_product(node: ir.Node) -> bool:
    return node.op_type in ("MatMul", "Gemm") and stored_weight(node.inputs[1]) is not None


def stored_weight(value: ir.Value | None) -> ir.Value | None:
    """The initializer that a value is, or is the transpose of."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose" and _swaps(producer):
        value = producer.inputs[0]
    return value if value is not None and value.is_initializer() and value.const_value is not None else None


def _is_lookup(node: ir.Node, index: int) -> bool:
    return node.op_type == "Gather" and index == 0 and _integer(node, "axis", 0) == 0


def _swaps(node: ir.Node) -> bool:
    source = node.inputs[0]
    if source is None or source.const_value is None or len(source.const_value.shape) != 2:
        return False
    perm = node.attributes.get("perm")
    return perm is None or (perm.type == ir.AttributeType.INTS and list(perm.as_ints()) == [1, 0])


def _integer(node: ir.Node, name: str, default: int) -> int:
    try:
        return int(node.attributes[name].as_int()) if name in node.attributes else default
    except TypeError as error:
        raise InputError(f"attribute {name!r} of node {node.name!r} is no whole number") from error


def _matches(patterns: Sequence[str], node: ir.Node) -> bool:
    name = node.name or ""
    return any(name == pattern or re.search(pattern, name) for pattern in patterns)
