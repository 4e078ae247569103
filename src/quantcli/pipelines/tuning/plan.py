"""What a search will do: what is tried, how it is judged, what decides; all that cannot be is refused beforehand."""

import time
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from quantcli.errors import UsageError
from quantcli.folder import fingerprint
from quantcli.json_files import read_json
from quantcli.models.source import locate_model
from quantcli.options import GraphOptions, Metric, QuantizeOptions, TuneOptions
from quantcli.pipelines import quantize
from quantcli.pipelines.graph.source import is_graph, locate_graph
from quantcli.pipelines.planning.steps import resolve_steps
from quantcli.pipelines.tuning.bits import bits_space
from quantcli.pipelines.tuning.choices import make_space
from quantcli.pipelines.tuning.judge import Judging, reads_tokens
from quantcli.pipelines.tuning.search import allowed_points, choose_sampler
from quantcli.pipelines.tuning.sets import predefined_set
from quantcli.pipelines.tuning.space import Space, checked

__all__ = ["TunePlan", "base_options", "make_tune_plan"]

_SMALL = 40
"""Points of a space that is tried whole where nothing says how many trials there are."""
_TRIALS = 20
_HALVINGS = 10
_PLANNING_SECONDS = 5.0


@dataclass(frozen=True)
class TunePlan:
    """Everything that is decided beforehand."""

    options: TuneOptions
    """As given."""
    folder: Path
    """The model's folder, or the folder of its graph."""
    digest: str
    """Fingerprint of the model."""
    kind: str
    """checkpoint or onnx."""
    metric: Metric
    """What tells how good a trial is."""
    space: Space
    """What is tried."""
    points: int | None
    """How many points it has; None of one with ranges, or with more than are counted."""
    sampler: str
    """How the next is chosen: grid, tpe, nsga2, or halving of bits."""
    trials: int
    """Most trials."""
    stop_at_first: bool
    """Whether the first that meets the goals ends it."""
    samples: GraphOptions
    """Where samples of graphs come from: flags, or what a configuration says for its trials."""

    @property
    def in_pairs(self) -> bool:
        """Whether two figures are made small at once."""
        return not self.options.goals

    def judging(self, kept: Path) -> Judging:
        """How trials are judged; what is made once lies in `kept`."""
        options = self.options
        language = reads_tokens(options.model)
        timed = options.minimize == "latency" or any(goal.name == "latency" for goal in options.goals)
        seq_len = options.eval_seq_len
        if language and seq_len == TuneOptions.eval_seq_len:
            seq_len = min(seq_len, _longest(options, self.folder) or seq_len)
        graph = GraphOptions() if language else self.samples
        return Judging(
            str(Path(options.model).absolute()) if Path(options.model).exists() else options.model,
            self.metric,
            timed,
            options.eval_data,
            options.eval_samples,
            seq_len,
            graph,
            kept,
            options.device,
            options.trust_remote_code,
        )

    def identity(self) -> dict[str, Any]:
        """What decides the content: a run goes on only with what the same made."""
        free = ("output", "force", "dry_run", "ray", "ray_cpus", "ray_gpus", "ray_memory", "trials", "timeout")
        said = {name: value for name, value in asdict(self.options).items() if name not in free}
        return said | {"parent": self.digest, "space": self.space.origin, "dimensions": self._dimensions()}

    def _dimensions(self) -> list[Any]:
        return [asdict(d) for d in self.space.dimensions]

    def rows(self) -> list[tuple[str, str]]:
        """For people."""
        options = self.options
        count = "" if self.points is None else f", {self.points} combination{'s' * (self.points > 1)}"
        skipped = f" ({self.space.skipped} others do not go together: {self.space.why})" if self.space.skipped else ""
        rows = [
            ("model", options.model),
            ("space", f"{self.space.origin}{count}{skipped}"),
            *(("", f"{d.name}: {_words(d)}") for d in self.space.dimensions if len(d.values) != 1),
            ("metric", f"{self.metric.name}, {'lower' if self.metric.lower else 'higher'} is better"),
            ("goal", " and ".join(map(str, options.goals)) or "none: the middle of the front of both figures"),
            ("minimize", options.minimize),
            ("trials", f"at most {self.trials}, {self.sampler}" + (", until one meets the goal" * self.stop_at_first)),
        ]
        if options.timeout is not None:
            rows.append(("time", f"no trial begins after {options.timeout:g} s"))
        where = "here, one at a time" if options.ray is None else f"as tasks of Ray ({options.ray})"
        return [*rows, ("run", where), ("output", str(options.output))]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        listed = None
        if self.space.finite and self.points is not None:
            listed = [
                {"label": self.space.label(p), "point": p} for p in islice(allowed_points(self.space), self.points)
            ]
        return {
            "model": self.options.model,
            "metric": asdict(self.metric),
            "goals": [str(goal) for goal in self.options.goals],
            "minimize": self.options.minimize,
            "space": {"origin": self.space.origin, "dimensions": self._dimensions(), "points": listed},
            "sampler": self.sampler,
            "trials": self.trials,
        }


def base_options(options: TuneOptions) -> QuantizeOptions:
    """What all trials share."""
    return QuantizeOptions(
        model=options.model,
        output=options.output,
        algorithm=options.algorithm,
        calibration=options.calibration,
        graph=options.graph,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )


def make_tune_plan(options: TuneOptions, space: Space | None = None) -> TunePlan:
    """Settles what is tried and refuses what cannot be, before the first trial.

    Args:
        options: As given.
        space: Of a pass or a workflow, where that was read already.

    Raises:
        UsageError: a space with values that cannot be, a metric or goal that the model does not have.
        InputError: a model that cannot be read.
    """
    kind = "onnx" if is_graph(options.model) else "checkpoint"
    if kind == "onnx":
        graph = locate_graph(Path(options.model))
        folder, digest = graph.parent, fingerprint(graph.parent)
    else:
        folder = locate_model(options.model)
        digest = fingerprint(folder)
    language = reads_tokens(options.model)
    metric = options.wanted_metric or Metric.parse("kl" if language else "sqnr")
    for goal in options.goals:
        goal.check(metric)
    _refuse_relative(options, metric, language)
    mixed = options.predefined == "mixed"
    found = space or _space(options, kind, language, mixed=mixed)
    if not mixed:
        found = checked(found, _checker(kind))
    most = options.trials or _SMALL
    points = None
    if found.finite:
        points = sum(1 for _ in islice(allowed_points(found), 10 * _SMALL))
        points = points if points < 10 * _SMALL else None
    whole = points is not None and points <= most
    trials = options.trials or (points if whole and points else _HALVINGS if mixed else _TRIALS)
    sampler = "halving" if mixed else choose_sampler(options.sampler, found, trials, goals=bool(options.goals))
    if sampler == "grid" and not found.finite:
        raise UsageError("--sampler grid needs lists of values, the space has a range", hint="use --sampler tpe")
    first = options.stop_at_first
    first = options.predefined == "woq" and bool(options.goals) if first is None else first
    return TunePlan(
        options, folder, digest, kind, metric, found, points, sampler, trials, first, _samples(options, space)
    )


def _space(options: TuneOptions, kind: str, language: bool, *, mixed: bool) -> Space:
    base = base_options(options)
    if mixed:
        return bits_space(base)
    if options.space is not None:
        said = read_json(options.space, object, "a space", hint='write it as {"bits": [3, 4], "group_size": [32, 64]}')
        return make_space(said, str(options.space), base, kind)
    if options.predefined is None and options.algorithm is not None:
        return make_space({}, f"-a {options.algorithm}", base, kind)
    name = options.predefined or ("weights" if language else "integers")
    return make_space(predefined_set(name, kind), f"--set {name}", base, kind)


def _samples(options: TuneOptions, space: Space | None) -> GraphOptions:
    """The graph's options that name samples."""
    graph = options.graph
    if space is None or graph.calibration_inputs is not None or graph.user_script is not None:
        return graph
    for point in islice(space.points(ends=True), _SMALL):
        if space.allowed(point) and (found := space.make(point).graph).user_script is not None:
            return found
    return graph


def _checker(kind: str) -> Any:
    """Refuses options that cannot be: by what they say, and, while that is quick, by what the model says to them."""
    begun = time.perf_counter()
    known: dict[str, UsageError | None] = {}

    def check(options: QuantizeOptions) -> None:
        key = repr(options)
        if key not in known:
            try:
                known[key] = None
                resolve_steps(options, kind)
                if time.perf_counter() - begun < _PLANNING_SECONDS:
                    quantize.run(replace(options, dry_run=True))
            except UsageError as error:
                known[key] = error
        if (refusal := known[key]) is not None:
            raise refusal

    return check


def _refuse_relative(options: TuneOptions, metric: Metric, language: bool) -> None:
    for goal in options.goals:
        if not goal.sign:
            continue
        known = ["latency"] if options.minimize == "latency" or not language else []
        known += [metric.name] if metric.name != "sqnr" else []
        if goal.name not in known or (language and goal.name in ("latency",)):
            raise UsageError(f"--goal {goal}: {goal.name} of the float model is not measured", hint="name a number")


def _longest(options: TuneOptions, folder: Path) -> int | None:
    from quantcli.pipelines.graph.source import GraphSource, context_length

    if is_graph(options.model):
        return context_length(GraphSource.open(options.model)[0])
    from quantcli.models.skeleton import load_config

    config = load_config(folder, options.trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _words(dimension: Any) -> str:
    if dimension.values:
        return ", ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in dimension.values)
    said = f"{dimension.low:g} to {dimension.high:g}"
    return said + (f" in steps of {dimension.step:g}" if dimension.step else "") + (" (log)" if dimension.log else "")
