"""What a search found."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantcli.options import Goal, Metric
from quantcli.pipelines.tuning.record import Record

__all__ = ["TuneResult"]


@dataclass(frozen=True)
class TuneResult:
    """What a search found and wrote."""

    output: Path
    """The folder."""
    best: Record
    """Whose model it holds."""
    front: list[Record]
    """Trials that no other beats in one figure without losing in the other, the cheapest first."""
    trials: list[Record]
    """All."""
    metric: Metric
    """What told how good they are."""
    minimize: str
    """What they cost."""
    goals: tuple[Goal, ...]
    """What had to hold."""
    sampler: str
    """How they were chosen."""
    reference: dict[str, float]
    """The float model's own figures, as far as they were measured."""
    parent_size_bytes: int
    """Of the float model's weights."""
    ended: str
    """Why no further trial began."""
    seconds: float
    """Of this run and of the interrupted ones that it continued, trials added up."""

    @property
    def failures(self) -> list[str]:
        """Goals that no trial met, a sentence each."""
        if self.best.meets:
            return []
        missed = [f"{goal}: {self.best.figures[goal.name]:.4g}" for goal in self.goals if str(goal) in self.best.missed]
        return [
            f"no trial meets {' and '.join(map(str, self.goals))}; the closest, {self.best.label} "
            f"(trial {self.best.number}), is kept in {self.output} ({'; '.join(missed)})"
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "output": str(self.output),
            "best": asdict(self.best),
            "front": [r.number for r in self.front],
            "trials": [asdict(r) for r in self.trials],
            "metric": asdict(self.metric),
            "minimize": self.minimize,
            "goals": [str(goal) for goal in self.goals],
            "sampler": self.sampler,
            "reference": self.reference,
            "parent_size_bytes": self.parent_size_bytes,
            "ended": self.ended,
            "seconds": self.seconds,
            "failures": self.failures,
        }
