"""`quantcli quantize --backend NAME`, its steps in order."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantcli.options import EvaluateOptions, QuantizeOptions
from quantcli.pipelines.external.plan import ExternalPlan, plan_external
from quantcli.progress import Progress

if TYPE_CHECKING:
    from quantcli.pipelines.external.checkpoint import ExternalResult
    from quantcli.pipelines.external.graph import ExternalGraphResult

__all__ = ["run_external"]


def run_external(options: QuantizeOptions, progress: Progress) -> ExternalPlan | ExternalResult | ExternalGraphResult:
    """Plans, lets the backend work, verifies, and evaluates where that is asked for.

    Raises:
        QuantcliError: see `errors`; nothing half-written stays behind.
    """
    plan = plan_external(options)
    longest: int | None
    if options.dry_run:
        return plan
    progress.plan("Quantize", plan.rows())
    if plan.method.warning:
        progress.warn(plan.method.warning)
    if plan.backend.input == "onnx":
        from quantcli.pipelines.external.graph import quantize_graph
        from quantcli.pipelines.graph.source import GraphSource, context_length

        made: Any = quantize_graph(plan, progress)
        longest = context_length(GraphSource.open(options.model)[0])
    else:
        from quantcli.pipelines.external.checkpoint import longest_input, quantize_checkpoint

        made = quantize_checkpoint(plan, progress)
        longest = longest_input(options.model)
    if options.evaluate:
        made = replace(made, evaluation=_evaluate(options, longest, progress))
    return made  # type: ignore[no-any-return]


def _evaluate(options: QuantizeOptions, longest: int | None, progress: Progress) -> Any:
    from quantcli.pipelines import evaluate

    asked = EvaluateOptions(
        str(options.output),
        options.model,
        seq_len=min(EvaluateOptions.seq_len, longest or EvaluateOptions.seq_len),
        trust_remote_code=options.trust_remote_code,
    )
    return evaluate.run(asked, progress)
