"""Second moments of the tensors inside a graph: the graph is run, and what flows through it is summed batch by batch.

One Hessian per tensor, whatever number of products reads it. The graph is run in parts
(`graphs.calibration.partition_runs`), of which each has the Hessians that fit into memory together; nothing is computed
that no asked tensor needs, and of a part's values no more than one batch is in memory, but for what the next parts
read.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcli.errors import InputError
from quantcli.graphs.calibration.partition_runs import Stream
from quantcli.tensors.hessian import Moments, Statistics

__all__ = ["InputMoments", "KeptMoments", "collect_moments", "combine"]


@dataclass
class InputMoments:
    """Of one tensor."""

    train: Moments
    """What solvers see."""
    held_out: Moments
    """What judges their results; of no tokens where nothing is held out."""


def collect_moments(
    stream: Stream,
    stage: int,
    widths: Mapping[str, int],
    held_out_step: int = 0,
    reference: Stream | None = None,
) -> dict[str, InputMoments]:
    """Runs the next stage over the calibration inputs.

    Args:
        stream: Of the graph.
        stage: Number of the stage.
        widths: K of each of its tensors, by name.
        held_out_step: Every so many batches one is held out; 0 for none.
        reference: The same graph with other weights, whose tensors are wanted too: what `stream`'s should have come to.

    Raises:
        InputError: the graph does not run on these inputs.
    """
    moments = {name: InputMoments(Moments(width), Moments(width)) for name, width in widths.items()}
    others = reference.run(stage) if reference is not None else repeat(None)
    for number, (values, wanted) in enumerate(zip(stream.run(stage), others, strict=reference is not None)):
        judges = held_out_step > 0 and number % held_out_step == held_out_step - 1
        for name, width in widths.items():
            if values[name].shape[-1] != width:
                raise InputError(f"tensor {name!r} has {values[name].shape[-1]} columns, the weight behind it {width}")
            target = moments[name].held_out if judges else moments[name].train
            target.add(*(_tensor(found[name]) for found in (values, wanted) if found is not None))
    return moments


class KeptMoments:
    """Moments of a graph's tensors in files, one for each, for runs on the same graph and samples."""

    def __init__(self, folder: Path | None, held_out_step: int):
        """Nothing is read yet.

        Args:
            folder: Of this graph and these samples; None: nothing is kept.
            held_out_step: Every so many batches one is held out.
        """
        self._folder, self._step = folder, held_out_step

    def has(self, name: str) -> bool:
        """Whether a tensor's are there."""
        return self._folder is not None and self._file(name).is_file()

    def read(self, name: str) -> InputMoments:
        """A tensor's, in memory of their own."""
        parts = load_file(self._file(name))
        return InputMoments(*(Moments.summed(parts[n], int(parts[n + "_tokens"])) for n in ("train", "held_out")))

    def write(self, found: Mapping[str, InputMoments]) -> None:
        """Keeps them, each file there whole or not at all."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, moments in found.items():
            parts: dict[str, Tensor] = {}
            for part in ("train", "held_out"):
                own: Moments = getattr(moments, part)
                parts |= {part: own.sums, f"{part}_tokens": torch.tensor(own.tokens)}
            file = self._file(name)
            aside = file.with_name(f"{file.name}.{os.getpid()}")
            save_file(parts, aside)
            aside.replace(file)

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        digest = hashlib.sha256(f"{self._step} {name}".encode()).hexdigest()[:24]
        return self._folder / f"{digest}.safetensors"


def combine(parts: Sequence[InputMoments], *, spent: bool = False) -> Statistics | None:
    """The statistics of a weight that reads these tensors; None where no token reached it.

    One that several products share has the mean of their Hessians, by tokens.

    Args:
        parts: Of each tensor.
        spent: Nobody else asks for them: the result takes over their memory, and no token can be added any more.
    """
    seen = [p for p in parts if p.train.tokens]
    if not seen:
        return None
    whole: Statistics | None = None
    for part in seen:
        held = part.held_out if part.held_out.tokens else None
        found = Statistics(
            part.train.matrix() if spent else part.train.mean(),
            part.train.tokens,
            held_out=None if held is None else held.matrix() if spent else held.mean(),
            held_out_tokens=0 if held is None else held.tokens,
            cross=part.train.cross(),
            held_out_cross=None if held is None else held.cross(),
        )
        whole = found if whole is None else _mix(whole, found)
    return whole


def _mix(one: Statistics, other: Statistics) -> Statistics:
    tokens, held = one.tokens + other.tokens, one.held_out_tokens + other.held_out_tokens

    def mean(a: Tensor | None, b: Tensor | None, weight: int, other_weight: int) -> Tensor | None:
        return None if a is None or b is None else (a * weight + b * other_weight) / (weight + other_weight)

    judged = mean(one.held_out, other.held_out, one.held_out_tokens, other.held_out_tokens)
    return Statistics(
        (one.hessian * one.tokens + other.hessian * other.tokens) / tokens,
        tokens,
        held_out=judged,
        held_out_tokens=held if judged is not None else 0,
        cross=mean(one.cross, other.cross, one.tokens, other.tokens),
        held_out_cross=mean(one.held_out_cross, other.held_out_cross, one.held_out_tokens, other.held_out_tokens),
    )


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))
