"""`quantcli quantize` on an ONNX graph: weights to codes, in the place where the float weights stood.

The steps: find the matrices, gather second moments where the rounder wants them, solve, rewrite, and read the written
file back. One Hessian per tensor; no more of them at a time than memory takes. Algorithms that take a graph whole,
activations too, run in `graph.whole`.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantcli.algorithms import Step, find
from quantcli.data.graph_inputs import Samples
from quantcli.evaluate.speed import peak_memory
from quantcli.graphs.blocks import container_bits
from quantcli.graphs.collect import InputMoments, collect_moments, combine, stages_of
from quantcli.graphs.files import Graph, Model, open_graph, save_graph
from quantcli.graphs.nbits import Placement
from quantcli.graphs.rewrite import replace_matrices
from quantcli.graphs.verify import verify_weights
from quantcli.graphs.walk import GraphTarget, read_matrix
from quantcli.options import QuantizeOptions
from quantcli.pipelines.blockwise.solve import LayerReport, solve_linears
from quantcli.pipelines.graph.feeds import open_feeds
from quantcli.pipelines.graph.output import GraphResult, commit_graph, open_graph_output
from quantcli.pipelines.graph.plan import GraphPlan, plan_graph, plan_weights
from quantcli.pipelines.graph.whole import plan_whole, quantize_whole
from quantcli.pipelines.planning.plan import HELD_OUT_SHARE, Target
from quantcli.progress import Progress, Silent
from quantcli.tensors.hessian import Statistics
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["run"]

_HESSIAN_BYTES = 2 << 30
"""What Hessians may take together where --max-memory says nothing."""


def run(options: QuantizeOptions, progress: Progress | None = None) -> GraphResult | GraphPlan:
    """Quantizes a graph; with `dry_run`, only the plan.

    Raises:
        UsageError: options that do not apply to graphs, or exclude each other.
        InputError: the graph or its calibration inputs cannot be read or run.
        ResourceError: not enough disk.
    """
    progress = progress or Silent()
    plan = plan_graph(options)
    whole = plan.step.algorithm.kind == "graph"
    plan = plan_whole(plan) if whole else plan_weights(plan)
    if options.dry_run:
        return plan
    progress.plan("Quantize", plan.rows())
    result = quantize_whole(plan, progress) if whole else _quantize_weights(plan, progress)
    return replace(result, evaluation=_evaluate(plan, progress)) if options.evaluate else result


def _evaluate(plan: GraphPlan, progress: Progress) -> Any:
    from quantcli.options import EvaluateOptions
    from quantcli.pipelines import evaluate

    trusted = plan.options.trust_remote_code
    asked = EvaluateOptions(str(plan.options.output), str(plan.source.folder), trust_remote_code=trusted)
    return evaluate.run(asked, progress)


def _quantize_weights(plan: GraphPlan, progress: Progress) -> GraphResult:
    """Weights alone, matrix by matrix; activations stay float."""
    begin, source, model, options = time.perf_counter(), plan.source, plan.model, plan.options
    targets = dict(plan.targets or {})
    with open_graph_output(source, options, int(1.1 * plan.size_bytes)) as partial, peak_memory() as watched:
        feeds = open_feeds(options, model.graph, source, progress) if plan.calibrates else None
        results, reports = _solve(model, source.folder, plan.found, targets, plan.step, feeds, options, progress)
        graph = options.graph
        placements = replace_matrices(
            model, plan.found, results.__getitem__, graph.encoding or "nbits", graph.accuracy_level
        )
        written = partial.model / source.path.name
        save_graph(model, written)
        progress.note("comparing every weight of the graph with what was computed")
        verify_weights(written, placements, results.__getitem__, {t.name: t.rows for t in plan.found})
        stored, weights = _stored_bytes(written, placements), sum(t.rows * t.columns for t in plan.found)
        spare = sum(t.rows * t.columns * (container_bits(t.scheme.bits) - t.scheme.bits) for t in targets.values())
        result = GraphResult(
            output=options.output,
            layers=reports,
            kept=dict(plan.kept or {}),
            size_bytes=0,
            parent_size_bytes=0,
            seconds=time.perf_counter() - begin,
            peak_bytes=watched.above_start_bytes,
            plan=plan.to_dict(),
            bits_per_weight=8 * stored / weights,
            information_bits_per_weight=(8 * stored - spare) / weights,
        )
        return commit_graph(partial, written, source, options, result, progress)


def _stored_bytes(written: Path, placements: Sequence[Placement]) -> int:
    """Of codes, scales and zero points; what several nodes share counts once."""
    initializers = open_graph(written).graph.initializers
    names = {name for p in placements for name in (p.weight, p.scales, p.zeros) if name}
    tensors = [initializers[name].const_value for name in names]
    return sum(t.nbytes for t in tensors if t is not None)


def _solve(
    model: Model,
    folder: Path,
    found: Sequence[GraphTarget],
    targets: Mapping[str, Target],
    step: Step,
    feeds: Samples | None,
    options: QuantizeOptions,
    progress: Progress,
) -> tuple[dict[str, QuantizedTensor], list[LayerReport]]:
    """Stage by stage: moments of the stage's tensors, then every matrix whose inputs have all been seen."""
    results: dict[str, QuantizedTensor] = {}
    reports: dict[str, LayerReport] = {}
    by_inputs: dict[tuple[str, ...], list[GraphTarget]] = defaultdict(list)
    for target in found:
        by_inputs[target.inputs if feeds is not None else (target.name,)].append(target)
    widths = {name: t.columns for t in found for name in t.inputs}
    stages = stages_of(widths, options.max_memory // 2 if options.max_memory else _HESSIAN_BYTES) if feeds else [[]]
    seen: dict[str, InputMoments] = {}
    holds_out = feeds is not None and options.preset == "best" and len(feeds) > 1
    with progress.track("Quantizing", len(found)) as task:
        for stage in stages:
            if feeds is not None:
                held = min(HELD_OUT_SHARE, len(feeds)) if holds_out else 0
                seen |= collect_moments(model, folder, {name: widths[name] for name in stage}, feeds, held)
            for inputs in [key for key in by_inputs if feeds is None or set(key) <= set(seen)]:
                members = by_inputs.pop(inputs)
                statistics = combine([seen[name] for name in inputs]) if feeds is not None else None
                made, said = _solve_together(model.graph, members, targets, step, statistics, progress)
                results |= made
                reports |= {report.name: report for report in said}
                for target in members:
                    task.advance(detail=target.name)
            waiting = {name for key in by_inputs for name in key}
            seen = {name: moments for name, moments in seen.items() if name in waiting}
    return results, [reports[t.name] for t in found]


def _solve_together(
    graph: Graph,
    members: Sequence[GraphTarget],
    targets: Mapping[str, Target],
    step: Step,
    statistics: Statistics | None,
    progress: Progress,
) -> tuple[dict[str, QuantizedTensor], list[LayerReport]]:
    algorithm, settings = step.algorithm, step.settings
    if statistics is None and algorithm.calibration == "required":
        algorithm = find("kquant")
        settings = algorithm.options()
        why = "no calibration input reaches it" if members[0].inputs else "it is a table, which has no input"
        progress.warn(f"{members[0].name} is quantized by kquant, without data: {why}")
    weights = {t.name: read_matrix(graph, t) for t in members}
    return solve_linears([targets[t.name] for t in members], weights, algorithm, settings, statistics)
