"""A float graph and what was made of it, run as their users run them: how far off each output is, and how fast.

Signal to quantization noise is 10 log10(sum y^2 / sum (y' - y)^2) in dB over all samples, where y is finite. Both files
are opened with all optimizations on the CPU, since an operator that is right alone can be wrong once it is fused.
"""

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from quantcli.errors import InputError, first_line
from quantcli.graphs.model.files import INLINE_BYTES, data_files, open_graph
from quantcli.graphs.model.inputs import Feed
from quantcli.graphs.model.made_inputs import graph_session
from quantcli.graphs.model.session import open_session

__all__ = [
    "MOST_DB",
    "FloatRun",
    "GraphRunError",
    "OutputDifference",
    "SideBySide",
    "decibels",
    "run_side_by_side",
    "timed",
]

MOST_DB = 200.0
"""Said where there is no difference at all; its negative where nothing of the signal is left."""
_TOGETHER_BYTES = 1 << 29
"""Graphs of more are run one after the other: never are both in memory."""
_KEPT_BYTES = 1 << 28
"""Of the float graph's outputs: a language model has hundreds of MB of logits."""
_TIMED_SECONDS, _MOST_TIMED = 0.4, 30
_SCORES = ("Softmax", "LogSoftmax", "MatMul", "Gemm", "MatMulNBits")
_SHAPE_ONLY = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Add", "Dropout")

Turn = Callable[[Feed], Feed]


class GraphRunError(InputError):
    """The quantized graph does not load, or does not run where the float graph does; the message is onnxruntime's."""

    def __init__(self, message: str, hint: str | None = None, nodes: Collection[str] = ()):
        """`nodes`: those that were quantized, one of which the message may name."""
        super().__init__(message, hint)
        self.nodes = nodes


@dataclass(frozen=True)
class OutputDifference:
    """One output of the two graphs."""

    name: str
    """Its name."""
    sqnr_db: float | None
    """Signal to quantization noise, -200 to 200; None where it is not made of floats, or never had the same shape."""
    largest: float
    """Greatest difference of one value."""
    top1: float | None = None
    """How often the last axis has its largest value at the same place, where that axis is a score; of whole numbers,
    how many are the same."""
    finite: bool = True
    """Whether it is finite wherever the float graph's is."""
    reshaped: int = 0
    """Samples on which it had another shape, as what is left of a selection has: they are not compared."""
    float_nan: bool = False
    """Whether the float graph's own output is no number somewhere."""

    def __str__(self) -> str:
        """For people."""
        if not self.finite:
            return f"{self.name} not finite where the float graph is"
        said = [
            f"{self.sqnr_db:.1f} dB" if self.sqnr_db is not None else "",
            f"top-1 {self.top1:.1%}" if self.top1 is not None and self.sqnr_db is not None else "",
            f"{self.top1:.1%} the same" if self.top1 is not None and self.sqnr_db is None else "",
            f"another shape on {self.reshaped} samples" if self.reshaped else "",
        ]
        return f"{self.name} " + ", ".join(filter(None, said))


@dataclass(frozen=True)
class SideBySide:
    """Two graphs."""

    outputs: tuple[OutputDifference, ...]
    """In the graph's order."""
    samples: int
    """How many were run."""
    float_ms: float | None
    """Median time of one sample through the float graph, runs of both taking turns; None for large graphs."""
    quantized_ms: float | None
    """The same of the other."""

    def below(self, least_db: float) -> list[OutputDifference]:
        """Outputs with less signal than that, or not finite where the float graph is; none where it is 0."""
        if least_db == 0:
            return []
        return [o for o in self.outputs if not o.finite or (o.sqnr_db is not None and o.sqnr_db < least_db)]

    def __str__(self) -> str:
        """One line for people: the worst outputs first, three of them."""
        ordered = sorted(self.outputs, key=lambda o: (o.finite, MOST_DB if o.sqnr_db is None else o.sqnr_db))
        more = f" and {len(ordered) - 3} outputs above" if len(ordered) > 3 else ""
        said = f"beside the float graph on {self.samples} samples: {'; '.join(map(str, ordered[:3]))}{more}"
        if self.float_ms is None or self.quantized_ms is None:
            return said
        ratio = self.quantized_ms / self.float_ms
        slower = ", slower here" if self.slower else ""
        return f"{said}; {self.quantized_ms:.3g} ms, float {self.float_ms:.3g} ms ({ratio:.2f}x{slower})"

    @property
    def slower(self) -> bool:
        """Whether the other graph takes longer than the float graph by more than such short runs differ anyway."""
        return self.float_ms is not None and self.quantized_ms is not None and self.quantized_ms > 1.05 * self.float_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def run_side_by_side(
    source: Path,
    made: Path,
    feeds: Sequence[Feed],
    *,
    turn: Turn | None = None,
    turned: Collection[str] = (),
) -> SideBySide:
    """Runs samples through both graph files.

    Args:
        source: The float graph.
        made: What became of it.
        feeds: Samples by input name, as the float graph takes them.
        turn: Makes a sample for `made` of one for `source`; None where both take the same.
        turned: Outputs of `made` whose channels stand at the end, where `source` has them on axis 1.

    Raises:
        InputError: the float graph does not run on these samples.
        GraphRunError: the other one does not load, or does not run.
    """
    run = FloatRun(source, feeds, turn=turn, turned=turned)
    return run.timed(run.beside(made))


class FloatRun:
    """A float graph, run once on samples: what graphs that were made of it are held against."""

    def __init__(self, source: Path, feeds: Sequence[Feed], *, turn: Turn | None = None, turned: Collection[str] = ()):
        """Runs it; see `run_side_by_side` for the arguments.

        Its outputs are kept for as many samples as memory is meant for them, the first at least.
        """
        self._turn, self._turned = turn or (lambda feed: feed), turned
        session = _open_source(source)
        self._names, self._scored = [str(o.name) for o in session.get_outputs()], _scored(source)
        self._expected: list[dict[str, Any]] = []
        kept = 0
        for feed in feeds:
            values = _run(session, feed, InputError)
            kept += sum(array.nbytes for value in values.values() for array in _arrays(value))
            if self._expected and kept > _KEPT_BYTES:
                break
            self._expected.append(values)
        self._feeds = feeds[: len(self._expected)]
        large = sum(p.stat().st_size for p in source.parent.glob(source.name + "*")) > _TOGETHER_BYTES
        self._session = None if large else session
        self._found: ort.InferenceSession | None = None

    def beside(self, made: Path, *, optimized: bool = True) -> SideBySide:
        """Runs the samples through another graph, `optimized` as users open it, and compares; no times are taken.

        Raises:
            GraphRunError: it does not load, or does not run.
        """
        self._found = None
        found = _open(made, GraphRunError, optimized=optimized)
        sums = {name: _Sums(name in self._scored) for name in self._names}
        for feed, values in zip(self._feeds, self._expected, strict=True):
            _add(sums, values, _run(found, self._turn(feed), GraphRunError), self._turned)
        if self._session is not None:
            self._found = found
        return SideBySide(tuple(s.difference(n) for n, s in sums.items()), len(self._feeds), None, None)

    def timed(self, compared: SideBySide) -> SideBySide:
        """The same with the times of both graphs, where neither is large; of what `beside` ran last."""
        if self._session is None or self._found is None:
            return compared
        times = timed((self._session, self._found), (self._feeds[0], self._turn(self._feeds[0])))
        return replace(compared, float_ms=times[0], quantized_ms=times[1])


def decibels(signal: float, noise: float) -> float:
    """10 log10 of a ratio, within what is said."""
    if noise <= signal * 10 ** (-MOST_DB / 10):
        return MOST_DB
    if signal <= 0 or not math.isfinite(noise):
        return -MOST_DB
    return max(-MOST_DB, 10 * (math.log10(signal) - math.log10(noise)))  # their ratio may be too small for a float


class _Sums:
    """One output, sample by sample."""

    def __init__(self, scored: bool):
        self._scored = scored
        self._signal = self._noise = self._largest = 0.0
        self._rows = self._same = self._reshaped = 0
        self._floats, self._finite, self._nan = False, True, False

    def add(self, expected: np.ndarray, found: np.ndarray) -> None:
        """One array of both graphs."""
        if expected.shape != found.shape:
            self._reshaped += 1
            return
        if expected.dtype.kind != "f":
            self._rows, self._same = self._rows + expected.size, self._same + int((expected == found).sum())
            return
        self._floats = True
        one, other = expected.astype(np.float64), found.astype(np.float64)
        finite = np.isfinite(one)
        self._nan |= bool(np.isnan(one).any())
        self._finite &= bool(np.isfinite(other[finite]).all())
        if not self._finite:
            return
        difference = other[finite] - one[finite]
        self._signal += float(np.square(one[finite]).sum())
        self._noise += float(np.square(difference).sum())
        self._largest = max(self._largest, float(np.abs(difference).max(initial=0.0)))
        if self._scored and one.ndim > 1 and one.shape[-1] > 1 and one.size:
            best = one.reshape(-1, one.shape[-1]).argmax(1) == other.reshape(-1, one.shape[-1]).argmax(1)
            self._rows, self._same = self._rows + best.size, self._same + int(best.sum())

    def difference(self, name: str) -> OutputDifference:
        """What came of it."""
        ratio = decibels(self._signal, self._noise) if self._floats else None
        top1 = self._same / self._rows if self._rows else None
        return OutputDifference(name, ratio, self._largest, top1, self._finite, self._reshaped, self._nan)


def _add(
    sums: Mapping[str, _Sums], expected: Mapping[str, Any], found: Mapping[str, Any], turned: Collection[str]
) -> None:
    for name, total in sums.items():
        one, other = list(_arrays(expected[name])), list(_arrays(found[name]))
        if name in turned:
            other = [np.moveaxis(a, -1, 1) for a in other]
        if len(one) != len(other):
            total.add(np.zeros(len(one)), np.zeros(len(other)))
            continue
        for a, b in zip(one, other, strict=True):
            total.add(a, b)


def _arrays(value: Any) -> Iterator[np.ndarray]:
    """The arrays of an output: itself, or those of a sequence, a map or an optional one."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _arrays(item)
    elif value is not None:
        yield np.asarray(value)


def _open_source(path: Path) -> ort.InferenceSession:
    """The float graph; onnxruntime takes none whose shapes or empty tensors lie in the data file."""
    try:
        return _open(path, InputError)
    except InputError:
        model = open_graph(path)
        if not data_files(model):
            raise
    for value in (v for graph in model.graphs() for v in graph.initializers.values()):
        stored = value.const_value
        if isinstance(stored, ir.ExternalTensor) and stored.nbytes <= INLINE_BYTES:
            value.const_value = ir.Tensor(np.array(stored.numpy()), name=value.name)
    return graph_session(model, path.parent)


def _open(path: Path, error: type[InputError], *, optimized: bool = True) -> ort.InferenceSession:
    size = path.stat().st_size + sum(p.stat().st_size for p in path.parent.glob(path.name + ".*"))
    # else weights are held twice
    return open_session(path, optimized=optimized, prepacked=size <= _TOGETHER_BYTES, what=path.name, error=error)


def _run(session: ort.InferenceSession, feed: Feed, error: type[InputError]) -> dict[str, Any]:
    names = [o.name for o in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, feed), strict=True))
    except Exception as problem:  # onnxruntime raises types of its own
        raise error(f"the graph does not run: {first_line(problem)}") from problem


def timed(sessions: Sequence[ort.InferenceSession], feeds: Sequence[Feed]) -> tuple[float, float]:
    """Medians in ms of runs that take turns, so that whatever else the machine does meets both."""
    taken: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    while len(taken[0]) < _MOST_TIMED and (len(taken[0]) < 3 or time.perf_counter() - begin < _TIMED_SECONDS):
        for session, feed, times in zip(sessions, feeds, taken, strict=True):
            started = time.perf_counter()
            session.run(None, feed)
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken[0]), statistics.median(taken[1])


def _scored(path: Path) -> set[str]:
    """Outputs whose last axis is a score: made by a Softmax or a product, through operators that only shape it."""
    found = set()
    for output in open_graph(path).graph.outputs:
        node, steps = output.producer(), 0
        while node is not None and node.op_type in _SHAPE_ONLY and steps < 8:
            source = next((v for v in node.inputs if v is not None and v.producer() is not None), None)
            node, steps = source.producer() if source is not None else None, steps + 1
        if node is not None and node.op_type in _SCORES and output.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            found.add(str(output.name))
    return found
