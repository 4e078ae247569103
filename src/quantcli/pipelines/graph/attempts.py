"""The quantizer of a whole graph, run once or again with more nodes in float, on ranges that are measured once."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quantcli.data.graph_inputs import Samples
from quantcli.errors import InputError, UsageError
from quantcli.graphs.activations.nodes import IntegerGraph
from quantcli.graphs.checking.compare import NodeError
from quantcli.graphs.checking.side_by_side import timed
from quantcli.graphs.model.inputs import input_specs
from quantcli.graphs.model.session import open_session
from quantcli.graphs.rewrite.channel_last import turn_feed
from quantcli.pipelines.graph.beside import Beside
from quantcli.pipelines.graph.feeds import describe_feeds
from quantcli.pipelines.graph.plan import GraphPlan
from quantcli.progress import Progress

__all__ = ["Attempts", "Files", "again"]

_FASTER = 0.97
"""Share of the time below which a graph counts as faster."""
_TURNED = ("inputs_to_make_channel_last", "outputs_to_make_channel_last")


@dataclass(frozen=True)
class Files:
    """What the quantizer reads and writes."""

    float_graph: Path
    """After all transforms."""
    written: Path
    """The graph of integers."""
    ranges: Path
    """Measured once, where the user names no cache."""


class Attempts:
    """The quantizer, run once or again with more nodes in float, on ranges that are measured once."""

    def __init__(
        self,
        plan: GraphPlan,
        files: Files,
        samples: Samples | None,
        progress: Progress,
        kept: Path | None = None,
    ):
        """Nothing is written yet; `kept`: a folder in which ranges stay for other runs."""
        self._plan, self._files, self._samples = plan, files, samples
        self._progress, self._settings = progress, plan.step.settings
        cache = plan.options.graph.calibration_cache
        uses_none = plan.step.algorithm.calibration == "none"
        own = files.ranges if kept is None or plan.transforms else _kept_ranges(plan, kept)
        self._ranges = cache if cache is not None or uses_none else own
        inputs, outputs = (tuple(getattr(plan.step.settings, name, ())) for name in _TURNED)
        self.beside = Beside(plan, samples, progress, lambda feed: turn_feed(feed, inputs), outputs)

    @property
    def plan(self) -> GraphPlan:
        """With the settings of the attempts as they are now."""
        return replace(self._plan, step=replace(self._plan.step, settings=self._settings))

    def attempt(self, excluded: Sequence[str], compares: bool | None = None) -> IntegerGraph:
        """Writes the graph, with these nodes in float."""
        graph = self._plan.options.graph
        settings = replace(self._settings, nodes_exclude=(*self._settings.nodes_exclude, *map(_exactly, excluded)))
        compares = graph.debug_activations if compares is None else compares
        made: IntegerGraph = self._plan.step.algorithm.run(
            self._files.float_graph, self._files.written, settings, self._reader(compares), self._ranges, compares
        )
        if excluded and not made.quantized:
            raise InputError(f"no node with a weight is left to quantize: {', '.join(excluded[:8])} stay float")
        return made

    def exclude_worst(self) -> tuple[str, ...]:
        """What --exclude-worst leaves float, from here on in every attempt."""
        count = self._plan.options.graph.exclude_worst
        if not count:
            return ()
        made = self.attempt((), compares=True)
        assert made.comparison is not None
        excluded = _worst(made.comparison.nodes, count)
        self._exclude(excluded)
        self._progress.note(f"once more without {', '.join(excluded)}")
        return excluded

    def take_faster(self) -> tuple[str, ...]:
        """What --faster changes, from here on in every attempt: int8 weights, and kinds of nodes that stay float.

        Returns:
            Nodes that stay float. Each change is timed beside the graph without it.
        """
        if not self.beside.feeds:
            raise UsageError("--faster times the graph, no input can be made for it", hint="add --calibration-inputs")
        kinds: dict[str, list[str]] = defaultdict(list)
        for name, kind in self.attempt(()).nodes.items():
            kinds[kind].append(name)
        slow: list[str] = []
        said: list[str] = []
        best = open_session(self._files.written)
        with self._progress.track("Timing", len(kinds) + 1) as task:
            best = self._take_int8(best)
            task.advance(detail="int8 weights")
            for kind, names in kinds.items():
                other = self._session((*slow, *names))
                if other is not None and (times := self._faster(best, other)):
                    best, slow = other, [*slow, *names]
                    said.append(f"{len(names)} {kind} ({times})")
                task.advance(detail=kind)
        self._progress.note(f"faster in float: {', '.join(said) or 'no kind of node'}")
        self._exclude(slow)
        return tuple(slow)

    def _take_int8(self, best: Any) -> Any:
        """The faster of two sessions: weights of uint8, or of int8 on that grid; as they are where one was asked."""
        asked = self._plan.options.settings.get("weight_type") is not None or self._plan.options.bits is not None
        if asked or getattr(self._settings, "weight_type", None) != "uint8":
            return best
        grid = "asym" if self._settings.weight_grid == "auto" else self._settings.weight_grid
        before, self._settings = self._settings, replace(self._settings, weight_type="int8", weight_grid=grid)
        other = self._session(())
        times = self._faster(best, other) if other is not None else ""
        if not times:
            self._settings = before
            return best
        self._progress.note(f"faster with int8 weights: {times}")
        return other

    def _faster(self, best: Any, other: Any) -> str:
        """Both times where the second session is faster than the first, empty where it is not."""
        feed = self.beside.turned(self.beside.feeds[0])
        before, after = timed((best, other), (feed, feed))
        return f"{before:.3g} to {after:.3g} ms" if after < _FASTER * before else ""

    def _session(self, excluded: Sequence[str]) -> Any:
        """The graph with these nodes in float, opened; None where that cannot be made."""
        try:
            self.attempt(excluded)
        except (InputError, UsageError):
            return None
        return open_session(self._files.written)

    def ranked(self, made: IntegerGraph, returned: Sequence[str]) -> list[str]:
        """Nodes by what their own rounding costs, the most first; those of which that is not known at the end."""
        try:
            compared = made.comparison or self.attempt(returned, compares=True).comparison
        except InputError as error:
            self._progress.note(f"what each node loses cannot be measured: {error.message}")
            compared = None
        known = [node.name for node in compared.nodes] if compared is not None else []
        return [*known, *(name for name in made.nodes if name not in known)]

    def _exclude(self, names: Sequence[str]) -> None:
        self._settings = replace(self._settings, nodes_exclude=(*self._settings.nodes_exclude, *map(_exactly, names)))

    def _reader(self, compares: bool) -> Samples | None:
        if self._samples is None and compares and self.beside.feeds:
            feeds = self.beside.feeds
            return Samples(input_specs(self._plan.source.path), lambda: ((feed, "made-up inputs") for feed in feeds))
        return again(self._samples)


_RANGES_ALIKE = ("per_channel", "reduce_range", "weight_type", "weight_grid", "bias_correction")
"""Settings on which ranges do not depend."""


def _kept_ranges(plan: GraphPlan, kept: Path) -> Path:
    """The file of ranges of all runs that measure the same tensors of the same graph on the same samples."""
    settings = {name: v for name, v in asdict(plan.step.settings).items() if name not in _RANGES_ALIKE}
    opset = getattr(plan.step.settings, "opset", None)
    samples = describe_feeds(plan.options, plan.source), asdict(plan.options.calibration)
    digest = hashlib.sha256(repr((settings, opset, samples, plan.source.digest)).encode()).hexdigest()[:16]
    kept.mkdir(parents=True, exist_ok=True)
    return kept / f"ranges-{digest}.json"


def again(samples: Samples | None) -> Samples | None:
    """The samples at their start, where there are any."""
    if samples is not None:
        samples.rewind()
    return samples


def _worst(nodes: Sequence[NodeError], count: int) -> tuple[str, ...]:
    if count >= len(nodes):
        raise UsageError(
            f"--exclude-worst {count} leaves nothing of {len(nodes)} quantized nodes", hint="give a smaller number"
        )
    return tuple(node.name for node in nodes[:count])


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"
