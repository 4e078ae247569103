"""Adapter files: .onnx_adapter, which ONNX Runtime loads, and plain safetensors or npz with the same names."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from safetensors.numpy import save_file

__all__ = ["FILE_FORMATS", "write_adapter"]

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
        held = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()}
        adapter = ort.AdapterFormat()
        adapter.set_adapter_version(_VERSION)
        adapter.set_model_version(_VERSION)
        adapter.set_parameters(held)
        adapter.export_adapter(str(path))
        found = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        if found.keys() != values.keys() or any((found[n].numpy() != v).any() for n, v in values.items()):
            raise AssertionError(f"{path} does not hold what was written")
