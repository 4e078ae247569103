"""Trains the rotations of a checkpoint on calibration rows, and keeps them only where they help on rows held out."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantcli.algorithms import Step
from quantcli.algorithms.transforms.spinquant import FLOAT, SpinquantOptions, fake_quantize
from quantcli.errors import InputError
from quantcli.models.layout import Layout, head_size, weight_shape
from quantcli.models.rotate import RotatedCheckpoint
from quantcli.models.rotated_forward import RotatedForward
from quantcli.models.skeleton import disk_name, materialize
from quantcli.pipelines.rotation.noise import RoundingNoise
from quantcli.progress import Progress
from quantcli.tensors.finite import require_finite
from quantcli.tensors.hadamard import Rotation, make_rotation

__all__ = ["RotationReport", "TrainingCost", "see_through", "train_rotations", "training_cost"]

_HELD_OUT_SHARE = 8
"""One calibration row in so many judges."""
_JUDGED_TOKENS = 1024
_GATHERED_TOKENS = 2048
"""Tokens that go through the model, forwards and backwards, for local training."""
_EFFICIENCY = 0.35  # share of the matrix-product rate that training reaches


@dataclass(frozen=True)
class TrainingCost:
    """What training will take."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class RotationReport:
    """What training came to; divergences are of the quantized model's next tokens from the float model's, in nats."""

    losses: list[float]
    """Loss at each step, relative to the start's: 1 is no better than the start."""
    held_out_divergences: dict[str, float]
    """Mean KL divergence on held-out rows under each rotation: start, random, trained."""
    held_out_losses: dict[str, float]
    """Next-token cross entropy there, of the float model as well."""
    kept: str
    """The rotation that is best on held-out rows."""
    tokens: int
    """Tokens that went through the model for training, repetitions counted."""
    seconds: float


def training_cost(skeleton: Any, layout: Layout, settings: SpinquantOptions, row_len: int, rate: float) -> TrainingCost:
    """Estimates time and memory.

    Args:
        skeleton: The model on the meta device.
        layout: Its parts.
        settings: Of training.
        row_len: Tokens per calibration row.
        rate: Floating-point operations per second of matrix products.
    """
    config = skeleton.config.get_text_config()
    hidden, blocks = config.hidden_size, len(layout.blocks)
    weights = sum(math.prod(weight_shape(skeleton.get_submodule(name))) for name in layout.linears)
    vocabulary = config.vocab_size * hidden
    length = min(settings.row_len, row_len)
    tokens = settings.steps * settings.batch_rows * length
    turns = 8 * blocks * hidden**2  # into the rotated basis and back, before attention and before the MLP
    forward = 2 * (weights + vocabulary) + turns
    flops = 4 * _JUDGED_TOKENS * forward + settings.steps * 20 * hidden**3  # a step in float64
    parameters = 4 * (weights + 2 * vocabulary)
    at_once = length
    if settings.objective == "local":
        flops += 2 * _GATHERED_TOKENS * forward + 6 * tokens * hidden**2
        parameters += 4 * _GATHERED_TOKENS * 3 * blocks * hidden
    else:
        flops += tokens * (3 * forward + 2 * turns)
        at_once *= settings.batch_rows
    if settings.w_bits < FLOAT:
        flops += 3 * settings.steps * 2 * weights * hidden + tokens * 2 * weights
        parameters += 12 * weights
    widest = max(weight_shape(skeleton.get_submodule(name))[1] for name in layout.linears)
    held = at_once * 4 * (blocks * (24 * hidden + 10 * widest) + 6 * config.vocab_size)
    return TrainingCost(3 + flops / (rate * _EFFICIENCY), int(parameters + held) + 200_000_000)


def see_through(checkpoint: RotatedCheckpoint, matrices: Sequence[Tensor]) -> RotatedCheckpoint:
    """The checkpoint through R1 [D, D], then R2 [H, H] of each block; float64."""
    stream, *heads = (Rotation((m.cpu(),), torch.ones(len(m), dtype=torch.float64)) for m in matrices)
    return checkpoint.turned(stream, heads)


def train_rotations(
    checkpoint: RotatedCheckpoint,
    skeleton: Any,
    layout: Layout,
    rows: Tensor,
    step: Step,
    device: torch.device,
    progress: Progress,
) -> tuple[list[Tensor], RotationReport]:
    """Trains R1 and R2 with the whole float model in memory.

    Args:
        checkpoint: Under rotations that do nothing.
        skeleton: Its model on the meta device; left as it is.
        layout: Its parts.
        rows: [rows, T] int64 calibration tokens; one row in eight is held out.
        step: spinquant with its options.
        device: Where the model runs, in float32.
        progress: Told of each step's divergence.

    Returns:
        R1 and one R2 per block, float64, the best of start, random and trained on held-out rows; and the report.

    Raises:
        InputError: fewer than two rows, or tensors that are not finite.
    """
    begun = time.perf_counter()
    settings: SpinquantOptions = step.settings
    train_rows, held_rows = _split(rows.to(device), settings)
    with torch.inference_mode(False), torch.enable_grad(), _one_generator(settings.rotation_seed):
        trial = _Trial(checkpoint, skeleton, layout, settings, device)
        order = torch.randperm(len(train_rows)).to(device)
        candidates = {"start": trial.matrices(settings.rotate_mode)}
        if settings.rotate_mode != "random":
            candidates["random"] = trial.matrices("random")

        parts = 1  # of the loss, each of which begins at one
        if settings.objective == "local":
            gathered = train_rows[order[: max(1, _GATHERED_TOKENS // train_rows.shape[1])]]
            loss = trial.noise(candidates["start"], gathered)
            parts = len(candidates["start"])
        else:
            loss = trial.divergence(train_rows[order])
        with progress.track("training rotations", settings.steps) as task:
            candidates["trained"], losses = step.algorithm.run(
                candidates["start"], loss, settings, lambda value: task.advance(1, f"loss {value / parts:.4f}")
            )
        del loss
        with torch.no_grad():
            judged, float_loss = trial.judge(candidates, held_rows)
    text = len(losses) * settings.batch_rows * train_rows.shape[1]
    if settings.objective == "local":
        text = gathered.numel()
    kept = min(judged, key=lambda name: judged[name][0])
    report = RotationReport(
        [value / parts for value in losses],
        {name: values[0] for name, values in judged.items()},
        {name: values[1] for name, values in judged.items()} | {"float": float_loss},
        kept,
        text,
        time.perf_counter() - begun,
    )
    _say(report, settings, progress)
    return candidates[kept], report


def _split(rows: Tensor, settings: SpinquantOptions) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to judge on, cut to the length of training; no calibration row is in both."""
    count = len(rows)
    if count < 2:
        raise InputError(
            "training rotations takes two calibration rows or more, one of them to judge", hint="give more text"
        )
    share = min(_HELD_OUT_SHARE, count)
    judges = torch.arange(count) % share == share - 1
    length = min(settings.row_len, rows.shape[1])
    pieces = rows[:, : rows.shape[1] // length * length].reshape(count, -1, length)
    held = pieces[judges.to(rows.device)].flatten(0, 1)
    spread = max(1, len(held) * length // _JUDGED_TOKENS)
    return pieces[(~judges).to(rows.device)].flatten(0, 1), held[::spread]


@contextmanager
def _one_generator(seed: int) -> Iterator[None]:
    """Random choices of their own, the caller's left as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class _Trial:
    """The float model, and what it says under rotations."""

    def __init__(
        self,
        checkpoint: RotatedCheckpoint,
        skeleton: Any,
        layout: Layout,
        settings: SpinquantOptions,
        device: torch.device,
    ):
        self._settings, self._blocks, self._device = settings, len(layout.blocks), device
        self._hidden, self._head_dim = skeleton.config.get_text_config().hidden_size, head_size(skeleton)
        self._model = deepcopy(skeleton)
        materialize(self._model, _tensors(checkpoint, skeleton))
        self._model.to(device)
        assert layout.head is not None
        self._head = self._model.get_submodule(layout.head)
        self._quantize = partial(fake_quantize, bits=settings.a_bits, symmetric=False)
        rounded = settings.w_bits < FLOAT
        self._forward = RotatedForward(
            self._model,
            layout,
            checkpoint,
            self._quantize,
            partial(fake_quantize, bits=settings.w_bits, symmetric=True) if rounded else None,
        )

    def matrices(self, mode: str) -> list[Tensor]:
        """R1, and for each block the same R2, as quarot makes them."""
        seed = self._settings.rotation_seed
        stream, head = (make_rotation(n, mode, seed + i) for i, n in enumerate((self._hidden, self._head_dim)))
        return [stream.matrix().to(self._device), *[head.matrix().to(self._device)] * self._blocks]

    def noise(self, start: Sequence[Tensor], rows: Tensor) -> Callable[[Sequence[Tensor], int], Tensor]:
        """The loss of objective local."""
        draws = self._settings.batch_rows * rows.shape[1]
        return RoundingNoise(self._forward, self._log_probabilities, self._quantize, rows, start, draws)

    def divergence(self, rows: Tensor) -> Callable[[Sequence[Tensor], int], Tensor]:
        """The loss of objective divergence: on some rows after another, relative to that of the first step."""
        count, first = self._settings.batch_rows, 0.0

        def loss(matrices: Sequence[Tensor], step: int) -> Tensor:
            nonlocal first
            chosen = torch.arange(step * count, (step + 1) * count, device=rows.device) % len(rows)
            with torch.no_grad():
                wanted = self._log_probabilities(rows[chosen])
            value = _divergence(self._rotated(matrices, rows[chosen]), wanted)
            first = first or float(value.detach())
            return value / first

        return loss

    def judge(
        self, candidates: Mapping[str, Sequence[Tensor]], rows: Tensor
    ) -> tuple[dict[str, tuple[float, float]], float]:
        """Divergence and next-token loss of each candidate, infinite where the model breaks down; the float loss."""
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in candidates}
        total = 0.0
        for row in torch.split(rows, 1):
            wanted = self._log_probabilities(row)
            total += float(_cross_entropy(wanted, row))
            for name, matrices in candidates.items():
                found = self._rotated(matrices, row)
                sums[name] += torch.stack([_divergence(found, wanted), _cross_entropy(found, row)]).double().cpu()
        means = {name: (value / len(rows)).nan_to_num(nan=math.inf).tolist() for name, value in sums.items()}
        return {name: (divergence, loss) for name, (divergence, loss) in means.items()}, total / len(rows)

    def _rotated(self, matrices: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """Log-probabilities of the rotated and quantized model."""
        stream, *heads = (m.float() for m in matrices)
        with self._forward.rotated(stream, heads):
            return self._log_probabilities(tokens)

    def _log_probabilities(self, tokens: Tensor) -> Tensor:
        hidden = self._model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        found: Tensor = self._head(hidden).float().log_softmax(-1)
        return found


def _divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean KL divergence per token, of log-probabilities [rows, T, V]."""
    total: Tensor = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum")
    return total / wanted[..., 0].numel()


def _cross_entropy(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    picked = log_probabilities[:, :-1].gather(-1, tokens[:, 1:, None])
    return -picked.sum() / max(1, picked.numel())


def _tensors(checkpoint: RotatedCheckpoint, skeleton: Any) -> dict[str, Tensor]:
    """Every tensor of the model in float32."""
    found = {}
    for name in skeleton.state_dict():
        disk = disk_name(name, skeleton, checkpoint.entries)
        assert disk is not None
        found[name] = checkpoint.read(disk).float()
        require_finite(found[name], disk)
    return found


def _say(report: RotationReport, settings: SpinquantOptions, progress: Progress) -> None:
    values = report.held_out_divergences
    rounded = [f"{settings.a_bits}-bit activations"] * (settings.a_bits < FLOAT)
    rounded += [f"{settings.w_bits}-bit weights"] * (settings.w_bits < FLOAT)
    words = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    line = f"KL to the float model on held-out text with {' and '.join(rounded)}: {words}"
    if report.kept == "trained":
        progress.note(line)
    else:
        progress.warn(f"training did not help, the {report.kept} rotation is kept; {line}")
