"""Keeps large weights away from onnxruntime's quantizers, which held 3 GiB of them three times over.

In a weight's place they get its smallest and its largest value of every output channel, of which they make the very
scales and zero points that the weight itself gives. Its codes are computed afterwards, one weight at a time, while the
file is written.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.walk.channels import has_weight, weight_rows

__all__ = ["with_stand_ins"]

_SUFFIXES = ("_quantized", "_scale", "_zero_point")
"""What onnxruntime puts behind a weight's name."""


def with_stand_ins(
    source: Path, made: Path, names: Collection[str], run: Callable[[Path, Path], None], *, large_bytes: int = 1 << 20
) -> None:
    """Quantizes a graph file without its large weights, then puts their codes in.

    Args:
        source: Float graph file.
        made: File to write, with `made`.data beside it.
        names: Nodes that are quantized.
        run: onnxruntime's quantizer, from a graph file to another.
        large_bytes: Float weights of more are replaced.
    """
    model = open_graph(source)
    found = _replaceable(model, names, large_bytes)
    if not found:
        run(source, made)
        return
    kept: list[tuple[ir.TensorProtocol, int]] = []
    for value, rows in found.items():
        assert value.const_value is not None
        kept.append((value.const_value, rows))
        value.const_value = _stand_in(value.const_value, rows)
        value.shape = ir.Shape(value.const_value.shape.numpy())
    with TemporaryDirectory(dir=made.parent, prefix=".bare-") as name:
        bare, small = Path(name) / "bare.onnx", Path(name) / "small.onnx"
        save_graph(model, bare)
        run(bare, small)
        result = ir.load(small)
        for weight, rows in kept:
            _fill(result.graph, weight, rows)
        save_graph(result, made)


def _replaceable(model: ir.Model, names: Collection[str], large_bytes: int) -> dict[ir.Value, int]:
    """Large float32 weights that only such nodes read, all with the same axis of output channels; that axis."""
    found: dict[ir.Value, int] = {}
    for node in model.graph:
        weight = node.inputs[1] if has_weight(node) and node.op_type != "ConvTranspose" else None
        if weight is None or weight.const_value is None or weight.dtype is not ir.DataType.FLOAT:
            continue
        stored = weight.const_value
        if stored.nbytes <= large_bytes or (node.op_type in ("MatMul", "Gemm") and len(stored.shape) != 2):
            continue
        rows = weight_rows(node)
        fits = (user.name in names and has_weight(user) and place == 1 for user, place in weight.uses())
        if all(fits) and all(weight_rows(user) == rows for user, _ in weight.uses()) and not weight.is_graph_output():
            found[weight] = rows
    return found


def _stand_in(weight: ir.TensorProtocol, rows: int) -> ir.TensorProtocol:
    """[N, 2, 1, ...] or [2, N]: the extremes of each output channel."""
    array = weight.numpy()
    others = tuple(axis for axis in range(array.ndim) if axis != rows)
    extremes = np.stack([array.min(others), array.max(others)], 1 - rows)
    del array
    _release(weight)
    return ir.Tensor(extremes.reshape(*extremes.shape, *[1] * (len(weight.shape) - 2)), name=weight.name)


def _fill(graph: ir.Graph, weight: ir.TensorProtocol, rows: int) -> None:
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
    axes = tuple(axis for axis in range(codes.ndim) if axis != rows)
    # as the scales are monotonous, no code of a channel is outside those of its extremes
    low, high = codes.min(axes, keepdims=True), codes.max(axes, keepdims=True)
    along = [-1 if axis == rows else 1 for axis in range(codes.ndim)]
    if scale.size > 1:
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


def _release(weight: ir.TensorProtocol) -> None:
    """Lets go of the pages that were read."""
    if isinstance(weight, ir.ExternalTensor):
        weight.release()
