"""What a graph is run on to gather statistics: arrays from files, or text where it is a language model's graph."""

from typing import Any, Protocol

from quantcli.data.calibration import calibration_rows
from quantcli.data.feeds import NpzFeeds
from quantcli.errors import UsageError
from quantcli.graphs.files import Graph
from quantcli.graphs.token_inputs import INPUT_IDS, TokenFeeds
from quantcli.options import BUILTIN, SELF, CalibrationOptions, QuantizeOptions
from quantcli.pipelines.graph.source import GraphSource
from quantcli.progress import Progress

__all__ = ["Feeds", "context_length", "describe_feeds", "open_feeds", "reads_text", "refuse_feeds"]


class Feeds(Protocol):
    """Batches by input name, read anew each time."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Any: ...


def reads_text(options: QuantizeOptions, graph: Graph) -> bool:
    """Whether inputs are made from text."""
    return options.graph.calibration_inputs is None and any(v.name == INPUT_IDS for v in graph.inputs)


def refuse_feeds(options: QuantizeOptions, graph: Graph, source: GraphSource) -> None:
    """Refuses what cannot be fed, before anything is read.

    Raises:
        UsageError: no inputs for this graph, or options that contradict each other.
    """
    calibration = options.calibration
    rows = CalibrationOptions(num_samples=calibration.num_samples)
    if options.graph.calibration_inputs is not None:
        if calibration != rows:
            raise UsageError("--calibration-inputs and options of text exclude each other", hint="leave one out")
        return
    if not reads_text(options, graph):
        inputs = ", ".join(str(v.name) for v in graph.inputs)
        raise UsageError(
            f"calibration inputs are needed: the graph's inputs are {inputs}, which no text can be made into",
            hint="add --calibration-inputs FOLDER of .npz files",
        )
    if calibration.data == SELF:
        raise UsageError("--data self is for checkpoints: a graph does not write its own text", hint="use --data FILE")
    longest = context_length(source)
    if longest is not None and calibration.seq_len > longest:
        raise UsageError(
            f"--seq-len {calibration.seq_len} is more than the {longest} positions of {source.folder}",
            hint=f"add --seq-len {longest}",
        )


def describe_feeds(options: QuantizeOptions, graph: Graph) -> str:
    """In words."""
    if options.graph.calibration_inputs is not None:
        return f"{options.graph.calibration_inputs}, {options.calibration.num_samples} batches or all"
    calibration = options.calibration
    named = calibration.data or calibration.data_name or BUILTIN
    text = "Python's documentation" if named == BUILTIN else named
    return f"{text}, {calibration.num_samples} rows of {calibration.seq_len} tokens"


def open_feeds(options: QuantizeOptions, graph: Graph, source: GraphSource, progress: Progress) -> Feeds:
    """The calibration inputs that the options name; text by default where the graph takes tokens.

    Raises:
        InputError: files or text that cannot be read, or a graph with inputs of which text says nothing.
    """
    calibration = options.calibration
    if options.graph.calibration_inputs is not None:
        return NpzFeeds.open(options.graph.calibration_inputs, calibration.num_samples)
    rows = calibration_rows(
        calibration,
        source.folder,
        source=BUILTIN,
        model_digest=source.digest,
        progress=progress,
        trust_remote_code=options.trust_remote_code,
    )
    heads, size = _decoder(source, "num_key_value_heads"), _decoder(source, "head_size")
    axes = {"kv_cache_dim": size, "head_size": size, "head_dim": size, "num_key_value_heads": heads}
    known = {name: length for name, length in axes.items() if length is not None}
    return TokenFeeds(graph, rows.tokens, calibration.batch_size, known)


def context_length(source: GraphSource) -> int | None:
    """Tokens that a language model's graph takes; None where its folder does not say."""
    return _decoder(source, "context_length", under=())


def _decoder(source: GraphSource, key: str, under: tuple[str, ...] = ("decoder",)) -> int | None:
    """A number of genai_config.json."""
    found: Any = source.genai_config
    for name in ("model", *under, key):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, int) else None
