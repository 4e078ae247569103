"""The trials of a search: asked for, run, written down and told; of their models only the best stays."""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantcli.folder import PartialFolder
from quantcli.pipelines.tuning.bits import BitSearch
from quantcli.pipelines.tuning.front import best_of, loss
from quantcli.pipelines.tuning.plan import TunePlan
from quantcli.pipelines.tuning.prune import Pruner
from quantcli.pipelines.tuning.record import TRIALS, Record, append_record, read_records
from quantcli.pipelines.tuning.runner import Runner
from quantcli.pipelines.tuning.search import Asked, Search
from quantcli.pipelines.tuning.space import Point
from quantcli.pipelines.tuning.trial import Job
from quantcli.progress import Progress

__all__ = ["Loop", "show_figure"]

STUDY = "study.journal"


class Loop:
    """One search."""

    def __init__(self, plan: TunePlan, partial: PartialFolder, reference: Mapping[str, float], progress: Progress):
        """Takes up what an interrupted run has left.

        Args:
            plan: What is tried.
            partial: The folder that is made.
            reference: The float model's own figures.
            progress: Told of every trial.
        """
        self._plan, self._partial, self._reference, self._progress = plan, partial, reference, progress
        self._file = partial.root / TRIALS
        self.records = read_records(self._file)
        self._number = 1 + max((r.number for r in self.records), default=0)
        self._running: dict[int, tuple[Asked, Point]] = {}
        sampler: Any = "tpe" if plan.sampler == "halving" else plan.sampler
        self._search = Search(
            plan.space,
            sampler,
            partial.root / STUDY,
            self._values,
            seed=plan.options.calibration.seed,
            objectives=2 if plan.in_pairs else 1,
        )
        self._bits: BitSearch | None = None
        if plan.sampler == "halving":
            of_metric = [g for g in plan.options.goals if g.name == plan.metric.name]
            line = of_metric[0] if len(of_metric) == 1 and plan.metric.name == "kl" else None
            (dimension,) = plan.space.dimensions
            self._bits = BitSearch(dimension.low, dimension.high, line, reference)
        self._clean()

    def run(self, runner: Runner) -> str:
        """Runs trials until there are enough; says why it ended."""
        plan, begun, ended = self._plan, time.monotonic(), ""
        columns = ("trial", "what", plan.metric.name, plan.options.minimize, "")
        title = f"{plan.space.origin}, at most {plan.trials} trials"
        with self._progress.board(title, columns) as board:
            for record in self.records:
                board.add(self._cells(record))
            while True:
                while not ended and runner.free:
                    ended = self._enough(begun) or ("" if self._begin(runner) else self._exhausted)
                if not self._running:
                    return ended
                record = runner.next()
                asked, _ = self._running.pop(record.number)
                append_record(self._file, record)
                self.records.append(record)
                self._search.tell(asked.number, record)
                self._clean()
                board.add(self._cells(record))

    @property
    def _exhausted(self) -> str:
        return "all were tried" if self._bits is None else "the next bits would come to the same size"

    def folder(self, point: Point) -> Path:
        """Where the model of a trial lies, or is made: the same for the same choices, so that a run goes on with it."""
        digest = hashlib.sha256(json.dumps(point, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return self._partial.state / "trials" / digest

    def best(self) -> Record | None:
        """The best trial so far."""
        plan = self._plan
        return best_of(self.records, plan.metric, plan.options.minimize, goals=bool(plan.options.goals))

    def job(self, number: int, point: Point) -> Job:
        """What a trial is told."""
        plan = self._plan
        options = replace(plan.space.make(point), output=self.folder(point), force=True)
        pruner = None
        if plan.options.prune and plan.options.minimize == "size" and self._bits is None:
            kl = [g for g in plan.options.goals if g.name == "kl" and g.lower]
            pruner = Pruner(tuple(r for r in self.records if r.state == "complete"), kl)
        return Job(number, plan.space.label(point), point, options, plan.judging(self.kept), plan.options.goals, pruner)

    @property
    def kept(self) -> Path:
        """What trials share."""
        return self._partial.state / "kept"

    def _begin(self, runner: Runner) -> bool:
        running = [point for _, point in self._running.values()]
        if self._bits is not None:
            if running:
                return True  # one at a time: the next depends on it
            point = self._bits.next(self.records)
            asked = None if point is None else self._search.propose(point)
        else:
            asked = self._search.ask(self.records, running)
        if asked is None:
            return False
        self._running[self._number] = (asked, asked.point)
        runner.submit(self.job(self._number, asked.point))
        self._number += 1
        return True

    def _enough(self, begun: float) -> str:
        options = self._plan.options
        if len(self.records) + len(self._running) >= self._plan.trials:
            return "all were tried" if self._plan.points == self._plan.trials else f"{self._plan.trials} trials"
        if options.timeout is not None and time.monotonic() - begun >= options.timeout:
            return f"--timeout {options.timeout:g} s"
        if self._plan.stop_at_first and any(r.meets for r in self.records):
            return "the first that meets the goal"
        return ""

    def _values(self, record: Record) -> tuple[float, ...] | None:
        if record.state != "complete":
            return None
        cost = record.figures[self._plan.options.minimize]
        return (loss(record, self._plan.metric), cost) if self._plan.in_pairs else (cost,)

    def _clean(self) -> None:
        """Removes the models of trials that are not the best."""
        best = self.best()
        kept = self.folder(best.point) if best is not None else None
        busy = {self.folder(point) for _, point in self._running.values()}
        for record in self.records:
            folder = self.folder(record.point)
            if folder != kept and folder not in busy:
                shutil.rmtree(folder, ignore_errors=True)

    def _cells(self, record: Record) -> tuple[str, ...]:
        names = (self._plan.metric.name, self._plan.options.minimize)
        shown = [show_figure(name, record.figures[name]) if name in record.figures else "-" for name in names]
        if record.state == "complete":
            best = self.best()
            said = "best so far" if best is not None and best.number == record.number else ""
            said = said or ("misses the goal" if record.missed else "")
        else:
            said = f"{'given up' if record.state == 'pruned' else 'failed'}: {record.reason}"
        return str(record.number), record.label, *shown, said


def show_figure(name: str, value: float) -> str:
    """A figure with its unit."""
    if name == "size":
        return f"{value / 1e6:.4g} MB"
    units = {"latency": " ms", "time": " s", "sqnr": " dB"}
    return f"{value:.4g}{units.get(name, '')}"
