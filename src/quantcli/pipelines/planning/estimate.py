"""What a run will take: time, which decides the calibration text, and memory, which may forbid it."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantcli.algorithms.transforms.smoothquant import SCORED_OUTPUTS
from quantcli.data.sampling import SamplingKey, estimate_sampling
from quantcli.errors import ResourceError, UsageError
from quantcli.folder import require_free_bytes
from quantcli.models.machine import free_bytes, matmul_flops
from quantcli.models.skeleton import disk_name
from quantcli.models.writer import FILE_BYTES
from quantcli.options import BUILTIN, SELF, CalibrationOptions
from quantcli.pipelines.distilling.cost import distill_cost
from quantcli.pipelines.mixed_bits.widths import make_budget
from quantcli.pipelines.planning.plan import Plan
from quantcli.pipelines.planning.sizes import with_bits, written_bytes
from quantcli.pipelines.planning.target import HELD_OUT_SHARE
from quantcli.pipelines.rotation.train import training_cost

__all__ = ["with_budget", "with_distilling", "with_memory", "with_source", "with_training"]

_BANDWIDTH = 1.2e10  # bytes a second that an ordinary two-core machine reads from memory
_EFFICIENCY = 0.55  # share of the matrix-product rate that whole runs reach


def with_training(plan: Plan) -> Plan:
    """Estimates what training rotations takes, and refuses what cannot fit.

    Raises:
        UsageError: too few rows to train on and to judge by.
        ResourceError: the float model does not fit in memory.
    """
    if plan.trained is None:
        return plan
    calibration = plan.options.calibration
    if calibration.num_samples < 2:
        raise UsageError(
            f"{plan.trained.algorithm.name} takes two calibration rows or more, one of them to judge, got 1",
            hint="raise --num-samples",
        )
    rate = matmul_flops(plan.device)
    cost = training_cost(plan.skeleton, plan.layout, plan.trained.settings, calibration.seq_len, rate)
    budget = plan.options.max_memory or free_bytes(plan.device)
    if cost.peak_bytes > budget:
        raise ResourceError(
            f"training rotations needs about {cost.peak_bytes / 1e9:.2f} GB of memory for the whole float model, "
            f"{budget / 1e9:.2f} GB are free",
            hint="use quarot, whose rotations need no training",
        )
    return replace(plan, training=cost)


def with_distilling(plan: Plan) -> Plan:
    """Estimates what distilling takes, chooses what is kept of a forward, and refuses what cannot fit.

    Raises:
        ResourceError: it does not fit in memory.
    """
    if plan.trainer is None:
        return plan
    packed = [(t.stored_bytes, t.rows * t.scheme.group_count(t.columns)) for t in plan.targets.values()]
    cost = distill_cost(
        plan.skeleton,
        plan.layout,
        plan.trainer.settings,
        plan.options.calibration.seq_len,
        packed,
        matmul_flops(plan.device),
        plan.options.max_memory or free_bytes(plan.device),
    )
    return replace(plan, distilling=cost, seconds=plan.seconds + cost.seconds)


def with_source(plan: Plan, config: Any) -> Plan:
    """Chooses the calibration text and estimates the time.

    Args:
        plan: With the cost of training, where there is some.
        config: transformers' own.

    Raises:
        ResourceError: the model was asked to write the text and does not fit in memory.
    """
    weights = sum(t.rows * t.columns for t in plan.walked.values())
    training = plan.training.seconds if plan.training is not None else 0.0
    solving = 2 + weights / 2.5e7 + training
    if not plan.wants_text:
        return replace(plan, source=None, seconds=solving)
    rate = matmul_flops(plan.device, plan.dtype)
    if plan.gathers:
        solving = 3 + weights / 2e7 + _flops(plan) / (rate * _EFFICIENCY) + training
    calibration = plan.options.calibration
    given = calibration.data or calibration.data_name
    named = BUILTIN if given == BUILTIN else "data"
    parameters = sum(e.size_bytes // e.dtype.itemsize for e in plan.checkpoint.entries.values())
    bandwidth = _BANDWIDTH if plan.device.type == "cpu" else 1e12
    budget = plan.options.max_memory or free_bytes(plan.device)

    def estimate(text: CalibrationOptions) -> tuple[float, int]:
        if SamplingKey(plan.model_digest, text.num_samples, text.seq_len, text.seed).file.is_file():
            return 0.0, 0  # written before, and kept
        return estimate_sampling(config, parameters, text.num_samples, text.seq_len, rate, bandwidth)

    if given and given != SELF:
        judges = max(1, calibration.num_samples // HELD_OUT_SHARE) if plan.improves else 0
        sampling, needed = estimate(replace(plan, judges=judges).judge_text) if judges else (0.0, 0)
        if needed > budget or sampling > solving:
            judges, sampling = 0, 0.0
        return replace(plan, source=named, seconds=solving + sampling, judges=judges)
    sampling, needed = estimate(calibration)
    if given != SELF:
        if needed > budget:
            return replace(
                plan, source=BUILTIN, seconds=solving, why_source="; writing its own would not fit in memory"
            )
        if sampling > 1.5 * solving:
            return replace(plan, source=BUILTIN, seconds=solving, why_source="; writing its own would take longer")
    elif needed > budget:
        raise ResourceError(
            f"--data self needs about {needed / 1e9:.1f} GB for the whole model, {budget / 1e9:.1f} GB are free",
            hint="use --data builtin or --data FILE",
        )
    wait = f", about {sampling:.0f} s to write" if sampling else ", written before"
    return replace(plan, source=SELF, seconds=solving + sampling, why_source=wait)


def _flops(plan: Plan) -> float:
    """Operations of a calibrated run: forwards, Hessians, factors and solves."""
    calibration = plan.options.calibration
    tokens = calibration.num_samples * calibration.seq_len
    forward = hessians = solves = 0.0
    seen: set[tuple[str, int, int]] = set()
    for target in plan.walked.values():
        forward += 2 * target.rows * target.columns * tokens
        solves += 4 * target.rows * target.columns**2 if plan.targets and plan.algorithm.sees == "moments" else 0
        # linears of one block with the same inputs are counted once: a guess by shape, good enough for an estimate
        block = re.sub(r"[^.]+$", "", target.name)
        if (block, target.columns, 0) not in seen:
            seen.add((block, target.columns, 0))
            if plan.gathering.moments:
                hessians += 1.2 * tokens * target.columns**2 + target.columns**3
            for step in plan.transforms:  # a search over grid points, each scored under the Hessian, or on rows of both
                points, rows = getattr(step.settings, "n_grid", 0), getattr(step.settings, "rows", 0)
                width = target.columns if step.algorithm.sees == "moments" else SCORED_OUTPUTS
                solves += 2 * points * min(rows, target.rows) * target.columns * width
    if plan.options.correct_earlier:
        forward, hessians = 2 * forward, 2.7 * hessians
    return forward + hessians + solves


def with_budget(plan: Plan) -> Plan:
    """Checks the target where bits are mixed; size and time are estimated anew.

    Raises:
        UsageError: it cannot be met.
    """
    budget = make_budget(plan)
    low, high = ({name: pick(sizes) for name, sizes in budget.sizes.items()} for pick in (min, max))
    ends = [written_bytes(with_bits(plan, bits)) for bits in (low, high)]
    spent = [budget.achieved(bits) for bits in (low, high)]
    share = (min(budget.target, spent[1]) - spent[0]) / max(spent[1] - spent[0], 1e-9)
    size = int(ends[0] + share * (ends[1] - ends[0]))
    tokens = plan.measured_rows * plan.options.calibration.seq_len
    weights = sum(t.rows * t.columns for t in plan.targets.values())
    head = 2 * tokens * math.prod(plan.skeleton.get_submodule(plan.layout.embedding).weight.shape)
    blocks = len(plan.layout.blocks)
    flops = 2 * tokens * weights * (blocks / 2 + 7 + len(budget.widths)) + head * (blocks + 1)
    rate = matmul_flops(plan.device, plan.dtype) * _EFFICIENCY
    return replace(plan, budget=budget, size_bytes=size, seconds=plan.seconds + flops / rate + weights / 1e7)


def with_memory(plan: Plan) -> Plan:
    """Estimates the peak, chooses whether paused forwards are kept, refuses what cannot fit.

    Raises:
        ResourceError: not enough memory or disk.
    """
    budget = plan.options.max_memory or free_bytes(plan.device)
    if not plan.walked:  # a shard under way, and one tensor more
        largest = max(e.size_bytes for e in plan.checkpoint.entries.values())
        return _checked(replace(plan, peak_bytes=4 * largest + 200_000_000), budget)
    itemsize = plan.dtype.itemsize
    first = plan.layout.blocks[0] + "."
    block = sum(t.rows * t.columns for t in plan.walked.values() if t.name.startswith(first)) * itemsize
    widest = max(plan.walked.values(), key=lambda t: t.columns)
    outside = plan.checkpoint.entries[
        disk_name(f"{plan.layout.embedding}.weight", plan.skeleton, plan.checkpoint.entries)
        or next(iter(plan.checkpoint.entries))
    ].size_bytes
    largest = max(t.rows * t.columns for t in plan.walked.values())
    measuring = _measuring_bytes(plan, block, outside)
    if not plan.calibrates:
        # one matrix in float32, its importance, codes and the shard under way
        peak = max(block + 16 * largest, 2 * outside, measuring)
        return _checked(replace(plan, peak_bytes=int(peak) + 200_000_000), budget)
    calibration = plan.options.calibration
    streams = 2 if plan.options.correct_earlier else 1
    tokens = calibration.num_samples * calibration.seq_len
    hidden = plan.skeleton.config.get_text_config().hidden_size
    batch = min(calibration.batch_size, calibration.num_samples) * calibration.seq_len
    inside = block / hidden + 4 * widest.columns * itemsize  # what one token's forward holds at its widest
    matrices = (4 + 2 * (plan.options.correct_earlier or plan.holds_out)) if plan.gathering.moments else 0
    copies = streams if plan.targets else 3  # a block that stays float is scaled beside it, written and compared
    fixed = (
        copies * block
        + 8 * plan.gathering.rows * widest.columns
        + 4 * matrices * widest.columns**2
        + 12 * largest
        + streams * tokens * hidden * itemsize
        + batch * min(inside, 12 * widest.columns * itemsize)
    )
    paused = streams * tokens * (hidden + widest.columns) * itemsize
    peak = max(fixed + paused, 2 * outside)
    keep = peak <= 0.8 * budget
    if not keep:
        peak = fixed
    peak = max(peak, measuring)
    return _checked(replace(plan, peak_bytes=int(peak) + 200_000_000, keep_paused=keep), budget)


def _measuring_bytes(plan: Plan, block: int, outside: int) -> int:
    """What measuring sensitivities holds: a stream per block; a block, rounded too; then embedding, head and logits."""
    if plan.budget is None:
        return 0
    tokens = plan.measured_rows * plan.options.calibration.seq_len
    hidden = plan.skeleton.config.get_text_config().hidden_size
    streams = (len(plan.layout.blocks) + 3) * tokens * hidden * plan.dtype.itemsize
    vocabulary = plan.skeleton.get_submodule(plan.layout.embedding).weight.shape[0]
    widest = max(t.columns for t in plan.targets.values())
    largest = max(t.rows * t.columns for t in plan.targets.values())
    float_size = plan.dtype.itemsize
    inside = 2 * block + 16 * largest + 8 * tokens * (widest + 4 * hidden)
    logits = 3 * outside * float_size // 2 + 12 * plan.options.calibration.seq_len * vocabulary
    return int(streams + max(inside, logits))


def _checked(plan: Plan, budget: int) -> Plan:
    for cost in (plan.training, plan.distilling):  # which fit, or they would have been refused
        if cost is not None:
            plan = replace(plan, peak_bytes=max(plan.peak_bytes, cost.peak_bytes))
    if plan.peak_bytes > budget:
        raise ResourceError(
            f"the run needs about {plan.peak_bytes / 1e9:.2f} GB of memory, {budget / 1e9:.2f} GB are free",
            hint="lower --num-samples or --seq-len, or use --preset fast",
        )
    joining = min(plan.size_bytes, FILE_BYTES)  # a file stands beside the shards that it is made of
    require_free_bytes(Path(plan.options.output).absolute().parent, int(1.1 * plan.size_bytes) + joining)
    return plan
