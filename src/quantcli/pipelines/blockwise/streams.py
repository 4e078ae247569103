"""The hidden states that go from block to block: those of the quantized model and, where asked, of the float one."""

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quantcli.errors import InputError
from quantcli.models.block import BlockCall
from quantcli.models.gathering import StageMoments
from quantcli.models.walk import embed_tokens, shares_state
from quantcli.models.writer import write_tensors
from quantcli.pipelines.blockwise.loading import outside_loaded
from quantcli.pipelines.planning.plan import Plan
from quantcli.pipelines.planning.target import HELD_OUT_SHARE
from quantcli.tensors.channels import Channels
from quantcli.tensors.hessian import Moments

__all__ = ["Streams", "begin_streams"]


@dataclass
class Streams:
    """Hidden states in front of the next block, [b, T, D] per micro-batch; empty where no text is read."""

    hidden: list[Tensor] = field(default_factory=list)
    """Behind the quantized blocks."""
    float_hidden: list[Tensor] | None = None
    """Behind the float ones."""
    calls: list[list[BlockCall]] = field(default_factory=list)
    """Per micro-batch, the further arguments of every block."""
    held_out: set[int] = field(default_factory=set)
    """Micro-batches that only judge."""
    norm: nn.Module | None = None
    """Between the last block and the head."""

    def save(self, state: Path, done: int) -> None:
        """Keeps what `begin_streams` takes up again after `done` blocks; nothing where there are no streams."""
        if not self.hidden:
            return
        tensors = {f"hidden.{i}": h.cpu().contiguous() for i, h in enumerate(self.hidden)}
        if self.float_hidden is not None:
            tensors |= {f"float.{i}": h.cpu().contiguous() for i, h in enumerate(self.float_hidden)}
        write_tensors(tensors, state / "hidden.tmp")
        (state / "hidden.tmp").replace(_saved(state, done))

    @staticmethod
    def forget(state: Path, done: int) -> None:
        """Removes what was kept after `done` blocks."""
        _saved(state, done).unlink(missing_ok=True)

    def finish_blocks(self, *, keep_hidden: bool) -> None:
        """Lets go of what only blocks need, and of the hidden states where the head does not need them."""
        self.calls = []
        if not keep_hidden:
            self.hidden, self.float_hidden = [], None

    def head_moments(self, columns: int, device: torch.device) -> StageMoments | None:
        """Moments [columns, columns] of the head's input; None where the norm in front of it is not known."""
        if self.norm is None:
            return None
        train, held, channels = Moments(columns, device), Moments(columns, device), Channels(columns, 1, device)
        for index, hidden in enumerate(self.hidden):
            chosen = held if index in self.held_out else train
            other = self.norm(self.float_hidden[index]) if self.float_hidden is not None else None
            inputs = self.norm(hidden)
            chosen.add(inputs, other)
            channels.add(inputs, measures=chosen is train)
        return StageMoments(train, held, channels)


def begin_streams(plan: Plan, saved: dict[str, Tensor], state: Path, done: int) -> Streams:
    """Tokens through the embedding: the hidden states, or those that the interrupted run left.

    Args:
        plan: What runs.
        saved: The tokens, from `saved_tokens`.
        state: Where the interrupted run kept them.
        done: Blocks that it has finished.
    """
    tokens, batch = torch.cat([saved["rows"], saved["judges"]]), plan.options.calibration.batch_size
    held_out = _held_out(len(saved["rows"]), len(tokens), batch) if plan.holds_out else set()
    with outside_loaded(plan):
        name = plan.layout.final_norm
        norm = deepcopy(plan.skeleton.get_submodule(name)) if name else None
        hidden, calls = embed_tokens(plan.skeleton, plan.layout, tokens.to(plan.device), batch)
    if shares_state(calls) and (done or plan.options.correct_earlier):
        what = "taken up again after an interruption" if done else "run beside its float self"
        raise InputError(
            f"{type(plan.skeleton).__name__} cannot be {what}: its blocks read what earlier ones have kept",
            hint=f"remove {state.parent} and start anew" if done else "leave --correct-earlier out",
        )
    float_hidden = None
    if done:
        kept = load_file(_saved(state, done))
        hidden = [kept[f"hidden.{i}"].to(plan.device) for i in range(len(hidden))]
        if plan.options.correct_earlier:
            float_hidden = [kept[f"float.{i}"].to(plan.device) for i in range(len(hidden))]
    elif plan.options.correct_earlier:
        float_hidden = [h.clone() for h in hidden]
    return Streams(hidden, float_hidden, calls, held_out, norm)


def _saved(state: Path, done: int) -> Path:
    return state / f"hidden-{done}.safetensors"


def _held_out(rows: int, total: int, batch: int) -> set[int]:
    """Micro-batches that only judge: one in `HELD_OUT_SHARE` of the rows, and all text of the model's own."""
    batches, whole = -(-total // batch), rows // batch
    if batches < 2:
        return set()
    step = max(2, min(HELD_OUT_SHARE, whole))
    return set(range(step - 1, whole, step)) | set(range(-(-rows // batch), batches))
