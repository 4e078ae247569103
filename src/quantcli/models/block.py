"""One transformer block: what it is called with, and the linears within it by the input that they share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

__all__ = ["BlockCall", "block_stages", "forward", "stage_hooks"]


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with beside the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def forward(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """The block's output hidden state, [b, T, D]."""
    out = block(hidden, *call.args, **call.kwargs)
    result: Tensor = out[0] if isinstance(out, tuple | list) else out
    return result


def block_stages(block: nn.Module, linears: list[str], hidden: Tensor, call: BlockCall) -> list[list[str]]:
    """Names of the linears of a block by the input that they share, in the order in which they are called.

    Found by running one row: linears that are given the same tensor object share it. Linears that the row did not reach
    (experts) come after the one that they are registered after, which is where they are called; they share stages as
    their like do in experts that it reached.
    """
    seen: list[tuple[str, Tensor]] = []
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen.append((name, args[0]))
        )
        for name in linears
    ]
    try:
        forward(block, hidden, call)
    finally:
        for hook in hooks:
            hook.remove()
    stages: list[tuple[Tensor, list[str]]] = []
    for name, tensor in seen:
        for other, names in stages:
            if other is tensor:
                names.append(name)
                break
        else:
            stages.append((tensor, [name]))
    found = [names for _, names in stages]
    alike = {frozenset(_leaf(n) for n in names) for names in found if len({_parent(n) for n in names}) == 1}
    for previous, name in pairwise(["", *linears]):
        if any(name in names for names in found):
            continue
        group = next((leaves for leaves in alike if _leaf(name) in leaves), frozenset((_leaf(name),)))
        members = [n for n in linears if _parent(n) == _parent(name) and _leaf(n) in group]
        place = next((i for i, names in enumerate(found) if previous in names), -1)
        found.insert(place + 1, members)
    return found


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


@contextmanager
def stage_hooks(
    block: nn.Module, stages: list[list[str]], make: Callable[[int], Callable[[nn.Module, tuple[Any, ...]], None]]
) -> Iterator[None]:
    """In front of the first linear of each stage."""
    hooks = [block.get_submodule(names[0]).register_forward_pre_hook(make(stage)) for stage, names in enumerate(stages)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
