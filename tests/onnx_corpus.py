"""The models with weights in onnx's own backend tests, brought to opset 17, with the inputs that lie beside them."""

from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
from onnx import numpy_helper, version_converter

from graph_scope import UnfitError
from graph_strategy import Case, Feed

__all__ = ["OPSET", "corpus_case", "corpus_names"]

OPSET = 17
_DATA = Path(onnx.backend.test.__file__).parent / "data"
_FOLDERS = ("simple", "pytorch-converted", "pytorch-operator")


def corpus_names() -> list[str]:
    """Models that have weights, floats with two axes or more that are constant, or a product of what they are given."""
    found = []
    for folder in _FOLDERS:
        for path in sorted((_DATA / folder).glob("*/model.onnx")):
            model = onnx.load(path)
            constants = [
                *model.graph.initializer,
                *(a.t for n in model.graph.node for a in n.attribute if a.HasField("t")),
            ]
            given = path.parent / "test_data_set_0"
            tensors = [t for t in constants if len(t.dims) > 1 and t.data_type == onnx.TensorProto.FLOAT]
            products = {n.op_type for n in model.graph.node} & {"Gemm", "MatMul", "Conv", "ConvTranspose"}
            if (tensors or products) and list(given.glob("input_*.pb")):
                found.append(f"{folder}/{path.parent.name}")
    return found


def corpus_case(name: str) -> Case:
    """The model and its inputs.

    Raises:
        UnfitError: onnx has no way to opset 17.
    """
    folder = _DATA / name
    try:
        proto = version_converter.convert_version(onnx.load(folder / "model.onnx"), OPSET)
    except Exception as error:  # what onnx raises has no common base
        raise UnfitError(str(error)) from error
    listed = {t.name for t in proto.graph.initializer}
    names = [v.name for v in proto.graph.input if v.name not in listed]
    feeds: list[Feed] = []
    for data in sorted(folder.glob("test_data_set_*")):
        files = sorted(data.glob("input_*.pb"), key=lambda p: int(p.stem.removeprefix("input_")))
        tensors = [onnx.TensorProto.FromString(p.read_bytes()) for p in files]
        feeds.append({n: np.asarray(numpy_helper.to_array(t)) for n, t in zip(names, tensors, strict=False)})
    operators = {node.op_type for node in proto.graph.node}
    return Case(proto, feeds, feeds, [], {}, operators, external=False, has_bodies=False)
