"""What it costs to round each linear to each width, in KL divergence from the float model.

One walk over the blocks, each read once. At block b the float stream shows every linear's inputs X, and the error of a
cheap rounder at each width is tr(E H E^T) = |X E^T|^2 / T, relative to the linear's output. A stream of its own then
begins: block b rounded to `REFERENCE_BITS`, later blocks float. Where it ends, the head says by how much the model's
distribution has changed: KL(b). What of it each group of linears (q, k and v; gate and up) has caused is told by how
far it alone moves the output of its block. Then, with i in group g of block b,

    cost(i, bits) = KL(b) * moved(g) / sum of moved * error(i, bits) / sum over g of error(., REFERENCE_BITS)

and costs are added over linears as if they did not meet, which holds for small errors.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.errors import InputError
from quantcli.evaluate.divergence import Scores, score_window
from quantcli.models.block import BlockCall, block_stages, forward, stage_hooks
from quantcli.models.layout import is_transposed
from quantcli.models.tail import tail_logits
from quantcli.models.walk import embed_tokens, shares_state
from quantcli.pipelines.blockwise.loading import load_block, outside_loaded
from quantcli.pipelines.planning.plan import Plan
from quantcli.pipelines.planning.target import Target
from quantcli.progress import Progress
from quantcli.tensors.affine import round_to_grid, searched_grid

__all__ = ["REFERENCE_BITS", "Sensitivities", "measure"]

REFERENCE_BITS = 3
"""Coarse enough to show, fine enough for effects to add up."""
_ROWS = 256
"""Output rows of a linear by which widths are compared."""
_STEPS = 20
_TRIALS = 20  # what trying the linears of a block takes, in forwards of a block; for the progress bar
_LEAST_KL = 1e-12  # where nothing is seen, errors still tell the order


@dataclass
class Sensitivities:
    """What was measured."""

    groups: list[list[str]] = field(default_factory=list)
    """Linears that read the same input; of experts, those of all experts of a block together."""
    costs: dict[str, dict[int, float]] = field(default_factory=dict)
    """By linear and width, nats per token."""
    tokens: int = 0
    """Tokens on which that was."""


@dataclass
class _Group:
    """Linears that share an input, and their part in their block."""

    names: list[str]
    errors: dict[str, dict[int, float]]
    """By linear and width, relative squared error of the output."""
    moved: float = 1.0
    """Squared change of the block's output, all of them rounded to the reference width."""


def measure(plan: Plan, widths: Mapping[str, tuple[int, ...]], tokens: Tensor, progress: Progress) -> Sensitivities:
    """Measures every quantized linear.

    Args:
        plan: With the float model's files.
        widths: By linear, the bits to try.
        tokens: [rows, T] int64.
        progress: Shows how far it is.

    Raises:
        InputError: activations or logits that are not numbers.
    """
    layout, rows = plan.layout, tokens.to(plan.device)
    with outside_loaded(plan):
        (hidden,), calls = embed_tokens(plan.skeleton, layout, rows, len(rows))
    if shares_state(calls):
        raise InputError(
            f"bits of {type(plan.skeleton).__name__} cannot be mixed: its blocks read what earlier ones have kept",
            hint="leave --target-bits and --target-size out",
        )
    streams: list[Tensor] = []
    groups: list[list[_Group]] = []
    tuples = False
    count = len(layout.blocks)
    tail = math.prod(plan.skeleton.get_submodule(layout.embedding).weight.shape) / max(_largest_block(plan), 1)
    with progress.track("measuring sensitivity", count * (count - 1) / 2 + (_TRIALS + tail) * count) as task:
        for number, path in enumerate(layout.blocks):
            block, call = load_block(plan, number), calls[0][number]
            streams = [forward(block, stream, call) for stream in streams]
            if number == count - 1:
                tuples = isinstance(block(hidden, *call.args, **call.kwargs), tuple)
            targets = {n.removeprefix(path + "."): t for n, t in plan.targets.items() if n.startswith(path + ".")}
            if targets:
                found, output, rounded = _try_block(block, targets, widths, hidden, call)
                groups.append(found)
                streams.append(rounded)
            else:
                output = forward(block, hidden, call)
            hidden = output
            task.advance(number + _TRIALS)
            del block
        with outside_loaded(plan, head=True):
            head, effects = _effects(
                plan, widths, rows, hidden, streams, tuples, lambda: task.advance(tail / len(rows))
            )
    measured = Sensitivities(tokens=rows.numel())
    for effect, members in zip(effects, [*groups, *([head] if head else [])], strict=True):
        moved = sum(group.moved for group in members)
        for group in members:
            _add_costs(measured, group, effect * group.moved / moved if moved > 0 else 0.0)
    return measured


def _largest_block(plan: Plan) -> int:
    """Weights of it that are quantized."""
    paths = tuple(path + "." for path in plan.layout.blocks)
    return max(sum(t.rows * t.columns for n, t in plan.targets.items() if n.startswith(path)) for path in paths)


def _add_costs(measured: Sensitivities, group: _Group, effect: float) -> None:
    reference = sum(errors[REFERENCE_BITS] for errors in group.errors.values())
    measured.groups.append(group.names)
    for name, errors in group.errors.items():
        per_error = max(effect, _LEAST_KL) / reference if reference > 0 else 0.0
        measured.costs[name] = {bits: per_error * error for bits, error in errors.items()}


def _try_block(
    block: nn.Module,
    targets: Mapping[str, Target],
    widths: Mapping[str, tuple[int, ...]],
    hidden: Tensor,
    call: BlockCall,
) -> tuple[list[_Group], Tensor, Tensor]:
    """The groups of a block, its output, and its output where all of them are rounded; it stays as it was."""
    stages = block_stages(block, list(targets), hidden, call)
    inputs: dict[int, Tensor] = {}

    def make(stage: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[stage] = args[0].reshape(-1, args[0].shape[-1]).float()

        return hook

    with stage_hooks(block, stages, make):
        output = forward(block, hidden, call)
    merged: dict[tuple[str, ...], _Group] = {}
    rounded: dict[str, Tensor] = {}
    for stage, names in enumerate(stages):
        # experts of one block are computed together: their numbers are left out
        key = tuple(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
        group = merged.setdefault(key, _Group([], {}))
        for name in names:
            target, module = targets[name], block.get_submodule(name)
            group.names.append(target.name)
            errors, result = _try_linear(module, target, widths[target.name], inputs.get(stage))
            group.errors[target.name], rounded[name] = errors, result
        inputs.pop(stage, None)
    originals: dict[str, Tensor] = {}
    path = next(iter(targets.values())).name.removesuffix(next(iter(targets)))
    for group in merged.values():
        inside = [name.removeprefix(path) for name in group.names]
        originals |= _replace(block, {name: rounded[name] for name in inside})
        group.moved = float((forward(block, hidden, call) - output).float().square().mean())
        _replace(block, {name: originals[name] for name in inside})
    _replace(block, rounded)
    perturbed = forward(block, hidden, call)
    _replace(block, originals)
    return list(merged.values()), output, perturbed


def _replace(block: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Puts weights in their places and returns those that stood there."""
    before = {}
    for name, weight in weights.items():
        module: Any = block.get_submodule(name)
        before[name] = module.weight.data
        module.weight.data = weight
    return before


def _try_linear(
    module: Any, target: Target, widths: tuple[int, ...], inputs: Tensor | None
) -> tuple[dict[int, float], Tensor]:
    """Relative errors by width, and the weight rounded to the reference width as the module stores it."""
    stored = module.weight.data
    weight = (stored.T if is_transposed(module) else stored).float()
    own = weight.abs() + weight.square().mean(1, keepdim=True).sqrt()
    importance = own if inputs is None else own * inputs.square().mean(0)
    step = max(1, len(weight) // _ROWS)

    def rounded(matrix: Tensor, weights: Tensor, bits: int) -> Tensor:
        scheme = replace(target.scheme, bits=bits)
        return round_to_grid(matrix, *searched_grid(matrix, scheme, weights, steps=_STEPS), scheme).dequantize()

    def energy(matrix: Tensor) -> float:
        return float((matrix if inputs is None else inputs @ matrix.T).square().sum())

    reference = rounded(weight, importance, REFERENCE_BITS)
    rows, norm = weight[::step], energy(weight[::step])
    errors = {REFERENCE_BITS: energy(rows - reference[::step])}
    for bits in widths:
        if bits not in errors:
            errors[bits] = energy(rows - rounded(rows.contiguous(), importance[::step].contiguous(), bits))
    errors = {bits: error / norm if norm > 0 else 0.0 for bits, error in errors.items()}
    return errors, (reference.T if is_transposed(module) else reference).to(stored.dtype).contiguous()


def _effects(
    plan: Plan,
    widths: Mapping[str, tuple[int, ...]],
    tokens: Tensor,
    hidden: Tensor,
    streams: list[Tensor],
    tuples: bool,
    advance: Any,
) -> tuple[list[_Group], list[float]]:
    """KL(float || stream) of every stream, last of all of the rounded head where that is quantized."""
    skeleton, layout = plan.skeleton, plan.layout

    def logits(row: int, stream: Tensor) -> Tensor:
        at = slice(row, row + 1)
        return tail_logits(skeleton, layout, tokens[at], stream[at], tuples=tuples)[0]

    head, rounded = _try_head(plan, widths, lambda row: logits(row, hidden), len(tokens))
    scores = [Scores() for _ in [*streams, *head]]
    for row in range(len(tokens)):
        expected = logits(row, hidden)
        for score, stream in zip(scores, streams, strict=False):
            score_window(score, tokens[row], logits(row, stream), expected)
            advance()
        if rounded is not None and layout.head is not None:
            before = _replace(skeleton, {layout.head: rounded})
            score_window(scores[-1], tokens[row], logits(row, hidden), expected)
            _replace(skeleton, before)
    return head, [score.kl_mean for score in scores]


def _try_head(
    plan: Plan, widths: Mapping[str, tuple[int, ...]], run: Any, rows: int
) -> tuple[list[_Group], Tensor | None]:
    target = plan.targets.get(plan.layout.head or "")
    if target is None:
        return [], None
    module = plan.skeleton.get_submodule(target.name)
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0].reshape(-1, target.columns)))
    try:
        for row in range(rows):
            run(row)
    finally:
        hook.remove()
    errors, rounded = _try_linear(module, target, widths[target.name], torch.cat(seen).float())
    return [_Group([target.name], {target.name: errors})], rounded
