"""ONNX files with their weights beside them: written with one data file, and opened only where the data lies inside."""

import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from quantcli.errors import InputError, first_line
from quantcli.graphs.model.validate import refuse_broken

__all__ = [
    "DATA_SUFFIX",
    "INLINE_BYTES",
    "Graph",
    "LazyTensor",
    "Model",
    "check_external_data",
    "data_files",
    "open_graph",
    "save_graph",
]

Graph: TypeAlias = ir.Graph
Model: TypeAlias = ir.Model
LazyTensor: TypeAlias = ir.LazyTensor

DATA_SUFFIX = ".data"
INLINE_BYTES = 1024


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes `path` and `path`.data; weights that are lazy are computed one after the other while they are written.

    Raises:
        InputError: the graph holds what no file can say, such as a name that is no text.
    """
    try:
        ir.save(
            model,
            path,
            external_data=path.name + DATA_SUFFIX,
            size_threshold_bytes=INLINE_BYTES,
            max_workers=1,
            max_in_flight_bytes=1 << 28,
        )
    except ir.serde.SerdeError as error:
        raise InputError(f"the graph cannot be written: {_line(error)}") from error


def open_graph(path: Path) -> ir.Model:
    """Opens a graph; its weights stay on disk until they are asked for.

    Raises:
        InputError: the file is no ONNX graph, or its data lies outside the folder.
    """
    proto = _checked(path)
    try:
        with warnings.catch_warnings():
            # runtimes leave notes of their own with a tensor's place, which are no concern of ours
            warnings.filterwarnings("ignore", "Ignoring unknown external data key")
            model: ir.Model = ir.from_proto(proto)
            ir.external_data.set_base_dir(model.graph, path.parent)
    except Exception as error:  # onnx_ir raises types of its own for what a graph cannot be
        raise InputError(f"{path} is not an ONNX graph: {_line(error)}") from error
    for value in (*model.graph.inputs, *model.graph.outputs, *(v for n in model.graph for v in n.outputs)):
        if value.shape is not None and any(_any_length(axis) for axis in value.shape):
            value.shape = ir.Shape([None if _any_length(axis) else axis for axis in value.shape])
    for value in (v for graph in model.graphs() for v in graph.initializers.values()):
        stored = value.const_value
        if isinstance(stored, ir.ExternalTensor) and stored.size == 0:  # nothing to map, at which onnx_ir fails
            value.const_value = ir.Tensor(np.empty(stored.shape.numpy(), stored.dtype.numpy()), name=value.name)
    return model


def _any_length(axis: int | ir.SymbolicDim) -> bool:
    """Whether an axis may have any length in the words of older exporters: -1, or "?", which names no length."""
    return axis < 0 if isinstance(axis, int) else axis.value == "?"


def check_external_data(path: Path) -> None:
    """Refuses broken graphs, and those whose weights are not in plain files of the same folder.

    Raises:
        InputError: the file is no ONNX graph, or a weight's path, offset or length points outside the folder's files.
    """
    _checked(path)


def _checked(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise InputError(f"{path} is no file", hint="give an .onnx file or a folder with one")
    hint = "give a file that an exporter to ONNX wrote"
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own types
        raise InputError(f"{path} is not an ONNX graph: {_line(error)}", hint) from error
    if not proto.graph.node:
        raise InputError(f"{path} is not an ONNX graph: it has no nodes", hint)
    refuse_broken(proto, path)
    return proto


def data_files(model: ir.Model) -> set[str]:
    """Names of the files that hold the graph's weights."""
    stored = [v.const_value for v in model.graph.initializers.values()]
    return {str(t.location) for t in stored if isinstance(t, ir.ExternalTensor)}


def _line(error: BaseException) -> str:
    """The first line of what went wrong at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)[:300]
