"""Weights alone, matrix by matrix; activations stay float.

The steps: find the matrices, gather second moments where the rounder wants them, solve, rewrite, and read the written
file back. One Hessian per tensor; no more of them at a time than memory takes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from quantcli.evaluate.memory import peak_memory
from quantcli.graphs.checking.read_back import stored_codes, verify_weights
from quantcli.graphs.model.files import Model, open_graph, save_graph
from quantcli.graphs.model.opset import prove_conversion
from quantcli.graphs.rewrite.fold_weights import unfold_weights
from quantcli.graphs.walk.matrices import find_targets
from quantcli.graphs.weights.blocks import container_bits
from quantcli.graphs.weights.matmul_nbits import Placement
from quantcli.graphs.weights.replace import note_bits, replace_matrices
from quantcli.pipelines.graph.arrays import round_matrices
from quantcli.pipelines.graph.beside import Beside, Limit, hold_outputs
from quantcli.pipelines.graph.feeds import describe_feeds, open_feeds
from quantcli.pipelines.graph.output import GraphResult, commit_graph, open_graph_output
from quantcli.pipelines.graph.plan import OPSET_HINT, GraphPlan, selection
from quantcli.pipelines.graph.source import axis_lengths
from quantcli.pipelines.graph.stages import Room
from quantcli.pipelines.planning.target import HELD_OUT_SHARE
from quantcli.progress import Progress

if TYPE_CHECKING:
    from quantcli.data.graph_inputs import Samples
    from quantcli.report.layer import LayerReport
    from quantcli.tensors.quantized import QuantizedTensor
    from quantcli.tensors.quantized_array import QuantizedArray

    Codes: TypeAlias = QuantizedTensor | QuantizedArray

__all__ = ["quantize_weights"]


def quantize_weights(plan: GraphPlan, progress: Progress, kept: Path | None = None) -> GraphResult:
    """Weights alone, matrix by matrix; activations stay float.

    Args:
        plan: What runs.
        progress: Told what happens.
        kept: Where statistics stay for other runs on the same graph and samples.
    """
    begin, source, model, options = time.perf_counter(), plan.source, plan.model, plan.options
    targets = dict(plan.targets or {})
    for said in plan.notes:
        progress.warn(said)
    conversion = None
    if plan.older is not None:
        conversion = prove_conversion(plan.older, model, source.folder, axis_lengths(source), OPSET_HINT)
        progress.note(str(conversion))
    with open_graph_output(source, options, int(1.1 * plan.size_bytes)) as partial, peak_memory() as watched:
        feeds = open_feeds(options, model.graph, source, progress) if plan.calibrates else None
        results, reports = _solve(plan, feeds, partial.root, progress, kept)
        written = partial.model / source.path.name
        placing = _Placing(plan, model, results, written)
        beside = Beside(plan, feeds, progress)
        held = hold_outputs(
            placing.attempt,
            lambda: beside.run(written),
            lambda _: list(targets),
            lambda _, __: [r.name for r in sorted(reports, key=lambda r: -r.relative_error)],
            Limit(options.graph.min_sqnr),
            progress,
        )
        progress.note("every weight of the graph was compared with what was computed")
        found = [t for t in plan.found if t.name not in held.returned]
        stored, weights = _stored_bytes(written, held.made), sum(t.rows * t.columns for t in found)
        spare = sum(
            t.rows * t.columns * (container_bits(s.bits) - s.bits) for t in found for s in [targets[t.name].scheme]
        )
        result = GraphResult(
            output=options.output,
            layers=[
                replace(r, kind=t.kind) for r, t in zip(reports, plan.found, strict=True) if t.name not in held.returned
            ],
            kept=dict(plan.kept or {}) | held.returned,
            size_bytes=0,
            parent_size_bytes=0,
            seconds=time.perf_counter() - begin,
            peak_bytes=watched.above_start_bytes,
            plan=plan.to_dict(),
            conversion=asdict(conversion) if conversion is not None else None,
            outputs=beside.timed(held.outputs),
            bits_per_weight=8 * stored / weights,
            information_bits_per_weight=(8 * stored - spare) / weights,
        )
        return commit_graph(partial, source, options, result, progress)


def _solve(
    plan: GraphPlan, feeds: Samples | None, spill: Path, progress: Progress, kept: Path | None
) -> tuple[Mapping[str, Codes], list[LayerReport]]:
    """The codes of every matrix; torch is imported where anything more than round-to-nearest is asked for."""
    targets = dict(plan.targets or {})
    if plan.step.algorithm.on_arrays is not None and not plan.transforms and feeds is None:
        return round_matrices(plan.model.graph, plan.found, targets, plan.step, progress)
    from quantcli.pipelines.graph.solve import GraphWork, solve_graph

    held_out = min(HELD_OUT_SHARE, len(feeds)) if feeds and plan.holds_out and len(feeds) > 1 else 0
    steps = (plan.step, plan.transforms[0] if plan.transforms else None, plan.must_scale)
    extras = (plan.options.graph.layer_wise, Room.of(plan.options))
    work = GraphWork(plan.model, plan.source.folder, plan.found, targets, *steps, *extras, _kept_moments(plan, kept))
    return solve_graph(work, feeds, progress, spill=spill, held_out_step=held_out)


def _kept_moments(plan: GraphPlan, kept: Path | None) -> Path | None:
    """A folder for the statistics of this graph on these samples."""
    if kept is None:
        return None
    said = describe_feeds(plan.options, plan.source), asdict(plan.options.calibration), plan.source.digest
    return kept / f"moments-{hashlib.sha256(repr(said).encode()).hexdigest()[:16]}"


class _Placing:
    """Codes in the place of float weights, as often as it takes: the float graph stays as it is."""

    def __init__(self, plan: GraphPlan, model: Model, results: Mapping[str, Codes], written: Path):
        self._plan, self._model, self._results, self._written = plan, model, results, written
        plain = model.clone()
        unfold_weights(plain)
        self._before = stored_codes(plain.graph)

    def attempt(self, excluded: Sequence[str]) -> list[Placement]:
        """Writes the graph without codes for these, and compares every weight of it with what was computed."""
        plan, graph = self._plan, self._plan.options.graph
        model = self._model.clone()
        found = [t for t in find_targets(model.graph, selection(plan.options))[0] if t.name in self._results]
        found = [t for t in found if t.name not in excluded]
        read = self._results.__getitem__
        placements = replace_matrices(model, found, read, str(graph.encoding), graph.accuracy_level)
        note_bits(model.graph, placements, {t.name: (plan.targets or {})[t.name].scheme.bits for t in found})
        save_graph(model, self._written)
        verify_weights(self._written, placements, read, {t.name: t.rows for t in found}, self._before)
        return placements


def _stored_bytes(written: Path, placements: Sequence[Placement]) -> int:
    """Of codes, scales and zero points; what several nodes share counts once."""
    initializers = open_graph(written).graph.initializers
    names = {name for p in placements for name in (p.weight, p.scales, p.zeros) if name}
    tensors = [initializers[name].const_value for name in names]
    return sum(t.nbytes for t in tensors if t is not None)
