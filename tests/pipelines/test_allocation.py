"""The knapsack against trying everything."""

import itertools
import random

import pytest

from quantcli.pipelines.mixed_bits.allocation import choose_bits


def try_everything(costs, sizes, groups, limit, lowest):
    """The least cost and every choice that has it, by looking at all of them."""
    options = [[b for b in sizes[names[0]] if all(b in sizes[n] for n in names)] for names in groups]
    best, found = None, []
    for widths in itertools.product(*options):
        choice = {name: bits for names, bits in zip(groups, widths, strict=True) for name in names}
        if lowest <= sum(sizes[n][b] for n, b in choice.items()) <= limit:
            cost = sum(costs[n][b] for n, b in choice.items())
            if best is None or cost < best - 1e-12:
                best, found = cost, []
            if cost <= best + 1e-12:
                found.append(choice)
    return best, found


def make_case(seed):
    """Linears in groups of one to three, some with one width only, of sizes and costs of all magnitudes."""
    draw = random.Random(seed)
    unit = draw.choice((1, 7, 4608, 1_000_003))
    groups, sizes, costs = [], {}, {}
    for number in range(draw.randint(1, 6)):
        names = [f"{number}.{i}" for i in range(draw.randint(1, 3))]
        groups.append(names)
        widths = draw.sample((2, 3, 4, 5, 8), draw.randint(1, 4))
        for name in names:
            weights, scale = draw.randint(1, 40), 10 ** draw.uniform(-6, 1)
            sizes[name] = {b: unit * weights * b for b in widths}
            costs[name] = {b: scale * 4.0**-b * draw.uniform(0.5, 2) for b in widths}
    smallest = sum(min(s.values()) for s in sizes.values())
    largest = sum(max(s.values()) for s in sizes.values())
    limit = draw.randint(smallest - 2, largest + 2)
    lowest = draw.choice((0, int(0.99 * limit), limit))
    return costs, sizes, groups, limit, lowest


@pytest.mark.parametrize("seed", range(80))
def test_the_choice_is_the_best_of_all(seed):
    costs, sizes, groups, limit, lowest = make_case(seed)
    best, choices = try_everything(costs, sizes, groups, limit, lowest)
    found = choose_bits(costs, sizes, groups, limit, lowest)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert sum(costs[n][b] for n, b in found.items()) == pytest.approx(best, rel=1e-9)
    assert lowest <= sum(sizes[n][b] for n, b in found.items()) <= limit
    assert len(choices) > 1 or found == choices[0]


def test_cases_cover_what_can_happen():
    """Among the random cases are some without a solution, some with groups, some with a lower limit that binds."""
    cases = [make_case(seed) for seed in range(80)]
    assert any(try_everything(*case)[0] is None for case in cases)
    assert any(len(names) > 1 for case in cases for names in case[2])
    assert any(
        (plain := try_everything(*case[:4], 0)[0]) is not None
        and (both := try_everything(*case)[0]) is not None
        and both > plain
        for case in cases
    )


def test_a_model_of_eighty_blocks_is_no_trouble():
    draw = random.Random(0)
    shapes = [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)]
    sizes, costs = {}, {}
    for number in range(320):
        rows, columns = shapes[number % 4]
        sizes[str(number)] = {b: rows * columns * b + rows * columns // 64 * (16 + b) for b in (2, 3, 4, 8)}
        costs[str(number)] = {b: draw.lognormvariate(0, 1) * 4.0**-b for b in (2, 3, 4, 8)}
    weights = sum(rows * columns for rows, columns in shapes) * 80
    found = choose_bits(costs, sizes, [[name] for name in sizes], int(3.5 * weights))
    assert 3.499 < sum(sizes[n][b] for n, b in found.items()) / weights <= 3.5
