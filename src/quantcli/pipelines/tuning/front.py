"""Which trial is the best, and which ones nothing beats in both figures."""

import math
from collections.abc import Sequence

from quantcli.options import Metric
from quantcli.pipelines.tuning.record import Record

__all__ = ["best_of", "loss", "pareto_front"]


def loss(record: Record, metric: Metric) -> float:
    """The metric as a number that is better where it is lower."""
    value = record.figures[metric.name]
    return value if metric.lower else -value


def best_of(records: Sequence[Record], metric: Metric, minimize: str, *, goals: bool) -> Record | None:
    """The best of the trials that were judged to the end; None where there is none.

    With goals, the cheapest that meets them; where none does, the one that misses them by least. Without, the point of
    the front that is nearest to the corner of both minima, each figure scaled to the front's range.
    """
    judged = [r for r in records if r.state == "complete"]
    if not judged:
        return None
    if goals:
        meeting = [r for r in judged if r.meets]
        if meeting:
            return min(meeting, key=lambda r: (r.figures[minimize], loss(r, metric), r.number))
        return min(judged, key=lambda r: (sum(r.missed.values()), r.figures[minimize], r.number))
    front = pareto_front(judged, metric, minimize)
    axes = [[loss(r, metric) for r in front], [r.figures[minimize] for r in front]]

    def far(number: int) -> float:
        total = 0.0
        for values in axes:
            spread = max(values) - min(values)
            total += ((values[number] - min(values)) / spread) ** 2 if spread > 0 else 0.0
        return math.sqrt(total)

    return front[min(range(len(front)), key=far)]


def pareto_front(records: Sequence[Record], metric: Metric, minimize: str) -> list[Record]:
    """Trials that no other beats in one figure without losing in the other, the cheapest first."""
    judged = [r for r in records if r.state == "complete"]
    front: list[Record] = []
    for record in sorted(judged, key=lambda r: (r.figures[minimize], loss(r, metric), r.number)):
        if not front or loss(record, metric) < loss(front[-1], metric):
            front.append(record)
    return front
