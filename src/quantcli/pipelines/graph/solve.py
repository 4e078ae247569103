"""The matrices of a graph, stage by stage: moments of the stage's tensors, a scale where one helps, codes."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from quantcli.algorithms import Step, find
from quantcli.errors import InputError
from quantcli.graphs.calibration.partition_runs import Stream
from quantcli.graphs.calibration.second_moments import InputMoments, KeptMoments, collect_moments, combine
from quantcli.graphs.model.files import LazyTensor, Model
from quantcli.graphs.walk.folds import find_graph_folds
from quantcli.graphs.walk.matrices import GraphTarget, other_matrix, read_matrix
from quantcli.models.machine import Heap
from quantcli.pipelines.blockwise.solve import solve_linears
from quantcli.pipelines.graph.feeds import Feeds
from quantcli.pipelines.graph.scaling import GraphScaling
from quantcli.pipelines.graph.stages import Room, plan_stages
from quantcli.pipelines.planning.target import Target
from quantcli.progress import Progress
from quantcli.report.layer import LayerReport
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["GraphWork", "solve_graph"]


@dataclass(frozen=True)
class GraphWork:
    """What is to be done."""

    model: Model
    """The float graph, as `walk.prepare` left it."""
    folder: Path
    """Where its external data lies."""
    found: Sequence[GraphTarget]
    """The matrices, in the order in which the graph reads them."""
    targets: Mapping[str, Target]
    """Each with its scheme."""
    step: Step
    """The rounder."""
    scaling: Step | None = None
    """What scales tensors before."""
    must_scale: bool = True
    """Whether a graph in which that can scale nothing is refused."""
    layer_wise: bool = False
    """Whether each matrix sees what the quantized ones before it make of the inputs, and corrects their error."""
    room: Room = field(default_factory=Room)
    """What calibration may hold in memory."""
    kept: Path | None = None
    """A folder in which the statistics of the float graph stay for other runs on the same samples."""


def solve_graph(
    work: GraphWork, feeds: Feeds | None, progress: Progress, *, spill: Path, held_out_step: int = 0
) -> tuple[dict[str, QuantizedTensor], list[LayerReport]]:
    """Quantizes the matrices; where tensors are scaled, what makes them is divided in the graph itself.

    Args:
        work: Which ones, and how.
        feeds: Calibration inputs; None for rounders without data.
        progress: Told of each matrix.
        spill: A folder for what calibration cannot hold in memory; left empty.
        held_out_step: Every so many batches one is held out; 0 for none.

    Returns:
        Codes by name, and a report on each matrix.

    Raises:
        InputError: a matrix or the calibration inputs cannot be read or run.
    """
    solver = _Solver(work, progress)
    by_inputs: dict[tuple[str, ...], list[GraphTarget]] = defaultdict(list)
    for target in work.found:
        by_inputs[target.inputs if feeds is not None else ()].append(target)
    with progress.track("Quantizing", len(work.found)) as task, TemporaryDirectory(dir=spill) as folder:

        def solve(members: Sequence[GraphTarget], seen: Sequence[InputMoments], spent: bool = False) -> None:
            solver.solve(members, seen, spent)
            for target in members:
                task.advance(detail=target.name)

        for target in by_inputs.pop((), []):  # nothing is seen of tables and kernels, nor of anything without inputs
            solve([target], [])
        if feeds is not None and by_inputs:
            _calibrate(work, feeds, by_inputs, solver, solve, held_out_step, Path(folder), progress)
    if solver.scaling is not None:
        solver.scaling.apply()
    return solver.results, [solver.reports[t.name] for t in work.found]


def _calibrate(
    work: GraphWork,
    feeds: Feeds,
    by_inputs: dict[tuple[str, ...], list[GraphTarget]],
    solver: "_Solver",
    solve: Callable[[Sequence[GraphTarget], Sequence[InputMoments], bool], None],
    held_out_step: int,
    folder: Path,
    progress: Progress,
) -> None:
    """Runs the graph step by step, and solves each matrix once all that it is multiplied with was seen."""
    planned = plan_stages(
        work.model.graph, work.found, work.room, layer_wise=work.layer_wise, held_out=held_out_step > 0
    )
    moments = KeptMoments(None if work.layer_wise else work.kept, held_out_step)
    known = all(moments.has(name) for name in planned.widths)
    room = work.room.kept_bytes // (2 if work.layer_wise else 1)
    spills = [folder / name for name in ("stream", "float")]
    for path in spills:
        path.mkdir()
    stream = Stream(work.model, work.folder, feeds, planned.names, room_bytes=room, spill=spills[0], progress=progress)
    reference: Stream | None = None

    def change(targets: Iterable[GraphTarget]) -> None:
        late = [t.name for t in targets if stream.change(t, solver.effective(t))]
        if late:
            named = " and ".join(late[:2]) + (f" and {len(late) - 2} others" if len(late) > 2 else "")
            progress.note(f"{named}: read at several steps, the graph is run from its beginning once more")

    if work.layer_wise and solver.results:
        reference = stream.fork(spills[1])
        change(t for t in work.found if t.name in solver.results)
    heap = Heap()
    seen: dict[str, InputMoments] = {}
    for number, stage in enumerate(planned.names):
        widths = {name: planned.widths[name] for name in stage}
        if known:
            seen |= {name: moments.read(name) for name in stage}
        else:
            found = collect_moments(stream, number, widths, held_out_step, reference)
            moments.write(found)
            seen |= found
        heap.watch()  # what the session has left
        last = number == len(planned.names) - 1
        for inputs in [key for key in by_inputs if set(key) <= set(seen)]:
            members = by_inputs.pop(inputs)
            waiting = {name for key in by_inputs for name in key}
            solve(members, [seen[name] for name in inputs], waiting.isdisjoint(inputs))
            for name in set(inputs) - waiting:
                del seen[name]
            heap.watch()
            if work.layer_wise and not last:
                reference = reference or stream.fork(spills[1])  # the float graph, before the first change
                change(members)


class _Solver:
    """Matrices that share their inputs, one run after the other."""

    def __init__(self, work: GraphWork, progress: Progress):
        self._work, self._progress = work, progress
        self.results: dict[str, QuantizedTensor] = {}
        self.reports: dict[str, LayerReport] = {}
        self._scales: dict[str, Tensor] = {}
        self.scaling = None
        if work.scaling is not None:
            folds = find_graph_folds(work.model, work.found)
            self.scaling = GraphScaling(work.model.graph, work.scaling, folds)
            inputs = {name for t in work.found for name in t.inputs}
            if not folds and work.must_scale:
                raise InputError(
                    f"{work.scaling.algorithm.name} can scale none of the graph's {len(inputs)} tensors: what"
                    " makes them cannot be divided",
                    hint=f"use -a {work.step.algorithm.name}",
                )
            progress.note(f"{work.scaling.algorithm.name} can scale {len(folds)} of {len(inputs)} tensors")

    def solve(self, members: Sequence[GraphTarget], seen: Sequence[InputMoments], spent: bool = False) -> None:
        """Quantizes matrices that read the same tensors; `spent`: nobody else asks for their moments."""
        work, statistics = self._work, combine(seen, spent=spent)
        algorithm, settings = work.step.algorithm, work.step.settings
        if statistics is None and algorithm.calibration == "required":
            algorithm = find("kquant")
            settings = algorithm.options()
            why = "no calibration input reaches it" if members[0].inputs else members[0].unseen
            self._progress.warn(f"{members[0].name} is quantized by kquant, without data: {why}")
        weights = {t.name: torch.from_numpy(read_matrix(work.model.graph, t)) for t in members}
        targets = [work.targets[t.name] for t in members]
        scale = None
        if self.scaling is not None and statistics is not None and len(seen) == 1:
            schemes = [t.scheme for t in targets]
            quantized = frozenset(work.targets)
            scale = self.scaling.scale(
                members[0].inputs[0], list(weights.values()), schemes, statistics, self.results, quantized
            )
        made, said = solve_linears(targets, weights, algorithm, settings, statistics, scale)
        if scale is not None:
            self._scales |= dict.fromkeys(made, scale)
        self.results |= made
        self.reports |= {report.name: report for report in said}

    def effective(self, target: GraphTarget) -> LazyTensor:
        """A finished matrix as it acts on inputs that are not scaled, whatever is folded into it later."""
        solved, scale = self.results[target.name], self._scales.get(target.name)

        def read() -> np.ndarray:
            values = solved.dequantize()
            return (values if scale is None else values / scale).numpy()

        return other_matrix(self._work.model.graph, target, read)
