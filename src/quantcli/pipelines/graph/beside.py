"""Runs a written graph beside the float one, and leaves nodes float until its outputs hold.

What onnxruntime cannot open or run loses the node that it names; where an output falls below the limit, the nodes that
lose most go back to float, as few as a search of bounded length finds. Nothing is kept that does not hold.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from quantcli.data.graph_inputs import Samples
from quantcli.errors import InputError, QualityError, UsageError
from quantcli.graphs.checking.side_by_side import FloatRun, GraphRunError, SideBySide, Turn
from quantcli.graphs.model.files import Model, open_graph
from quantcli.graphs.model.finite import name_not_finite
from quantcli.graphs.model.inputs import Feed
from quantcli.graphs.model.made_inputs import sample_inputs
from quantcli.graphs.model.session import open_session
from quantcli.pipelines.graph.source import GraphSource, axis_lengths
from quantcli.progress import Progress

__all__ = ["Beside", "FloatGraph", "Gate", "Held", "Limit", "hold_outputs"]

_SAMPLES = 8
_ATTEMPTS = 12
"""Of leaving fewer nodes float, once it holds: each writes the graph once more."""
Made = TypeVar("Made")


@dataclass(frozen=True)
class Gate:
    """What else a written graph must reach, as far as nodes in float get it there."""

    missing: Callable[[Path], str | None]
    """Judges a graph file: what it comes to where that is too little, else None."""
    words: str
    """What it must reach."""


@dataclass(frozen=True)
class Limit:
    """What a written graph must reach."""

    least_db: float
    """Least signal to quantization noise of every output; 0 takes what comes."""
    gate: Gate | None = None
    """A figure of its own, asked where the outputs hold."""
    written: Path = Path()
    """The graph's file."""

    def wanting(self, found: SideBySide | None) -> tuple[list[str], str]:
        """What is too little, none where all holds; and the limit."""
        below = found.below(self.least_db) if found is not None else []
        if below:
            return [f"output {output}" for output in below], f"{self.least_db:g} dB (--min-sqnr)"
        missing = self.gate.missing(self.written) if self.gate is not None else None
        return ([missing], self.gate.words) if missing is not None and self.gate is not None else ([], "")


@dataclass(frozen=True)
class Held(Generic[Made]):
    """A graph whose outputs hold."""

    made: Made
    """What the last attempt returned."""
    outputs: SideBySide | None
    """How far off its outputs are; None where they could not be compared."""
    returned: dict[str, str]
    """Nodes that went back to float, with the reason."""


class FloatGraph(Protocol):
    """Where the float graph lies; a plan is one."""

    @property
    def source(self) -> GraphSource:
        """The file and what belongs to it."""
        ...

    @property
    def model(self) -> Model:
        """The graph in it, opened."""
        ...


class Beside:
    """The float graph and samples for it."""

    def __init__(
        self,
        plan: FloatGraph,
        samples: Samples | None,
        progress: Progress,
        turn: Turn | None = None,
        turned: Collection[str] = (),
    ):
        """Samples are read, or made of what the graph says of its inputs.

        Args:
            plan: Says where the float graph lies.
            samples: Calibration inputs, of which the first are run; None where there are none.
            progress: Told why the outputs cannot be compared.
            turn: Makes a sample for the written graph of one for the float graph; None where both take the same.
            turned: Outputs of the written graph with their channels at the end.
        """
        self._source, self._turn, self._outputs, self._progress = plan.source.path, turn, turned, progress
        self._feeds: list[Feed] = []
        self._float: FloatRun | None = None
        self._told = False
        try:
            self._feeds = (
                list(islice(samples, _SAMPLES))
                if samples is not None
                else sample_inputs(plan.model, plan.source.folder, axis_lengths(plan.source), _SAMPLES)
            )
        except InputError as error:
            progress.warn(f"the outputs are not compared with the float graph's: {error.message}")

    @property
    def feeds(self) -> list[Feed]:
        """The samples; none where nothing can be compared."""
        return self._feeds

    def turned(self, feed: Feed) -> Feed:
        """A sample as the written graph takes it."""
        return feed if self._turn is None else self._turn(feed)

    def run(self, written: Path, *, optimized: bool = True) -> SideBySide | None:
        """How far off the outputs of a written graph are; None without samples.

        Raises:
            GraphRunError: it does not load or run.
        """
        if self._feeds and self._float is None:
            try:
                self._float = FloatRun(self._source, self._feeds, turn=self._turn, turned=self._outputs)
            except InputError as error:
                self._feeds = []
                self._progress.warn(f"the outputs are not compared with the float graph's: {error.message}")
        if self._float is None:
            # not onnx.checker, which refuses what GenAI has of onnxruntime's own operators in the standard's domain
            open_session(written, optimized=optimized, what="the quantized graph", error=GraphRunError)
            return None
        found = self._float.beside(written, optimized=optimized)
        lost = [o.name for o in found.outputs if o.float_nan]
        if lost and not self._told:
            self._told = True
            named = name_not_finite(open_graph(self._source))
            why = f": weight {named!r} holds NaN or infinite values" if named is not None else ""
            self._progress.warn(f"output {lost[0]} of the float graph itself is not a number on these samples{why}")
        return found

    def timed(self, found: SideBySide | None) -> SideBySide | None:
        """What the last run found, with the times of both graphs."""
        return found if found is None or self._float is None else self._float.timed(found)


def hold_outputs(
    attempt: Callable[[tuple[str, ...]], Made],
    run: Callable[[], SideBySide | None],
    names: Callable[[Made], Collection[str]],
    ranked: Callable[[Made, tuple[str, ...]], Sequence[str]],
    limit: Limit,
    progress: Progress,
) -> Held[Made]:
    """Makes a graph, and makes it again with more nodes in float until it runs and its outputs hold.

    Args:
        attempt: Writes the graph without the named nodes.
        run: Runs what was written beside the float graph.
        names: The nodes that an attempt quantized.
        ranked: The same, those that cost most first; given what was made, and what is float already.
        limit: What it must reach. Where nodes in float do not get it past its gate, the graph stays as it was.
        progress: Told of every node that goes back to float.

    Raises:
        GraphRunError: the graph does not run, and onnxruntime names no node.
        QualityError: an output stays below the limit whatever nodes are float.
    """
    returned: dict[str, str] = {}
    quantized: Collection[str] = ()
    while True:
        try:
            made = attempt(tuple(returned))
            quantized = names(made)
            found = run()
            break
        except GraphRunError as error:
            left = {*error.nodes, *quantized} - set(returned)
            name = _named(error.message, left) if len(left) > 1 else None
            if name is None:
                raise
            returned[name] = error.message
            progress.warn(f"{name} stays float: {error.message}")
    held = Held(made, found, returned)
    held = _reach(held, attempt, run, ranked, replace(limit, gate=None), progress)
    return held if limit.gate is None else _reach(held, attempt, run, ranked, limit, progress)


def _reach(
    held: Held[Made],
    attempt: Callable[[tuple[str, ...]], Made],
    run: Callable[[], SideBySide | None],
    ranked: Callable[[Made, tuple[str, ...]], Sequence[str]],
    limit: Limit,
    progress: Progress,
) -> Held[Made]:
    """The graph with as many more nodes in float as the limit takes; arguments as of `hold_outputs`."""
    returned = held.returned
    wanting, bound = limit.wanting(held.outputs)
    if not wanting:
        return held
    progress.note(f"{'; '.join(wanting)}, the limit is {bound}; nodes go back to float")
    order = [name for name in ranked(held.made, tuple(returned)) if name not in returned]
    with progress.track("Nodes back to float", _ATTEMPTS) as task:

        def holds(some: Sequence[str]) -> Outcome[Made] | None:
            task.advance(detail=f"{len(some)} of {len(order)}")
            return _holds(attempt, run, (*returned, *some), limit)

        good = _least(order, holds)
    if good is None and limit.gate is not None:
        progress.warn(f"{wanting[0]}, the goal is {bound}: nodes in float do not get it there")
        return replace(held, made=attempt(tuple(returned)), outputs=run())
    if good is None:
        raise QualityError(
            f"{wanting[0]}, below {limit.least_db:g} dB, also with nodes in float",
            hint="use more bits or --nodes-exclude; --min-sqnr 0 keeps it as it is",
        )
    for name in good[0]:
        returned[name] = f"with its like in integers, {wanting[0]}"
    few = ", ".join(good[0][:5]) + (f" and {len(good[0]) - 5} more" if len(good[0]) > 5 else "")
    progress.warn(f"{few} stay float: with them {wanting[0].removeprefix('output ')}, the limit is {bound}")
    return Held(good[1][0], good[1][1], returned)


Outcome = tuple[Made, SideBySide | None]


def _holds(
    attempt: Callable[[tuple[str, ...]], Made],
    run: Callable[[], SideBySide | None],
    excluded: tuple[str, ...],
    limit: Limit,
) -> Outcome[Made] | None:
    try:
        made = attempt(excluded)
        found = run()
    except (InputError, UsageError):  # nothing is left to quantize, or it does not run either
        return None
    return None if limit.wanting(found)[0] else (made, found)


def _least(
    order: Sequence[str], holds: Callable[[Sequence[str]], Outcome[Made] | None]
) -> tuple[Sequence[str], Outcome[Made]] | None:
    """A small set with which it holds, tried last: the shortest beginning of the order, less what it holds without."""
    found: Outcome[Made] | None = None
    tried = order[:0]
    failed, count = 0, 1
    while found is None and count < len(order):
        tried = order[:count]
        found = holds(tried)
        failed, count = (failed, count) if found is not None else (count, 2 * count)
    some = order[:count]
    while len(some) - failed > 1:
        tried = order[: (failed + len(some)) // 2]
        better = holds(tried)
        if better is None:
            failed = len(tried)
        else:
            some, found = tried, better
    left, size = _ATTEMPTS, (len(some) + 1) // 2
    while size and left > 0:
        for start in range((len(some) - 1) // size * size, -1, -size):  # from the end: what is lost there is least
            fewer = [*some[:start], *some[start + size :]]
            if not fewer or len(fewer) == len(some) or left <= 0:
                continue
            left, tried = left - 1, fewer
            better = holds(fewer)
            if better is not None:
                some, found = fewer, better
        size //= 2
    if found is not None and list(tried) != list(some):  # what lies on disk is the last attempt
        found = holds(some)
    return None if found is None else (some, found)


def _named(message: str, names: Collection[str]) -> str | None:
    """The quantized node that an error of onnxruntime names, by its own name or by that of a node made of it."""
    found = (n for n in names if n and re.search(rf"(?<![\w./]){re.escape(n)}(?:(?![\w./])|_[A-Za-z])", message))
    return max(found, key=len, default=None)
