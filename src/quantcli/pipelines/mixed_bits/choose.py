"""Mixed bits: measures what each linear costs at each width, solves for the target, and gives the plan its schemes.

What was measured and chosen is kept beside the run's other state, so that a run that was interrupted goes on with the
same choice.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quantcli.errors import UsageError
from quantcli.folder import read_state, write_json
from quantcli.pipelines.blockwise.tokens import measured_tokens
from quantcli.pipelines.mixed_bits.allocation import choose_bits
from quantcli.pipelines.mixed_bits.budget import Budget, Choice
from quantcli.pipelines.mixed_bits.sensitivity import measure
from quantcli.pipelines.planning.plan import Plan
from quantcli.pipelines.planning.sizes import with_choice
from quantcli.progress import Progress

__all__ = ["mix_bits"]


def mix_bits(plan: Plan, state: Path, progress: Progress) -> Plan:
    """The plan with the bits of each linear chosen for its target.

    Args:
        plan: With a budget.
        state: Where an interrupted run keeps what it needs.
        progress: Told of the measurement and of what was chosen.

    Raises:
        UsageError: overrides and shared inputs leave no choice within the target.
    """
    assert plan.budget is not None
    file = state / "bits.json"
    if file.is_file():
        choice = _read(read_state(file, _Written), plan)
    else:
        choice = _choose(plan, plan.budget, measured_tokens(plan, state, progress), progress)
        write_json(file, _written(choice))
    progress.plan("Bits", plan.budget.choice_rows(choice))
    return with_choice(plan, choice)


def _choose(plan: Plan, budget: Budget, tokens: Tensor, progress: Progress) -> Choice:
    begun = time.perf_counter()
    measured = measure(plan, {name: tuple(sizes) for name, sizes in budget.sizes.items()}, tokens, progress)
    fixed = set(budget.fixed)
    groups = [free for names in measured.groups if (free := [n for n in names if n not in fixed])]
    groups += [[name] for name in budget.sizes if name in fixed]
    given = measured.costs, budget.sizes, groups, budget.limit
    bits = choose_bits(*given)
    if bits is None:  # the range was checked: only rounding is left
        raise UsageError("no choice of bits meets the target", hint="raise it a little")
    if sum(budget.sizes[name][b] for name, b in bits.items()) < budget.lowest:
        # the best choice leaves more than the tolerance: a few large linears, or effects that hardly differ
        bits = choose_bits(*given, lowest=budget.lowest) or bits
    seconds = time.perf_counter() - begun
    return Choice(bits, measured.costs, groups, _counts(plan), measured.tokens, seconds)


def _counts(plan: Plan) -> dict[str, int]:
    return {name: target.rows * target.columns for name, target in plan.targets.items()}


@dataclass(frozen=True)
class _Written:
    """A choice as it is kept; JSON has texts for keys."""

    bits: dict[str, int]
    costs: dict[str, dict[str, float]]
    groups: list[list[str]]
    tokens: int
    seconds: float


def _written(choice: Choice) -> dict[str, Any]:
    return {name: getattr(choice, name) for name in _Written.__dataclass_fields__}


def _read(values: _Written, plan: Plan) -> Choice:
    costs = {name: {int(bits): cost for bits, cost in found.items()} for name, found in values.costs.items()}
    return Choice(values.bits, costs, values.groups, _counts(plan), values.tokens, values.seconds)
