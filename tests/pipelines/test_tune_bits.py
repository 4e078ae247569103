"""Closing in on the least bits that meet a goal, and the front of two figures, beside what is literally meant."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.options import Goal, Metric
from quantcli.pipelines.tuning.bits import BITS, BitSearch
from quantcli.pipelines.tuning.front import pareto_front
from quantcli.pipelines.tuning.record import Record


@settings(deadline=None)
@given(
    st.floats(2.1, 7.9), st.floats(0.2, 3.0), st.floats(0.0, 0.9), st.booleans()
)  # where it begins to hold, how steep KL falls, how crooked
def test_the_least_bits_are_found_in_few_trials(edge, slope, crooked, drawn_as_a_line):
    goal = Goal.parse("kl<=0.05")

    def kl(bits):
        return 0.05 * math.exp(-slope * (bits - edge) * (1 + crooked * abs(math.sin(3 * bits))))

    search = BitSearch(2.0, 8.0, goal if drawn_as_a_line else None, {})
    records = []
    while (point := search.next(records)) is not None:
        assert 2.0 <= point[BITS] <= 8.0 and point not in [r.point for r in records]
        value = kl(point[BITS])
        missed = {str(goal): value / 0.05 - 1} if value > 0.05 else {}
        records.append(Record(len(records) + 1, "", point, "complete", {"kl": value, "size": point[BITS]}, missed))
        assert len(records) <= 25
    least = min(r.point[BITS] for r in records if r.meets)
    assert edge - 1e-3 <= least <= edge * 1.012 + 0.01


def test_the_ends_of_the_range():
    """All meet it: the least bits are tried; none does: the most are, and then it ends."""
    for value, end in ((0.01, 2.0), (1.0, 8.0)):
        search, records = BitSearch(2.0, 8.0, None, {}), []
        while (point := search.next(records)) is not None and len(records) < 30:
            missed = {"kl<=0.05": 1.0} if value > 0.05 else {}
            records.append(Record(len(records) + 1, "", point, "complete", {"kl": value}, missed))
        assert len(records) < 30
        assert min(abs(r.point[BITS] - end) for r in records) <= 0.02 * end


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12), st.booleans())
def test_the_front_is_what_none_beats(pairs, higher):
    metric = Metric("m", "f.py", lower=not higher)
    records = [Record(n, "", {}, "complete", {"size": float(a), "m": float(b)}) for n, (a, b) in enumerate(pairs)]
    found = {(r.figures["size"], r.figures["m"]) for r in pareto_front(records, metric, "size")}
    sign = -1 if higher else 1
    points = {(float(a), float(b)) for a, b in pairs}
    wanted = {
        (a, b) for a, b in points if not any(c <= a and sign * d <= sign * b and (c, d) != (a, b) for c, d in points)
    }
    assert found == wanted
