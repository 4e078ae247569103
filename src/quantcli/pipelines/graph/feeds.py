"""What a graph is run on to gather statistics: files, a user's function, or text for a language model's graph."""

from dataclasses import replace
from typing import Any, Protocol

from quantcli.data.graph_inputs import Samples, npz_samples, script_samples
from quantcli.data.images import image_samples, parse_image_spec
from quantcli.errors import UsageError
from quantcli.graphs.calibration.token_inputs import INPUT_IDS, TokenFeeds
from quantcli.graphs.model.files import Graph
from quantcli.graphs.model.inputs import input_specs
from quantcli.options import BUILTIN, SELF, CalibrationOptions, QuantizeOptions
from quantcli.pipelines.graph.source import GraphSource, axis_lengths, context_length
from quantcli.progress import Progress

__all__ = ["Feeds", "describe_feeds", "open_feeds", "reads_text", "refuse_feeds"]


class Feeds(Protocol):
    """Batches by input name, read anew each time."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Any: ...


def reads_text(options: QuantizeOptions, graph: Graph) -> bool:
    """Whether inputs are made from text."""
    return not _names_samples(options) and any(v.name == INPUT_IDS for v in graph.inputs)


def _names_samples(options: QuantizeOptions) -> bool:
    return options.graph.calibration_inputs is not None or options.graph.user_script is not None


def refuse_feeds(options: QuantizeOptions, graph: Graph, source: GraphSource) -> None:
    """Refuses what cannot be fed, before anything is read.

    Raises:
        UsageError: no inputs for this graph, or options that contradict each other.
    """
    calibration = options.calibration
    rows = CalibrationOptions(num_samples=calibration.num_samples, batch_size=calibration.batch_size)
    if _names_samples(options):
        if calibration != rows:
            flag = "--calibration-inputs" if options.graph.user_script is None else "--user-script"
            raise UsageError(f"{flag} and options of text exclude each other", hint="leave one out")
        if options.graph.image_spec is not None:
            parse_image_spec(options.graph.image_spec)
        return
    if not reads_text(options, graph):
        inputs = ", ".join(str(v.name) for v in graph.inputs)
        raise UsageError(
            f"calibration inputs are needed: the graph's inputs are {inputs}, which no text can be made into",
            hint="add --calibration-inputs FOLDER of .npz files, or of images with --image-spec; or --user-script",
        )
    if calibration.data == SELF:
        raise UsageError("--data self is for checkpoints: a graph does not write its own text", hint="use --data FILE")
    longest = context_length(source)
    if longest is not None and calibration.seq_len > longest and calibration.seq_len != CalibrationOptions.seq_len:
        raise UsageError(
            f"--seq-len {calibration.seq_len} is more than the {longest} positions of {source.folder}",
            hint=f"add --seq-len {longest}",
        )


def _text(options: QuantizeOptions, source: GraphSource) -> CalibrationOptions:
    """Of text; rows of the default length are cut where the model has fewer positions."""
    longest = context_length(source)
    if longest is None or options.calibration.seq_len <= longest:
        return options.calibration
    return replace(options.calibration, seq_len=longest)


def describe_feeds(options: QuantizeOptions, source: GraphSource) -> str:
    """In words."""
    if options.graph.user_script is not None:
        return f"{options.graph.user_script}:{options.graph.data_function}, at most {options.calibration.num_samples}"
    if options.graph.calibration_inputs is not None:
        kind = "images" if options.graph.image_spec else "batches"
        return f"{options.graph.calibration_inputs}, {options.calibration.num_samples} {kind} or all"
    calibration = _text(options, source)
    named = calibration.data or calibration.data_name or BUILTIN
    text = "Python's documentation" if named == BUILTIN else named
    return f"{text}, {calibration.num_samples} rows of {calibration.seq_len} tokens"


def open_feeds(options: QuantizeOptions, graph: Graph, source: GraphSource, progress: Progress) -> Samples:
    """The calibration inputs that the options name; text by default where the graph takes tokens.

    Raises:
        InputError: files, functions or text that give no samples, or a graph with inputs of which text says nothing.
    """
    calibration, given = options.calibration, options.graph
    specs = input_specs(source.path)
    sizes: Any = {"batch_size": calibration.batch_size, "limit": calibration.num_samples}
    if given.user_script is not None:
        return script_samples(given.user_script, given.data_function or "", specs, **sizes)
    if given.calibration_inputs is not None and given.image_spec is not None:
        return image_samples(given.calibration_inputs, specs, parse_image_spec(given.image_spec), **sizes)
    if given.calibration_inputs is not None:
        return npz_samples(given.calibration_inputs, specs, **sizes)
    from quantcli.data.calibration import calibration_rows

    rows = calibration_rows(
        _text(options, source),
        source.folder,
        source=BUILTIN,
        model_digest=source.digest,
        progress=progress,
        trust_remote_code=options.trust_remote_code,
    )
    feeds = TokenFeeds(graph, rows.tokens, calibration.batch_size, axis_lengths(source))
    return Samples(specs, lambda: ((feed, f"batch {number} of text") for number, feed in enumerate(feeds)))
