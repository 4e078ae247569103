"""The tokens that a run reads: rows to calibrate on, rows that only judge, and rows to measure sensitivities on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from quantcli.data.calibration import calibration_rows
from quantcli.models.writer import write_tensors
from quantcli.options import CalibrationOptions
from quantcli.pipelines.planning.plan import Plan
from quantcli.progress import Progress

__all__ = ["kept_training_rows", "measured_tokens", "read_tokens", "saved_tokens", "training_tokens"]


def read_tokens(plan: Plan, progress: Progress) -> dict[str, Tensor]:
    """The text that calibrates, from where the plan says.

    Returns:
        rows: [rows, T] int64 to calibrate on.
        judges: [judges, T] int64 that only judge: with `best` on other text, a little of the model's own.
    """
    calibration = plan.options.calibration
    rows = _read_rows(plan, calibration, progress)
    judges = rows[:0]
    if plan.judges:
        judges = _read_rows(plan, plan.judge_text, progress).reshape(plan.judges, calibration.seq_len)
    return {"rows": rows, "judges": judges}


def saved_tokens(plan: Plan, state: Path, progress: Progress) -> dict[str, Tensor]:
    """What `read_tokens` gave this run or the interrupted one; kept in `state`."""
    file = state / "tokens.safetensors"
    if file.is_file():
        saved: dict[str, Tensor] = load_file(file)
        return saved
    saved = read_tokens(plan, progress)
    write_tensors(saved, state / "tokens.tmp")
    (state / "tokens.tmp").replace(file)
    return saved


def training_tokens(plan: Plan, state: Path, progress: Progress) -> Tensor:
    """The rows [rows, T] int64 that scales are trained on and judged by; kept in `state`."""
    assert plan.trainer is not None
    return kept_training_rows(
        plan.options.calibration,
        plan.trainer.settings.train_rows,
        state,
        lambda text: _read_rows(plan, text, progress, flag="--set train_rows="),
    )


def kept_training_rows(
    calibration: CalibrationOptions, rows: int, state: Path, read: Callable[[CalibrationOptions], Tensor]
) -> Tensor:
    """Rows like those of calibration, but not the same; those of the interrupted run where there was one.

    Args:
        calibration: Where the text comes from.
        rows: How many are wanted.
        state: Where they are kept.
        read: Makes rows [rows, T] of what it is given.
    """
    file = state / f"training-text-{rows}.safetensors"
    if not file.is_file():
        found = read(replace(calibration, num_samples=rows, seed=calibration.seed + 1))
        write_tensors({"rows": found}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    kept: Tensor = load_file(file)["rows"]
    return kept


def measured_tokens(plan: Plan, state: Path, progress: Progress) -> Tensor:
    """A few rows of calibration text, or, where the algorithm reads none, of text for this alone."""
    if plan.source is not None:
        return saved_tokens(plan, state, progress)["rows"][: plan.measured_rows]
    return _read_rows(plan, plan.measured_text, progress)


def _read_rows(plan: Plan, text: CalibrationOptions, progress: Progress, *, flag: str = "--num-samples ") -> Tensor:
    return calibration_rows(
        text,
        plan.folder,
        source=plan.source,
        model_digest=plan.model_digest,
        progress=progress,
        device=plan.device,
        trust_remote_code=plan.options.trust_remote_code,
        flag=flag,
    ).tokens
