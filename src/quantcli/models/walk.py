"""Runs calibration tokens through a model block by block, handing each linear's input statistics to a solver.

One forward does what usually takes three to five. Every micro-batch runs in a greenlet of its own; it stops in front
of the first linear of each stage (linears that read the same input), adds its input to the stage's Hessian and lets the
next micro-batch come up. Once all have arrived, the stage is solved, its quantized weights are put in place, and the
forwards go on from where they stood: true sequential order, for any architecture, at the cost of one pass. What a
paused forward holds but no longer reads is emptied (`idle_inputs`). Where the rest does not fit, forwards are dropped
at each stage and run again (`keep=False`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from quantcli.errors import InputError
from quantcli.models.layout import Layout
from quantcli.tensors.finite import all_finite
from quantcli.tensors.hessian import Moments

__all__ = ["BlockCall", "StageMoments", "block_stages", "embed_tokens", "forward", "idle_inputs", "run_block"]

BLOCK_INPUT = -1
"""Stands for the block's own input where stages are numbered."""


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with beside the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _EnoughError(Exception):
    """The blocks' inputs are known; the rest of the model need not run."""


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is called with, passes the hidden state on."""

    def __init__(self, original: nn.Module, calls: list[tuple[Tensor, BlockCall]], last: bool):
        super().__init__()
        self._calls, self._last = calls, last
        for name in ("attention_type", "layer_type", "is_sliding", "layer_idx", "is_linear_attn"):
            if hasattr(original, name):  # models choose a block's mask by such marks
                setattr(self, name, getattr(original, name))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._calls.append((hidden_states, BlockCall(args, kwargs)))
        if self._last:
            raise _EnoughError
        return hidden_states


def embed_tokens(
    model: Any, layout: Layout, tokens: Tensor, batch_size: int
) -> tuple[list[Tensor], dict[int, list[BlockCall]]]:
    """What the first block is given for each micro-batch of tokens [rows, T].

    Args:
        model: Skeleton whose tensors outside the blocks are in place.
        layout: Its parts.
        tokens: [rows, T] int64 on the device to run on.
        batch_size: Rows per micro-batch.

    Returns:
        Hidden states [b, T, D] per micro-batch, and by batch size the further arguments of every block.
    """
    path = layout.blocks[0].rpartition(".")[0]
    originals = model.get_submodule(path)
    hidden: list[Tensor] = []
    calls: dict[int, list[BlockCall]] = {}
    try:
        for batch in torch.split(tokens, batch_size):
            seen: list[tuple[Tensor, BlockCall]] = []
            last = len(originals) - 1
            recorders = nn.ModuleList(_Recorder(b, seen, i == last) for i, b in enumerate(originals))
            model.set_submodule(path, recorders)
            with suppress(_EnoughError):
                getattr(model, model.base_model_prefix, model)(input_ids=batch, use_cache=False)
            if len(seen) != len(originals):
                raise InputError(f"{type(model).__name__} does not call its blocks one after another")
            hidden.append(seen[0][0].clone())
            calls.setdefault(len(batch), [call for _, call in seen])
    finally:
        model.set_submodule(path, originals)
    return hidden, calls


@dataclass
class StageMoments:
    """Second moments of one stage's input."""

    train: Moments
    """From the tokens that solvers see."""
    held_out: Moments | None
    """From those that they do not."""


def block_stages(block: nn.Module, linears: list[str], hidden: Tensor, call: BlockCall) -> list[list[str]]:
    """Names of the linears of a block by the input that they share, in the order in which they are called.

    Found by running one row: linears that are given the same tensor object share it. Linears that the row did not reach
    (experts) are stages of their own, at the end.
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
    missed = [[name] for name in linears if name not in {n for n, _ in seen}]
    return [names for _, names in stages] + missed


def idle_inputs(block: nn.Module, stages: list[list[str]], hidden: Tensor, call: BlockCall) -> dict[int, list[int]]:
    """Which inputs nothing reads any more once a forward stands in front of a stage.

    A paused forward's frames hold the block's input and its submodules' arguments to the end, read or not. Which are
    not is found by trying, on one row: an input is idle where emptying it leaves the output the same.

    Returns:
        By stage, the inputs that become idle there: `BLOCK_INPUT`, or the number of an earlier stage.
    """

    def output(victim: int | None = None, at: int | None = None) -> Tensor | None:
        seen = {BLOCK_INPUT: hidden.clone()}

        def make(stage: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                seen[stage] = args[0]
                if stage == at and victim in seen:
                    _empty(seen[victim])

            return hook

        with _hooks(block, stages, make):
            try:
                return forward(block, seen[BLOCK_INPUT], call)
            except Exception:  # whatever a model says when it meets an empty tensor
                return None

    idle: dict[int, list[int]] = {}
    expected = output()
    for victim in range(BLOCK_INPUT, len(stages)):
        for stage in range(victim + 1, len(stages)):
            found = output(victim, stage)
            if found is not None and expected is not None and torch.equal(found, expected):
                idle.setdefault(stage, []).append(victim)
                break
    return idle


def _empty(tensor: Tensor) -> None:
    """Takes a tensor's memory away, whoever holds it; views of it keep theirs."""
    tensor.set_(torch.empty(0, dtype=tensor.dtype, device=tensor.device))  # type: ignore[call-overload]


class _Pass:
    """One micro-batch's forward through a block, stopping where a hook tells it to."""

    def __init__(self, block: nn.Module, hidden: Tensor, call: BlockCall):
        self._greenlet = greenlet(lambda: (-1, forward(block, hidden, call)))
        self.stage = -2
        """Where it stands: a stage, -1 at the end, -2 before the start."""
        self._inputs = {BLOCK_INPUT: hidden}

    def advance(self, idle: Mapping[int, list[int]]) -> Tensor:
        """Runs to the next stop and returns the input there, or to the end and returns the output.

        Args:
            idle: Inputs to empty, by the stage in front of which it stops.
        """
        stage, tensor = self._greenlet.switch()
        self.stage = stage
        for number in idle.get(stage, ()):
            if number in self._inputs:
                _empty(self._inputs.pop(number))
        self._inputs[stage] = tensor
        out: Tensor = tensor
        return out

    def drop(self) -> None:
        """Ends the forward where it stands."""
        if not self._greenlet.dead:
            self._greenlet.throw(GreenletExit)


def _stops(block: nn.Module, stages: list[list[str]], solved: set[int]) -> AbstractContextManager[None]:
    """Hooks that hand over to the scheduler in front of each stage that is not solved yet."""

    def make(stage: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if stage not in solved:
                getcurrent().parent.switch((stage, args[0]))

        return hook

    return _hooks(block, stages, make)


@contextmanager
def _hooks(
    block: nn.Module, stages: list[list[str]], make: Callable[[int], Callable[[nn.Module, tuple[Any, ...]], None]]
) -> Iterator[None]:
    """In front of the first linear of each stage."""
    hooks = [block.get_submodule(names[0]).register_forward_pre_hook(make(stage)) for stage, names in enumerate(stages)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run_block(
    block: nn.Module,
    inputs: list[Tensor],
    calls: dict[int, BlockCall],
    stages: list[list[str]],
    solve: Callable[[list[str], StageMoments | None], None],
    *,
    held_out: set[int] = frozenset(),  # type: ignore[assignment]
    keep: bool = True,
    idle: Mapping[int, list[int]] | None = None,
    reference: nn.Module | None = None,
    reference_inputs: list[Tensor] | None = None,
    path: str = "",
) -> None:
    """Quantizes one block in true sequential order; `inputs` become the block's outputs, in place.

    Args:
        block: The block with float weights; `solve` replaces them stage by stage.
        inputs: Hidden states [b, T, D] of the quantized stream, per micro-batch.
        calls: Further arguments by batch size.
        stages: From `block_stages`.
        solve: Called with a stage's linears and moments; None where no token reached it.
        held_out: Micro-batches that solvers must not see.
        keep: Whether paused forwards are kept (one pass) or run again from the block's input (less memory).
        idle: From `idle_inputs`: what a kept forward may lose; without it, nothing.
        reference: The float block, whose stage inputs are wanted as well.
        reference_inputs: Hidden states of the float stream; become the float block's outputs, in place.
        path: Module path of the block, for messages.
    """
    solved: set[int] = set()
    moments: dict[int, StageMoments] = {}
    released = idle if idle is not None and keep else {}
    count = len(inputs)
    passes: list[_Pass | None] = [None] * count
    shadows: list[_Pass | None] = [None] * count
    done = [False] * count

    def arrive(index: int) -> None:
        """Moves a micro-batch to its next unsolved stage and adds what it brings, or to the end."""
        current = passes[index]
        if current is None:
            current = passes[index] = _Pass(block, inputs[index], calls[len(inputs[index])])
            if reference is not None and reference_inputs is not None:
                shadows[index] = _Pass(reference, reference_inputs[index], calls[len(inputs[index])])
        tensor = current.advance(released)
        shadow = shadows[index]
        if current.stage == -1:
            inputs[index], passes[index], done[index] = tensor, None, True
            if shadow is not None and reference_inputs is not None:
                out = shadow.advance(released)
                while shadow.stage != -1:
                    out = shadow.advance(released)
                reference_inputs[index], shadows[index] = out, None
            return
        other = None
        if shadow is not None:
            while shadow.stage != -1 and shadow.stage < current.stage:
                other = shadow.advance(released)
            if shadow.stage != current.stage or other is None or other.shape != tensor.shape:
                other = None  # a token that an expert sees in one stream only
        stage = moments.get(current.stage)
        if stage is None:
            columns, device = tensor.shape[-1], tensor.device
            stage = moments[current.stage] = StageMoments(
                Moments(columns, device), Moments(columns, device) if held_out else None
            )
        target = stage.held_out if index in held_out and stage.held_out is not None else stage.train
        target.add(tensor, other)

    def drop(index: int) -> None:
        for running in (passes, shadows):
            current = running[index]
            if current is not None:
                current.drop()
                running[index] = None

    shadow_stops = _stops(reference, stages, set()) if reference is not None else nullcontext()
    with _stops(block, stages, solved), shadow_stops:
        try:
            while True:
                for index in range(count):
                    paused = passes[index]
                    if not done[index] and (paused is None or paused.stage in solved):
                        arrive(index)
                        if not keep and not done[index]:
                            drop(index)  # its statistics are in; it is run again once the stage is solved
                if all(done):
                    break
                stage = min(moments.keys() - solved)
                _check_finite(moments[stage], f"{path}.{stages[stage][0]}".lstrip("."))
                solve(stages[stage], moments.pop(stage))
                solved.add(stage)
                if not keep:
                    moments.clear()
        finally:
            for index in range(count):
                drop(index)
    for number, names in enumerate(stages):
        if number not in solved:
            solve(names, None)


def _check_finite(moments: StageMoments, name: str) -> None:
    """A NaN or infinite activation shows on the diagonal: a glance at K sums instead of a pass over all tokens."""
    for part in (moments.train, moments.held_out):
        if part is not None and not all_finite(part.energies()):
            raise InputError(f"activations are NaN or infinite at the input of {name}", hint="check the model itself")


def forward(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """The block's output hidden state [b, T, D]."""
    out = block(hidden, *call.args, **call.kwargs)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result
