"""Trains a quantized folder in place, so that a run which is killed goes on and ends with the same tensors.

What a run leaves in its state: which training it is and how far the folder was from the float model (`distill.json`),
the tensors as the rounder left them, the float model's hidden states, and where the training stands.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcli.algorithms import Step
from quantcli.algorithms.training.distill import DistillOptions, Progressed
from quantcli.errors import DivergedError, InputError, ResourceError, first_line
from quantcli.folder import read_state, write_json
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.load import load
from quantcli.models.writer import replace_tensors, write_tensors
from quantcli.pipelines.distilling.divergence import divergence
from quantcli.pipelines.distilling.student import Student, open_student
from quantcli.pipelines.distilling.teacher import Teacher
from quantcli.progress import Progress
from quantcli.tensors.finite import require_finite

__all__ = ["DistillReport", "distill"]

_SAVED_EVERY = 60.0  # seconds
_SAME, _LEAST = 1e-3, 1e-6  # relative and absolute: kernels of packed layers sum in another order
_MOMENTS = ("average", "square")


@dataclass(frozen=True)
class DistillReport:
    """What training came to; divergences are of next tokens from the float model's, in nats."""

    losses: list[float]
    """Mean KL divergence on the rows of each step."""
    held_out_before: float
    """Mean KL divergence on the rows that only judge, as the rounder left the model."""
    held_out_after: float
    """The same after training."""
    kept: bool
    """Whether what was trained is better, and written."""
    rows: int
    """Rows that were trained on."""
    judges: int
    """Rows that judged."""
    values: int
    """Scales, gains and biases that were trained."""
    seconds: float


@dataclass(frozen=True)
class _Begun:
    """`distill.json`."""

    settings: dict[str, Any]
    held_out_before: float
    report: DistillReport | None = None


def distill(
    folder: Path,
    teacher: Teacher,
    tokens: Tensor,
    step: Step,
    state: Path,
    progress: Progress,
    *,
    seed: int,
    recompute: bool,
    trust_remote_code: bool = False,
) -> DistillReport:
    """Trains the scales, norms and biases of a packed folder, and writes them where they are better.

    Args:
        folder: Of the model; its files are ours to change.
        teacher: The float model.
        tokens: [rows, T] int64; the last rows only judge.
        step: distill with its options.
        state: Where an interrupted run keeps what it needs.
        progress: Told of each step's loss.
        seed: Of the order of the rows.
        recompute: Whether blocks run again on the way back, for less memory.
        trust_remote_code: As in `models.load`.

    Raises:
        InputError: fewer than two rows, or a folder that cannot be trained.
        DivergedError: a loss that is not finite.
        ResourceError: out of memory.
    """
    if len(tokens) < 2:
        raise InputError("distill takes two rows of text or more, one of them to judge", hint="give more text")
    settings = asdict(step.settings) | {"seed": seed}
    log = state / "distill.json"
    begun = read_state(log, _Begun) if log.is_file() else None
    if begun is not None and begun.settings != settings:
        progress.note("other options of distill than those of the interrupted run: its training begins anew")
        for name in ("distill.json", "training.safetensors", "hidden.safetensors"):
            (state / name).unlink(missing_ok=True)
        begun = None
    if begun is not None and begun.report is not None:
        return begun.report
    with _explained(), torch.inference_mode(False), torch.enable_grad():
        work = _Training(folder, teacher, tokens.clone(), step, state, progress, trust_remote_code)
        if recompute:
            work.student.recompute(teacher.layout.blocks)
        return work.run(begun, settings, log)


class _Training:
    """One training: the model, its text, and where it stands."""

    def __init__(
        self,
        folder: Path,
        teacher: Teacher,
        tokens: Tensor,
        step: Step,
        state: Path,
        progress: Progress,
        trust_remote_code: bool,
    ):
        self._folder, self._teacher, self._tokens, self._step = folder, teacher, tokens, step
        self._state, self._progress, self._trust = state, progress, trust_remote_code
        self._started = self._saved = time.perf_counter()
        self._options: DistillOptions = step.settings
        judges = min(self._options.judges, max(1, len(tokens) // 16))
        self._rows = len(tokens) - judges
        self._hidden = state / "hidden.safetensors"
        self._checkpoint = Checkpoint.open(folder)
        self._restore()
        if not self._hidden.is_file():
            teacher.listen(tokens, self._hidden, progress)
        self.student = open_student(folder, teacher.device, trust_remote_code=trust_remote_code)
        self._rates = [t.longest_step(self._options.learning_rate) for t in self.student.trained]

    def _restore(self) -> None:
        """The folder as the rounder left it: an interrupted run may have begun to write."""
        file = self._state / "rounded.safetensors"
        if file.is_file():
            replace_tensors(self._checkpoint, load_file(file))

    def _keep_rounded(self) -> None:
        file = self._state / "rounded.safetensors"
        if not file.is_file():
            write_tensors(
                {t.disk: self._checkpoint.read(t.disk) for t in self.student.trained}, file.with_suffix(".tmp")
            )
            file.with_suffix(".tmp").replace(file)

    def run(self, begun: _Begun | None, settings: dict[str, Any], log: Path) -> DistillReport:
        """Judges, trains, judges again, writes."""
        self._keep_rounded()
        options, student = self._options, self.student
        with self._teacher.speaking(self._tokens, self._hidden) as wanted:
            if begun is None:
                before = self._judge(student.logits, wanted)
                begun = _Begun(settings, before)
                write_json(log, asdict(begun))
            standing, seconds = self._standing()
            if standing.losses:
                self._progress.note(f"continuing after {len(standing.losses)} steps of training")
            batches = _batches(self._rows, options, settings["seed"])
            with self._progress.track("distilling", len(batches), start=len(standing.losses)) as task:

                def done(state: Progressed) -> None:
                    self._save(state, seconds, last=len(state.losses) == len(batches))
                    task.advance(1, f"KL {state.losses[-1]:.4f}")

                try:
                    self._step.algorithm.run(
                        standing, self._rates, len(batches), lambda n: self._loss(batches[n], wanted), done
                    )
                except DivergedError:
                    self._save(standing, seconds, last=True)
                    raise
            after = self._judge(student.logits, wanted)
            kept = after < begun.held_out_before
            if kept:
                self._write(wanted)
        report = DistillReport(
            standing.losses,
            begun.held_out_before,
            after,
            kept,
            self._rows,
            len(self._tokens) - self._rows,
            sum(t.value.numel() for t in student.trained),
            seconds + time.perf_counter() - self._started,
        )
        write_json(log, asdict(_Begun(settings, begun.held_out_before, report)))
        _say(report, self._progress)
        return report

    def _loss(self, rows: Sequence[int], wanted: Callable[[int], Tensor]) -> float:
        """The mean divergence on some rows, its gradients added to what is trained; one row at a time."""
        total = 0.0
        for index in rows:
            row = self._tokens[index].to(self._teacher.device)
            value = divergence(self.student.logits(row), wanted(index)) / len(rows)
            value.backward()  # type: ignore[no-untyped-call]
            total += float(value.detach())
        return total

    @torch.no_grad()
    def _judge(self, logits: Callable[[Tensor], Tensor], wanted: Callable[[int], Tensor], rows: int = 0) -> float:
        """The mean divergence on the rows that only judge, or the first of them."""
        chosen = range(self._rows, self._rows + rows if rows else len(self._tokens))
        found = [
            float(divergence(logits(self._tokens[index].to(self._teacher.device)), wanted(index))) for index in chosen
        ]
        return math.fsum(found) / len(found)

    def _standing(self) -> tuple[Progressed, float]:
        """Where the interrupted run's training stood and the seconds that it had taken, or the beginning."""
        values = [t.value for t in self.student.trained]
        file = self._state / "training.safetensors"
        if not file.is_file():
            return Progressed.begin(values), 0.0
        kept = load_file(file)
        with torch.no_grad():
            for i, value in enumerate(values):
                value.copy_(kept[f"value.{i}"])
        averages, squares = ([kept[f"{what}.{i}"].to(v.device) for i, v in enumerate(values)] for what in _MOMENTS)
        return Progressed(list(values), averages, squares, kept["losses"].tolist()), float(kept["seconds"])

    def _save(self, standing: Progressed, seconds: float, *, last: bool) -> None:
        now = time.perf_counter()
        if now - self._saved < _SAVED_EVERY and not last:
            return
        lists = {"value": standing.values, "average": standing.averages, "square": standing.squares}
        kept = {f"{what}.{i}": v.detach().cpu() for what, values in lists.items() for i, v in enumerate(values)}
        kept["losses"] = torch.tensor(standing.losses, dtype=torch.float64)
        kept["seconds"] = torch.tensor(seconds + now - self._started, dtype=torch.float64)
        file = self._state / "training.safetensors"
        write_tensors(kept, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
        self._saved = now

    def _write(self, wanted: Callable[[int], Tensor]) -> None:
        """Puts what was trained into the files, opens them again and compares: exported is what was trained."""
        changed = {t.disk: t.stored() for t in self.student.trained}
        for name, tensor in changed.items():
            require_finite(tensor, name)
        trained = self._judge(self.student.logits, wanted, rows=1)
        replace_tensors(self._checkpoint, changed)
        written = Student(
            load(self._folder, device=self._teacher.device, dtype=torch.float32, trust_remote_code=self._trust), []
        )
        read = self._judge(written.logits, wanted, rows=1)
        if abs(read - trained) > _SAME * trained + _LEAST:
            raise AssertionError(f"{self._folder}: KL {read} where training ended with {trained}")


def _batches(rows: int, options: DistillOptions, seed: int) -> list[list[int]]:
    """The rows of every step, in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(rows, generator=generator) for _ in range(options.epochs)]
    return [batch.tolist() for order in orders for batch in torch.split(order, options.batch_rows)]


@contextmanager
def _explained() -> Iterator[None]:
    """Lack of memory is an error that keeps what is finished."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        lacks = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not lacks:
            raise
        raise ResourceError(
            f"distill ran out of memory: {first_line(error)}",
            hint="lower --seq-len, or give --max-memory: below what it took, blocks keep less and run twice",
        ) from error


def _say(report: DistillReport, progress: Progress) -> None:
    before, after = report.held_out_before, report.held_out_after
    line = f"KL to the float model on {report.judges} rows held out: {before:.4f} before, {after:.4f} after"
    if report.kept:
        progress.note(f"distill: {line}")
    else:
        progress.warn(f"distill did not help, scales stay as the rounder left them; {line}")
