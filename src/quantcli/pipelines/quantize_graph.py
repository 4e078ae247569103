"""`quantcli quantize` on an ONNX graph: weights alone in `graph.weights`, activations too in `graph.whole`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from quantcli.options import QuantizeOptions
from quantcli.pipelines.graph.beside import Gate
from quantcli.pipelines.graph.output import GraphResult
from quantcli.pipelines.graph.plan import GraphPlan, plan_graph, plan_weights
from quantcli.pipelines.graph.source import context_length
from quantcli.pipelines.graph.weights import quantize_weights
from quantcli.pipelines.graph.whole import plan_whole, quantize_whole
from quantcli.progress import Progress, Silent

__all__ = ["run"]


def run(
    options: QuantizeOptions,
    progress: Progress | None = None,
    gate: Gate | None = None,
    kept: Path | None = None,
) -> GraphResult | GraphPlan:
    """Quantizes a graph; with `dry_run`, only the plan.

    Args:
        options: What was asked for.
        progress: Told what happens.
        gate: What else a graph of integers must reach, for which nodes go back to float.
        kept: Where ranges and statistics stay for other runs on the same graph and samples.

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
    result = quantize_whole(plan, progress, gate, kept) if whole else quantize_weights(plan, progress, kept)
    return replace(result, evaluation=_evaluate(plan, progress)) if options.evaluate else result


def _evaluate(plan: GraphPlan, progress: Progress) -> Any:
    from quantcli.options import EvaluateOptions
    from quantcli.pipelines import evaluate

    longest = context_length(plan.source)
    asked = EvaluateOptions(
        str(plan.options.output),
        str(plan.source.folder),
        seq_len=min(EvaluateOptions.seq_len, longest or EvaluateOptions.seq_len),
        trust_remote_code=plan.options.trust_remote_code,
    )
    return evaluate.run(asked, progress)
