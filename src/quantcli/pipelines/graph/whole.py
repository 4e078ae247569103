"""Algorithms that take a whole graph, activations too: they write a graph file from a graph file.

The steps: transforms of the float graph, the quantizer, and, where nodes are to be excluded for what they lose, the
quantizer once more without them, on the ranges that were measured the first time.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quantcli.algorithms import Step
from quantcli.data.graph_inputs import Samples
from quantcli.errors import UsageError
from quantcli.evaluate.memory import peak_memory
from quantcli.options import CalibrationOptions
from quantcli.pipelines.graph.attempts import Attempts, Files, again
from quantcli.pipelines.graph.beside import Gate, Limit, hold_outputs
from quantcli.pipelines.graph.feeds import describe_feeds, open_feeds, refuse_feeds
from quantcli.pipelines.graph.output import GraphResult, commit_graph, open_graph_output
from quantcli.pipelines.graph.plan import GraphPlan
from quantcli.progress import Progress
from quantcli.report.outliers import OutlierReport

__all__ = ["IntegerResult", "plan_whole", "quantize_whole"]

_IDLE = {
    "group_size": "integer graphs have one scale per tensor, or per channel with --per-channel",
    "symmetric": "say --set activation_symmetric=true or --set weight_grid=sym",
    "overrides": "leave nodes out with --nodes-exclude",
    "quantize_lm_head": "leave it out",
    "max_memory": "leave it out",
}
_TURNED = ("inputs_to_make_channel_last", "outputs_to_make_channel_last")


@dataclass(frozen=True)
class IntegerResult(GraphResult):
    """What became of a graph of integers."""

    quantized: tuple[str, ...] = ()
    """Nodes with weights that compute with integers."""
    excluded: tuple[str, ...] = ()
    """Nodes that --exclude-worst left float."""
    comparison: dict[str, Any] | None = None
    """Errors by node, worst first, and of the outputs, in dB."""
    notes: tuple[str, ...] = ()
    """What there was to say on the way."""
    outliers: tuple[OutlierReport, ...] = ()
    """Outlier features of each input, of a method that keeps them out of its product."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json` and the report."""
        return super().to_dict() | {"outliers": [asdict(outliers) for outliers in self.outliers]}


def plan_whole(plan: GraphPlan) -> GraphPlan:
    """Gives the algorithm what flags say, and refuses what has no effect on it, before anything is read.

    Raises:
        UsageError: naming the flag.
    """
    options, graph, algorithm = plan.options, plan.options.graph, plan.step.algorithm
    for name, hint in _IDLE.items():
        if getattr(options, name) != getattr(type(options), name, ()):
            raise UsageError(f"--{name.replace('_', '-')} has no effect with {algorithm.name}", hint=hint)
    if graph.accuracy_level or graph.layer_wise or not graph.quantize_last_matmul:
        name = "--layer-wise" if graph.layer_wise else "--no-quantize-last-matmul"
        name = "--accuracy-level" if graph.accuracy_level else name
        raise UsageError(f"{name} has no effect with {algorithm.name}", hint="leave nodes out with --nodes-exclude")
    if graph.calibration_cache is not None and algorithm.name != "static":
        raise UsageError(f"{algorithm.name} measures no ranges that --calibration-cache could hold", hint="use static")
    if plan.calibrates and not _has_ranges(plan):
        refuse_feeds(options, plan.model.graph, plan.source)
    elif not plan.calibrates and (
        graph.calibration_inputs is not None
        or graph.user_script is not None
        or options.calibration != CalibrationOptions()
    ):
        raise UsageError(f"{algorithm.name} uses no calibration inputs", hint="leave them out, or use -a static")
    settings = _with_flags(plan)
    turned = [n for n in _TURNED if getattr(settings, n, ())]
    if turned and plan.source.genai_config is not None:
        flag = "--" + turned[0].replace("_", "-")
        raise UsageError(f"{flag} is not for folders with genai_config.json: GenAI feeds inputs as they are")
    resolved = replace(options, graph=replace(graph, encoding=getattr(settings, "encoding", None)))
    return replace(plan, step=replace(plan.step, settings=settings), options=resolved)


def _with_flags(plan: GraphPlan) -> Any:
    """The algorithm's settings with what --bits, --encoding and the flags that choose nodes say."""
    options, graph, settings = plan.options, plan.options.graph, plan.step.settings
    given: dict[str, Any] = {
        "op_types": graph.op_types,
        "nodes_include": graph.nodes_include,
        "nodes_exclude": (*graph.nodes_exclude, *options.exclude),
        "encoding": graph.encoding,
    }
    changes = {name: value for name, value in given.items() if value}
    if options.bits is not None and hasattr(settings, "weight_type"):
        kind = "uint" if settings.weight_type.startswith("uint") else "int"
        changes["weight_type"] = f"{kind}{options.bits}"
    for name, value in changes.items():
        flag = "--bits" if name == "weight_type" else "--" + name.replace("_", "-")
        if not hasattr(settings, name) or (name == "encoding" and value == "nbits"):
            hint = "; ".join(f"--encoding {f}" for f in plan.step.algorithm.formats)
            raise UsageError(f"{plan.step.algorithm.name} has no {flag} {value}", hint=f"leave it out, or use {hint}")
        if options.settings.get(name) is not None and getattr(settings, name) != value:
            raise UsageError(f"{flag} and --set {name} contradict each other", hint="leave one out")
    return replace(settings, **changes)


def _has_ranges(plan: GraphPlan) -> bool:
    """Whether a cache says all that samples would."""
    graph = plan.options.graph
    again = graph.debug_activations or graph.exclude_worst or getattr(plan.step.settings, "bias_correction", False)
    cached = graph.calibration_cache is not None and graph.calibration_cache.is_file()
    return cached and not again and not plan.transforms


def quantize_whole(
    plan: GraphPlan, progress: Progress, gate: Gate | None = None, kept: Path | None = None
) -> IntegerResult:
    """Runs the algorithm on the source's file; the folder is made as for every other graph.

    Args:
        plan: What runs.
        progress: Told what happens.
        gate: What else the graph must reach, for which nodes go back to float.
        kept: Where ranges stay for other runs on the same graph and samples.
    """
    begin, source, options, graph = time.perf_counter(), plan.source, plan.options, plan.options.graph
    samples: Samples | None = None
    cache = graph.calibration_cache
    if plan.calibrates and not _has_ranges(plan):
        samples = open_feeds(options, plan.model.graph, source, progress)
    if cache is not None and cache.is_file():
        progress.note(f"ranges are read from {cache}, none are measured")
    notes: list[str] = []
    with open_graph_output(source, options, 3 * source.size_bytes) as partial, peak_memory() as watched:
        written = partial.model / source.path.name
        with TemporaryDirectory(dir=partial.root, prefix=".graph-") as temporary:
            folder, name = Path(temporary), plan.step.algorithm.name
            path = _transform(plan.transforms, source.path, folder, samples, notes)
            progress.note(f"{name} reads {describe_feeds(options, source)}" if samples else name)
            files = Files(path, written, folder / "ranges.json")
            work = Attempts(plan, files, samples, progress, kept)
            excluded = work.exclude_worst()
            slow = work.take_faster() if graph.faster else ()
            held = hold_outputs(
                work.attempt,
                lambda: work.beside.run(written),
                lambda made: list(made.nodes),
                work.ranked,
                Limit(graph.min_sqnr, gate, written),
                progress,
            )
        made = held.made
        conversion = made.prepared.conversion
        if conversion is not None:
            progress.note(str(conversion))
        notes += made.notes
        outputs = work.beside.timed(held.outputs)
        if outputs is not None and outputs.slower and not graph.faster:
            progress.note("--faster tries what is faster on this machine: int8 weights, nodes in float")
        for note in notes:
            progress.warn(note)
        result = IntegerResult(
            output=options.output,
            layers=[],
            kept={n: made.reasons.get(n, "not asked for") for n in made.kept if n not in held.returned}
            | dict.fromkeys(slow, "faster in float here")
            | held.returned,
            size_bytes=0,
            parent_size_bytes=0,
            seconds=time.perf_counter() - begin,
            peak_bytes=watched.above_start_bytes,
            plan=work.plan.to_dict(),
            conversion=asdict(conversion) if conversion is not None else None,
            outputs=outputs,
            quantized=made.quantized,
            excluded=excluded,
            comparison=asdict(made.comparison) if made.comparison is not None else None,
            notes=tuple(notes),
            outliers=tuple(OutlierReport.of(n, counts) for n, counts in getattr(made, "outliers", ())),
        )
        committed = commit_graph(partial, source, options, result, progress)
        assert isinstance(committed, IntegerResult)
        return committed


def _transform(steps: Sequence[Step], path: Path, folder: Path, samples: Samples | None, notes: list[str]) -> Path:
    """The float graph after all transforms; the source itself where there is none."""
    for step in steps:
        target = folder / f"{step.algorithm.name}.onnx"
        notes += step.algorithm.run(path, target, step.settings, again(samples)).notes
        path = target
    return path
