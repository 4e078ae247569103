"""What a float graph needs before integers can go in, each step done or refused, never skipped in silence.

Weights that sit in Constant nodes become initializers, Identity nodes go, nodes without a name get one, older graphs
are converted to the opset that the integers need, batch norms are taken into the linear node in front, and every tensor
gets its element type. What stays as it was is said in `Prepared`.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from quantcli.errors import InputError, first_line
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.model.opset import Conversion, convert_opset, prove_conversion, raise_ir_version, with_known_opset
from quantcli.graphs.rewrite.fold_weights import fold_weights
from quantcli.graphs.rewrite.gemms import normalize_gemms

__all__ = ["LOWEST_OPSET", "Prepared", "fold_batch_norms", "infer_types", "name_nodes", "prepare"]

LOWEST_OPSET = 13
"""DequantizeLinear has one scale per channel from here on."""
# onnxruntime's quantizers look for this key, and ask for preparation where it is missing
_MARK = ("onnx.quant.pre_process", "onnxruntime.quant")


@dataclass(frozen=True)
class Prepared:
    """What was done to a graph."""

    conversion: Conversion | None
    """To a later opset; None where the source's own is late enough."""
    lifted: int
    """Constant nodes that became initializers."""
    folded: int
    """Batch norms that were taken into the node in front."""
    left: tuple[str, ...]
    """Batch norms that stay, each with the reason."""
    untyped: tuple[str, ...]
    """Values whose type no inference finds; nodes that use them stay float."""


def prepare(source: Path, target: Path, *, opset: int = LOWEST_OPSET) -> Prepared:
    """Writes the graph that quantizers start from; the source stays as it is.

    Args:
        source: Graph file.
        target: File to write, with `target`.data beside it.
        opset: Lowest opset that the result may have; a higher one stays.

    Raises:
        InputError: no graph, data outside its folder, an opset that cannot be converted, or types that contradict.
    """
    model = open_graph(source)
    before = model.opset_imports.get("")
    if before is None or before < 1:
        raise InputError(f"{source} says no opset of the standard's operators", hint="export it once more")
    model, oldest = with_known_opset(model, opset)
    passes.InlinePass()(model)
    constants = _count_constants(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    lifted = constants - _count_constants(model)
    passes.RemoveInitializersFromInputsPass()(model)
    drop_identities(model)
    passes.DeduplicateInitializersPass()(model)
    if not any(n.op_type == "QuantizeLinear" for n in model.graph.all_nodes()):  # else it is quantized already
        fold_weights(model, transposes=True)
    conversion = None
    if before < opset:
        older, model = oldest or model, model if oldest else convert_opset(model, opset)
        conversion = prove_conversion(older, model, source.parent)
        # axes and shapes that were attributes before
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    raise_ir_version(model)
    name_nodes(model)
    normalize_gemms(model)
    folded, left = fold_batch_norms(model)
    name_nodes(model)
    name_values(model)
    passes.RemoveUnusedNodesPass()(model)
    model.metadata_props[_MARK[0]] = _MARK[1]
    save_graph(model, target)
    untyped = infer_types(target)
    return Prepared(conversion, lifted, folded, tuple(left), tuple(untyped))


def infer_types(path: Path) -> list[str]:
    """Writes types and shapes of all values into a graph file whose weights stand beside it; the names left without."""
    proto = onnx.load(str(path), load_external_data=False)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # onnx raises InferenceError, which has no public name
        raise InputError(f"types and shapes of {path.name} contradict: {first_line(error)}") from error
    # types of weights are their own: one that onnxruntime's quantizers replace must not contradict an entry here
    weights = {t.name for t in inferred.graph.initializer}
    kept = [v for v in inferred.graph.value_info if v.name not in weights]
    del inferred.graph.value_info[:]
    inferred.graph.value_info.extend(kept)
    onnx.save(inferred, str(path))
    model = ir.load(path)
    return [v.name for n in model.graph.all_nodes() for v in n.outputs if v.name and v.dtype is None]


def _count_constants(model: ir.Model) -> int:
    return sum(n.op_type == "Constant" and n.domain == "" for n in model.graph.all_nodes())


def drop_identities(model: ir.Model) -> None:
    """Removes Identity nodes, in place, but those that make an input, a constant or an outer value an output."""
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Identity" or node.domain or node.inputs[0] is None:
            continue
        x, y = node.inputs[0], node.outputs[0]
        if y.is_graph_output():
            if x.producer() is None or x.graph is not node.graph or x.is_graph_output():
                continue
            y.replace_all_uses_with(x, replace_graph_outputs=True)
            name, x.name = y.name, None
            x.name = name
        else:
            y.replace_all_uses_with(x)
        x.type, x.shape = x.type or y.type, x.shape or y.shape
        assert isinstance(node.graph, ir.Graph)
        node.graph.remove(node, safe=True)


def name_values(model: ir.Model) -> None:
    """Gives values of bodies names that no other graph of the model has."""
    graphs = [model.graph, *model.graph.subgraphs()]
    taken: set[str] = set()
    for graph in graphs:
        for value in (*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)):
            stem, count = value.name, 0
            if not stem or (value.is_initializer() and value.is_graph_input() and stem in taken):
                continue
            while value.name in taken:
                count += 1
                value.name = f"{stem}.{count}"
            taken.add(str(value.name))


def name_nodes(model: ir.Model) -> None:
    """Gives every node a name of its own, in bodies too: quantizers choose nodes by name."""
    nodes = [*model.graph, *(n for graph in model.graph.subgraphs() for n in graph)]
    taken = Counter(n.name for n in nodes if n.name)
    for index, node in enumerate(nodes):
        if node.name and taken[node.name] == 1:
            continue
        base = node.name or node.op_type
        taken[node.name or ""] -= 1
        name, count = f"{base}_{index}", 0
        while name in taken:
            count += 1
            name = f"{base}_{index}_{count}"
        node.name = name
        taken[name] = 1


def fold_batch_norms(model: ir.Model) -> tuple[int, list[str]]:
    """Takes batch norms into the Conv, ConvTranspose or Gemm in front, in place; the function stays.

    y = (x - mean) * s + beta with s = gamma / sqrt(var + eps) is W' = W * s and b' = (b - mean) * s + beta of the
    output channels (https://arxiv.org/abs/1712.05877, section 3.2).

    Returns:
        How many were folded, and those that stay with the reason.
    """
    folded, left = 0, []
    for norm in list(model.graph.all_nodes()):
        if norm.op_type != "BatchNormalization" or norm.domain:
            continue
        reason = _why_not(norm)
        if reason:
            left.append(f"{norm.name or norm.outputs[0].name}: {reason}")
            continue
        assert isinstance(norm.graph, ir.Graph)
        _fold(norm.graph, norm)
        folded += 1
    return folded, left


def _constants(values: tuple[ir.Value | None, ...]) -> Iterator[np.ndarray | None]:
    for value in values:
        constant = value is not None and value.is_initializer() and value.const_value is not None
        yield value.const_value.numpy() if constant else None  # type: ignore[union-attr]


def _why_not(norm: ir.Node) -> str | None:
    """Why a batch norm cannot be folded; None where it can."""
    x = norm.inputs[0]
    before = x.producer() if x is not None else None
    if before is None or before.domain or before.op_type not in ("Conv", "ConvTranspose", "Gemm"):
        return f"follows {'an input' if before is None else before.op_type}, not Conv, ConvTranspose or Gemm"
    if x is None or len(x.uses()) != 1 or x.is_graph_output() or before.graph is not norm.graph:
        return f"other nodes use the output of {before.name or before.op_type} too"
    if norm.attributes.get_int("training_mode", 0) or sum(bool(o.uses()) for o in norm.outputs) > 1:
        return "it is in training mode"
    if any(a is None for a in _constants(tuple(norm.inputs[1:]))):
        return "its parameters are not constant"
    if any(a is None for a in _constants(tuple(v for v in before.inputs[1:] if v is not None))):
        return f"the weights of {before.name or before.op_type} are not constant"
    if before.op_type == "ConvTranspose" and before.attributes.get_int("group", 1) != 1:
        return "ConvTranspose in groups"
    return None


def _fold(graph: ir.Graph, norm: ir.Node) -> None:
    x = norm.inputs[0]
    before = x.producer() if x is not None else None
    assert before is not None
    gamma, beta, mean, var = (a.astype(np.float64) for a in _constants(tuple(norm.inputs[1:5])) if a is not None)
    scale = gamma / np.sqrt(var + norm.attributes.get_float("epsilon", 1e-5))
    weight, *rest = _constants(tuple(before.inputs[1:]))
    assert weight is not None
    bias = rest[0].astype(np.float64) if rest and rest[0] is not None else np.zeros_like(mean)
    axis = 0 if before.op_type == "Conv" else 1
    if before.op_type == "Gemm":
        axis = 0 if before.attributes.get_int("transB", 0) else 1
    along = [1] * weight.ndim
    along[axis] = -1
    name = norm.outputs[0].name
    new_weight = (weight.astype(np.float64) * scale.reshape(along)).astype(weight.dtype)
    new_bias = ((bias - mean) * scale + beta).astype(weight.dtype)
    before.resize_inputs(3)
    for place, array, suffix in ((1, new_weight, "weight"), (2, new_bias, "bias")):
        # new tensors: another node may use the old ones
        value = ir.Value(name=f"{name}.folded_{suffix}", const_value=ir.Tensor(array, name=f"{name}.folded_{suffix}"))
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        graph.register_initializer(value)
        before.replace_input_with(place, value)
    output = before.outputs[0]
    norm.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    output.name = name
