"""Which linear gets how many bits: a knapsack in which every group of linears takes one width, solved exactly.

Symbols: group i, width b, cost c[i, b], size s[i, b]. Minimise sum c[i, b(i)] over all choices b with
lowest <= sum s[i, b(i)] <= limit. HiGHS (https://highs.dev), as scipy carries it, solves it as an integer program with
one binary variable per group and width.
"""

from collections.abc import Mapping, Sequence
from math import gcd

__all__ = ["choose_bits"]

_LARGEST_COST = 1e4
"""What the largest cost is scaled to: HiGHS stops at an absolute gap of 1e-6."""
_SECONDS = 120.0


def choose_bits(
    costs: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, Mapping[int, int]],
    groups: Sequence[Sequence[str]],
    limit: int,
    lowest: int = 0,
) -> dict[str, int] | None:
    """The choice of least total cost within the limit.

    Args:
        costs: By linear and width, what rounding it to that width costs.
        sizes: By linear and width, what it takes; whole numbers of any unit. A linear with one width is fixed.
        groups: The linears, each in one group; those of a group take the same width, one that all of them have.
        limit: Largest total size.
        lowest: Smallest total size.

    Returns:
        The width of each linear; None where no choice lies between `lowest` and `limit`.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    options = [(i, bits) for i, names in enumerate(groups) for bits in _widths(names, sizes)]
    cost = np.array([sum(costs[name][bits] for name in groups[i]) for i, bits in options])
    size = [sum(sizes[name][bits] for name in groups[i]) for i, bits in options]
    unit = gcd(*size)  # small whole numbers: what the solver's tolerances are made for
    weights = np.array([s // unit for s in size], dtype=np.float64)
    once = np.zeros((len(groups), len(options)))
    for column, (i, _) in enumerate(options):
        once[i, column] = 1
    largest = float(cost.max(initial=0.0))
    high, low = limit // unit, -(-lowest // unit)
    if low > high:
        return None
    solved = milp(
        cost * (_LARGEST_COST / largest if largest > 0 else 1.0),
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        # half a unit of room, so that tolerances decide nothing
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(weights[None], low - 0.5, high + 0.5)],
        options={"mip_rel_gap": 0.0, "time_limit": _SECONDS},
    )
    if solved.x is None:
        return None
    taken = [option for option, share in zip(options, solved.x, strict=True) if share > 0.5]
    total = sum(s for s, share in zip(size, solved.x, strict=True) if share > 0.5)
    if len(taken) != len(groups) or not lowest <= total <= limit:
        raise AssertionError(f"the solver's choice takes {total}, between {lowest} and {limit} were allowed")
    return {name: bits for i, bits in taken for name in groups[i]}


def _widths(names: Sequence[str], sizes: Mapping[str, Mapping[int, int]]) -> list[int]:
    """Widths that all linears of a group have."""
    return [bits for bits in sizes[names[0]] if all(bits in sizes[name] for name in names)]
