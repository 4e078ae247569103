"""What is tried next: Optuna's study, kept in a file, asked for points and told what they came to."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from quantcli.pipelines.tuning.record import Record, by_point
from quantcli.pipelines.tuning.space import Dimension, Point, Space, token, values_of

__all__ = ["Asked", "Search", "choose_sampler"]

Sampler = Literal["grid", "tpe", "nsga2"]
_SAME = 200
"""Points in a row that were tried already, after which a space counts as exhausted."""
_POPULATION = 8
_MISSED = "missed"


@dataclass(frozen=True)
class Asked:
    """A point to try."""

    number: int
    """Of Optuna's trial."""
    point: Point
    """What to try."""


def choose_sampler(asked: str, space: Space, trials: int, *, goals: bool) -> Sampler:
    """The sampler, where none is named: all of the space where there are trials enough, else what learns."""
    if asked != "auto":
        return asked  # type: ignore[return-value]
    if space.finite and next(islice(allowed_points(space), trials, None), None) is None:
        return "grid"
    return "tpe" if goals else "nsga2"


def allowed_points(space: Space) -> Iterator[Point]:
    """Points in order, without those that cannot be."""
    return (point for point in space.points() if space.allowed(point))


class Search:
    """Asks and tells; what was told before is remembered in the file."""

    def __init__(
        self,
        space: Space,
        sampler: Sampler,
        file: Path,
        values: Callable[[Record], tuple[float, ...] | None],
        *,
        seed: int,
        objectives: int,
    ):
        """Opens the study, or goes on with it; trials that an interrupted run had begun are asked for again.

        Args:
            space: What may be chosen.
            sampler: How.
            file: Where the study is kept.
            values: Of a trial, the figures to make small; None where it has none.
            seed: Of the sampler.
            objectives: Figures to make small: 1, or 2 for a front.
        """
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
        from optuna.trial import TrialState

        optuna.logging.set_verbosity(logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._optuna, self._space, self._sampler = optuna, space, sampler
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(file))),
            sampler=_sampler(sampler, seed),
            study_name="tune",
            directions=["minimize"] * objectives,
            load_if_exists=True,
        )
        self._values = values
        self._running: dict[int, Any] = {}
        self._again: list[Point] = []
        states = (TrialState.WAITING, TrialState.RUNNING)
        for _ in self._study.get_trials(deepcopy=False, states=states[:1]):
            self._suggested(self._study.ask())
        for trial in self._study.get_trials(deepcopy=False, states=states[1:]):
            if (point := _point(space, trial.params)) is not None:
                self._again.append(point)
            self._study.tell(trial.number, state=TrialState.FAIL)
        self._grid = allowed_points(space) if sampler == "grid" else None

    def ask(self, records: Sequence[Record], running: Sequence[Point] = ()) -> Asked | None:
        """The next point that is neither done nor running; None where there is none left."""
        done = set(by_point(records)) | {_key(p) for p in running}
        while self._again:
            point = self._again.pop(0)
            if _key(point) not in done:
                return self._begin(point)
        if self._grid is not None:
            following = next((p for p in self._grid if _key(p) not in done), None)
            return None if following is None else self._begin(following)
        earlier = by_point(records)
        for _ in range(_SAME):
            trial = self._study.ask()
            point = self._suggested(trial)
            if not self._space.allowed(point):
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            elif (record := earlier.get(_key(point))) is not None:
                self._running[trial.number] = trial
                self.tell(trial.number, record)
            elif _key(point) in done:
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            else:
                self._running[trial.number] = trial
                return Asked(trial.number, point)
        return None

    def propose(self, point: Point) -> Asked:
        """Begins a point that was chosen elsewhere."""
        return self._begin(point)

    def _begin(self, point: Point) -> Asked:
        several = {d.name for d in self._space.dimensions if len(d.values) != 1}
        self._study.enqueue_trial({name: token(value) for name, value in point.items() if name in several})
        trial = self._study.ask()
        suggested = self._suggested(trial)
        self._running[trial.number] = trial
        return Asked(trial.number, suggested)

    def tell(self, number: int, record: Record) -> None:
        """What a trial came to."""
        state = self._optuna.trial.TrialState
        trial, values = self._running.pop(number), self._values(record)
        trial.set_user_attr(_MISSED, sum(record.missed.values()))
        if values is None:
            self._study.tell(trial, state=state.PRUNED if record.state == "pruned" else state.FAIL)
        else:
            self._study.tell(trial, list(values))

    def _suggested(self, trial: Any) -> Point:
        point: Point = {}
        for dimension in self._space.dimensions:
            if dimension.there(point):
                point[dimension.name] = _suggest(trial, dimension)
        return point


def _sampler(name: Sampler, seed: int) -> Any:
    import optuna

    def missed(trial: Any) -> tuple[float]:
        return (float(trial.user_attrs.get(_MISSED, 0.0)),)

    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=_POPULATION, constraints_func=missed)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=6, constraints_func=missed)
    return optuna.samplers.RandomSampler(seed=seed)


def _suggest(trial: Any, dimension: Dimension) -> Any:
    if dimension.values:
        tokens = values_of(dimension)
        if len(tokens) == 1:
            return dimension.values[0]
        return dimension.values[tokens.index(trial.suggest_categorical(dimension.name, tokens))]
    if dimension.whole:
        step = 1 if dimension.log else int(dimension.step or 1)
        return trial.suggest_int(dimension.name, int(dimension.low), int(dimension.high), step=step, log=dimension.log)
    return trial.suggest_float(dimension.name, dimension.low, dimension.high, step=dimension.step, log=dimension.log)


def _point(space: Space, params: dict[str, Any]) -> Point | None:
    """A point from what Optuna keeps of it; None where the run was killed before it kept all."""
    point: Point = {}
    for dimension in space.dimensions:
        if not dimension.there(point):
            continue
        if len(dimension.values) == 1:
            point[dimension.name] = dimension.values[0]
        elif dimension.name not in params:
            return None
        elif not dimension.values:
            point[dimension.name] = params[dimension.name]
        else:
            point[dimension.name] = dimension.values[values_of(dimension).index(params[dimension.name])]
    return point


def _key(point: Point) -> str:
    return json.dumps(point, sort_keys=True, default=str)
