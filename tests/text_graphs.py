"""Small ONNX graphs in onnx's own text form, with weights from numpy; bodies and functions too."""

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
import onnx
from onnx import numpy_helper

Arrays = Mapping[str, np.ndarray]
_NONE: Mapping = MappingProxyType({})


def text_proto(
    text: str, weights: Arrays = _NONE, bodies: Mapping[str, Arrays] = _NONE, *, opset: int = 18, ir_version: int = 9
) -> onnx.ModelProto:
    """A model of `inputs => outputs { nodes }`, and functions behind it.

    Args:
        text: What follows the graph's name, in the syntax of `onnx.parser`.
        weights: Initializers of the main graph.
        bodies: Initializers of bodies by the body's name.
        opset: Of the standard's domain.
        ir_version: Of the file.
    """
    opsets = f'"" : {opset}, "own" : 1, "com.microsoft" : 1'
    proto = onnx.parser.parse_model(f"<ir_version: {ir_version}, opset_import: [{opsets}]> main {text}")
    known = {"main": weights} | dict(bodies)
    for graph in _graphs(proto.graph):
        for name, array in known.get(graph.name, {}).items():
            graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return proto


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    attributes: Iterable[onnx.AttributeProto] = (a for node in graph.node for a in node.attribute)
    for attribute in attributes:
        if attribute.HasField("g"):
            yield from _graphs(attribute.g)
