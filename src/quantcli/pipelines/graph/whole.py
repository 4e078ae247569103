"""Algorithms that take a whole graph, activations too: they write a graph file from a graph file."""

import time
from typing import Any

from quantcli.errors import UsageError
from quantcli.evaluate.speed import peak_memory
from quantcli.pipelines.graph.output import GraphResult, commit_graph, open_graph_output
from quantcli.pipelines.graph.plan import GraphPlan
from quantcli.progress import Progress

__all__ = ["check_whole", "quantize_whole"]


def check_whole(plan: GraphPlan) -> None:
    """Refuses what has no effect on the algorithm, before anything is read.

    Raises:
        UsageError: naming the flag.
    """
    if plan.step.algorithm.calibration == "required":
        raise UsageError(f"{plan.step.algorithm.name} cannot be run from here yet")


def quantize_whole(plan: GraphPlan, progress: Progress) -> GraphResult:
    """Runs the algorithm on the source's file; the folder is made as for every other graph.

    Raises:
        QuantcliError: see `errors`; nothing half-written stays behind.
    """
    begin, source, options = time.perf_counter(), plan.source, plan.options
    reader: Any = None
    with open_graph_output(source, options, source.size_bytes) as partial, peak_memory() as watched:
        written = partial.model / source.path.name
        plan.step.algorithm.run(source.path, written, plan.step.settings, reader)
        result = GraphResult(
            output=options.output,
            layers=[],
            kept={},
            size_bytes=0,
            parent_size_bytes=0,
            seconds=time.perf_counter() - begin,
            peak_bytes=watched.above_start_bytes,
            plan=plan.to_dict(),
        )
        return commit_graph(partial, written, source, options, result, progress)
