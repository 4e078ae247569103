"""Mixed bits: measures what each linear costs at each width, solves for the target, and gives the plan its schemes.

What was measured and chosen is kept beside the run's other state, so that a run that was interrupted goes on with the
same choice.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quantcli.errors import UsageError
from quantcli.folder import read_state, write_json
from quantcli.pipelines.blockwise.tokens import measured_tokens
from quantcli.pipelines.mixed_bits.allocation import choose_bits
from quantcli.pipelines.mixed_bits.budget import Budget, Choice
from quantcli.pipelines.mixed_bits.sensitivity import Sensitivities, measure
from quantcli.pipelines.planning.plan import Plan
from quantcli.pipelines.planning.sizes import with_choice
from quantcli.progress import Progress

__all__ = ["mix_bits"]


def mix_bits(plan: Plan, state: Path, progress: Progress, kept: Path | None = None) -> Plan:
    """The plan with the bits of each linear chosen for its target.

    Args:
        plan: With a budget.
        state: Where an interrupted run keeps what it needs.
        progress: Told of the measurement and of what was chosen.
        kept: Where sensitivities stay for runs with other targets.

    Raises:
        UsageError: overrides and shared inputs leave no choice within the target.
    """
    assert plan.budget is not None
    file = state / "bits.json"
    if file.is_file():
        choice = _read(read_state(file, _Written), plan)
    else:
        choice = _choose(plan, plan.budget, measured_tokens(plan, state, progress), progress, kept)
        write_json(file, _written(choice))
    progress.plan("Bits", plan.budget.choice_rows(choice))
    return with_choice(plan, choice)


def _choose(plan: Plan, budget: Budget, tokens: Tensor, progress: Progress, kept: Path | None) -> Choice:
    begun = time.perf_counter()
    widths = {name: tuple(sizes) for name, sizes in budget.sizes.items()}
    measured = _measured(plan, widths, tokens, progress, kept)
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


def _measured(
    plan: Plan, widths: Mapping[str, tuple[int, ...]], tokens: Tensor, progress: Progress, kept: Path | None
) -> Sensitivities:
    """What each linear costs at each width; read where another run has measured the same."""
    if kept is None:
        return measure(plan, widths, tokens, progress)
    schemes = {name: (t.scheme.group_size, t.scheme.symmetric) for name, t in plan.targets.items()}
    said = repr((plan.model_digest, widths, schemes, plan.transforms)).encode() + tokens.numpy().tobytes()
    file = kept / f"sensitivities-{hashlib.sha256(said).hexdigest()[:16]}.json"
    if file.is_file():
        found = read_state(file, _Measured)
        costs = {name: {int(bits): cost for bits, cost in by.items()} for name, by in found.costs.items()}
        return Sensitivities(found.groups, costs, found.tokens)
    measured = measure(plan, widths, tokens, progress)
    kept.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(measured))
    return measured


@dataclass(frozen=True)
class _Measured:
    """Sensitivities as they are kept; JSON has texts for keys."""

    groups: list[list[str]]
    costs: dict[str, dict[str, float]]
    tokens: int


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
