"""`quantcli quantize`: a checkpoint or a graph; what only checkpoints need, torch first of all, stays out else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.errors import UsageError
from quantcli.options import GRAPH_READERS, QuantizeOptions
from quantcli.pipelines.graph.source import is_graph
from quantcli.progress import Progress, Silent

if TYPE_CHECKING:
    from pathlib import Path

    from quantcli.pipelines.distill_folder import DistillPlan
    from quantcli.pipelines.external.checkpoint import ExternalResult
    from quantcli.pipelines.external.plan import ExternalPlan
    from quantcli.pipelines.graph.beside import Gate
    from quantcli.pipelines.graph.output import GraphResult
    from quantcli.pipelines.graph.plan import GraphPlan
    from quantcli.pipelines.planning.plan import Plan
    from quantcli.pipelines.quantize_checkpoint import QuantizeResult

__all__ = ["run"]


def run(
    options: QuantizeOptions,
    progress: Progress | None = None,
    *,
    gate: Gate | None = None,
    kept: Path | None = None,
) -> QuantizeResult | Plan | DistillPlan | GraphResult | GraphPlan | ExternalResult | ExternalPlan:
    """Quantizes a checkpoint or, where the model is one, an ONNX graph; with `dry_run`, only the plan.

    With `backend`, another package does it.

    Args:
        options: What was asked for.
        progress: Told what happens.
        gate: What else a graph of integers must reach, for which nodes go back to float.
        kept: Where that stays what other runs on the same model and data need too.

    Raises:
        QuantcliError: see `errors`; nothing half-written stays behind.
    """
    if options.backend is not None:
        from quantcli.pipelines.external.run import run_external

        return run_external(options, progress or Silent())
    if is_graph(options.model):
        _refuse_readers_of_checkpoints(options)
        from quantcli.pipelines import quantize_graph

        return quantize_graph.run(options, progress, gate, kept)
    from quantcli.pipelines import distill_folder

    if distill_folder.is_distilled_alone(options):
        return distill_folder.run(options, progress)
    from quantcli.pipelines import quantize_checkpoint

    return quantize_checkpoint.run(options, progress, kept)


def _refuse_readers_of_checkpoints(options: QuantizeOptions) -> None:
    for name in options.readers:
        if name not in GRAPH_READERS:
            raise UsageError(
                f"{name} opens checkpoints, {options.model} is an ONNX graph",
                hint=f"use --for {' or '.join(GRAPH_READERS)}",
            )
