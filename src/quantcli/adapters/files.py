"""Adapter files: .onnx_adapter, which ONNX Runtime loads, and plain safetensors or npz with the same names."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from safetensors.numpy import save_file

from quantcli.errors import InputError, nearest

__all__ = ["FILE_FORMATS", "require_fit", "write_adapter"]

FILE_FORMATS = {"onnx_adapter": ".onnx_adapter", "safetensors": ".safetensors", "npz": ".npz"}
_VERSION = 1


def write_adapter(path: Path, values: Mapping[str, np.ndarray], file_format: str) -> None:
    """Writes values of graph inputs, [K, R] and [R, N] float32 by name; what was written is read back and compared."""
    if file_format == "safetensors":
        save_file(dict(values), path)
    elif file_format == "npz":
        with path.open("wb") as stream:
            np.savez(stream, **values)  # type: ignore[arg-type]
    else:
        # an OrtValue borrows the array: `values` keeps them alive until they are written
        held = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()}
        adapter = ort.AdapterFormat()
        adapter.set_adapter_version(_VERSION)
        adapter.set_model_version(_VERSION)
        adapter.set_parameters(held)
        adapter.export_adapter(str(path))
        found = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        if found.keys() != values.keys() or any((found[n].numpy() != v).any() for n, v in values.items()):
            raise AssertionError(f"{path} does not hold what was written")


def require_fit(path: Path, graph: Path) -> None:
    """Compares an .onnx_adapter with the inputs of the graph that it is to run on; the runtime checks when it runs.

    Raises:
        InputError: the file is damaged, or was made for another base.
    """
    try:
        values = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    except Exception as error:  # the package raises RuntimeError with a place in its sources
        raise InputError(f"{path} is damaged, or no adapter file", hint="make it again with convert-adapter") from error
    inputs = {v.name: v.type.tensor_type.shape.dim for v in onnx.load(graph, load_external_data=False).graph.input}
    hint = f"make it for this base: quantcli convert-adapter -m {graph.parent} --adapter-path FOLDER"
    ranks: dict[str, int] = {}
    for name, value in values.items():
        if name not in inputs:
            raise InputError(f"{path} holds {name}, {graph} has no such input: {nearest(name, inputs)[:200]}", hint)
        shape = value.shape()
        wanted = [ranks.setdefault(d.dim_param, n) if d.dim_param else d.dim_value for d, n in
                  zip(inputs[name], shape, strict=False)]  # fmt: skip
        if shape != wanted:
            raise InputError(f"{path}: {name} is {shape}, {graph} expects {wanted}", hint)
