"""Where a scale of a linear's inputs can be undone: in the norm or the linear that makes them.

W (x / s) with W's columns times s is W x. The division moves into what produces x: a norm's gain, or the rows of an
earlier linear that x depends on linearly (v -> o, up -> down). No table says which that is: each candidate is tried on
one row with random powers of two, and taken where the block's output stays what it was. So a norm that also feeds
something else (a router, a second branch) is left alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.models.block import BlockCall, forward
from quantcli.models.layout import is_linear, is_transposed, weight_shape

__all__ = ["Fold", "divide_rows", "find_folds", "folded_norm"]

_TOLERANCE = 0.01  # of what scaling the columns alone changes; a fold in powers of two changes next to nothing


@dataclass(frozen=True)
class Fold:
    """The producer of one stage's input."""

    producer: str
    """Path of a norm or linear within the block."""
    rows: Tensor | None
    """[K] int64: the producer's output row that each input column is made of; None for a norm, whose rows are K."""
    offset: bool = False
    """Whether the norm multiplies by 1 + weight (Gemma)."""

    @property
    def is_norm(self) -> bool:
        """Whether the producer is a norm."""
        return self.rows is None


def find_folds(
    block: nn.Module, stages: Sequence[Sequence[str]], hidden: Tensor, call: BlockCall, head_dim: int | None = None
) -> dict[str, Fold]:
    """The folds of a block.

    Args:
        block: With float weights; the same again when this returns.
        stages: Linears that share an input, as `walk.block_stages` finds them.
        hidden: [1, T, D] the block's input.
        call: Its further arguments.
        head_dim: Columns of an attention head, for heads that share a value head.

    Returns:
        By the first linear of a stage; stages without an entry have none.
    """
    made, order, inputs, expected = _trace(block, hidden, call)
    folds: dict[str, Fold] = {}
    for names in stages:
        tensor = inputs.get(names[0])
        if tensor is None:
            continue
        for fold in _candidates(block, names, tensor, made, order, head_dim):
            scale = _random_powers(block, fold)
            with _scaled(block, fold, names, scale, compensate=False):
                effect = float((forward(block, hidden, call) - expected).abs().max())
            with _scaled(block, fold, names, scale):
                change = float((forward(block, hidden, call) - expected).abs().max())
            if change <= _TOLERANCE * effect and effect > 0:  # also refuses NaN
                folds[names[0]] = fold
                break
    return folds


def folded_norm(weight: Tensor, scale: Tensor, offset: bool) -> tuple[Tensor, Tensor]:
    """A norm's gain divided by `scale` as its dtype can hold it, and the scale that this amounts to.

    Args:
        weight: [K] stored gain.
        scale: [K] float32, positive.
        offset: Whether the norm multiplies by 1 + weight.

    Returns:
        The new gain in the stored dtype and s [K] float32 with old gain = new gain * s up to float32 rounding.
    """
    old = weight.float() + float(offset)
    new = (old / scale - float(offset)).to(weight.dtype)
    stored = new.float() + float(offset)
    usable = (stored != 0) & (old != 0) & torch.isfinite(stored)
    return torch.where(usable, new, weight), torch.where(usable, old / stored, torch.ones_like(old))


def divide_rows(tensor: Tensor, rows: Tensor, scale: Tensor, transposed: bool = False) -> Tensor:
    """A weight [N, K] (or [K, N], transposed) or bias [N] with output row rows[i] divided by scale[i], dtype kept."""
    divisor = torch.ones(tensor.shape[1 if transposed else 0], device=tensor.device)
    divisor[rows.to(tensor.device)] = scale.to(tensor.device)
    shape = [1] * tensor.ndim
    shape[1 if transposed else 0] = -1
    return (tensor.float() / divisor.view(shape)).to(tensor.dtype)


def _trace(
    block: nn.Module, hidden: Tensor, call: BlockCall
) -> tuple[dict[str, Tensor], list[str], dict[str, Tensor], Tensor]:
    """One forward: what each leaf module made, in which order, and what each linear was given; the block's output."""
    made: dict[str, Tensor] = {}
    order: list[str] = []
    inputs: dict[str, Tensor] = {}
    hooks = []
    for name, module in block.named_modules():
        if any(True for _ in module.children()):
            continue

        def note(_module: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
            order.append(name)
            if isinstance(output, Tensor):
                made[name] = output
            if args and isinstance(args[0], Tensor):
                inputs[name] = args[0]

        hooks.append(module.register_forward_hook(note))
    try:
        output = forward(block, hidden, call)
    finally:
        for hook in hooks:
            hook.remove()
    return made, order, inputs, output


def _candidates(
    block: nn.Module,
    names: Sequence[str],
    tensor: Tensor,
    made: dict[str, Tensor],
    order: list[str],
    head_dim: int | None,
) -> Iterator[Fold]:
    """Producers to try, the most likely first."""
    columns = tensor.shape[-1]
    before = order[: order.index(names[0])]
    for name in reversed(before):
        module = block.get_submodule(name)
        weight = getattr(module, "weight", None)
        if made.get(name) is tensor and isinstance(weight, Tensor) and tuple(weight.shape) == (columns,):
            yield Fold(name, None)
            yield Fold(name, None, offset=True)
    natural = torch.arange(columns)
    for name in reversed(before):
        module = block.get_submodule(name)
        if not is_linear(module) or name in names:
            continue
        rows = weight_shape(module)[0]
        for first in sorted({0, rows - columns}, reverse=True):
            if 0 <= first <= rows - columns:
                yield Fold(name, first + natural)
        yield from _shared_heads(name, rows, columns, head_dim)


def _shared_heads(name: str, rows: int, columns: int, head_dim: int | None) -> Iterator[Fold]:
    """Value heads that several query heads read (https://arxiv.org/abs/2305.13245), alone or last in fused qkv."""
    if head_dim is None or columns % head_dim or rows % head_dim:
        return
    heads = columns // head_dim
    for shared in (n for n in range(heads - 1, 0, -1) if heads % n == 0):
        fused = (rows - columns) // 2 == shared * head_dim and (rows - columns) % 2 == 0
        if rows == shared * head_dim or fused:
            column = torch.arange(columns)
            head = column // head_dim // (heads // shared)
            yield Fold(name, rows - shared * head_dim + head * head_dim + column % head_dim)


def _random_powers(block: nn.Module, fold: Fold) -> Tensor:
    """[R] of 1/2, 1 and 2, one per output row of the producer: exact in every floating type."""
    module = block.get_submodule(fold.producer)
    weight: Tensor = module.weight  # type: ignore[assignment]
    count = weight.shape[0] if fold.is_norm else weight_shape(module)[0]
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([0.5, 1.0, 2.0])[torch.randint(3, (count,), generator=generator)].to(weight.device)


@contextmanager
def _scaled(
    block: nn.Module, fold: Fold, names: Sequence[str], scale: Tensor, *, compensate: bool = True
) -> Iterator[None]:
    """The block with a fold applied: columns of `names` times the scale, the producer's rows divided by it."""
    kept: list[tuple[Tensor, Tensor]] = []

    def change(parameter: Tensor, new: Tensor) -> None:
        kept.append((parameter, parameter.data))
        parameter.data = new

    module = block.get_submodule(fold.producer)
    every = torch.arange(len(scale))
    rows = every if fold.rows is None else fold.rows
    used = torch.unique(rows)
    try:
        for name in names:
            linear, columns = block.get_submodule(name), scale[rows]
            weight: Tensor = linear.weight  # type: ignore[assignment]
            change(weight, weight * (columns[:, None] if is_transposed(linear) else columns).to(weight.dtype))
        if compensate:
            made: Tensor = module.weight  # type: ignore[assignment]
            if fold.offset:
                change(made, ((made.float() + 1) / scale - 1).to(made.dtype))
            else:
                change(made, divide_rows(made, used, scale[used], is_transposed(module)))
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                change(bias, divide_rows(bias, used, scale[used]))
        yield
    finally:
        for parameter, data in reversed(kept):
            parameter.data = data
