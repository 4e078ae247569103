"""Moves factors from the channels of activations into the weights that read them, with what that takes of a graph.

Which factors, `algorithms.transforms.smoothquant` says. Here are the places: inputs of MatMul and Gemm with constant
weights. A factor is undone in what makes the input (a norm's gain, the linear in front), or by a Mul in front of the
readers where something else reads the input too.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from quantcli.errors import InputError, UsageError
from quantcli.graphs.activations.nodes import select_nodes
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.model.inputs import CalibrationReader
from quantcli.graphs.model.session import open_session, run_sample
from quantcli.graphs.rewrite.makers import find_maker
from quantcli.graphs.rewrite.prepare import prepare
from quantcli.graphs.walk.channels import constant_of, has_weight, scale_columns, weight_columns, weight_width
from quantcli.graphs.walk.origins import shapes_of
from quantcli.tensors.channels import Channels
from quantcli.tensors.outliers import OutlierCounts

__all__ = ["Place", "Smoothed", "find_places", "look", "smooth"]

_Seen = TypeVar("_Seen", Channels, OutlierCounts)


@dataclass(frozen=True)
class Place:
    """An activation that may be scaled, and its readers."""

    tensor: str
    """Its name."""
    readers: tuple[ir.Node, ...]
    """The MatMul and Gemm nodes that multiply it by a constant."""

    def names(self) -> list[str]:
        """Of the readers."""
        return [str(node.name) for node in self.readers]

    def weights(self) -> list[Tensor]:
        """[N, K] float32 of each reader."""
        found = []
        for node in self.readers:
            array = constant_of(node.inputs[1])
            assert array is not None
            columns = np.array(weight_columns(node, array).T, np.float32, order="C")  # torch takes no read-only memory
            found.append(torch.from_numpy(columns))
        return found


@dataclass(frozen=True)
class Smoothed:
    """What became of a graph."""

    folded: tuple[str, ...]
    """Activations whose factors went into what makes them."""
    multiplied: tuple[str, ...]
    """Activations that a Mul divides."""
    kept: tuple[str, ...]
    """Activations that stay as they were: no factors are better."""
    notes: tuple[str, ...]
    """What there is to say."""


def smooth(
    source: Path,
    target: Path,
    reader: CalibrationReader,
    find: Callable[[list[str], Channels, list[Tensor]], Tensor | None],
    *,
    rows: int,
    fold_only: bool = False,
    include: Collection[str] = (),
    exclude: Collection[str] = (),
    named: Collection[str] = (),
) -> Smoothed:
    """Writes the graph with smoothed activations; its float function is the same.

    Args:
        source: Float graph file.
        target: File to write, with `target`.data beside it.
        reader: Samples.
        find: From the names of an activation's readers, what was seen of it and their weights [N, K] to factors [K]
            float32, or None.
        rows: How many rows of each activation `find` is given.
        fold_only: Whether activations that need a Mul are left as they are.
        include: Names or regular expressions of nodes; empty for all.
        exclude: The same; these stay as they are.
        named: Regular expressions of which each must match a reader.

    Raises:
        UsageError: no node is left, or a name that no node has.
        InputError: a graph that cannot be prepared, no samples, or samples that do not fit.
    """
    with TemporaryDirectory(dir=target.parent, prefix=".smooth-") as name:
        ready = Path(name) / "ready.onnx"
        conversion = prepare(source, ready).conversion
        model = open_graph(ready)
        chosen = select_nodes(model, ("MatMul", "Gemm"), (), [*include], [*exclude])
        places = find_places(model, {str(n.name) for n in chosen})
        if not places:
            raise UsageError("no MatMul or Gemm with a constant weight is left to smooth", hint="leave smoothquant out")
        readers = [name for place in places for name in place.names()]
        for pattern in named:
            if not any(re.search(pattern, name) for name in readers):
                raise UsageError(f"no node that is smoothed is called {pattern!r}, which has an alpha of its own")
        seen = look(ready, [p.tensor for p in places], reader, lambda width: Channels(width, rows))
        folded, multiplied, kept = [], [], []
        shapes = shapes_of(model)
        for place in places:
            value = place.readers[0].inputs[0]
            assert value is not None
            maker = find_maker(value, -1, weight_width(place.readers[0]), place.readers, shapes)
            foldable = maker is not None and maker.repeat == 1
            factors = None
            if foldable or not fold_only:
                factors = find(place.names(), seen[place.tensor], place.weights())
            if factors is None:
                kept.append(place.tensor)
                continue
            scale = factors.double().numpy()
            for node in place.readers:
                scale_columns(node, scale)
            if foldable and maker is not None:
                maker.divide(scale)
                folded.append(place.tensor)
            else:
                _multiply(model.graph, value, place.readers, 1 / scale)
                multiplied.append(place.tensor)
        save_graph(model, target)
    said = f"smoothquant: {len(folded)} activations folded, {len(multiplied)} with a Mul, {len(kept)} as they were"
    notes = (said,) if conversion is None else (str(conversion), said)
    return Smoothed(tuple(folded), tuple(multiplied), tuple(kept), notes)


def find_places(model: ir.Model, chosen: Collection[str]) -> list[Place]:
    """Activations that nodes of these names multiply by constant matrices: MatMul and Gemm of the main graph."""
    readers: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if node.name not in chosen or not has_weight(node) or weight is None or weight.shape is None:
            continue
        if len(weight.shape) == 2 and node.attributes.get_int("transA", 0) == 0 and node.inputs[0] is not None:
            readers.setdefault(str(node.inputs[0].name), []).append(node)
    return [Place(tensor, tuple(nodes)) for tensor, nodes in readers.items()]


def look(ready: Path, names: list[str], reader: CalibrationReader, begin: Callable[[int], _Seen]) -> dict[str, _Seen]:
    """Runs the samples; tensors of one at a time, of which little is kept.

    Args:
        ready: Float graph file.
        names: Tensors to look at.
        reader: Samples.
        begin: From a tensor's channels to what gathers of it.

    Raises:
        InputError: no samples, samples that do not fit, or tensors that are empty or not finite.
    """
    model = open_graph(ready)
    known = {str(v.name): v for v in model.graph.inputs}
    inside = {str(v.name): v for n in model.graph for v in n.outputs}
    model.graph.outputs[:] = [inside[n] for n in names if n in inside]
    seen: dict[str, _Seen] = {}
    samples = 0
    with TemporaryDirectory(dir=ready.parent, prefix=".look-") as folder:
        save_graph(model, Path(folder) / "look.onnx")
        session = open_session(Path(folder) / "look.onnx", optimized=False) if len(model.graph.outputs) else None
        while feed := reader.get_next():
            values = {n: feed[n] for n in names if n in known}
            if session is not None:
                got = [o.name for o in session.get_outputs()]
                values |= dict(zip(got, run_sample(session, feed, samples), strict=True))
            for name, array in values.items():
                if not np.isfinite(array).all():
                    raise InputError(f"{name} holds values that are not finite in sample {samples}")
                if array.size:
                    if name not in seen:
                        seen[name] = begin(array.shape[-1])
                    seen[name].add(torch.from_numpy(np.array(array, np.float32)))
            samples += 1
    if not samples:
        raise InputError("there are no samples to look at activations with")
    unseen = [name for name in names if name not in seen]
    if unseen:
        raise InputError(f"{unseen[0]} was empty in every sample", hint="exclude the nodes that read it")
    return seen


def _multiply(graph: ir.Graph, value: ir.Value, readers: tuple[ir.Node, ...], factors: np.ndarray) -> None:
    """Puts one Mul between a value and these readers."""
    name = f"{value.name}.smoothed"
    dtype = value.dtype or ir.DataType.FLOAT
    array = factors.astype(dtype.numpy())
    constant = ir.Value(name=f"{name}.factors", const_value=ir.Tensor(array, name=f"{name}.factors"))
    constant.dtype, constant.shape = dtype, ir.Shape(array.shape)
    graph.register_initializer(constant)
    node = ir.node("Mul", [value, constant], name=f"{name}.Mul")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, value.shape
    graph.insert_before(readers[0], node)
    for reader in readers:
        reader.replace_input_with(0, node.outputs[0])
