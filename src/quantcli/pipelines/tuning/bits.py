"""Mixed bits for a goal: the smallest average of bits whose result meets it, by closing in on where it begins to hold.

Quality grows with the bits, so each trial halves what is left of the range, or more: the logarithm of KL is close to a
line over the bits, and the next target is where that line meets the goal.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from quantcli.errors import InputError
from quantcli.options import Goal, QuantizeOptions
from quantcli.pipelines.tuning.record import Record
from quantcli.pipelines.tuning.space import Dimension, Point, Space

__all__ = ["BITS", "BitSearch", "bits_space"]

BITS = "target_bits"
_CLOSE = 0.01
"""Share of the bits at which a bracket is as small as results are near their target."""
_ROOM = 0.15
"""Share of a bracket that a guess stays off its ends, so that it always shrinks."""
_FIRST = 4.5


def bits_space(base: QuantizeOptions) -> Space:
    """Averages of bits that the model can be brought to.

    Raises:
        UsageError: widths that cannot be mixed.
        InputError: it is no checkpoint.
    """
    from quantcli.pipelines.graph.source import is_graph
    from quantcli.pipelines.planning.decide import make_plan

    if is_graph(base.model):
        raise InputError(f"{base.model} is an ONNX graph, bits are mixed in checkpoints", hint="use --set weights")
    plan = make_plan(replace(base, target_bits=_FIRST))
    assert plan.budget is not None
    low, high = plan.budget.reachable

    def make(point: Point) -> QuantizeOptions:
        return replace(base, target_bits=point[BITS])

    def label(point: Point) -> str:
        return f"{point[BITS]:.3f} bits"

    low, high = math.ceil(low * 1000) / 1000, math.floor(high * 1000) / 1000
    return Space((Dimension(BITS, (), low, high),), make, label, "--set mixed")


@dataclass(frozen=True)
class BitSearch:
    """Where to go next."""

    low: float
    """The least bits that can be had."""
    high: float
    """The most."""
    goal: Goal | None
    """The one goal on a metric that falls with the bits, if it is that."""
    reference: Mapping[str, float]
    """The float model's own figures."""

    def next(self, records: Sequence[Record]) -> Point | None:
        """The next average of bits; None where there is nothing to find any more."""
        tried = {r.point[BITS]: r for r in records}
        passing = [bits for bits, r in tried.items() if r.meets]
        failing = [bits for bits, r in tried.items() if not r.meets]
        high = min(passing, default=None)
        below = [bits for bits in failing if high is None or bits < high]
        low = max(below, default=None)
        if not tried:
            return {BITS: min(max(_FIRST, self.low), self.high)}
        if high is None:
            assert low is not None
            guess = None if low >= self.high else self._guess(list(tried.values()), low, self.high)
            return None if guess is None else {BITS: guess if guess not in tried else self.high}
        if low is None:
            if high <= self.low * (1 + _CLOSE):
                return None
            guess = self._guess(list(tried.values()), self.low, high)
            # below everything that was tried a guess is free to go to the end
            return {BITS: guess if guess not in tried else self.low}
        if high - low <= _CLOSE * high:
            return None
        return {BITS: self._guess([tried[low], tried[high]], low, high)}

    def _guess(self, known: Sequence[Record], low: float, high: float) -> float:
        """Bits between two, where the line through what is known meets the goal; the middle where nothing tells."""
        middle = (low + high) / 2
        found = self._line(known)
        room = _ROOM * (high - low)
        return round(min(max(middle if found is None else found, low + room), high - room), 3)

    def _line(self, known: Sequence[Record]) -> float | None:
        if self.goal is None:
            return None
        bound = self.goal.bound(self.reference.get(self.goal.name))
        points = [(r.point[BITS], r.figures.get(self.goal.name)) for r in known if r.state == "complete"]
        line = sorted((float(bits), math.log(value)) for bits, value in points if value is not None and value > 0)
        if len(line) < 2 or bound <= 0:
            return None
        (a, first), (b, second) = line[0], line[-1]
        if second >= first:
            return None
        return a + (math.log(bound) - first) * (b - a) / (second - first)
