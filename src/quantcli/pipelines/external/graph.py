"""An ONNX graph through a backend: samples, the worker, its graph run beside the float one and put in its place."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantcli.backends.worker import Work, run_worker
from quantcli.data.graph_inputs import Samples
from quantcli.errors import InputError, QualityError, QuantcliError, UsageError
from quantcli.graphs.checking.side_by_side import SideBySide
from quantcli.graphs.model.files import Model, open_graph, save_graph
from quantcli.graphs.model.inspect import read_contents
from quantcli.graphs.model.opset import convert_opset, with_known_opset
from quantcli.pipelines.external.plan import ExternalPlan
from quantcli.pipelines.graph.beside import Beside
from quantcli.pipelines.graph.feeds import describe_feeds, open_feeds, refuse_feeds
from quantcli.pipelines.graph.output import GraphResult, commit_graph, open_graph_output
from quantcli.pipelines.graph.source import GraphSource
from quantcli.progress import Progress

__all__ = ["quantize_graph"]

_WEIGHTED = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather")
_FLOATS = ("float", "float16", "bfloat16", "double")


@dataclass(frozen=True)
class ExternalGraphResult(GraphResult):
    """What a backend made of a graph."""

    versions: dict[str, str] | None = None
    """Of the backend's packages."""


@dataclass(frozen=True)
class _Float:
    """The graph as it was given."""

    source: GraphSource
    model: Model


def quantize_graph(plan: ExternalPlan, progress: Progress) -> ExternalGraphResult:
    """Runs the job.

    Raises:
        UsageError: no calibration inputs, or patterns that name no node.
        InputError: the graph cannot be read, or the backend refuses it.
        QualityError: an output is below --min-sqnr.
        QuantcliError: the backend failed, or wrote what is no graph.
    """
    begun, options = time.perf_counter(), plan.options
    source, model = GraphSource.open(options.model)
    given = _Float(source, model)
    if options.evaluate and source.genai_config is None:
        raise UsageError(
            f"--evaluate scores language models, {source.path} has no genai_config.json beside it", hint="leave it out"
        )
    nodes, excluded = _nodes(plan, model)
    feeds: Samples | None = None
    if plan.method.calibrates:
        refuse_feeds(options, model.graph, source)
        feeds = open_feeds(options, model.graph, source, progress)
        progress.note(f"{plan.name} reads {describe_feeds(options, source)}")
    with open_graph_output(source, options, 3 * source.size_bytes) as partial:
        state, written = partial.state, partial.model / source.path.name
        state.mkdir(exist_ok=True)
        beside = Beside(given, feeds, progress)
        job = plan.job() | {
            "input": str(_alone(plan, model, state)),
            "output": str(written),
            "feeds": None if feeds is None else str(_write_feeds(feeds, state / "feeds")),
            "nodes": nodes,
            "excluded": excluded,
            "op_types": list(options.graph.op_types),
            "encoding": options.graph.encoding or "qdq",
            "accuracy_level": options.graph.accuracy_level,
        }
        work = run_worker(plan.backend, job, state, plan.limits, progress)
        outputs = _run(plan, written, beside)
        result = ExternalGraphResult(
            output=options.output,
            layers=[],
            kept=_kept(plan, written, progress),
            size_bytes=0,
            parent_size_bytes=0,
            seconds=time.perf_counter() - begun,
            peak_bytes=work.peak_bytes,
            plan=plan.to_dict(),
            outputs=beside.timed(outputs),
            versions=work.versions,
        )
        committed = commit_graph(partial, source, options, result, progress, _versions(plan, work))
    assert isinstance(committed, ExternalGraphResult)
    return committed


def _versions(plan: ExternalPlan, work: Work) -> dict[str, str]:
    return {f"{plan.backend.name}: {name}": version for name, version in work.versions.items()}


def _nodes(plan: ExternalPlan, model: Model) -> tuple[list[str], list[str]]:
    """Names of the nodes to quantize (none: all) and of those to leave, for packages that know names alone."""
    graph = plan.options.graph
    names = [str(node.name) for node in model.graph.all_nodes() if node.name]

    def matching(patterns: Sequence[str], flag: str) -> list[str]:
        for pattern in patterns:
            if not any(name == pattern or re.search(pattern, name) for name in names):
                raise UsageError(f"{flag} {pattern!r} matches no node of {plan.options.model}")
        return [n for n in names if any(n == pattern or re.search(pattern, n) for pattern in patterns)]

    included = matching(graph.nodes_include, "--nodes-include")
    excluded = matching((*graph.nodes_exclude, *plan.options.exclude), "--nodes-exclude")
    if graph.nodes_include and not set(included) - set(excluded):
        raise UsageError("--nodes-exclude leaves nothing of --nodes-include", hint="leave one of them out")
    return [name for name in included if name not in excluded], excluded


def _alone(plan: ExternalPlan, model: Model, folder: Path) -> Path:
    """A copy for the worker, in the opset that its result needs; some packages write beside what they read."""
    path = folder / "float.onnx"
    model, _ = with_known_opset(model.clone())
    if plan.method.opset is not None and model.opset_imports.get("", 0) < plan.method.opset:
        model = convert_opset(model, plan.method.opset, "export the model with a later opset")
    save_graph(model, path)
    return path


def _write_feeds(feeds: Samples, folder: Path) -> Path:
    folder.mkdir()
    for number, feed in enumerate(feeds):
        np.savez(folder / f"{number:05}.npz", **feed)  # type: ignore[arg-type]
    return folder


def _run(plan: ExternalPlan, written: Path, beside: Beside) -> SideBySide | None:
    """Opens what was written, rewrites it with one file of weights, and runs it beside the float graph."""
    name, least = plan.backend.name, plan.options.graph.min_sqnr
    if not written.is_file():
        raise QuantcliError(f"{name} wrote no graph")
    try:
        made = open_graph(written)
        save_graph(made, written.with_name("again-" + written.name))
        _replace(written)
        found = beside.run(written, optimized=plan.method.optimized)
    except InputError as error:
        raise QuantcliError(f"{name} wrote no graph that runs: {error.message}") from error
    low = found.below(least) if found is not None else []
    if low:
        raise QualityError(
            f"output {low[0]}, below {least:g} dB: {name}'s result is not kept",
            hint="use more bits, --nodes-exclude or another method; --min-sqnr 0 keeps it as it is",
        )
    return found


def _replace(written: Path) -> None:
    """Keeps the rewritten graph and its one file of weights, by their right names."""
    again = written.with_name("again-" + written.name)
    model = open_graph(again)
    for path in list(written.parent.iterdir()):
        if path.name not in (again.name, again.name + ".data"):
            path.unlink()
    save_graph(model, written)
    again.unlink()
    again.with_name(again.name + ".data").unlink(missing_ok=True)


def _kept(plan: ExternalPlan, written: Path, progress: Progress) -> dict[str, str]:
    """Nodes whose weights stayed float."""
    contents = read_contents(written)
    # some leave weights as they are and round them as the graph runs
    rounds = contents.operators["QuantizeLinear"] + contents.operators["DequantizeLinear"]
    if not (rounds or any(record.quantized for record in contents.records)):
        raise InputError(f"{plan.backend.name} quantized nothing of {plan.options.model}", hint="see --op-types")
    left = [n for n in contents.nodes if n.op_type in _WEIGHTED and n.dtype in _FLOATS]
    kept: dict[str, str] = {n.name or n.weight: f"left float by {plan.backend.name}" for n in left}
    if kept:
        few = ", ".join(list(kept)[:5]) + (f" and {len(kept) - 5} more" if len(kept) > 5 else "")
        progress.warn(f"{few} stay float: {plan.backend.name} left them")
    return kept
