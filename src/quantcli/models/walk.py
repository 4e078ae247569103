"""Runs calibration tokens through a model block by block, handing each linear's input statistics to a solver.

One forward does what usually takes three to five. Every micro-batch runs in a greenlet of its own; it stops in front
of the first linear of each stage (linears that read the same input), adds its input to the stage's Hessian and lets the
next micro-batch come up. Once all have arrived, the stage is solved, its quantized weights are put in place, and the
forwards go on from where they stood: true sequential order, for any architecture, at the cost of one pass. What a
paused forward holds but no longer reads is emptied (`paused`). Where the rest does not fit, forwards are dropped at
each stage and run again (`keep=False`).
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quantcli.errors import InputError
from quantcli.models.block import BlockCall, stage_hooks
from quantcli.models.gathering import MOMENTS, Gathering, StageMoments
from quantcli.models.layout import Layout
from quantcli.models.paused import END, Pass, Pause, Shelf, token_count

__all__ = ["block_marks", "embed_tokens", "run_block"]

_MARKS = ("attention_type", "layer_type", "is_sliding", "layer_idx", "is_linear_attn")


def block_marks(block: nn.Module) -> dict[str, Any]:
    """Attributes of a block by which models choose its mask: whatever stands in for it needs them too."""
    return {name: getattr(block, name) for name in _MARKS if hasattr(block, name)}


class _EnoughError(Exception):
    """The blocks' inputs are known; the rest of the model need not run."""


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is called with, passes the hidden state on."""

    def __init__(self, original: nn.Module, calls: list[tuple[Tensor, BlockCall]], last: bool):
        super().__init__()
        self._calls, self._last = calls, last
        for name, value in block_marks(original).items():
            setattr(self, name, value)

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
            found = [call for _, call in seen]
            _refuse_other_arguments(calls.setdefault(len(batch), found), found, model)
    finally:
        model.set_submodule(path, originals)
    return hidden, calls


def _refuse_other_arguments(first: list[BlockCall], found: list[BlockCall], model: Any) -> None:
    """Blocks are run with the arguments of the first micro-batch; those that depend on the text cannot be."""
    compared: set[tuple[int, int]] = set()
    for one, other in zip(first, found, strict=True):
        if any(isinstance(value, dict) for value in (*one.args, *one.kwargs.values())):
            raise InputError(f"blocks of {type(model).__name__} write to what they are called with")
        for a, b in zip(tree_leaves((one.args, one.kwargs)), tree_leaves((other.args, other.kwargs)), strict=True):
            if isinstance(a, Tensor) and a is not b and (id(a), id(b)) not in compared:
                compared.add((id(a), id(b)))
                if not torch.equal(a, b):
                    raise InputError(f"blocks of {type(model).__name__} are called with what depends on the text")


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
    calls: dict[int, BlockCall],
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
        calls: Further arguments by batch size.
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
            current = passes[index] = Pass(block, inputs[index], calls[len(inputs[index])], shelf)
            if reference is not None and reference_inputs is not None:
                shadows[index] = Pass(reference, reference_inputs[index], calls[len(inputs[index])], shelf)
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
