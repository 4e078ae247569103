"""The float model as a teacher: it runs once, block by block; what leaves its last block is kept on disk.

Logits are made of that again whenever they are wanted, by norm and head alone: they would take a hundred times the
room, and the whole float model is never in memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from quantcli.models.block import forward
from quantcli.models.machine import compute_dtype
from quantcli.models.tail import tail_logits
from quantcli.models.walk import embed_tokens
from quantcli.models.writer import write_tensors
from quantcli.pipelines.blockwise.loading import load_block, outside_loaded
from quantcli.pipelines.planning.opening import FloatModel
from quantcli.progress import Progress
from quantcli.tensors.finite import require_finite

__all__ = ["Teacher"]

_TUPLES = "tuples"


class Teacher:
    """A float model, read part by part."""

    replaced: frozenset[str] = frozenset()

    def __init__(self, model: FloatModel, device: torch.device):
        """Nothing is read yet."""
        self.folder, self.checkpoint = model.folder, model.checkpoint
        self.skeleton, self.layout = model.skeleton, model.layout
        self.device, self.dtype = device, compute_dtype(device, model.stored_dtype)

    def float_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Its tensors are what they are."""
        return stored

    @torch.no_grad()
    def listen(self, tokens: Tensor, file: Path, progress: Progress) -> None:
        """Runs the blocks on rows of tokens [rows, T]; keeps what leaves the last one.

        Raises:
            InputError: a tensor is missing, or what leaves the last block is not finite.
        """
        with outside_loaded(self):
            hidden, calls = embed_tokens(self.skeleton, self.layout, tokens.to(self.device), 1)
        tuples, count = False, len(self.layout.blocks)
        with progress.track("running the float model", count) as task:
            for number in range(count):
                block = load_block(self, number)
                if number == count - 1:
                    tuples = isinstance(block(hidden[0], *calls[0][number].args, **calls[0][number].kwargs), tuple)
                for index, row in enumerate(hidden):
                    hidden[index] = forward(block, row, calls[index][number])
                task.advance(1)
                del block
        for row in hidden:
            require_finite(row, f"what leaves the last block of {self.folder}")
        kept = {str(index): row.cpu() for index, row in enumerate(hidden)}
        write_tensors(kept | {_TUPLES: torch.tensor(tuples)}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)

    @contextmanager
    def speaking(self, tokens: Tensor, file: Path) -> Iterator[Callable[[int], Tensor]]:
        """A function from a row's number to its logits [T, V] float32, on the device.

        Args:
            tokens: As `listen` was given.
            file: As `listen` has written it.
        """
        with outside_loaded(self, head=True), safe_open(file, framework="pt") as kept:
            tuples = bool(kept.get_tensor(_TUPLES))

            @torch.no_grad()
            def logits(index: int) -> Tensor:
                row = tokens[index : index + 1].to(self.device)
                hidden = kept.get_tensor(str(index)).to(self.device)
                return tail_logits(self.skeleton, self.layout, row, hidden, tuples=tuples)[0]

            yield logits
