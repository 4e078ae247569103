"""Keeps large weights away from onnxruntime's quantizers, which held 3 GiB of them three times over.

In a weight's place they get its smallest and its largest value of every output channel, of which they make the very
scales and zero points that the weight itself gives. Its codes are computed afterwards, one weight at a time, while the
file is written.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.walk.channels import has_weight, weight_rows

__all__ = ["unshare_constants", "with_stand_ins"]

_SUFFIXES = ("_quantized", "_scale", "_zero_point")
"""What onnxruntime puts behind a weight's name."""


def with_stand_ins(
    source: Path,
    made: Path,
    names: Collection[str],
    run: Callable[[Path, Path], None],
    spans: Mapping[str, np.ndarray] | None = None,
    *,
    batches_alike: bool = False,
    large_bytes: int = 1 << 20,
) -> None:
    """Quantizes a graph file without its large weights, then puts their codes in.

    Weights of three axes and more are kept away as well, whatever their size: their channels are those of a matrix.

    Args:
        source: Float graph file.
        made: File to write, with `made`.data beside it.
        names: Nodes that are quantized.
        run: onnxruntime's quantizer, from a graph file to another.
        spans: How far the grids of weights have to reach at least, [output channels] by node.
        batches_alike: Whether weights of three axes and more have one scale whatever matrices have: onnxruntime fuses
            DequantizeLinear and MatMul to an operator that does not take theirs.
        large_bytes: Float weights of more are replaced.
    """
    model = open_graph(source)
    parted = unshare_constants(model, names)
    found = _replaceable(model, names, spans or {}, large_bytes)
    if not parted and not found:
        return run(source, made)
    kept = []
    for value, (rows, span) in found.items():
        assert value.const_value is not None
        kept.append((value.const_value, rows))
        value.const_value = _stand_in(value.const_value, rows, span, batches_alike)
        value.shape = ir.Shape(value.const_value.shape.numpy())
    with TemporaryDirectory(dir=made.parent, prefix=".bare-") as name:
        bare, small = Path(name) / "bare.onnx", Path(name) / "small.onnx"
        save_graph(model, bare)
        run(bare, small)
        result = ir.load(small)
        for weight, rows in kept:
            _fill(result.graph, weight, rows, batches_alike)
        save_graph(result, made)


def unshare_constants(model: ir.Model, names: Collection[str]) -> bool:
    """Gives these nodes constants of their own where others use the same otherwise, in place; whether any had to be.

    onnxruntime's quantizers keep one grid for each constant: that of the first node that they meet.
    """
    parted = False
    for value in list(model.graph.initializers.values()):
        uses: dict[tuple[str, object], list[tuple[ir.Node, int]]] = {}
        for user, place in value.uses():
            if user.name in names:
                uses.setdefault(_use(user, place), []).append((user, place))
        alone = sum(map(len, uses.values())) == len(value.uses()) and not value.is_graph_output()
        kept = next(iter(uses), None) if alone else ("tensor", 0)
        for kind, users in uses.items():
            if kind != kept:
                parted = True
                new = _copied(model.graph, value, users[0][0])
                for user, place in users:
                    user.replace_input_with(place, new)
    return parted


def _use(node: ir.Node, place: int) -> tuple[str, object]:
    """What a constant is to a node, with the axis of its channels, or the node whose scales a bias has."""
    if has_weight(node) and place == 2:
        return "bias", node
    return ("weight", weight_rows(node)) if has_weight(node) and place == 1 else ("tensor", 0)


def _copied(graph: ir.Graph, value: ir.Value, node: ir.Node) -> ir.Value:
    stem, stored = f"{value.name}.{node.name}", value.const_value
    name, count = stem, 0
    while name in graph.initializers:
        name, count = f"{stem}.{count}", count + 1
    assert stored is not None
    # not the tensor itself, which has one name
    tensor = ir.LazyTensor(lambda: stored, dtype=stored.dtype, shape=ir.Shape(stored.shape.numpy()), name=name)
    new = ir.Value(name=name, type=value.type, shape=value.shape, const_value=tensor)
    graph.register_initializer(new)
    return new


def _replaceable(
    model: ir.Model, names: Collection[str], spans: Mapping[str, np.ndarray], large_bytes: int
) -> dict[ir.Value, tuple[int, np.ndarray | None]]:
    """Float32 weights that only such nodes read, all with the same axis of output channels; that axis, and the span."""
    found: dict[ir.Value, tuple[int, np.ndarray | None]] = {}
    for node in model.graph:
        weight = node.inputs[1] if has_weight(node) and node.name in names else None
        if weight is None or weight.const_value is None or weight.dtype is not ir.DataType.FLOAT:
            continue
        stored, rows = weight.const_value, weight_rows(node)
        batched = node.op_type == "MatMul" and len(stored.shape) > 2
        needed = batched or node.name in spans
        if not needed and (stored.nbytes <= large_bytes or node.op_type == "ConvTranspose"):
            continue
        if len(stored.shape) < 2 or stored.size == 0:
            continue
        fits = (user.name in names and has_weight(user) and place == 1 for user, place in weight.uses())
        if not all(fits) or any(weight_rows(user) != rows for user, _ in weight.uses()) or weight.is_graph_output():
            continue
        span = spans.get(str(node.name))
        before = found.get(weight, (rows, None))[1]
        found[weight] = rows, before if span is None else span if before is None else np.maximum(span, before)
    return found


def _stand_in(weight: ir.TensorProtocol, rows: int, span: np.ndarray | None, alike: bool) -> ir.TensorProtocol:
    """[N, 2, 1, ...] or [2, N]: the extremes of each output channel."""
    array = weight.numpy()
    others = tuple(axis for axis in range(array.ndim) if axis != rows)
    low, high = array.min(others), array.max(others)
    if span is not None:
        low, high = np.minimum(low, -span).astype(array.dtype), np.maximum(high, span).astype(array.dtype)
    del array
    _release(weight)
    if rows > 1:
        if alike:
            low, high = np.full_like(low, low.min()), np.full_like(high, high.max())
        return ir.Tensor(np.stack([low, high]), name=weight.name)
    extremes = np.stack([low, high], 1 - rows)
    return ir.Tensor(extremes.reshape(*extremes.shape, *[1] * (len(weight.shape) - 2)), name=weight.name)


def _fill(graph: ir.Graph, weight: ir.TensorProtocol, rows: int, alike: bool) -> None:
    """Puts the weight itself, or the codes of it, where those of its stand-in are."""
    name = str(weight.name)
    if name in graph.initializers:
        graph.initializers[name].const_value = weight
        graph.initializers[name].shape = ir.Shape(weight.shape.numpy())
    parts = [graph.initializers.get(name + suffix) for suffix in _SUFFIXES]
    tensors = [part.const_value for part in parts if part is not None and part.const_value is not None]
    value = parts[0]
    if value is None or len(tensors) != len(_SUFFIXES):
        return
    dtype, shape = tensors[0].dtype, ir.Shape(weight.shape.numpy())
    codes, scale, zero = (tensor.numpy().astype(np.float32) for tensor in tensors)
    axes = tuple(axis for axis in range(codes.ndim) if axis != min(rows, 1))
    along = [-1 if axis == rows else 1 for axis in range(len(shape))]
    # as the scales are monotonous, no code of a channel is outside those of its extremes
    low, high = codes.min(axes).reshape(along), codes.max(axes).reshape(along)
    if scale.size > 1:
        for part in parts[1:] if rows > 1 else ():
            assert part is not None
            _batch_channels(part, () if alike else (*weight.shape.numpy()[:-2], 1, weight.shape.numpy()[-1]))
        scale, zero = scale.reshape(along), zero.reshape(along)

    def compute() -> ir.TensorProtocol:
        made = weight.numpy() / scale
        _release(weight)
        np.rint(made, out=made)
        made += zero
        np.clip(made, low, high, out=made)
        return ir.Tensor(made.astype(np.int32).astype(dtype.numpy()), dtype=dtype, name=value.name)

    value.const_value = ir.LazyTensor(compute, dtype=dtype, shape=shape, name=value.name)
    value.shape = shape


def _batch_channels(constant: ir.Value, shape: Sequence[int]) -> None:
    """Scales or zero points [N] as [..., 1, N], the shape that operators on integers want, or one of them."""
    assert constant.const_value is not None
    array = constant.const_value.numpy()
    wide = np.broadcast_to(array, shape) if shape else array[0]
    constant.const_value = ir.Tensor(np.array(wide), dtype=constant.const_value.dtype, name=constant.name)
    constant.shape = ir.Shape(shape)


def _release(weight: ir.TensorProtocol) -> None:
    """Lets go of the pages that were read."""
    if isinstance(weight, ir.ExternalTensor):
        weight.release()
