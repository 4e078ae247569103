"""What distilling a model will take."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from quantcli.algorithms.training.distill import DistillOptions
from quantcli.errors import ResourceError
from quantcli.models.layout import Layout, weight_shape

__all__ = ["DistillCost", "distill_cost"]

_EFFICIENCY = 0.45  # share of the matrix-product rate that training reaches


@dataclass(frozen=True)
class DistillCost:
    """Time and memory, estimated."""

    seconds: float
    peak_bytes: int
    recompute: bool
    """Whether blocks keep only their input and run again on the way back, for lack of memory."""


def distill_cost(
    skeleton: Any,
    layout: Layout,
    settings: DistillOptions,
    row_len: int,
    packed: Iterable[tuple[int, int]],
    rate: float,
    budget: int,
) -> DistillCost:
    """Estimates time and memory.

    Args:
        skeleton: The float model on the meta device.
        layout: Its parts.
        settings: Of distill.
        row_len: Tokens per row.
        packed: Stored bytes and groups of each packed linear.
        rate: Floating-point operations per second of matrix products.
        budget: Bytes of memory that may be taken.

    Raises:
        ResourceError: it does not fit, however little is kept.
    """
    config = skeleton.config.get_text_config()
    shapes = [weight_shape(skeleton.get_submodule(name)) for name in layout.linears]
    weights, vocabulary = sum(map(math.prod, shapes)), config.vocab_size * config.hidden_size
    stored, groups = (sum(part) for part in zip(*packed, strict=True))
    widest = max(columns for _, columns in shapes)
    inside = 4 * row_len * (24 * config.hidden_size + 10 * widest)  # what a block keeps of one row for the way back
    blocks = len(layout.blocks)
    logits = 4 * 4 * row_len * config.vocab_size
    hidden = 4 * settings.train_rows * row_len * config.hidden_size
    largest = 4 * 3 * max(math.prod(shape) for shape in shapes)
    fixed = stored + 20 * groups + 4 * 3 * vocabulary + logits + largest + 200_000_000
    listening = hidden + 4 * (weights // blocks + vocabulary) + inside
    kept, recomputed = (
        max(listening, fixed + part) for part in (blocks * inside, blocks * 4 * row_len * config.hidden_size + inside)
    )
    recompute = kept > 0.8 * budget
    peak = recomputed if recompute else kept
    if peak > budget:
        raise ResourceError(
            f"distill needs about {peak / 1e9:.2f} GB of memory, {budget / 1e9:.2f} GB are free",
            hint="lower --seq-len, or leave distill out",
        )
    tokens = settings.train_rows * row_len
    passes = settings.epochs * (3 + recompute) + 2  # forwards; on the way back two; judged twice on a sixteenth
    flops = 2 * tokens * (passes * weights + settings.epochs * 4 * vocabulary)
    return DistillCost(5 + flops / (rate * _EFFICIENCY), int(peak), recompute)
