"""What dynamic and static quantization share: which nodes are meant, and whether they became integers in the end."""

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from quantcli.errors import InputError, UsageError, first_line, nearest
from quantcli.graphs.checking.compare import Comparison
from quantcli.graphs.model.files import save_graph
from quantcli.graphs.rewrite.prepare import Prepared
from quantcli.graphs.walk.channels import NORMS, has_weight
from quantcli.graphs.walk.matrices import operator_counts

__all__ = [
    "NOT_QUANTIZED",
    "IntegerGraph",
    "captured_warnings",
    "default_types",
    "finish",
    "float_nodes",
    "full_int8",
    "kinds_of",
    "quantize_what_goes",
    "require_float32",
    "select_nodes",
]

NOT_QUANTIZED = "onnxruntime did not quantize it"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FULL_INT8 = (
    "int8 weights of full range overflow on x86 processors without VNNI: measure there, or use reduce_range or uint8"
)


@dataclass(frozen=True)
class IntegerGraph:
    """What became of a graph."""

    quantized: tuple[str, ...]
    """Nodes with weights that compute with integers now."""
    kept: tuple[str, ...]
    """Nodes with weights that were not asked for and stay float."""
    prepared: Prepared
    """What was done to the float graph beforehand."""
    notes: tuple[str, ...]
    """What onnxruntime had to say."""
    samples: int = 0
    """How many samples the ranges are from."""
    equalized: tuple[tuple[str, str], ...] = ()
    """Pairs of nodes whose channels were equalized."""
    corrected: tuple[str, ...] = ()
    """Nodes whose bias was corrected."""
    comparison: Comparison | None = None
    """Errors by node, where they were asked for."""
    nodes: Mapping[str, str] = field(default_factory=dict)
    """All nodes that onnxruntime's quantizer was given, with weights or without, and the kind of each."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why nodes that were asked for stay float; `notes` say it too."""


_PRODUCTS = ("MatMul", "Gemm", "Gather", "Conv")


def default_types(model: ir.Model, able: Collection[str]) -> tuple[str, ...]:
    """What is quantized where nobody says it: all operators that can be, in a transformer those with weights.

    A few channels of the sums between a transformer's layers are a hundred times as large as the others; one scale for
    all of them leaves nothing of those (https://arxiv.org/abs/2109.12948).
    """
    transformer = any(n.op_type in NORMS for n in model.graph.all_nodes())
    return tuple(t for t in able if t in _PRODUCTS or not transformer)


def select_nodes(
    model: ir.Model,
    able: Collection[str],
    op_types: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[ir.Node]:
    """The nodes that are to be quantized.

    Args:
        model: Graph whose nodes have names.
        able: Operators that can be quantized.
        op_types: Some of them; empty: all.
        include: Names, or regular expressions that are searched in names; empty: all.
        exclude: The same; these stay float.

    Raises:
        UsageError: an operator that cannot be quantized, or a name that no node has.
        InputError: a weight among them is not finite.
    """
    types = list(op_types) or list(able)
    for op_type in types:
        if op_type not in able:
            raise UsageError(f"{op_type} nodes cannot be quantized, {nearest(op_type, able)}")
    nodes = list(model.graph.all_nodes())
    chosen = [n for n in nodes if n.domain in ("", "com.microsoft") and n.op_type in types and _reads_floats(n)]
    names = [str(n.name) for n in chosen]
    wanted = _matching(include, names) if include else set(names)
    wanted -= _matching(exclude, [str(n.name) for n in nodes])
    if not wanted:
        raise UsageError(
            f"no node is left to quantize: the graph's operators are {operator_counts(model.graph)}; "
            f"asked for are {', '.join(types)}",
            hint="`quantcli inspect FILE.onnx --nodes` lists nodes",
        )
    found = [n for n in chosen if n.name in wanted]
    for weight in {n.inputs[1] for n in found if has_weight(n)}:
        _require_finite(weight)
    return found


def kinds_of(nodes: Sequence[ir.Node]) -> dict[str, str]:
    """What kernels tell apart, by the node's name: its operator, and for Conv whether it is pointwise or depthwise."""
    return {str(node.name): _kind(node) for node in nodes}


def _kind(node: ir.Node) -> str:
    weight = node.inputs[1] if node.op_type == "Conv" and len(node.inputs) > 1 else None
    if weight is None or weight.shape is None:
        return node.op_type
    if node.attributes.get_int("group", 1) > 1:
        return "Conv in groups"
    return "Conv 1x1" if all(size == 1 for size in list(weight.shape)[2:]) else "Conv"


def _reads_floats(node: ir.Node) -> bool:
    """Whether a node works on floats: Gather, Slice and the like work on the sizes of tensors too."""
    return any(v is not None and (v.dtype is None or v.dtype in _FLOATS) for v in node.inputs)


def require_float32(nodes: Sequence[ir.Node]) -> None:
    """Refuses graphs in float16.

    Dynamic quantization has no operators for it; with QDQ, onnxruntime makes the scale of a bias in float16 too, where
    the product of two scales is a subnormal of few bits, or 0.

    Raises:
        InputError: one of these nodes computes in float16 or bfloat16.
    """
    for node in nodes:
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
                raise InputError(
                    f"node {node.name!r} computes in {value.dtype.name.lower()}, integers are made of float32 only",
                    hint="export the graph in float32 (--precision fp32), or exclude the node with --nodes-exclude",
                )


def _require_finite(weight: ir.Value | None) -> None:
    stored = weight.const_value if weight is not None else None
    if stored is None or stored.size == 0:
        return
    # onnxruntime's quantizers make scales of 0 or infinity of it, or fail
    if not np.isfinite([bound(stored.numpy()) for bound in (np.min, np.max)]).all():
        raise InputError(
            f"weight {stored.name!r} holds NaN or infinite values",
            hint="export the model again from a sound checkpoint, or exclude the node with --nodes-exclude",
        )
    if isinstance(stored, ir.ExternalTensor):
        stored.release()


def _matching(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        if pattern in names:
            found.add(pattern)
            continue
        try:
            some = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UsageError(f"{pattern!r} is neither a node nor a regular expression: {error}") from error
        if not some:
            raise UsageError(f"no node that can be quantized is called {pattern!r}, {_few(pattern, names)}")
        found |= some
    return found


def _few(pattern: str, names: Sequence[str]) -> str:
    return (
        nearest(pattern, names) if len(names) < 20 else nearest(pattern, names).partition("known:")[0] or "see inspect"
    )


def float_nodes(model: ir.Model, asked: Collection[tuple[str, str]]) -> list[str]:
    """Of (name, operator) those that still multiply floats in a quantized graph.

    A node that is gone was replaced by one on integers; one that stays reads its inputs through DequantizeLinear.
    """
    return [
        str(node.name)
        for node in model.graph.all_nodes()
        if (str(node.name), node.op_type) in asked and not all(_from_integers(v) for v in node.inputs[:2])
    ]


def _from_integers(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def finish(model: ir.Model, target: Path) -> None:
    """Writes a quantized graph without what nothing reads.

    Args:
        model: What onnxruntime's quantizer wrote; changed in place.
        target: File to write.
    """
    passes.RemoveUnusedNodesPass()(model)
    _part_names(model.graph)
    save_graph(model, target)


def _part_names(graph: ir.Graph) -> None:
    """Gives nodes of the same name different ones: onnxruntime writes the same for all that round one tensor."""
    names = {str(node.name) for node in graph.all_nodes()}
    seen: set[str] = set()
    for node in graph.all_nodes():
        base, number = str(node.name), 1
        while node.name in seen:
            number += 1
            name = f"{base}_{number}"
            if name not in names:
                node.name = name
        seen.add(str(node.name))


def full_int8(model: ir.Model, reduced: bool) -> list[str]:
    """What is to be said where weights have all of int8, which per_channel makes of Conv in operators on integers.

    Args:
        model: Quantized graph.
        reduced: Whether one bit was left.
    """
    kernels = [v for v in model.graph.initializers.values() if v.dtype is ir.DataType.INT8]
    return [_FULL_INT8] if not reduced and any(v.shape is not None and len(v.shape) > 1 for v in kernels) else []


def quantize_what_goes(
    run: Callable[[Path, Path, Collection[str]], None], source: Path, made: Path, names: Collection[str]
) -> dict[str, str]:
    """Quantizes a graph file but for nodes at which onnxruntime's quantizer fails; why those stay float, by name.

    Raises:
        InputError: it fails although it does at no single node.
    """
    failing: dict[str, str] = {}
    try:
        run(source, made, names)
        return failing
    except (InputError, UsageError):
        raise
    except Exception as error:  # onnxruntime's quantizers raise what Python does
        reason = first_line(error)
    waiting = [sorted(names)] if len(names) == 1 else _halves(sorted(names))
    while waiting:
        some = waiting.pop()
        try:
            run(source, made, some)
        except Exception as error:
            if len(some) > 1:
                waiting += _halves(some)
            else:
                failing[some[0]] = f"onnxruntime's quantizer fails: {first_line(error)}"
    left = [name for name in names if name not in failing]
    if not failing or not left:
        raise InputError(f"onnxruntime's quantizer fails at {', '.join(sorted(names)[:3])}: {reason}",
                         hint="exclude nodes with nodes_exclude")  # fmt: skip
    return failing | quantize_what_goes(run, source, made, left)


def _halves(names: list[str]) -> list[list[str]]:
    return [names[: len(names) // 2], names[len(names) // 2 :]]


@contextmanager
def captured_warnings() -> Iterator[list[str]]:
    """Collects what onnxruntime's quantizers write to the root logger, once each."""
    found: list[str] = []

    class _Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (text := record.getMessage()) not in found:
                found.append(text)

    root = logging.getLogger()
    before = root.handlers
    root.handlers = [_Collect(logging.WARNING)]
    try:
        yield found
    finally:
        root.handlers = before
