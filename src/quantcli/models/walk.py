"""Runs calibration tokens through a model block by block, handing each linear's input statistics to a solver.

One forward does what usually takes three to five. Every micro-batch runs in a greenlet of its own; it stops in front
of the first linear of each stage (linears that read the same input), adds its input to the stage's Hessian and lets the
next micro-batch come up. Once all have arrived, the stage is solved, its quantized weights are put in place, and the
forwards go on from where they stood: true sequential order, for any architecture, at the cost of one pass. What a
paused forward holds but no longer reads is emptied (`paused`). Where the rest does not fit, forwards are dropped at
each stage and run again (`keep=False`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from quantcli.errors import InputError, first_line
from quantcli.models.block import BlockCall, stage_hooks
from quantcli.models.gathering import MOMENTS, Gathering, StageMoments
from quantcli.models.layout import Layout
from quantcli.models.paused import END, Pass, Pause, Shelf, token_count

__all__ = ["StandIn", "embed_tokens", "run_block", "shares_state"]

_OUTPUTS = (0, 2, 3)  # a block gives its hidden state alone, or a tuple of so many that begins with it
_MISFITS = (ValueError, TypeError, AttributeError, IndexError)


class StandIn(nn.Module):
    """Stands in for a block; whatever a model asks of it but its output, the block answers."""

    def __init__(self, original: nn.Module):
        """Stands in for `original`, which does not become a part of it."""
        super().__init__()
        self.__dict__["_original"] = original

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"], name)


class _EnoughError(Exception):
    """The blocks' inputs are known; the rest of the model need not run."""


class _Recorder(StandIn):
    """Notes what a block is called with, passes the hidden state on."""

    def __init__(self, original: nn.Module, calls: list[tuple[Tensor, BlockCall]], last: bool, outputs: int):
        super().__init__(original)
        self._calls, self._last, self._outputs = calls, last, outputs

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._calls.append((hidden_states, BlockCall(args, kwargs)))
        if self._last:
            raise _EnoughError
        return (hidden_states, *[None] * (self._outputs - 1)) if self._outputs else hidden_states


def embed_tokens(
    model: Any, layout: Layout, tokens: Tensor, batch_size: int
) -> tuple[list[Tensor], list[list[BlockCall]]]:
    """What the blocks are given for each micro-batch of tokens [rows, T].

    Args:
        model: Skeleton whose tensors outside the blocks are in place.
        layout: Its parts.
        tokens: [rows, T] int64 on the device to run on.
        batch_size: Rows per micro-batch.

    Returns:
        Per micro-batch, hidden states [b, T, D] in front of the first block, and the further arguments of every block;
        tensors that do not depend on the text are the same for all.

    Raises:
        InputError: the model's blocks are not called one after another.
    """
    path = layout.blocks[0].rpartition(".")[0]
    originals = model.get_submodule(path)
    hidden: list[Tensor] = []
    calls: list[list[BlockCall]] = []
    outputs = _OUTPUTS[0]
    try:
        for batch in torch.split(tokens, batch_size):
            seen, outputs = _record(model, path, originals, batch, outputs)
            if len(seen) != len(originals):
                raise InputError(f"{type(model).__name__} does not call its blocks one after another")
            hidden.append(seen[0][0].clone())
            calls.append(
                [_shared(call, one) for (_, call), one in zip(seen, calls[0], strict=True)]
                if calls
                else [call for _, call in seen]
            )
    finally:
        model.set_submodule(path, originals)
    return hidden, calls


def _record(
    model: Any, path: str, originals: Any, batch: Tensor, outputs: int
) -> tuple[list[tuple[Tensor, BlockCall]], int]:
    """Each block's hidden state and further arguments, and how many values the model takes from a block."""
    last, failures = len(originals) - 1, []
    for tried in _OUTPUTS[_OUTPUTS.index(outputs) :]:
        seen: list[tuple[Tensor, BlockCall]] = []
        recorders = nn.ModuleList(_Recorder(b, seen, i == last, tried) for i, b in enumerate(originals))
        model.set_submodule(path, recorders)
        try:
            with suppress(_EnoughError):
                getattr(model, model.base_model_prefix, model)(input_ids=batch, use_cache=False)
        except _MISFITS as error:
            failures.append(error)
            continue
        return seen, tried
    raise InputError(
        f"{type(model).__name__} cannot be followed block by block: {first_line(failures[0])}"
    ) from failures[0]


def _shared(call: BlockCall, first: BlockCall) -> BlockCall:
    """The call with tensors that equal those of the first micro-batch replaced by these."""
    found, spec = tree_flatten((call.args, call.kwargs))
    before, same_spec = tree_flatten((first.args, first.kwargs))
    if spec != same_spec:
        return call
    args, kwargs = tree_unflatten([b if _equal(a, b) else a for a, b in zip(found, before, strict=True)], spec)
    kept = {name: call.kwargs[name] if isinstance(call.kwargs[name], dict) else value for name, value in kwargs.items()}
    return BlockCall(tuple(a if isinstance(a, dict) else b for a, b in zip(call.args, args, strict=True)), kept)


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)


def shares_state(calls: list[list[BlockCall]]) -> bool:
    """Whether blocks write to what they are called with, for later blocks to read (shared keys and values)."""
    return any(isinstance(v, dict) for call in calls[0] for v in (*call.args, *call.kwargs.values()))


def _stops(block: nn.Module, stages: list[list[str]], solved: set[int]) -> AbstractContextManager[None]:
    """Hooks that hand over to the scheduler in front of each stage that is not solved yet."""

    def make(stage: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if stage not in solved:
                getcurrent().parent.switch((stage, args[0]))

        return hook

    return stage_hooks(block, stages, make)


def run_block(
    block: nn.Module,
    inputs: list[Tensor],
    calls: Sequence[BlockCall],
    stages: list[list[str]],
    solve: Callable[[list[str], StageMoments | None], None],
    *,
    gathering: Gathering = MOMENTS,
    held_out: set[int] = frozenset(),  # type: ignore[assignment]
    keep: bool = True,
    pauses: Mapping[int, Pause] | None = None,
    shelf: Shelf | None = None,
    between: Callable[[], None] = lambda: None,
    reference: nn.Module | None = None,
    reference_inputs: list[Tensor] | None = None,
    path: str = "",
) -> None:
    """Solves one block in true sequential order; `inputs` become the block's outputs, in place.

    Args:
        block: The block with float weights; `solve` replaces them stage by stage.
        inputs: Hidden states [b, T, D] of the quantized stream, per micro-batch.
        calls: Further arguments per micro-batch.
        stages: From `block_stages`.
        solve: Called with a stage's linears and moments; None where no token reached it.
        gathering: What of the inputs `solve` is to know.
        held_out: Micro-batches that solvers must not see.
        keep: Whether paused forwards are kept (one pass) or run again from the block's input (less memory).
        pauses: From `study_pauses`: what becomes of the tensors that a kept forward holds; without it, nothing.
        shelf: Memory for what paused forwards hold, the same for every block; default: one for this block.
        between: Called whenever a forward has stopped.
        reference: The float block, whose stage inputs are wanted as well.
        reference_inputs: Hidden states of the float stream; become the float block's outputs, in place.
        path: Module path of the block, for messages.
    """
    solved: set[int] = set()
    moments: dict[int, StageMoments] = {}
    handled = pauses if pauses is not None and keep else {}
    count = len(inputs)
    shelf = Shelf(count) if shelf is None else shelf
    passes: list[Pass | None] = [None] * count
    shadows: list[Pass | None] = [None] * count
    done = [False] * count
    tokens = [token_count(hidden) for hidden in inputs]

    def arrive(index: int) -> None:
        """Moves a micro-batch to its next unsolved stage and adds what it brings, or to the end."""
        current = passes[index]
        if current is None:
            current = passes[index] = Pass(block, inputs[index], calls[index], shelf)
            if reference is not None and reference_inputs is not None:
                shadows[index] = Pass(reference, reference_inputs[index], calls[index], shelf)
        current.advance(handled)
        tensor = current.tensor
        shadow = shadows[index]
        if current.stage == END:
            _renew(inputs, index, tensor, shelf)
            passes[index], done[index] = None, True
            if shadow is not None and reference_inputs is not None:
                while shadow.stage != END:
                    shadow.advance(handled)
                _renew(reference_inputs, index, shadow.tensor, shelf)
                shadows[index] = None
            return
        other = None
        if shadow is not None:
            while shadow.stage != END and shadow.stage < current.stage:
                shadow.advance(handled)
            # an expert may see other tokens in the other stream, and then nothing can be said
            if shadow.stage == current.stage and token_count(tensor) == token_count(shadow.tensor) == tokens[index]:
                other = shadow.tensor
        stage = moments.get(current.stage)
        if stage is None:
            stage = moments[current.stage] = StageMoments.begin(tensor, gathering, holds_out=bool(held_out))
        stage.add(tensor, other, judges=index in held_out, holds_out=bool(held_out))

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
                        between()
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


def _renew(hidden: list[Tensor], index: int, output: Tensor, shelf: Shelf) -> None:
    """Puts a block's output in the place of its input."""
    shelf.clear(hidden[index])
    shelf.move(output)
    hidden[index] = output


def _check_finite(moments: StageMoments, name: str) -> None:
    if not moments.is_finite():
        raise InputError(f"activations are NaN or infinite at the input of {name}", hint="check the model itself")
