"""Finds the matrices of an ONNX graph that can be quantized: products' weights, Gather's tables, Conv's kernels.

Whatever way a graph stores a matrix (as [K, N], as [N, K] behind a Transpose or a Gemm with transB, in a Constant node,
once for several nodes), a target is one [N, K] matrix that is quantized once, along the columns that are summed over;
a kernel [N, C, ...] has one row per output channel.
What stays float is named with the reason: nothing is skipped in silence.

Symbols: N output rows, K input columns.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass, RemoveInitializersFromInputsPass

from quantcli.errors import InputError, first_line
from quantcli.graphs.rewrite.fold_weights import FoldedWeight, fold_weights, lift_body_weights
from quantcli.options import GRAPH_OP_TYPES

__all__ = [
    "FLOATS",
    "GraphTarget",
    "Selection",
    "WeightUse",
    "find_targets",
    "operator_counts",
    "other_matrix",
    "prepare",
    "read_matrix",
    "refuse_quantized",
    "stored_weight",
    "weight_uses",
]

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""Types of weights that can be quantized."""
# parts of names that say nothing about a matrix: exporters' numbers, and the operators that read it
_NAMELESS = re.compile(
    r"(onnx::|node_|_)?(weight|kernel|val|MatMul|Gemm|Gather|Conv|Transpose|Constant)?(_?\d+)*(_quantized)?", re.I
)
_MOST_NAMED = 8
_LOWEST_OPSET = 7  # numpy-style broadcasting of Add and Gemm
_WHOLE = "export the model again from a sound checkpoint, or exclude the node with --nodes-exclude"
_QUANTIZED = (
    *("MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "DequantizeLinear", "QLinearMatMul", "MatMulInteger"),
    *("QLinearConv", "ConvInteger", "QGemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM"),
)


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
    stack: tuple[int, ...] = ()
    """Leading axes of an initializer [..., K, N], whose matrices are one below the other."""
    inside: frozenset[ir.Node] = frozenset()
    """Nodes of bodies of If, Loop and Scan among them."""

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
        """Names of the main graph's tensors whose columns it is multiplied with, each once.

        None for a mere table or a kernel, or what is read in bodies alone. Each matrix of a stack sees its own columns,
        which no tensor has together.
        """
        nodes = [u.node for u in self.uses if u.node.op_type in ("MatMul", "Gemm") and u.node not in self.inside]
        found = [] if self.stack else [node.inputs[0] for node in nodes]
        return tuple(dict.fromkeys(str(v.name) for v in found if v is not None))

    @property
    def unseen(self) -> str:
        """Why it has no `inputs`."""
        if self.stack:
            return "it is a stack of matrices"
        return f"{next(iter(self.inside)).name!r} reads it in a body" if self.inside else "it is a table or a kernel"

    def as_stored(self, matrix: np.ndarray) -> np.ndarray:
        """[N, C] in the order of the initializer's axes, C in the place of K; kernels stay as they are."""
        return matrix.reshape(*self.stack, -1, matrix.shape[1]).swapaxes(-1, -2) if self.transposed else matrix

    def as_matrix(self, array: np.ndarray) -> np.ndarray:
        """The initializer as [N, K]."""
        return (array.swapaxes(-1, -2) if self.transposed else array).reshape(self.rows, self.columns)


@dataclass(frozen=True)
class Selection:
    """Which nodes may be quantized."""

    op_types: tuple[str, ...] = ("MatMul", "Gemm")
    """Operators."""
    include: tuple[str, ...] = ()
    """Names or regular expressions of nodes; empty for all."""
    exclude: tuple[str, ...] = ()
    """Names or regular expressions of nodes that stay float."""
    stacks: bool = False
    """Whether matrices of more than two axes are quantized: DequantizeLinear alone holds them."""
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


def prepare(model: ir.Model) -> list[str]:
    """Makes every weight an initializer of the main graph.

    Functions are inlined, Constant nodes lifted, initializers are no inputs any more (old files list them there), those
    of bodies move to the main graph, and weights behind a Cast, a Reshape and the like become what they compute.

    Returns:
        What is to be said: weights that were stored as codes.

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
    lift_body_weights(model)
    refuse_quantized(model)
    codes = [str(folded.name) for folded in fold_weights(model) if folded.requantized]
    return [f"{name} is stored as codes, with a DequantizeLinear: it is quantized a second time" for name in codes]


def refuse_quantized(model: ir.Model) -> None:
    """Refuses a graph whose products are computed from codes.

    Raises:
        InputError: naming the first node that is.
    """
    found = next((n for n in model.graph.all_nodes() if n.op_type in _QUANTIZED and not _is_stored(n)), None)
    if found is not None:
        raise InputError(
            f"the graph is quantized already: node {found.name!r} is a {found.op_type}", hint="give the float graph"
        )


def _is_stored(node: ir.Node) -> bool:
    """Whether a DequantizeLinear gives a stored weight, which is a weight as others."""
    stored = node.inputs[0] if node.op_type == "DequantizeLinear" else None
    return stored is not None and ir.convenience.get_const_tensor(stored) is not None


def find_targets(graph: ir.Graph, selection: Selection) -> tuple[list[GraphTarget], dict[str, str]]:
    """The matrices to quantize, in the order in which the graph first reads them.

    Returns:
        The targets, and the reason for each matrix of a MatMul, Gemm or Gather that stays float, by its initializer.
    """
    targets: dict[str, GraphTarget] = {}
    kept: dict[str, str] = {}
    last = set() if selection.last_product else _last_products(graph)
    for node in graph.all_nodes():
        if node.op_type not in GRAPH_OP_TYPES or node.domain not in ("", "ai.onnx"):
            continue
        for value in map(stored_weight, node.inputs[:2]):
            if value is None or value.const_value is None or str(value.name) in targets or str(value.name) in kept:
                continue
            if value.const_value.dtype not in (*FLOATS, ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
                continue  # indexes and shapes
            found = _target(graph, value, selection, last)
            if isinstance(found, GraphTarget) and isinstance(value.const_value, FoldedWeight):
                found = _beside_its_source(graph, value.const_value, selection, last) or found
            if isinstance(found, GraphTarget):
                targets[found.name] = found
            else:
                kept[str(value.name)] = found
    return list(targets.values()), kept


def operator_counts(graph: ir.Graph) -> str:
    """Its operators and how many of each, the most frequent first."""
    counts = Counter(node.op_type for node in graph.all_nodes())
    most = [f"{count} {name}" for name, count in counts.most_common(_MOST_NAMED)]
    return ", ".join(most) + (f" and {len(counts) - _MOST_NAMED} other operators" if len(counts) > _MOST_NAMED else "")


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
        values = np.array(target.as_matrix(array), np.float32, order="C")
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
        array = target.as_stored(matrix).reshape(shape.numpy()).astype(dtype.numpy())
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
    rank = len(stored.shape)
    stacked = rank > 2 and all(use.node.op_type == "MatMul" for use in uses)
    if stacked and not selection.stacks:
        return f"it has {rank} axes, which MatMulNBits has not: --encoding qdq quantizes it"
    if not stacked and not all(kernels) and rank != 2:
        return f"it has {rank} {'axis' if rank == 1 else 'axes'}, a matrix has 2"
    if len({u.rows_first for u in uses}) > 1:
        return "it is multiplied as it is and transposed"
    for use in uses:
        refusal = "a last product" if use.node in last else selection.refusal(use.node)
        if refusal is not None:
            return refusal
    shape = [int(n) for n in stored.shape.numpy()]
    if not math.prod(shape):
        return "it is empty"
    transposed, stack = not uses[0].rows_first, tuple(shape[:-2]) if stacked else ()
    columns = shape[-2] if transposed else math.prod(shape[1:])
    inside = frozenset(use.node for use in uses if use.node.graph is not graph)
    return GraphTarget(str(value.name), math.prod(shape) // columns, columns, transposed, tuple(uses), stack, inside)


def _beside_its_source(graph: ir.Graph, folded: FoldedWeight, selection: Selection, last: set[ir.Node]) -> str | None:
    """Why codes would only add to a file: others read the stored values as they are, and those stay float."""
    for value in graph.initializers.values():
        if value.const_value is folded.source:
            found = _target(graph, value, selection, last)
            return f"{value.name!r}, which it is made of, stays: {found}" if isinstance(found, str) else None
    return None


def _last_products(graph: ir.Graph) -> set[ir.Node]:
    """Products with a weight from whose output no other one is reached."""
    followed: set[ir.Node] = set()
    last: set[ir.Node] = set()
    owners = {body: node for node in graph.all_nodes() for body in _bodies(node)}

    def readers(node: ir.Node) -> set[ir.Node]:
        found = {reader for output in node.outputs for reader, _ in output.uses()}
        leaves = any(output.is_graph_output() for output in node.outputs)
        owner = owners.get(node.graph) if leaves and isinstance(node.graph, ir.Graph) else None
        return found | readers(owner) if owner is not None else found

    for node in reversed(list(graph.all_nodes())):
        if any(reader in followed or _is_product(reader) for reader in readers(node)):
            followed.add(node)
        elif _is_product(node):
            last.add(node)
    return last


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type is ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


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
