"""How good a written folder is, how large and how fast: what all trials share of it is done once.

Of a language model the original's logits are kept in files; of any other graph the float graph runs once, and so does
the user's function on it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from quantcli.errors import InputError, UsageError
from quantcli.options import EvaluateOptions, GraphEvaluationOptions, GraphOptions, Metric
from quantcli.pipelines.graph.source import is_graph, locate_graph
from quantcli.pipelines.tuning.prune import Partial
from quantcli.progress import Progress

__all__ = ["Judge", "Judging", "Stop", "judge_of", "reads_tokens"]

Stop = Callable[[Partial], str | None]
"""Says why a trial is given up, of what is known; None: go on."""


@dataclass(frozen=True)
class Judging:
    """How trials are judged."""

    model: str
    """The original."""
    metric: Metric
    """The figure of quality."""
    timed: bool
    """Whether latency is measured."""
    data: str | None
    """What is scored or run."""
    samples: int
    """Windows, or samples of graphs."""
    seq_len: int
    """Tokens per window."""
    graph: GraphOptions
    """Inputs of graphs, where `data` names none."""
    kept: Path
    """Folder for what is made once."""
    device: str | None = None
    """Of language models."""
    trust_remote_code: bool = False
    """Of language models."""


class PrunedError(Exception):
    """The trial cannot become the best."""

    def __init__(self, reason: str, figures: Mapping[str, float] | None = None):
        """`figures`: what is known of it."""
        super().__init__(reason)
        self.figures = dict(figures or {})


class Judge(Protocol):
    """Judges folders beside the original."""

    reference: dict[str, float]
    """The original's own figures, as far as goals may speak of them."""

    def __call__(self, folder: Path, progress: Progress, stop: Stop) -> tuple[dict[str, float], int | None]:
        """Figures by name, and on how many windows of text.

        Raises:
            InputError: it cannot be run, or gives no numbers.
            PrunedError: `stop` had a reason.
        """
        ...

    def quality(self, graph: Path) -> float:
        """The metric alone of an ONNX file."""
        ...


def reads_tokens(model: str) -> bool:
    """Whether a model is a language model that can be scored: a checkpoint, or a folder for ONNX Runtime GenAI."""
    from quantcli.pipelines.evaluate_graphs import is_graph_pair

    return not is_graph_pair(EvaluateOptions(model))


@cache
def judge_of(judging: Judging) -> Judge:
    """The judge, made once per process.

    Raises:
        UsageError: a metric that this model does not have.
        InputError: the original, the data or the function fails.
    """
    named, language = judging.metric, reads_tokens(judging.model)
    if language and named.script is not None:
        return _Scored(judging, _function(judging))
    if language:
        if named.name == "sqnr":
            raise UsageError("sqnr is of graphs that read no tokens", hint="use --metric kl")
        return _Scored(judging, None)
    if named.script is None and named.name in ("kl", "perplexity"):
        raise UsageError(
            f"{named.name} is of language models, {judging.model} is a graph without genai_config.json",
            hint="use --metric sqnr or accuracy, or name FILE.py:FUNCTION",
        )
    return _Compared(judging)


class _Scored:
    """A language model, on text."""

    def __init__(self, judging: Judging, function: Callable[[Path], float] | None):
        self._judging, self._function = judging, function
        self.reference: dict[str, float] = {"kl": 0.0, "accuracy": 1.0}
        if function is not None:
            self.reference[judging.metric.name] = function(Path(judging.model))

    def __call__(self, folder: Path, progress: Progress, stop: Stop) -> tuple[dict[str, float], int | None]:
        from quantcli.evaluate.divergence import Scores
        from quantcli.pipelines import evaluate

        judging = self._judging
        reasons: list[str] = []

        def enough(scores: Scores) -> bool:
            reason = stop(Partial(kl=(scores.kl_mean, scores.kl_standard_error), windows=len(scores.kl)))
            reasons.extend([reason] if reason else [])
            return bool(reason)

        asked = EvaluateOptions(
            str(folder),
            judging.model,
            data=judging.data,
            num_samples=judging.samples,
            seq_len=judging.seq_len,
            reference_cache=judging.kept / "logits",
            speed=judging.timed,
            device=judging.device,
            trust_remote_code=judging.trust_remote_code,
        )
        found = evaluate.run(asked, progress, enough)
        if reasons:
            raise PrunedError(reasons[0])
        assert found.kl_mean is not None and found.top1_agreement is not None
        figures = {"kl": found.kl_mean, "perplexity": found.perplexity, "accuracy": found.top1_agreement}
        if found.reference_perplexity is not None:
            self.reference["perplexity"] = found.reference_perplexity
        if found.decode_tokens_per_second:
            figures["latency"] = 1000 / found.decode_tokens_per_second
        if self._function is not None:
            figures[judging.metric.name] = self._function(folder)
        return figures, found.windows

    def quality(self, graph: Path) -> float:
        figures, _ = self(graph.parent, _silent(), lambda partial: None)
        return figures[self._judging.metric.name]


class _Compared:
    """Any other graph, on samples."""

    def __init__(self, judging: Judging):
        from quantcli.graphs.checking.side_by_side import FloatRun
        from quantcli.pipelines.evaluate_graphs import open_feeds
        from quantcli.pipelines.graph.source import GraphSource

        self._judging = judging
        source, model = GraphSource.open(judging.model)
        feeds, self._origin = open_feeds(_as_evaluated(judging), source, model)
        self._float = FloatRun(source.path, feeds)
        self._function = _function(judging) if judging.metric.script is not None else None
        self.reference: dict[str, float] = {"accuracy": 1.0}
        if self._function is not None:
            self.reference[judging.metric.name] = self._function(source.path)
        if judging.timed:
            compared = self._float.timed(self._float.beside(source.path))
            if compared.float_ms is not None:
                self.reference["latency"] = compared.float_ms

    def __call__(self, folder: Path, progress: Progress, stop: Stop) -> tuple[dict[str, float], int | None]:
        figures = self._figures(locate_graph(folder), timed=self._judging.timed)
        return figures, None

    def quality(self, graph: Path) -> float:
        return self._figures(graph, timed=False)[self._judging.metric.name]

    def _figures(self, graph: Path, *, timed: bool) -> dict[str, float]:
        compared = self._float.beside(graph)
        if timed:
            compared = self._float.timed(compared)
        figures = {}
        ratios = [o.sqnr_db for o in compared.outputs if o.sqnr_db is not None]
        if any(not o.finite or o.reshaped for o in compared.outputs):
            raise InputError(f"{graph.name} gives values that are not finite, or of another shape")
        if ratios:
            figures["sqnr"] = min(ratios)
        agreed = [o.top1 for o in compared.outputs if o.top1 is not None]
        if agreed:
            figures["accuracy"] = min(agreed)
        if compared.quantized_ms is not None:
            figures["latency"] = compared.quantized_ms
        name = self._judging.metric.name
        if self._function is not None:
            figures[name] = self._function(graph)
        for wanted in (name, *(["latency"] if timed else [])):
            if wanted not in figures:
                why = "none of its outputs is a score" if wanted == "accuracy" else "it cannot be measured here"
                raise UsageError(f"{self._judging.model} has no {wanted}: {why}", hint="name another")
        return figures


def _as_evaluated(judging: Judging) -> EvaluateOptions:
    """The options of `evaluate` that give the samples: those of the calibration where no others are named."""
    graph, data, script = judging.graph, judging.data, judging.graph.user_script
    if data is not None:
        script = None
    elif graph.calibration_inputs is not None:
        data = str(graph.calibration_inputs)
    pair = GraphEvaluationOptions(
        user_script=script,
        data_function=graph.data_function if script is not None else None,
        image_spec=graph.image_spec if data is not None else None,
    )
    return EvaluateOptions(judging.model, judging.model, data=data, num_samples=judging.samples, pair=pair)


def _function(judging: Judging) -> Callable[[Path], float]:
    """The user's function: of a graph's session, or of a checkpoint's folder."""
    from quantcli.evaluate.graph_metric import GraphMetric

    script, name = Path(judging.metric.script or ""), judging.metric.name
    offered = {"data_dir": judging.data, "batch_size": 1}
    metric = GraphMetric(script, name, offered, of_graphs=is_graph(judging.model))
    graphs = is_graph(judging.model)

    def call(path: Path) -> float:
        value = metric(locate_graph(path) if graphs else path)
        assert math.isfinite(value)
        return value

    return call


def _silent() -> Progress:
    from quantcli.progress import Silent

    return Silent()
