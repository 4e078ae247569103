"""ONNX files with their weights beside them: written with one data file, and opened only where the data lies inside."""

from pathlib import Path
from typing import TypeAlias

import onnx
import onnx_ir as ir

from quantcli.errors import InputError

__all__ = [
    "DATA_SUFFIX",
    "Graph",
    "Model",
    "check_external_data",
    "data_files",
    "open_graph",
    "refuse_unusable",
    "save_graph",
]

Graph: TypeAlias = ir.Graph
Model: TypeAlias = ir.Model

DATA_SUFFIX = ".data"
_INLINE_BYTES = 1024


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes `path` and `path`.data; weights that are lazy are computed one after the other while they are written."""
    ir.save(
        model,
        path,
        external_data=path.name + DATA_SUFFIX,
        size_threshold_bytes=_INLINE_BYTES,
        max_workers=1,
        max_in_flight_bytes=1 << 28,
    )


def open_graph(path: Path) -> ir.Model:
    """Opens a graph; its weights stay on disk until they are asked for.

    Raises:
        InputError: the file is no ONNX graph, or its data lies outside the folder.
    """
    check_external_data(path)
    return ir.load(path)


def check_external_data(path: Path) -> None:
    """Refuses graphs whose weights are not in plain files of the same folder.

    Raises:
        InputError: the file is no ONNX graph, or a weight's path, offset or length points outside the folder's files.
    """
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own types
        raise InputError(f"{path} is not an ONNX graph: {str(error).splitlines()[0] if str(error) else ''}") from error
    folder = path.parent.resolve()
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {e.key: e.value for e in tensor.external_data}
        location = entries.get("location", "")
        file = path.parent / location
        if not location or Path(location).is_absolute() or file.is_symlink() or not file.is_file():
            raise InputError(f"{path}: the data file {location!r} of {tensor.name} is no plain file of its folder")
        if not file.resolve().is_relative_to(folder):
            raise InputError(f"{path}: the data file {location!r} of {tensor.name} lies outside its folder")
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        if offset < 0 or length < 0 or offset + length > file.stat().st_size:
            raise InputError(f"{path}: {tensor.name} ends at byte {offset + length} of {location}, which is shorter")


def data_files(model: ir.Model) -> set[str]:
    """Names of the files that hold the graph's weights."""
    stored = [v.const_value for v in model.graph.initializers.values()]
    return {str(t.location) for t in stored if isinstance(t, ir.ExternalTensor)}


def refuse_unusable(path: Path) -> None:
    """Opens what was written as its users will.

    Raises:
        InputError: onnxruntime cannot open it.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    try:
        # not onnx.checker: GenAI's graphs have onnxruntime's own operators in the standard's domain, which it refuses
        onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"the quantized graph cannot be opened: {reason}") from error
