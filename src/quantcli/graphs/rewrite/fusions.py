"""Sequences of a float graph that become one operator, as QNN's provider has them; the function stays.

onnxruntime's fusions find them (Gelu, LpNormalization, SpaceToDepth, LayerNormalization). Its `qnn_preprocess_model`,
which runs them, is not used, as of onnxruntime 1.31. It fails on graphs with metadata. It lets a session optimize the
graph first, which makes LayerNormalization from opset 17 on, whatever `fuse_layernorm` says; from opset 20 on nothing
is left to fuse then, and no file is written. Before opset 17, `fuse_layernorm` is a line in the log. What is wrong with
the fusions themselves is made up for here:

- LayerNormalization was made of means over any axis and over several, and computed something else;
- tensors that are outputs of the graph too, or are read by a subgraph, were removed;
- a norm at the end of a graph, without a bias, and image sizes that are not fixed raised KeyError and TypeError;
- ReduceL2 without its optional attribute `keepdims` was not found.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from quantcli.graphs.model.files import open_graph

__all__ = ["fuse_operators"]

_READER = onnx.NodeProto(name="outside")
"""Stands for whoever reads a tensor and is no node of the graph: fusions keep what it reads."""
_CONSTANTS_OF = {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Clip", "ReduceMean", "ReduceL2", "Expand"}
"""Operators whose constants fusions look at."""
_IMAGE_RANK = 4


def fuse_operators(path: Path, *, layer_norms: bool) -> tuple[ir.Model, dict[str, int]]:
    """Fuses all sequences that are found.

    Args:
        path: Float graph file as `prepare` wrote it, of opset 17 or later where `layer_norms` are to be fused.
        layer_norms: Whether LayerNormalization is made too.

    Returns:
        The graph, whose weights are still in the files beside `path`, and how many of each operator were made.
    """
    from onnxruntime.quantization.execution_providers.qnn.fusion_lpnorm import FusionLpNormalization
    from onnxruntime.quantization.execution_providers.qnn.fusion_spacetodepth import FusionSpaceToDepth
    from onnxruntime.quantization.fusions import FusionGelu, FusionLayerNormalization
    from onnxruntime.quantization.onnx_model import ONNXModel

    proto = onnx.load(str(path), load_external_data=False)
    _load_constants(proto, path.parent)
    _say_keepdims(proto.graph)
    kinds = [
        FusionGelu,
        FusionLpNormalization,
        FusionSpaceToDepth,
        *([FusionLayerNormalization] if layer_norms else []),
    ]
    model = ONNXModel(proto)
    made: Counter[str] = Counter()
    for kind in kinds:
        fusion = kind(model)
        made[fusion.fused_op_type] += _apply(fusion, model)
    fused = path.with_name(f"{path.stem}.fused.onnx")  # beside the weights, so that they are found
    onnx.save(proto, str(fused))
    graph = open_graph(fused)
    passes.TopologicalSortPass()(graph)
    passes.RemoveUnusedNodesPass()(graph)
    return graph, {name: count for name, count in made.items() if count}


def _apply(fusion: Any, model: Any) -> int:
    """Runs one of onnxruntime's fusions; how many operators it made."""
    consumers, producers = model.input_name_to_nodes(), model.output_name_to_node()
    for name in _read_elsewhere(model.graph()):
        consumers.setdefault(name, []).append(_READER)
    for node in list(model.nodes()):
        if node.op_type != fusion.search_op_type or not _has_fixed_image(node, fusion.fused_op_type, model):
            continue
        removed, added = len(fusion.nodes_to_remove), len(fusion.nodes_to_add)
        fusion.fuse(node, consumers, producers)
        parts, whole = fusion.nodes_to_remove[removed:], fusion.nodes_to_add[added:]
        if whole and fusion.fused_op_type == "LayerNormalization" and not _is_layer_norm(parts, whole[0], model):
            del fusion.nodes_to_remove[removed:], fusion.nodes_to_add[added:]
    model.remove_nodes(fusion.nodes_to_remove)
    model.add_nodes(fusion.nodes_to_add)
    return len(fusion.nodes_to_add)


def _is_layer_norm(parts: Sequence[onnx.NodeProto], whole: onnx.NodeProto, model: Any) -> bool:
    """Whether the means go over the last axis alone, and gain and bias have one value for each of its elements."""
    shape = _shape(model, whole.input[0])
    for node in parts:
        if node.op_type != "ReduceMean":
            continue
        axes = _attribute(node, "axes")
        if axes is None and len(node.input) > 1:
            axes = model.get_constant_value(node.input[1])
        last = (-1, len(shape) - 1) if shape else (-1,)
        if axes is None or len(axes) != 1 or int(axes[0]) not in last or _attribute(node, "keepdims") == 0:
            return False
    sizes = {tuple(model.get_initializer(name).dims) for name in whole.input[1:]}
    wide = shape[-1] if shape and isinstance(shape[-1], int) else max(sizes)[0]
    return sizes == {(wide,)} and wide != 1


def _has_fixed_image(node: onnx.NodeProto, made: str, model: Any) -> bool:
    """SpaceToDepth is found by dividing height and width, which must be numbers."""
    if made != "SpaceToDepth":
        return True
    shape = _shape(model, node.input[0])
    return len(shape) == _IMAGE_RANK and all(isinstance(size, int) for size in shape[2:])


def _shape(model: Any, name: str) -> list[int | str]:
    """Sizes, names where any will do; empty where the shape is not known."""
    found = model.get_tensor_type(name)
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in found.shape.dim] if found else []


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return list(attribute.ints) if attribute.ints else attribute.i
    return None


def _read_elsewhere(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of tensors that are outputs of the graph or are read inside a node's own graphs."""
    yield from (value.name for value in graph.output)
    for node in graph.node:
        yield from _read_inside(node)


def _read_inside(node: onnx.NodeProto) -> Iterator[str]:
    for attribute in node.attribute:
        for inner in [attribute.g, *attribute.graphs]:
            yield from (value.name for value in inner.output)
            for part in inner.node:
                yield from part.input
                yield from _read_inside(part)


def _say_keepdims(graph: onnx.GraphProto) -> None:
    """Writes down what ReduceL2 does where nothing is said."""
    for node in graph.node:
        if node.op_type == "ReduceL2" and _attribute(node, "keepdims") is None:
            node.attribute.add(name="keepdims", type=onnx.AttributeProto.INT, i=1)


def _load_constants(proto: onnx.ModelProto, folder: Path) -> None:
    """Reads the few weights that fusions look at; the others stay in their file."""
    read = {name for node in proto.graph.node if node.op_type in _CONSTANTS_OF for name in node.input}
    for tensor in proto.graph.initializer:
        if tensor.name in read and tensor.data_location == onnx.TensorProto.EXTERNAL:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
