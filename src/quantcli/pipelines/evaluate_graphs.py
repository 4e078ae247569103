"""`quantcli evaluate` on ONNX graphs that are no language models: both are run on the same inputs."""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from quantcli.data.graph_inputs import npz_samples, script_samples
from quantcli.data.images import image_samples, parse_image_spec
from quantcli.errors import InputError, UsageError
from quantcli.evaluate.graph_metric import GraphMetric
from quantcli.evaluate.result import GraphEvaluation
from quantcli.folder import resolve_model_folder
from quantcli.graphs.checking.side_by_side import SideBySide, run_side_by_side
from quantcli.graphs.model.files import Model
from quantcli.graphs.model.genai_config import GENAI_CONFIG
from quantcli.graphs.model.inputs import Feed, input_specs
from quantcli.graphs.model.made_inputs import sample_inputs
from quantcli.options import EvaluateOptions
from quantcli.pipelines.graph.source import GraphSource, axis_lengths, is_graph
from quantcli.progress import Progress, Silent

__all__ = ["is_graph_pair", "open_feeds", "run"]

_OF_LANGUAGE_MODELS = (
    "text_field",
    "seq_len",
    "reference_cache",
    "max_kl",
    "max_perplexity_increase",
    "simulation",
    "device",
    "trust_remote_code",
)


def is_graph_pair(options: EvaluateOptions) -> bool:
    """Whether the model is a graph that nothing says how to run as a language model."""
    path = Path(options.model)
    return is_graph(options.model) and (path.is_file() or not (_folder(path) / GENAI_CONFIG).is_file())


def _folder(path: Path) -> Path:
    return resolve_model_folder(path) if path.is_dir() else path.parent


def run(options: EvaluateOptions, progress: Progress | None = None) -> GraphEvaluation:
    """Compares a graph with its reference; gates that fail are in the result's `failures`.

    Raises:
        UsageError: options of language models, or no reference.
        InputError: graphs that cannot be read, run or compared, inputs that do not fit, a function that fails.
    """
    progress, pair = progress or Silent(), options.pair
    _refuse_options(options)
    if options.reference is None:
        raise UsageError(
            f"{options.model} is a graph without {GENAI_CONFIG}: it is judged beside its reference",
            hint="add --reference model.onnx",
        )
    (made, made_model), (source, model) = GraphSource.open(options.model), GraphSource.open(options.reference)
    _require_same_signature(model, made_model, source.path, made.path)
    metric = None
    if pair.user_script is not None and pair.metric_function is not None:
        offered = {"data_dir": options.data, "batch_size": pair.batch_size}
        metric = GraphMetric(pair.user_script, pair.metric_function, offered)
    feeds, origin = open_feeds(options, source, model)
    progress.note(f"running {len(feeds)} samples through both graphs")
    compared = run_side_by_side(source.path, made.path, feeds)
    figures: dict[str, Any] = {}
    if metric is not None:
        progress.note(f"running {pair.metric_function} on both graphs")
        before, after = metric(source.path), metric(made.path)
        loss = after - before if pair.lower_is_better else before - after
        figures = {"metric": pair.metric_function, "score": after, "reference_score": before, "loss": loss}
    result = GraphEvaluation(
        model=str(made.path),
        reference=str(source.path),
        inputs=origin,
        compared=compared,
        timed=options.speed,
        size_bytes=made.size_bytes,
        reference_size_bytes=source.size_bytes,
        **figures,
    )
    result.failures.extend(_failed_gates(options, compared, result))
    return result


def _refuse_options(options: EvaluateOptions) -> None:
    defaults = EvaluateOptions(options.model)
    for name in _OF_LANGUAGE_MODELS:
        given, default = getattr(options, name), getattr(defaults, name)
        if given != default:
            if name == "simulation":
                name = next(f.name for f in fields(given) if getattr(given, f.name) != getattr(default, f.name))
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{flag} is for language models, {options.model} is a graph without {GENAI_CONFIG}", hint="leave it out"
            )


def _require_same_signature(wanted: Model, found: Model, source: Path, made: Path) -> None:
    """Refuses graphs that do not take and give the same, before anything is run.

    Raises:
        InputError: naming the input or output.
    """
    hint = "compare a graph with the one that it was made from"
    names = [({str(v.name) for v in _inputs(m)}, {str(v.name) for v in m.graph.outputs}) for m in (wanted, found)]
    for what, one, other in zip(("input", "output"), *names, strict=True):
        for name in sorted(one ^ other):
            lacking, having = (made, source) if name in one else (source, made)
            raise InputError(f"{lacking} has no {what} {name!r}, {having} has", hint)
    others = {str(v.name): v for v in _inputs(found)}
    for value in _inputs(wanted):
        other = others[str(value.name)]
        if value.dtype is not other.dtype or not _may_agree(value.shape, other.shape):
            raise InputError(f"input {value.name!r} is {_words(other)} in {made}, {_words(value)} in {source}", hint)


def _inputs(model: Model) -> list[Any]:
    return [v for v in model.graph.inputs if not v.is_initializer()]


def _may_agree(one: Iterable[Any] | None, other: Iterable[Any] | None) -> bool:
    """Whether lengths of axes can be the same; names, and axes that are not said, fit any."""
    if one is None or other is None:
        return True
    some, others = list(one), list(other)
    pairs = zip(some, others, strict=False)
    return len(some) == len(others) and all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def _words(value: Any) -> str:
    axes = "" if value.shape is None else f"[{', '.join(str(n) for n in value.shape)}]"
    return f"{'of no known type' if value.dtype is None else value.dtype.name.lower()}{axes}"


def open_feeds(options: EvaluateOptions, source: GraphSource, model: Model) -> tuple[list[Feed], str]:
    """The samples, and where they come from in words.

    Raises:
        UsageError: images without their folder.
        InputError: data that cannot be read or fed, or no sample.
    """
    pair, data = options.pair, options.data
    sizes: Any = {"batch_size": pair.batch_size, "limit": options.num_samples}
    if pair.user_script is not None and pair.data_function is not None:
        specs = input_specs(source.path)
        samples = script_samples(pair.user_script, pair.data_function, specs, data_dir=data, **sizes)
        origin = f"{pair.user_script}:{pair.data_function}"
    elif pair.image_spec is not None:
        if data is None:
            raise UsageError("--image-spec is for a folder of images", hint="add --data FOLDER")
        samples = image_samples(Path(data), input_specs(source.path), parse_image_spec(pair.image_spec), **sizes)
        origin = data
    elif data is not None:
        samples, origin = npz_samples(Path(data), input_specs(source.path), **sizes), data
    else:
        return sample_inputs(model, source.folder, axis_lengths(source), options.num_samples), "made from the graph"
    feeds = list(samples)
    if not feeds:
        raise InputError(f"{origin} gives no samples", hint="give at least one")
    return feeds, origin


def _failed_gates(options: EvaluateOptions, compared: SideBySide, result: GraphEvaluation) -> list[str]:
    pair = options.pair
    failures = []
    if pair.min_sqnr is not None:
        wanting = compared.below(pair.min_sqnr)
        failures += [f"output {output}, below --min-sqnr {pair.min_sqnr:g}" for output in wanting]
    if pair.max_loss is not None and result.loss is not None and result.loss > pair.max_loss:
        failures.append(
            f"{result.metric} went from {result.reference_score:g} to {result.score:g}, "
            f"more than --max-loss {pair.max_loss:g} allows"
        )
    return failures
