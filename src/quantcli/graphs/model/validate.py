"""What is wrong with a graph file, found before any of it is used.

Names are made once and known where they are read, and every tensor's data lies in the file or in a plain file beside
it, as many bytes as its shape takes. Nothing is executed and no weight is read.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from quantcli.errors import InputError

__all__ = ["refuse_broken"]

_EXPORT = "export it once more"
_COPY = "copy the graph and all of its data into one folder"


def refuse_broken(proto: onnx.ModelProto, path: Path) -> None:
    """Refuses graphs that contradict themselves and weights that are not in plain files of the same folder.

    Args:
        proto: The parsed file, without its external data.
        path: Where it lies.

    Raises:
        InputError: naming the node or tensor.
    """
    _check_versions(proto, path)
    _check_names(proto.graph, set(), path)
    for tensor in _tensors(proto):
        if tensor.data_type == onnx.TensorProto.STRING:
            continue
        try:
            needed = _size_bytes(tensor)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path} is broken: tensor {tensor.name!r} has no such type or shape: {error}", _EXPORT
            ) from error
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, needed, path)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != needed:
            held = len(tensor.raw_data)
            raise InputError(
                f"{path} is broken: tensor {tensor.name!r} has {held} bytes, its shape takes {needed}", _EXPORT
            )


def _check_versions(proto: onnx.ModelProto, path: Path) -> None:
    opset = max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    for what, found, known in (
        ("opset", opset, onnx.defs.onnx_opset_version()),
        ("IR version", proto.ir_version, onnx.IR_VERSION),
    ):
        if found > known:
            raise InputError(
                f"{path} has {what} {found}, {known} is the latest that is known here",
                hint=f"export the model with {what} {known} or lower, or update onnx and onnxruntime",
            )


def _check_names(graph: onnx.GraphProto, outer: set[str], path: Path) -> None:
    given = [v.name for v in graph.input]
    stored = [t.name for t in graph.initializer] + [t.values.name for t in graph.sparse_initializer]
    made = [name for node in graph.node for name in node.output if name]
    for names, what in ((given, "inputs"), (stored, "initializers"), (made, "tensors"), ([*made, *given], "tensors")):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise InputError(f"{path} is broken: it has two {what} named {name!r}", _EXPORT)
            seen.add(name)
    known = outer | {*given, *stored, *made}
    for node in graph.node:
        lost = next((name for name in node.input if name and name not in known), None)
        if lost is not None:
            raise InputError(f"{path} is broken: node {node.name!r} reads {lost!r}, which nothing makes", _EXPORT)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.UNDEFINED and not attribute.ref_attr_name:
                raise InputError(
                    f"{path} is broken: attribute {attribute.name!r} of node {node.name!r} has no type", _EXPORT
                )
            for inner in (attribute.g, *attribute.graphs):
                _check_names(inner, known, path)
    types = {t.name: t.data_type for t in graph.initializer}
    for value in (*graph.value_info, *graph.input):
        if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type != types.get(
            value.name, value.type.tensor_type.elem_type
        ):
            raise InputError(f"{path} is broken: {value.name!r} is said to have another type than it has", _EXPORT)
    for value in graph.output:
        if value.name not in known:
            raise InputError(f"{path} is broken: nothing makes its output {value.name!r}", _EXPORT)


def _check_external(tensor: onnx.TensorProto, needed: int, path: Path) -> None:
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    if not isinstance(location, str):
        raise InputError(f"{path}: the data file of {tensor.name} has no name that can be read", _EXPORT)
    file = path.parent / location
    if not location or "\0" in location or Path(location).is_absolute() or file.is_symlink() or not file.is_file():
        raise InputError(f"{path}: the data file {location!r} of {tensor.name} is no plain file of its folder", _COPY)
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise InputError(f"{path}: the data file {location!r} of {tensor.name} lies outside its folder", _COPY)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", needed))
    except ValueError as error:
        raise InputError(f"{path}: {tensor.name} has a place or length that is no number: {error}", _EXPORT) from error
    if offset < 0 or length < 0:
        raise InputError(f"{path}: {tensor.name} has {length} bytes from byte {offset} of {location} on", _EXPORT)
    if offset + length > file.stat().st_size:
        raise InputError(f"{path}: {tensor.name} ends at byte {offset + length} of {location}, which is shorter", _COPY)
    if length != needed:
        raise InputError(f"{path}: {tensor.name} has {length} bytes in {location}, its shape takes {needed}", _EXPORT)


def _size_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's raw data; ValueError or TypeError where it has no such type or shape."""
    if any(size < 0 for size in tensor.dims):
        raise ValueError(f"shape {list(tensor.dims)}")
    bits: int = ir.DataType(tensor.data_type).bitwidth
    return -(-math.prod(int(size) for size in tensor.dims) * bits // 8)


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers and attributes, in subgraphs and functions too."""
    yield from _tensors_of_graph(proto.graph)
    for function in proto.functions:
        yield from _tensors_of_nodes(function.node)


def _tensors_of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
            for graph in (attribute.g, *attribute.graphs):
                yield from _tensors_of_graph(graph)
