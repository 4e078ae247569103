"""A checkpoint through a backend: calibration rows, the worker, its folder checked, run and put in its place."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from quantcli.backends.worker import Work, run_worker
from quantcli.data.builtin import builtin_texts
from quantcli.data.calibration import calibration_rows, load_tokenizer
from quantcli.data.windows import evaluation_windows
from quantcli.errors import InputError, QuantcliError, UsageError
from quantcli.folder import (
    Manifest,
    PartialFolder,
    create_output,
    describe_parent,
    fingerprint,
    package_versions,
    public_options,
    require_free_bytes,
    write_json,
)
from quantcli.models.checkpoint import Checkpoint, copy_companions, read_config
from quantcli.models.layout import find_layout
from quantcli.models.readers import packed_names, reader_of
from quantcli.models.skeleton import build_skeleton, disk_name, load_config
from quantcli.models.source import locate_model
from quantcli.pipelines.external.plan import ExternalPlan
from quantcli.pipelines.external.verify import Verified, verify
from quantcli.pipelines.inspect import weight_records
from quantcli.progress import Progress
from quantcli.report.layer import LayerReport
from quantcli.tensors.inventory import quantized_bits_per_weight

__all__ = ["ExternalResult", "longest_input", "quantize_checkpoint"]

_JUDGES, _JUDGE_TOKENS = 4, 256


@dataclass(frozen=True)
class ExternalResult:
    """What a backend wrote and what it cost."""

    output: Path
    seconds: float
    """Of the whole run."""
    peak_bytes: int
    """Most memory of the backend's processes."""
    size_bytes: int
    """Bytes of the written weights."""
    parent_size_bytes: int
    bits_per_weight: float | None
    """Stored bits per quantized weight."""
    outputs: Verified
    """What it lost."""
    plan: dict[str, Any]
    versions: dict[str, str]
    """Of the backend's packages."""
    kept: tuple[str, ...] = ()
    """Linears that stayed float."""
    layers: tuple[LayerReport, ...] = ()
    """None: the backend's weights may be scaled, so that one matrix cannot be held against another."""
    evaluation: Any = None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        values = {k: v for k, v in self.__dict__.items() if k not in ("outputs", "evaluation", "output", "layers")}
        evaluation = self.evaluation.to_dict() if self.evaluation is not None else None
        return {"output": str(self.output), **values, "outputs": self.outputs.to_dict(), "evaluation": evaluation}


def quantize_checkpoint(plan: ExternalPlan, progress: Progress) -> ExternalResult:
    """Runs the job.

    Raises:
        UsageError: rows longer than the model takes.
        InputError: no float checkpoint, or one that the backend refuses.
        QualityError: its result is noise.
        QuantcliError: it failed, or wrote what is no model.
    """
    begun, options = time.perf_counter(), plan.options
    folder = locate_model(options.model)
    checkpoint = Checkpoint.open(folder)
    if checkpoint.config.get("quantization_config") is not None:
        raise InputError(f"{folder} is already quantized", hint="quantize the original model instead")
    _refuse_rows(plan, checkpoint)
    require_free_bytes(options.output.absolute().parent, 2 * checkpoint.size_bytes)
    digest = fingerprint(folder)
    identity = plan.to_dict() | {"model": digest, "calibration": asdict(options.calibration)}
    with create_output(options.output, plan=identity, inputs=[folder], force=options.force) as partial:
        windows = _windows(folder, checkpoint, options.trust_remote_code)
        job = plan.job() | _rows(plan, folder, digest, partial, progress)
        job |= {"input": str(folder.absolute()), "output": str(partial.model)}
        work = run_worker(plan.backend, job, partial.state, plan.limits, progress)
        result = _checked(plan, partial, checkpoint, windows, work, progress)
        result = replace(result, seconds=time.perf_counter() - begun, output=options.output)
        write_json(partial.root / "report.json", result.to_dict())
        metrics = {
            "seconds": round(result.seconds, 1),
            "peak_bytes": result.peak_bytes,
            "size_bytes": result.size_bytes,
            "kl": result.outputs.kl,
            "top1": result.outputs.top1,
        }
        chosen = {k: v for k, v in public_options(asdict(options)).items() if k != "graph"}
        chosen["settings"] = dict(plan.settings)
        versions = package_versions() | {f"{plan.backend.name}: {k}": v for k, v in work.versions.items()}
        partial.commit(Manifest("checkpoint", "quantize", chosen, describe_parent(folder, digest), metrics, versions))
    return result


def _refuse_rows(plan: ExternalPlan, checkpoint: Checkpoint) -> None:
    longest, asked = _longest(checkpoint.config), plan.options.calibration.seq_len
    if plan.method.calibrates and longest is not None and asked > longest:
        raise UsageError(
            f"--seq-len {asked} is more than the {longest} positions of {checkpoint.folder}",
            hint=f"add --seq-len {longest}",
        )


def longest_input(model: str) -> int | None:
    """Tokens that a model takes, where its folder says so."""
    return _longest(read_config(locate_model(model)))


def _longest(config: Mapping[str, Any]) -> int | None:
    config = config.get("text_config") or config
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return found if isinstance(found, int) else None


def _windows(folder: Path, checkpoint: Checkpoint, trust_remote_code: bool) -> Tensor:
    """Text that judges: Python's own documentation, which calibrates only where it is asked for."""
    length = min(_JUDGE_TOKENS, _longest(checkpoint.config) or _JUDGE_TOKENS)
    return evaluation_windows(load_tokenizer(folder, trust_remote_code), builtin_texts(), _JUDGES, length)


def _rows(plan: ExternalPlan, folder: Path, digest: str, partial: PartialFolder, progress: Progress) -> dict[str, Any]:
    """The rows that our own algorithms would see."""
    if not plan.method.calibrates:
        return {"tokens": None}
    options = plan.options
    rows = calibration_rows(
        options.calibration,
        folder,
        model_digest=digest,
        progress=progress,
        trust_remote_code=options.trust_remote_code,
    )
    np.save(partial.state / "tokens.npy", rows.tokens.numpy())
    return {"tokens": str(partial.state / "tokens.npy")}


def _checked(
    plan: ExternalPlan,
    partial: PartialFolder,
    original: Checkpoint,
    windows: Tensor,
    work: Work,
    progress: Progress,
) -> ExternalResult:
    """Opens and runs what was written; nothing of it but weights and configuration is kept."""
    backend, folder = plan.backend.name, original.folder
    try:
        for path in partial.model.rglob("*"):
            if path.is_symlink():
                raise InputError(f"{path.name} is a link")
        written = Checkpoint.open(partial.model)
        written.require_finite()
        if written.config.get("quantization_config") is None:
            raise InputError("its config.json has no quantization_config")
        outputs = verify(folder, partial.model, windows, plan.options.trust_remote_code)
    except InputError as error:
        raise QuantcliError(f"{backend} wrote no model that runs: {error.message}") from error
    size = written.size_bytes
    if size >= original.size_bytes:
        raise InputError(
            f"the result would take {size} bytes, the model takes {original.size_bytes}",
            hint="use fewer bits or larger groups",
        )
    _keep_only_model(partial.model)
    copy_companions(folder, partial.model)
    bits = quantized_bits_per_weight(weight_records(partial.model))
    return ExternalResult(
        output=plan.options.output,
        seconds=0.0,
        peak_bytes=work.peak_bytes,
        size_bytes=size,
        parent_size_bytes=original.size_bytes,
        bits_per_weight=bits,
        outputs=outputs,
        plan=plan.to_dict(),
        versions=work.versions,
        kept=_kept(plan, original, written, progress),
    )


def _kept(plan: ExternalPlan, original: Checkpoint, written: Checkpoint, progress: Progress) -> tuple[str, ...]:
    """Linears inside of blocks that the backend left float."""
    trust = plan.options.trust_remote_code
    skeleton = build_skeleton(original.folder, load_config(original.folder, trust), trust)
    packed = set(packed_names(written, reader_of(written)))
    found = (disk_name(f"{name}.weight", skeleton, original.entries) for name in find_layout(skeleton).linears)
    kept = tuple(sorted({str(name).removesuffix(".weight") for name in found if name} - packed))
    if kept:
        few = ", ".join(kept[:5]) + (f" and {len(kept) - 5} more" if len(kept) > 5 else "")
        progress.warn(f"{few} stay float: {plan.backend.name} left them")
    return kept


def _keep_only_model(folder: Path) -> None:
    """Tokenizers and logs that packages leave are not the original's: it brings its own."""
    for path in sorted(folder.iterdir()):
        keeps = path.name in (
            "config.json",
            "quantize_config.json",
            "quantization_config.json",
            "generation_config.json",
        )
        if not keeps and not path.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
