"""Runs a graph part by part over calibration inputs; between two parts, what crosses is kept for each batch.

Each node runs once per batch, however many parts there are. What is kept lies in memory up to a bound, and in files of
a folder beyond it. Weights may be replaced on the way: parts that are still to run see the new ones.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from quantcli.errors import InputError, first_line
from quantcli.graphs.model.session import open_session
from quantcli.graphs.walk.matrices import GraphTarget
from quantcli.graphs.walk.partition import Part, parts_of, reads_of
from quantcli.progress import Progress, Silent

__all__ = ["Feed", "Stream"]

Feed = Mapping[str, np.ndarray]
"""Values of a graph's inputs by name."""


class Stream:
    """One run of a graph over all batches, in parts."""

    def __init__(
        self,
        model: ir.Model,
        folder: Path,
        feeds: Iterable[Feed],
        stages: Sequence[Sequence[str]],
        *,
        room_bytes: int = 1 << 62,
        spill: Path | None = None,
        progress: Progress | None = None,
    ):
        """Nothing is run yet.

        Args:
            model: As `walk.prepare` left it; not changed.
            folder: Where its external data lies.
            feeds: Inputs, one batch at a time; read once.
            stages: Names of the tensors that are wanted, stage by stage.
            room_bytes: What may be kept in memory.
            spill: An empty folder for the rest; needed where there is a bound.
            progress: Told what cannot be kept.
        """
        self._model, self._folder, self._feeds, self._stages = model, folder, feeds, stages
        self._progress = progress or Silent()
        self._parts, self._first = parts_of(model.graph, stages), 0
        self._kept = _Kept(room_bytes, spill)
        self._changed: dict[str, ir.TensorProtocol] = {}
        self._ran: set[ir.Node] = set()
        self._stale = self._whole = False
        self.node_runs = 0
        """How often a node was run on a batch, all nodes together."""

    def fork(self, spill: Path | None = None) -> "Stream":
        """Another stream that goes on from here; what either changes or keeps from now on is its own."""
        other = Stream(
            self._model,
            self._folder,
            self._feeds,
            self._stages,
            room_bytes=self._kept.room_bytes,
            spill=spill,
            progress=Silent(),
        )
        other._parts, other._first, other._ran = self._parts, self._first, set(self._ran)
        other._changed, other._whole, other._stale = dict(self._changed), self._whole, self._stale
        other._kept.take(self._kept)
        return other

    def change(self, target: GraphTarget, tensor: ir.TensorProtocol) -> bool:
        """Another weight, for all nodes that read it.

        Returns:
            Whether one of them has run already: then the graph begins anew at the next stage.
        """
        self._changed[target.name] = tensor
        late = any(use.node in self._ran for use in target.uses)
        if target.inside:  # what ran is the node that they are in
            late |= any(value.name == target.name for node in self._ran for value in reads_of(node))
        self._stale |= late
        return late

    def run(self, stage: int) -> Iterator[dict[str, np.ndarray]]:
        """The tensors of a stage, batch by batch; stages are run in their order, each to its end.

        Raises:
            InputError: the graph does not run on these inputs.
        """
        if self._stale or self._whole:
            self._begin_at(stage)
        try:
            yield from self._run(stage)
        except _CannotKeepError as found:
            self._progress.warn(
                f"{found} crosses the steps of calibration and is no tensor that can be kept: the graph is run from"
                " its beginning at each step"
            )
            self._whole = True
            self._begin_at(stage)
            yield from self._run(stage)

    def _begin_at(self, stage: int) -> None:
        self._parts, self._first, self._stale = parts_of(self._model.graph, self._stages[stage:]), stage, False
        self._kept.clear()
        self._ran = set()

    def _run(self, stage: int) -> Iterator[dict[str, np.ndarray]]:
        begins, part = stage == self._first, self._parts[stage - self._first]
        keeps = [] if self._whole else [str(v.name) for v in part.keeps]
        given = self._feeds if begins else self._kept.read()
        known = {str(v.name) for v in self._model.graph.inputs} if begins else None
        session, outputs = None, []
        for number, before in enumerate(given):
            if known is not None:
                _check(self._model, before)
            if not number and part.nodes:
                made = {str(v.name) for node in part.nodes for v in node.outputs}
                outputs = [n for n in dict.fromkeys((*part.watched, *keeps)) if n in made]
                session = self._session(part, outputs, before)
            values = dict(before)
            if session is not None:
                feed = {str(v.name): before[str(v.name)] for v in part.reads}
                values |= zip(outputs, _run(session, outputs, feed, keeps), strict=True)
                self.node_runs += len(part.nodes)
            self._kept.write(number, {name: _array(name, values[name]) for name in keeps})
            yield {name: values[name] for name in part.watched}
        self._ran.update(part.nodes)

    def _session(self, part: Part, outputs: Sequence[str], example: Feed):  # type: ignore[no-untyped-def]
        """A session of the part's nodes; weights stay in the files they are in, onnxruntime reads them from there."""
        import torch

        proto = self._proto(part, outputs, example)
        try:
            content = proto.SerializeToString()
        except Exception as error:  # protobuf raises types of its own
            raise InputError(f"the graph cannot be run: {first_line(error)}") from error
        del proto
        # between runs, others compute
        return open_session(content, folder=self._folder, threads=torch.get_num_threads(), spinning=False)

    def _proto(self, part: Part, outputs: Sequence[str], example: Feed) -> onnx.ModelProto:
        graph = self._model.graph
        values = {str(v.name): v for node in part.nodes for v in node.outputs}
        weights = dict.fromkeys(v for node in part.nodes for v in reads_of(node) if v.is_initializer())
        inputs = [v if v in graph.inputs else _like(v, example[str(v.name)]) for v in part.reads]
        view = ir.GraphView(
            inputs,
            [values[name] for name in outputs],
            nodes=part.nodes,
            initializers=[self._weight(value) for value in weights],
            opset_imports=dict(graph.opset_imports),
            name=graph.name or "part",
        )
        proto = onnx.ModelProto(ir_version=self._model.ir_version)
        for domain, version in graph.opset_imports.items():
            proto.opset_import.add(domain=domain, version=version)
        try:
            ir.serde.serialize_graph_into(proto.graph, view)  # type: ignore[arg-type]  # views are among the protocols
        except Exception as error:  # onnx_ir raises types of its own
            raise InputError(f"the graph cannot be run: {first_line(error.__cause__ or error)}") from error
        return proto

    def _weight(self, value: ir.Value) -> ir.Value:
        if value.name not in self._changed:
            return value
        tensor = self._changed[value.name]
        return ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=tensor)


class _CannotKeepError(Exception):
    """A sequence, a text, or a type that numpy does not have."""


class _Kept:
    """Tensors of each batch, in memory as far as they fit."""

    def __init__(self, room_bytes: int, folder: Path | None):
        self.room_bytes, self._folder = room_bytes, folder
        self._batches: dict[int, dict[str, np.ndarray] | tuple[Path, list[str]]] = {}
        self._sizes: dict[int, int] = {}
        self._files = 0

    def read(self) -> Iterator[dict[str, np.ndarray]]:
        """The batches in order; each may be written anew while it is the last that was read."""
        for number in range(len(self._batches)):
            held = self._batches[number]
            if isinstance(held, dict):
                yield held
            else:
                path, names = held
                with open(path, "rb") as file:
                    yield {name: np.load(file, allow_pickle=False) for name in names}

    def write(self, number: int, tensors: dict[str, np.ndarray]) -> None:
        """A batch in the place of what was kept of it."""
        self._drop(number)
        size = sum(array.nbytes for array in tensors.values())
        if self._folder is None or sum(self._sizes.values()) + size <= self.room_bytes:
            self._batches[number], self._sizes[number] = tensors, size
            return
        path = self._folder / f"{self._files}.npy"
        self._files += 1
        with open(path, "wb") as file:
            for array in tensors.values():
                np.save(file, array, allow_pickle=False)
        self._batches[number] = (path, list(tensors))

    def take(self, other: "_Kept") -> None:
        """What another keeps: arrays are shared, files copied, for each removes its own."""
        self._batches, self._sizes, self._files = dict(other._batches), dict(other._sizes), other._files
        for number, held in other._batches.items():
            if isinstance(held, tuple):
                assert self._folder is not None
                path = self._folder / held[0].name
                shutil.copyfile(held[0], path)
                self._batches[number] = (path, held[1])

    def clear(self) -> None:
        """Forgets all."""
        for number in list(self._batches):
            self._drop(number)

    def _drop(self, number: int) -> None:
        held = self._batches.pop(number, None)
        self._sizes.pop(number, None)
        if isinstance(held, tuple):
            held[0].unlink()


def _run(session: Any, outputs: Sequence[str], feed: Feed, keeps: Sequence[str]) -> Sequence[Any]:
    try:
        return session.run(outputs, dict(feed))  # type: ignore[no-any-return]
    except Exception as error:  # onnxruntime raises types of its own
        if keeps and "Numpy type" in str(error):  # bfloat16 and the like
            raise _CannotKeepError("a value of a type that numpy does not have") from error
        raise InputError(f"the graph does not run on the calibration inputs: {first_line(error)}") from error


def _array(name: str, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        raise _CannotKeepError(repr(name))
    return value


def _like(value: ir.Value, array: np.ndarray) -> ir.Value:
    """An input for what an earlier part made: of its type, and of its rank where the graph says that."""
    rank = len(value.shape) if value.shape is not None else None
    shape = ir.Shape([None] * rank) if rank == array.ndim else None
    return ir.Value(name=value.name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=shape)


def _check(model: ir.Model, feed: Feed) -> None:
    wanted, given = {str(v.name) for v in model.graph.inputs}, set(feed)
    if wanted != given:
        what = f"lack {sorted(wanted - given)[0]!r}" if wanted - given else f"have {sorted(given - wanted)[0]!r}"
        raise InputError(f"the calibration inputs {what}; the graph's inputs are {', '.join(sorted(wanted))}")
