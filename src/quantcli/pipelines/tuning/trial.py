"""One trial: quantize, judge, and say what it came to; it never raises for what a trial can be blamed for."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantcli.errors import InterruptedRunError, QuantcliError
from quantcli.options import COSTS, Goal, QuantizeOptions
from quantcli.pipelines import quantize
from quantcli.pipelines.graph.beside import Gate
from quantcli.pipelines.graph.source import is_graph
from quantcli.pipelines.tuning.judge import Judging, PrunedError, judge_of
from quantcli.pipelines.tuning.prune import Partial, Pruner
from quantcli.pipelines.tuning.record import Record
from quantcli.progress import Progress, Silent, Task

__all__ = ["Job", "missed_goals", "run_trial"]


@dataclass(frozen=True)
class Job:
    """What one trial is told; it travels to other machines."""

    number: int
    """Of the trial."""
    label: str
    """How it is called."""
    point: dict[str, Any]
    """What was chosen."""
    options: QuantizeOptions
    """The same as options; the output is the trial's own folder."""
    judging: Judging
    """How it is judged."""
    goals: tuple[Goal, ...]
    """What must hold."""
    pruner: Pruner | None
    """What other trials came to; None: nothing is given up."""


def run_trial(job: Job, progress: Progress | None = None) -> Record:
    """Runs a trial; its folder stays where it was judged to the end.

    Args:
        job: What to do.
        progress: Shows its steps; what it has to say is kept in the record.

    Raises:
        InterruptedRunError: Ctrl-C.
    """
    begun, said = time.perf_counter(), _Said(progress or Silent())
    record = Record(job.number, job.label, job.point, "failed")
    try:
        record = _judged(job, record, said)
    except PrunedError as error:
        record = replace(record, state="pruned", reason=str(error), figures=error.figures)
    except InterruptedRunError:
        raise
    except QuantcliError as error:
        record = replace(record, reason=error.message)
    except Exception as error:  # a fault of ours in one trial is no reason to lose the others
        record = replace(record, reason=f"a bug in quantcli: {type(error).__name__}: {error}")
    return replace(record, notes=tuple(said.lines), seconds=round(time.perf_counter() - begun, 2))


def _judged(job: Job, record: Record, said: "_Said") -> Record:
    options, judge = job.options, judge_of(job.judging)
    gate = _gate(job) if is_graph(options.model) else None
    result: Any = quantize.run(options, said, gate=gate, kept=job.judging.kept)
    errors = [layer.relative_error for layer in result.layers]
    figures = {"size": float(result.size_bytes), "time": round(result.seconds, 3)}
    calibrated = any(layer.tokens for layer in result.layers)
    if errors:
        figures |= {"error": sum(errors) / len(errors), "calibrated": float(calibrated)}
    known = Partial(figures["size"], figures.get("error"), calibrated)
    pruner = job.pruner
    if pruner is not None and (reason := pruner.by_error(known)) is not None:
        raise PrunedError(reason, figures)

    def stop(partial: Partial) -> str | None:
        return None if pruner is None else pruner.by_text(partial, figures["size"])

    try:
        found, windows = judge(options.output, said, stop)
    except PrunedError as error:
        raise PrunedError(str(error), figures) from error
    figures |= found
    missed = missed_goals(job.goals, figures, judge.reference)
    return replace(record, state="complete", figures=figures, missed=missed, windows=windows)


def missed_goals(goals: Sequence[Goal], figures: dict[str, float], reference: Any) -> dict[str, float]:
    """By goal, how far its figure is on the wrong side, as a share of the bound; those alone that do not hold."""
    missed = {}
    for goal in goals:
        own = reference.get(goal.name)
        gap = goal.missed_by(figures[goal.name], own)
        if gap > 0:
            missed[str(goal)] = gap / max(abs(goal.bound(own)), 1e-12)
    return missed


def _gate(job: Job) -> Gate | None:
    """Where activations become integers: a goal on quality for which nodes go back to float."""
    metric = job.judging.metric.name
    goals = [goal for goal in job.goals if goal.name == metric and goal.name not in COSTS]
    if not goals:
        return None
    judge = judge_of(job.judging)

    def missing(written: Path) -> str | None:
        value = judge.quality(written)
        wrong = [g for g in goals if g.missed_by(value, judge.reference.get(metric)) > 0]
        return f"{metric} is {value:.4g}" if wrong else None

    return Gate(missing, " and ".join(map(str, goals)))


class _Said(Silent):
    """Keeps what a trial has to say, and lets its bars through."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self.lines: list[str] = []

    def warn(self, message: str) -> None:
        """Keeps the message."""
        self.lines.append(message)

    @contextmanager
    def track(self, label: str, total: float, start: float = 0) -> Iterator[Task]:
        """Shows it."""
        with self._progress.track(label, total, start) as task:
            yield task
