"""The matrices of a graph, stage by stage: moments of the stage's tensors, a scale where one helps, codes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from quantcli.algorithms import Step, find
from quantcli.errors import InputError
from quantcli.graphs.collect import InputMoments, collect_moments, combine, levels_of, stages_of
from quantcli.graphs.files import Model
from quantcli.graphs.folds import find_graph_folds
from quantcli.graphs.walk import GraphTarget, read_matrix, write_matrix
from quantcli.pipelines.blockwise.solve import LayerReport, solve_linears
from quantcli.pipelines.graph.feeds import Feeds
from quantcli.pipelines.graph.scaling import GraphScaling
from quantcli.pipelines.planning.plan import Target
from quantcli.progress import Progress
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


def solve_graph(
    work: GraphWork, feeds: Feeds | None, progress: Progress, *, memory_bytes: int, held_out_step: int = 0
) -> tuple[dict[str, QuantizedTensor], list[LayerReport]]:
    """Quantizes the matrices; where tensors are scaled, what makes them is divided in the graph itself.

    Args:
        work: Which ones, and how.
        feeds: Calibration inputs; None for rounders without data.
        progress: Told of each matrix.
        memory_bytes: What Hessians may take together.
        held_out_step: Every so many batches one is held out; 0 for none.

    Returns:
        Codes by name, and a report on each matrix.

    Raises:
        InputError: a matrix or the calibration inputs cannot be read or run.
    """
    solver = _Solver(work, progress)
    by_inputs: dict[tuple[str, ...], list[GraphTarget]] = defaultdict(list)
    for target in work.found:
        by_inputs[target.inputs if feeds is not None else (target.name,)].append(target)
    widths = {name: t.columns for t in work.found for name in t.inputs}
    levels = levels_of(work.model.graph, work.found) if work.layer_wise else [list(widths)]
    room = memory_bytes // 2 if work.layer_wise else memory_bytes  # a second matrix of moments beside each
    cut = [stages_of({name: widths[name] for name in level}, room) for level in levels]
    stages = [stage for part in cut for stage in part] if feeds is not None else [[]]
    current = work.model.clone() if work.layer_wise else work.model
    seen: dict[str, InputMoments] = {}
    with progress.track("Quantizing", len(work.found)) as task:
        for stage in stages:
            if feeds is not None:
                wanted = {name: widths[name] for name in stage}
                reference = work.model if work.layer_wise and solver.results else None
                seen |= collect_moments(current, work.folder, wanted, feeds, held_out_step, reference)
            for inputs in [key for key in by_inputs if feeds is None or set(key) <= set(seen)]:
                members = by_inputs.pop(inputs)
                solver.solve(members, [seen[name] for name in inputs] if feeds is not None else [])
                for target in members:
                    task.advance(detail=target.name)
                    if work.layer_wise:
                        write_matrix(current.graph, target, solver.effective(target.name))
            waiting = {name for key in by_inputs for name in key}
            seen = {name: moments for name, moments in seen.items() if name in waiting}
    if solver.scaling is not None:
        solver.scaling.apply()
    return solver.results, [solver.reports[t.name] for t in work.found]


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

    def solve(self, members: Sequence[GraphTarget], seen: Sequence[InputMoments]) -> None:
        """Quantizes matrices that read the same tensors, of which moments were seen."""
        work, statistics = self._work, combine(seen)
        algorithm, settings = work.step.algorithm, work.step.settings
        if statistics is None and algorithm.calibration == "required":
            algorithm = find("kquant")
            settings = algorithm.options()
            why = "no calibration input reaches it" if members[0].inputs else "it is a table or a kernel"
            self._progress.warn(f"{members[0].name} is quantized by kquant, without data: {why}")
        weights = {t.name: read_matrix(work.model.graph, t) for t in members}
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

    def effective(self, name: str) -> Tensor:
        """A finished matrix [N, K] as it acts on inputs that are not scaled."""
        values = self.results[name].dequantize()
        return values / self._scales[name] if name in self._scales else values
