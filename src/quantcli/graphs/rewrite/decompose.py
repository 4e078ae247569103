"""LLM.int8() on an ONNX graph: products of codes, a scale for each vector, beside float products of outlier channels.

Which channels hold outliers is fixed by what samples show. Codes lie in uint8 around 128 on both sides: onnxruntime's
kernel of int8 weights adds pairs up in 16 bits on processors without VNNI, and they overflow.

Symbols: X [..., K] an input, W [K, N] a weight, O the outlier channels, R the others.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import torch

from quantcli.errors import InputError
from quantcli.graphs.activations import nodes as integers
from quantcli.graphs.checking import compare
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.model.inputs import CalibrationReader, rewound
from quantcli.graphs.rewrite.gemms import split_gemms
from quantcli.graphs.rewrite.prepare import prepare
from quantcli.graphs.rewrite.smooth import Place, find_places, look
from quantcli.graphs.walk.channels import constant_of, has_weight
from quantcli.tensors.outliers import OutlierCounts
from quantcli.tensors.vectorwise import round_vectors

__all__ = ["Decomposed", "decompose"]

_ALL_OUTLIERS = "all channels of its input are outliers"
_NOT_CONSTANT = "its weight is no constant matrix"
_MIDDLE = 128
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Decomposed(integers.IntegerGraph):
    """What became of a graph."""

    outliers: tuple[tuple[tuple[str, ...], OutlierCounts], ...] = ()
    """By the nodes that read an input, what samples showed of it."""


def decompose(
    source: Path,
    target: Path,
    reader: CalibrationReader,
    threshold: float,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    debug: bool = False,
) -> Decomposed:
    """Writes the graph in integers.

    Args:
        source: Float graph file.
        target: File to write, with `target`.data beside it.
        reader: Samples that show outliers.
        threshold: Magnitude from which on a value is one; 0: none is.
        include: Names or regular expressions of nodes; empty for all.
        exclude: The same; these stay float.
        debug: Whether float and quantized graph are compared, node by node.

    Raises:
        UsageError: no node is left, or a name that no node has.
        InputError: a graph that cannot be prepared, a node in float16, or samples that do not fit.
    """
    with TemporaryDirectory(dir=target.parent, prefix=".int8-") as name:
        folder = Path(name)
        prepared = prepare(source, folder / "prepared.onnx")
        model = open_graph(folder / "prepared.onnx")
        weighted = [str(n.name) for n in model.graph.all_nodes() if has_weight(n)]
        chosen = integers.select_nodes(model, ("MatMul", "Gemm"), (), include, exclude)
        integers.require_float32(chosen)
        names = {str(n.name) for n in chosen}
        split_gemms(model, names)
        save_graph(model, folder / "ready.onnx")
        places = find_places(model, names)
        seen = look(
            folder / "ready.onnx", [p.tensor for p in places], reader, lambda width: OutlierCounts(width, threshold)
        )
        done: list[str] = []
        reasons: dict[str, str] = {}
        for place in places:
            if len(seen[place.tensor].columns()) == len(seen[place.tensor].hits):
                reasons |= dict.fromkeys(place.names(), _ALL_OUTLIERS)
                continue
            _split(model.graph, place, seen[place.tensor].columns())
            done += place.names()
        if not done:
            raise InputError(f"no node is left to quantize: {_ALL_OUTLIERS}", hint="raise --set threshold")
        reasons |= {n: _NOT_CONSTANT for n in names if n not in done and n not in reasons}
        integers.finish(model, target)
        compared = None
        if debug:
            compared = compare.compare(folder / "ready.onnx", target, set(done), rewound(reader, "a comparison"))
    notes = [f"{name} stays float: {why}" for name, why in reasons.items() if why == _ALL_OUTLIERS]
    return Decomposed(
        quantized=tuple(n for n in weighted if n in done),
        kept=tuple(n for n in weighted if n not in done),
        prepared=prepared,
        notes=tuple(notes),
        comparison=compared,
        reasons=reasons,
        nodes=dict.fromkeys(done, "MatMul"),
        outliers=tuple((tuple(place.names()), seen[place.tensor]) for place in places),
    )


def _split(graph: ir.Graph, place: Place, outliers: Collection[int]) -> None:
    """Puts a product of codes and one of outlier channels in the place of every reader of an input."""
    value = place.readers[0].inputs[0]
    assert value is not None
    made = _Maker(graph, place.readers[0], f"{value.name}.int8")
    width = constant_of(place.readers[0].inputs[1])
    assert width is not None
    apart = np.array(sorted(outliers), np.int64)
    others = np.setdiff1d(np.arange(len(width)), apart)
    rest, large = value, None
    if len(apart):
        rest = made.node("Gather", value, made.constant("others", others), attributes={"axis": -1})
        large = made.node("Gather", value, made.constant("outliers", apart), attributes={"axis": -1})
    codes, scale = _codes(made, rest)
    zero = made.constant("zero", np.array(_MIDDLE, np.uint8))
    for reader in place.readers:
        weight = constant_of(reader.inputs[1])
        assert weight is not None
        at = _Maker(graph, reader, f"{reader.name}.int8")
        rounded, largest = round_vectors(torch.from_numpy(np.array(weight[others].T, np.float32, order="C")))
        stored = (rounded.to(torch.int16) + _MIDDLE).to(torch.uint8).numpy().T
        product = at.node("MatMulInteger", codes, at.constant("codes", np.ascontiguousarray(stored)), zero, zero)
        product = at.node("Mul", at.node("Cast", product, attributes={"to": ir.DataType.FLOAT}), scale)
        product = at.node("Mul", product, at.constant("scales", largest.numpy() / np.float32(127)))
        if large is not None:
            kept = at.constant("weight", np.array(weight[apart], np.float32))
            product = at.node("Add", product, at.node("MatMul", large, kept))
        _stand_in(graph, reader, product)


def _codes(made: "_Maker", x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Codes of X around 128 and the scale of each of its vectors, [..., 1]; vectors of zeros have a tiny one."""
    version = made.graph.opset_imports.get("", 0)
    magnitude = made.node("Abs", x)
    if version < 18:
        largest = made.node("ReduceMax", magnitude, attributes={"axes": [-1], "keepdims": 1})
    else:
        axes = made.constant("axes", np.array([-1], np.int64))
        largest = made.node("ReduceMax", magnitude, axes, attributes={"keepdims": 1})
    scale = made.node("Div", largest, made.constant("top", np.array(127, np.float32)))
    scale = made.node("Max", scale, made.constant("least", np.array(_TINY, np.float32)))
    steps = made.node("Round", made.node("Div", x, scale))
    shifted = made.node("Add", steps, made.constant("middle", np.array(_MIDDLE, np.float32)))
    return made.node("Cast", shifted, attributes={"to": ir.DataType.UINT8}), scale


def _stand_in(graph: ir.Graph, reader: ir.Node, product: ir.Value) -> None:
    """The product takes the name, the readers and the place among outputs of what a node made."""
    old = reader.outputs[0]
    product.type, product.shape = old.type, old.shape
    for at, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[at] = product
    for node, index in list(old.uses()):
        node.replace_input_with(index, product)
    name, old.name = old.name, None
    product.name = name
    graph.remove(reader, safe=True)


class _Maker:
    """Makes nodes in front of one, named after what they are for."""

    def __init__(self, graph: ir.Graph, before: ir.Node, name: str):
        self.graph, self._before, self._name, self._count = graph, before, name, 0

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initializer; one for all that ask for the same name."""
        full = f"{self._name}.{name}"
        if full in self.graph.initializers:
            return self.graph.initializers[full]
        tensor = ir.Tensor(array, name=full)
        value = ir.Value(name=full, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        self.graph.register_initializer(value)
        return value

    def node(
        self, op_type: str, *inputs: ir.Value, attributes: Mapping[str, int | list[int]] | None = None
    ) -> ir.Value:
        """What a new node makes."""
        self._count += 1
        name = f"{self._name}.{op_type}.{self._count}"
        made = ir.node(op_type, list(inputs), attributes=dict(attributes or {}), name=name)
        made.outputs[0].name = name
        self.graph.insert_before(self._before, made)
        return made.outputs[0]
