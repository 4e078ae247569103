"""Forwards that pause in the middle of a block, and what they hold while they wait.

A paused forward's frames hold the block's input, its submodules' arguments and their own local variables, read again or
not: with queries, keys and values more than twice what is still needed. What is not is emptied. What is moves to memory
of its own: among the short-lived tensors of other forwards it would leave holes that nothing else fits into.
"""

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeAlias

import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor, nn

from quantcli.models.block import BlockCall, forward, stage_hooks

__all__ = ["BLOCK_INPUT", "END", "Pass", "Pause", "Shelf", "study_pauses", "token_count"]

BLOCK_INPUT = -1
"""Stands for the block's own input where stages are numbered."""
END = -1
"""Where a forward stands that is done."""
Held: TypeAlias = int | tuple[str, str]
"""What a paused forward holds: the input of a stage, `BLOCK_INPUT`, or (function, local variable)."""
_SMALL = 1 << 12
"""Elements below which a tensor is not worth the trouble."""


@dataclass
class Pause:
    """What to do with the tensors of a forward that stands in front of a stage."""

    idle: list[Held] = field(default_factory=list)
    """Read by nobody any more: to be emptied."""
    kept: list[Held] = field(default_factory=list)
    """Local variables still needed: to be moved to the shelf."""


def study_pauses(block: nn.Module, stages: list[list[str]], hidden: Tensor, call: BlockCall) -> dict[int, Pause]:
    """Finds out by trying, on one row, what a paused forward still needs.

    A tensor is idle where filling its memory with NaN leaves the block's output what it was. What is shared between
    forwards (rotary tables, masks, weights) is never touched. Where the row does not reach every linear with all of its
    tokens (experts), other rows may read what this one does not: local variables are then left alone, and in front of
    an expert all but the inputs of experts.

    Args:
        block: With weights.
        stages: From `block_stages`.
        hidden: [b, T, D] its input.
        call: Its further arguments.

    Returns:
        By stage, what to do there; nothing where a model takes even the moving of inputs amiss.
    """
    first, expected = _trial(block, stages, hidden, call, {})
    second, _ = _trial(block, stages, hidden, call, {})  # while the first are alive: the same memory is shared memory
    if expected is None:
        return {}
    whole = {stage for stage, held in first.items() if token_count(held[stage]) == token_count(hidden)}
    dense = len(whole) == len(stages)

    def candidates(stage: int) -> list[Held]:
        """What only this forward holds, but for the stage's own input."""
        return [
            name
            for name, tensor in first[stage].items()
            if (dense or (isinstance(name, int) and (stage in whole or (name != BLOCK_INPUT and name not in whole))))
            and _memory(tensor) != _memory(first[stage][stage])
            and (name == BLOCK_INPUT or _memory(tensor) != _memory(second[stage][name]))
        ]

    def attempt(move_variables: bool) -> dict[int, Pause] | None:
        pauses = {stage: Pause() for stage in sorted(first)}

        def harmless(stage: int, idle: list[Held]) -> bool:
            tried = pauses | {stage: Pause(pauses[stage].idle + idle)}
            _, output = _trial(block, stages, hidden, call, tried)
            return output is not None and torch.equal(output, expected)

        def search(stage: int, names: list[Held]) -> list[Held]:
            """Which of them are idle, by halves: most are, or are not, together."""
            if not names or harmless(stage, names):
                pauses[stage].idle += names
                return names
            half = len(names) // 2
            return search(stage, names[:half]) + search(stage, names[half:]) if half else []

        gone: set[Held] = set()
        for stage, pause in pauses.items():
            names = [name for name in candidates(stage) if name not in gone]
            idle = search(stage, names)
            gone |= {name for name in idle if isinstance(name, int)}  # a local variable may be bound anew
            if move_variables:
                pause.kept = [name for name in names if name not in idle and not isinstance(name, int)]
        _, output = _trial(block, stages, hidden, call, pauses)
        return pauses if output is not None and torch.equal(output, expected) else None

    # a variable whose view is written to in place, for one, cannot be moved
    return attempt(True) or attempt(False) or {}


def _trial(
    block: nn.Module, stages: list[list[str]], hidden: Tensor, call: BlockCall, pauses: Mapping[int, Pause]
) -> tuple[dict[int, dict[Held, Tensor]], Tensor | None]:
    """One forward: what it holds in front of each stage, and its output; None where it fails without what was idle."""
    inputs: dict[Held, Tensor] = {BLOCK_INPUT: hidden.clone()}
    held: dict[int, dict[Held, Tensor]] = {}
    shelf = Shelf(1)

    def poison(tensor: Tensor) -> None:
        tensor.fill_(torch.nan)

    def make(stage: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[stage] = args[0]
            held[stage] = inputs | _local_tensors(sys._getframe(1))
            if stage in pauses:
                _handle(pauses[stage], held[stage], args[0], inputs[BLOCK_INPUT], shelf, poison)

        return hook

    with stage_hooks(block, stages, make):
        try:
            return held, forward(block, inputs[BLOCK_INPUT], call)
        except Exception:  # whatever a model says when it meets an empty tensor
            return held, None


def _local_tensors(frame: FrameType | None) -> dict[Held, Tensor]:
    """Tensors in local variables between a block's forward and `frame`, by function and variable."""
    found: dict[Held, Tensor] = {}
    while frame is not None and frame.f_code is not forward.__code__:
        for name, value in frame.f_locals.items():
            if isinstance(value, Tensor) and value.numel() >= _SMALL and not isinstance(value, nn.Parameter):
                found.setdefault((frame.f_code.co_qualname, name), value)
        frame = frame.f_back
    return found


def token_count(tensor: Tensor) -> int:
    """Tokens of [..., K]."""
    return tensor.numel() // max(tensor.shape[-1], 1)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _empty(tensor: Tensor) -> None:
    """Takes a tensor's memory away, whoever holds it; views of it keep theirs."""
    tensor.set_(torch.empty(0, dtype=tensor.dtype, device=tensor.device))  # type: ignore[call-overload]


class Shelf:
    """Memory for tensors that wait, one piece per size, used again and again from block to block.

    Giving memory back to the system instead costs a page fault per 4 KB when it is needed again, a tenth of a run.
    """

    def __init__(self, count: int) -> None:
        """Empty; a piece holds `count` tensors, and another is taken where that is not enough."""
        self._count = count
        self._free: dict[tuple[bool, int, torch.dtype], list[Tensor]] = {}
        self._taken: dict[int, tuple[tuple[bool, int, torch.dtype], Tensor, Tensor]] = {}
        self._widest = 0

    def move(self, tensor: Tensor, *, wide: bool = False) -> bool:
        """Moves a tensor, for whoever holds it; whether it did.

        It stays where it is on accelerators, where it is not contiguous, and when it is there already.

        Args:
            tensor: What to move.
            wide: Whether it takes a place as large as the largest such tensor needs, so that stages share places.
        """
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.data_ptr() in self._taken:
            return False
        elements = tensor.numel()
        if wide:
            if elements < self._widest // 8:
                return False  # an expert's few tokens
            if elements > self._widest:
                self._free = {key: free for key, free in self._free.items() if not key[0]}
                self._widest = elements
            elements = self._widest
        key = wide, elements, tensor.dtype
        free = self._free.setdefault(key, [])
        if not free:
            free += torch.empty(self._count, elements, dtype=tensor.dtype).unbind()
        place = free.pop()
        moved = place[: tensor.numel()].view(tensor.shape)
        moved.copy_(tensor)
        tensor.set_(moved)  # type: ignore[call-overload]
        self._taken[tensor.data_ptr()] = key, place, tensor
        return True

    def clear(self, tensor: Tensor) -> None:
        """Takes the place of a tensor back, which nobody reads any more; nothing to do where it has none."""
        key, place, owner = self._taken.get(tensor.data_ptr(), (None, None, None))
        if key is not None and place is not None and owner is tensor:
            del self._taken[tensor.data_ptr()]
            if key in self._free:
                self._free[key].append(place)


def _handle(
    pause: Pause,
    held: Mapping[Held, Tensor],
    given: Tensor,
    hidden: Tensor,
    shelf: Shelf,
    give_up: Callable[[Tensor], None],
) -> list[Tensor]:
    """Does at a pause what is to be done there, in trials as for real; what it moved to the shelf.

    Args:
        pause: What to do.
        held: What the forward holds.
        given: The stage's input.
        hidden: The block's, which belongs to whoever runs the forward, perhaps once more: it is never moved.
        shelf: Where to move what is kept.
        give_up: Called with a tensor before it is emptied.
    """
    for name in pause.idle:
        if name in held:
            give_up(held[name])
            _empty(held[name])
    kept = [held[name] for name in pause.kept if name in held]
    moved = [tensor for tensor in kept if tensor is not hidden and shelf.move(tensor)]
    if given is not hidden and shelf.move(given, wide=True):
        moved.append(given)
    return moved


class Pass:
    """One micro-batch's forward through a block, stopping where a hook tells it to."""

    def __init__(self, block: nn.Module, hidden: Tensor, call: BlockCall, shelf: Shelf):
        """Stands before the start."""
        self._greenlet = greenlet(lambda: (END, forward(block, hidden, call)))
        self.stage = END - 1
        """Where it stands: a stage, or `END`."""
        self.tensor = hidden
        """What it was given there: the stage's input, or the output at the end."""
        self._hidden = hidden
        self._inputs: dict[Held, weakref.ref[Tensor]] = {BLOCK_INPUT: weakref.ref(hidden)}
        self._shelf = shelf
        self._moved: list[Tensor] = []

    def advance(self, pauses: Mapping[int, Pause]) -> None:
        """Runs to the next stop, or to the end."""
        self.stage, self.tensor = self._greenlet.switch()
        if self.stage == END:
            if any(_memory(self.tensor) == _memory(moved) for moved in self._moved):
                self.tensor = self.tensor.clone()
            self.drop()
            return
        if self.stage in pauses:
            held = {name: tensor for name, kept in self._inputs.items() if (tensor := kept()) is not None}
            held |= _local_tensors(self._greenlet.gr_frame)
            self._moved += _handle(pauses[self.stage], held, self.tensor, self._hidden, self._shelf, self._shelf.clear)
        self._inputs[self.stage] = weakref.ref(self.tensor)

    def drop(self) -> None:
        """Ends the forward where it stands."""
        if not self._greenlet.dead:
            self._greenlet.throw(GreenletExit)
        for tensor in self._moved:
            self._shelf.clear(tensor)
        self._moved.clear()
