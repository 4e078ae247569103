"""`quantcli quantize -a distill` on a folder that is quantized already: codes kept, scales trained anew."""

import shutil
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from quantcli.algorithms import Step, find_chain, make_steps
from quantcli.data.calibration import calibration_rows
from quantcli.errors import InputError, UsageError
from quantcli.evaluate.memory import peak_memory
from quantcli.folder import (
    Manifest,
    PartialFolder,
    create_output,
    describe_parent,
    fingerprint,
    public_options,
    read_manifest,
    require_free_bytes,
    write_json,
)
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.machine import free_bytes, matmul_flops, pick_device, settled_heap
from quantcli.models.readers import packed_names
from quantcli.models.source import locate_model
from quantcli.options import CalibrationOptions, QuantizeOptions
from quantcli.pipelines.blockwise.tokens import kept_training_rows
from quantcli.pipelines.distilling.cost import DistillCost, distill_cost
from quantcli.pipelines.distilling.student import reader_with_scales
from quantcli.pipelines.distilling.teacher import Teacher
from quantcli.pipelines.distilling.train import distill
from quantcli.pipelines.inspect import weight_records
from quantcli.pipelines.planning.opening import FloatModel, open_model
from quantcli.pipelines.quantize_checkpoint import QuantizeResult, evaluate_result
from quantcli.progress import Progress, Silent
from quantcli.tensors.inventory import quantized_bits_per_weight

__all__ = ["DistillPlan", "is_distilled_alone", "run"]

_READ = (
    "model", "output", "algorithm", "float_model", "settings", "config", "calibration", "device", "max_memory",
    "trust_remote_code", "evaluate", "simulation", "force", "dry_run",
)  # fmt: skip
_IDLE_OF_CALIBRATION = {"num_samples": "rows are counted by --set train_rows", "batch_size": "use --set batch_rows"}


@dataclass(frozen=True)
class DistillPlan:
    """Everything that is decided beforehand."""

    options: QuantizeOptions
    folder: Path
    """Of the quantized model."""
    checkpoint: Checkpoint
    step: Step
    teacher: FloatModel
    device: torch.device
    cost: DistillCost

    def rows(self) -> list[tuple[str, str]]:
        """For people."""
        settings = ", ".join(f"{k}={v}" for k, v in asdict(self.step.settings).items())
        calibration = self.options.calibration
        text = calibration.data or calibration.data_name or "text that the float model writes itself"
        return [
            ("model", f"{self.folder} ({self.checkpoint.size_bytes / 1e6:.0f} MB), codes stay"),
            ("learns from", str(self.teacher.folder)),
            ("algorithm", f"distill ({settings})"),
            ("text", f"{text}, {self.step.settings.train_rows} rows of {calibration.seq_len} tokens"),
            ("device", str(self.device)),
            ("estimated peak memory", f"{self.cost.peak_bytes / 1e9:.2f} GB"),
            ("estimated time", f"{self.cost.seconds:.0f} s"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "model": str(self.folder),
            "float_model": str(self.teacher.folder),
            "algorithm": "distill",
            "settings": asdict(self.step.settings),
            "device": str(self.device),
            "distilling": asdict(self.cost),
        }


def is_distilled_alone(options: QuantizeOptions) -> bool:
    """Whether a trainer is all that was asked for."""
    return options.algorithm is not None and [a.kind for a in find_chain(options.algorithm)] == ["trainer"]


def run(options: QuantizeOptions, progress: Progress | None = None) -> QuantizeResult | DistillPlan:
    """Trains the scales of a quantized folder; with `dry_run`, only the plan.

    Raises:
        QuantcliError: see `errors`; nothing half-written stays behind.
    """
    progress, started = progress or Silent(), time.perf_counter()
    plan = _make_plan(options, progress)
    if options.dry_run:
        return plan
    digest, float_digest = fingerprint(plan.folder), fingerprint(plan.teacher.folder)
    private = ("model", "output", "float_model", "config", "settings", "force", "dry_run", "evaluate", "simulation")
    identity = {k: v for k, v in asdict(options).items() if k not in (*private, "max_memory")}
    identity |= {"model_digest": digest, "float_model_digest": float_digest}
    with (
        create_output(
            options.output,
            plan=identity,
            inputs=[plan.folder, plan.teacher.folder],
            force=options.force,
            resumable=True,
        ) as partial,
        peak_memory() as watched,
        settled_heap(),
    ):
        progress.plan("Plan", plan.rows())
        _place(plan, partial)
        tokens = kept_training_rows(
            options.calibration,
            plan.step.settings.train_rows,
            partial.state,
            lambda text: (
                calibration_rows(
                    text,
                    plan.teacher.folder,
                    model_digest=float_digest,
                    progress=progress,
                    device=plan.device,
                    trust_remote_code=options.trust_remote_code,
                    flag="--set train_rows=",
                ).tokens
            ),
        )
        report = distill(
            partial.model,
            Teacher(plan.teacher, plan.device),
            tokens,
            plan.step,
            partial.state,
            progress,
            seed=options.calibration.seed,
            recompute=plan.cost.recompute,
            trust_remote_code=options.trust_remote_code,
        )
        result = QuantizeResult(
            output=options.output,
            layers=[],
            seconds=max(report.seconds, time.perf_counter() - started),
            peak_bytes=watched.above_start_bytes,
            size_bytes=sum(p.stat().st_size for p in partial.model.glob("*.safetensors")),
            parent_size_bytes=plan.checkpoint.size_bytes,
            bits_per_weight=quantized_bits_per_weight(weight_records(partial.model)) or 0.0,
            plan=plan.to_dict(),
            distilled=report,
        )
        write_json(partial.root / "report.json", result.to_dict())
        metrics = {
            "seconds": round(result.seconds, 1),
            "peak_bytes": result.peak_bytes,
            "held_out_kl": {"before": report.held_out_before, "after": report.held_out_after},
        }
        chosen = {k: v for k, v in public_options(asdict(options)).items() if k not in ("graph", "float_model")}
        partial.commit(Manifest("checkpoint", "quantize", chosen, describe_parent(plan.folder, digest), metrics))
    if not options.evaluate:
        return result
    evaluation = evaluate_result(options, str(plan.teacher.folder), plan.teacher.config, progress)
    return replace(result, evaluation=evaluation)


def _make_plan(options: QuantizeOptions, progress: Progress) -> DistillPlan:
    """Refuses what cannot work, before anything is written."""
    folder = locate_model(options.model)
    checkpoint = Checkpoint.open(folder)
    reader = reader_with_scales(checkpoint)
    _refuse_idle(options)
    assert options.algorithm is not None
    (step,) = make_steps(find_chain(options.algorithm), options.settings)
    teacher = _open_teacher(options, folder, checkpoint, progress)
    device = pick_device(options.device)
    config, packed = checkpoint.config["quantization_config"], []
    for name in packed_names(checkpoint, reader):
        entries = {p: checkpoint.entries[f"{name}.{p}"] for p in reader.parts if f"{name}.{p}" in checkpoint}
        scheme, rows, columns = reader.linear(config, name, entries)
        packed.append((sum(e.size_bytes for e in entries.values()), rows * scheme.group_count(columns)))
    budget = options.max_memory or free_bytes(device)
    cost = distill_cost(
        teacher.skeleton,
        teacher.layout,
        step.settings,
        options.calibration.seq_len,
        packed,
        matmul_flops(device),
        budget,
    )
    require_free_bytes(options.output.absolute().parent, 2 * checkpoint.size_bytes)
    return DistillPlan(options, folder, checkpoint, step, teacher, device, cost)


def _refuse_idle(options: QuantizeOptions) -> None:
    """No flag without effect: codes, and so all that decides them, are there."""
    for field in fields(options):
        if field.name not in _READ and getattr(options, field.name) != getattr(_DEFAULTS, field.name):
            raise UsageError(
                f"distill alone keeps the codes of {options.model}, {field.name} would have no effect",
                hint="leave it out, or quantize the float model with -a gptq,distill",
            )
    for name, why in _IDLE_OF_CALIBRATION.items():
        if getattr(options.calibration, name) != getattr(CalibrationOptions, name):
            raise UsageError(f"--{name.replace('_', '-')} would have no effect on distill alone", hint=why)


_DEFAULTS = QuantizeOptions("", Path())


def _open_teacher(options: QuantizeOptions, folder: Path, checkpoint: Checkpoint, progress: Progress) -> FloatModel:
    """The float model.

    Raises:
        UsageError: none was named.
        InputError: it is another model than the quantized one was made of.
    """
    manifest = read_manifest(folder)
    made_from = "" if manifest is None else f", made from {manifest.parent.get('name')!r}"
    if options.float_model is None:
        raise UsageError(
            f"distill learns from the float model of {options.model}{made_from}", hint="add --float-model FOLDER"
        )
    teacher = open_model(options.float_model, None, trust_remote_code=options.trust_remote_code)
    own, other = (c.get("model_type") for c in (checkpoint.config, teacher.checkpoint.config))
    if own != other:
        raise InputError(
            f"--float-model {teacher.folder} is a {other}, {folder} a {own}",
            hint="give the model that it was made from",
        )
    if manifest is not None and manifest.parent.get("fingerprint") != fingerprint(teacher.folder):
        progress.warn(f"{folder} was not made from {teacher.folder}, as its manifest says{made_from}")
    return teacher


def _place(plan: DistillPlan, partial: PartialFolder) -> None:
    """Copies the folder, unless an interrupted run has done so."""
    done = partial.state / "copied.json"
    if not done.is_file():
        shutil.rmtree(partial.model, ignore_errors=True)
        shutil.copytree(plan.folder, partial.model, ignore=shutil.ignore_patterns(".*"))
        write_json(done, {})
