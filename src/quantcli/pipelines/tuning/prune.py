"""When a trial is given up: what is cheap to know comes first, and only what decides is believed.

The order of cost: the mean relative error of the matrices, which quantizing has told anyway; KL on a few windows of
text; KL on all of them. A trial is given up where an earlier one is no larger and clearly closer, or where a goal on
KL is out of reach.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantcli.options import Goal
from quantcli.pipelines.tuning.record import Record

__all__ = ["Partial", "Pruner"]

_CLEARLY = 1.5
"""Times the error of another trial, above which its KL is not in doubt."""
_FEW = 4
"""Windows after which KL is looked at."""
_ERRORS = 3.0
"""Standard errors of a mean that are granted."""


@dataclass(frozen=True)
class Partial:
    """What is known of a trial on its way."""

    size: float | None = None
    """Bytes."""
    error: float | None = None
    """Mean relative error of its matrices."""
    calibrated: bool = False
    """Whether that error is weighted by inputs: only such errors are compared."""
    kl: tuple[float, float | None] | None = None
    """Mean over the windows so far, and its standard error."""
    windows: int = 0
    """How many."""


@dataclass(frozen=True)
class Pruner:
    """What other trials came to when this one began."""

    finished: Sequence[Record]
    """Judged to the end."""
    goals: Sequence[Goal]
    """Of KL."""

    def by_error(self, known: Partial) -> str | None:
        """Why the error of the matrices decides."""
        if known.error is None or known.size is None:
            return None
        for other in self.finished:
            error, like = other.figures.get("error"), other.figures.get("calibrated") == float(known.calibrated)
            if like and error is not None and other.figures["size"] <= known.size and known.error > _CLEARLY * error:
                return f"relative error {known.error:.3g}, trial {other.number} has {error:.3g} and is no larger"
        return None

    def by_text(self, known: Partial, size: float) -> str | None:
        """Why KL on the windows so far decides."""
        if known.kl is None or known.windows < _FEW:
            return None
        mean, deviation = known.kl
        least = mean - _ERRORS * (deviation or 0.0)
        for goal in self.goals if any(r.figures.get("kl", math.inf) <= least for r in self.finished) else ():
            # one that is closer is there, which is kept where nothing meets the goal
            if least > goal.bound(0.0):
                return f"KL {mean:.3g} on {known.windows} windows, the goal is {goal}"
        for other in self.finished:
            kl = other.figures.get("kl")
            if kl is not None and other.figures["size"] <= size and least > kl:
                return f"KL {mean:.3g} on {known.windows} windows, trial {other.number} has {kl:.3g} and is no larger"
        return None
