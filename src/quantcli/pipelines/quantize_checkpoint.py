"""`quantcli quantize` on a checkpoint: read a block, quantize it, write its shard, forget it; then the next."""

import re
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from quantcli.errors import InputError
from quantcli.evaluate.memory import peak_memory
from quantcli.folder import Manifest, PartialFolder, create_output, describe_parent, public_options, write_json
from quantcli.models.checkpoint import copy_companions
from quantcli.models.machine import Heap, settled_heap
from quantcli.models.skeleton import first_names
from quantcli.options import QuantizeOptions
from quantcli.pipelines.blockwise.blocks import CalibratedBlocks
from quantcli.pipelines.blockwise.config import result_config
from quantcli.pipelines.blockwise.journal import Journal
from quantcli.pipelines.blockwise.scaling import ScaleReport, Scaling
from quantcli.pipelines.blockwise.shards import ShardWriter
from quantcli.pipelines.blockwise.stages import FEW_TOKENS, StageSolver
from quantcli.pipelines.blockwise.streams import Streams, begin_streams
from quantcli.pipelines.blockwise.tokens import saved_tokens, training_tokens
from quantcli.pipelines.distilling.teacher import Teacher
from quantcli.pipelines.distilling.train import DistillReport, distill
from quantcli.pipelines.mixed_bits.choose import mix_bits
from quantcli.pipelines.planning.decide import make_plan
from quantcli.pipelines.planning.opening import open_model
from quantcli.pipelines.planning.plan import Plan
from quantcli.pipelines.planning.share import Share
from quantcli.pipelines.planning.target import Target
from quantcli.pipelines.rotation.learn import learn_rotations
from quantcli.pipelines.rotation.train import RotationReport
from quantcli.progress import Progress, Silent
from quantcli.report.layer import LayerReport
from quantcli.report.outliers import OutlierReport
from quantcli.tensors.block_types import block_type_of
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["QuantizeResult", "evaluate_result", "run"]


@dataclass(frozen=True)
class QuantizeResult:
    """What a run wrote and what it cost."""

    output: Path
    layers: list[LayerReport]
    seconds: float
    """Time of this run and of the interrupted ones that it continued."""
    peak_bytes: int
    """Memory above what the process held when the run began."""
    size_bytes: int
    """Bytes of the written weights."""
    parent_size_bytes: int
    bits_per_weight: float
    """Stored bits per quantized weight, scales and zeros included."""
    plan: dict[str, Any]
    share: Share | None = None
    """How much of the matrices is quantized, and what is not; None where none is."""
    scales: list[ScaleReport] = field(default_factory=list)
    """What became of each input that smoothquant looked at."""
    outliers: list[OutlierReport] = field(default_factory=list)
    """Outlier features of each input, of a method that keeps them out of its product."""
    training: RotationReport | None = None
    """How rotations were trained, where they were."""
    distilled: DistillReport | None = None
    """What training scales came to, where they were."""
    evaluation: Any = None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        apart = ("layers", "evaluation", "output", "training", "distilled", "scales", "outliers", "share")
        values = {k: v for k, v in self.__dict__.items() if k not in apart}
        return {
            "output": str(self.output),
            **values,
            "share": self.share.to_dict() if self.share is not None else None,
            "layers": [asdict(layer) for layer in self.layers],
            "scales": [asdict(scale) for scale in self.scales],
            "outliers": [asdict(outliers) for outliers in self.outliers],
            "training": asdict(self.training) if self.training is not None else None,
            "distilled": asdict(self.distilled) if self.distilled is not None else None,
            "evaluation": self.evaluation.to_dict() if self.evaluation is not None else None,
        }


def run(options: QuantizeOptions, progress: Progress | None = None, kept: Path | None = None) -> QuantizeResult | Plan:
    """Quantizes a checkpoint; with `dry_run`, only the plan.

    Args:
        options: What was asked for.
        progress: Told what happens.
        kept: Where that stays what other runs on the same model and data need too: sensitivities and text.

    Raises:
        QuantcliError: see `errors`; nothing half-written stays behind.
    """
    progress = progress or Silent()
    started = time.perf_counter()
    plan = make_plan(options)
    options = plan.options
    if options.dry_run:
        return plan
    if plan.dequantized is not None:
        progress.note(
            f"{plan.folder} holds {plan.dequantized}: weights are dequantized as they are read, and errors are those "
            "beside what they stand for"
        )
    if not plan.layout.known:
        progress.note(f"{plan.skeleton.config.model_type} is not in our table; its blocks were found by looking")
    with (
        create_output(
            options.output, plan=plan.identity(), inputs=[plan.folder], force=options.force, resumable=True
        ) as partial,
        peak_memory() as watched,
        settled_heap(),
        torch.inference_mode(),
    ):
        progress.plan("Plan", plan.rows())
        if plan.untie_head and (own := plan.targets.get(plan.layout.head or "")) is not None:
            progress.warn(
                "the head shared the embedding's matrix and gets codes of its own: the files grow by "
                f"{own.stored_bytes / 1e6:.1f} MB, since the embedding stays"
            )
        for note in plan.gguf.notes if plan.gguf is not None else ():
            progress.warn(note)
        heap, journal, training = Heap(), Journal(partial), None
        if journal.done:
            progress.note(f"continuing after {journal.done} finished blocks")
        if plan.trained is not None:
            plan, training = learn_rotations(plan, partial.state, journal, progress)
            heap.settle()
        if plan.budget is not None:
            plan = mix_bits(plan, partial.state, progress, kept)
            heap.settle()
        work = _Run(plan, partial, journal, heap, progress)
        if not journal.whole:
            work.blocks()
            _name_unseen(plan, work, progress)
            _check_scales(plan, work, progress)
            work.outside()
            journal.close()
        companions = copy_companions(plan.folder, partial.model)
        if not any(name.startswith("tokenizer") for name in companions):
            progress.warn(f"{plan.folder} has no tokenizer; the output has none either")
        write_json(partial.model / "config.json", result_config(plan))
        work.shards.finish()
        size = sum(p.stat().st_size for kind in ("safetensors", "gguf") for p in partial.model.glob(f"*.{kind}"))
        if size >= plan.checkpoint.size_bytes and plan.codec.unpack is not None:
            raise InputError(
                f"the result would take {size} bytes, the model takes {plan.checkpoint.size_bytes}",
                hint="use fewer bits or larger groups",
            )
        heap.settle()
        distilled = _distill(plan, partial, progress) if plan.trainer is not None else None
        bits = _bits_per_weight(plan)
        result = QuantizeResult(
            output=options.output,
            layers=journal.reports,
            seconds=journal.seconds_before + time.perf_counter() - started,
            peak_bytes=watched.above_start_bytes,
            size_bytes=size,
            parent_size_bytes=plan.checkpoint.size_bytes,
            bits_per_weight=bits,
            plan=plan.to_dict(),
            share=plan.share,
            scales=journal.scales,
            outliers=journal.outliers,
            training=training,
            distilled=distilled,
        )
        write_json(partial.root / "report.json", result.to_dict())
        metrics = {
            "seconds": round(result.seconds, 1),
            "peak_bytes": result.peak_bytes,
            "size_bytes": size,
            "bits_per_weight": round(bits, 4),
            **({"share": plan.share.to_dict()} if plan.share is not None else {}),
            "mean_relative_error": sum(r.relative_error for r in journal.reports) / max(len(journal.reports), 1),
        }
        parent = describe_parent(plan.folder, plan.model_digest)
        chosen = {k: v for k, v in public_options(asdict(options)).items() if k != "graph"}
        partial.commit(Manifest("checkpoint", "quantize", chosen, parent, metrics))
    if not options.evaluate:
        return result
    return replace(result, evaluation=evaluate_result(options, options.model, plan.skeleton.config, progress))


def _distill(plan: Plan, partial: PartialFolder, progress: Progress) -> DistillReport:
    """Trains what was rounded against the model as it was given: transforms have left its function alone."""
    assert plan.trainer is not None and plan.distilling is not None
    trust = plan.options.trust_remote_code
    tokens = training_tokens(plan, partial.state, progress)
    with torch.inference_mode(False):
        teacher = Teacher(open_model(plan.options.model, None, trust_remote_code=trust), plan.device)
    return distill(
        partial.model,
        teacher,
        tokens,
        plan.trainer,
        partial.state,
        progress,
        seed=plan.options.calibration.seed,
        recompute=plan.distilling.recompute,
        trust_remote_code=trust,
    )


def evaluate_result(options: QuantizeOptions, reference: str, config: Any, progress: Progress) -> Any:
    """The written folder beside the float model.

    Args:
        options: With the folder.
        reference: The float model.
        config: transformers' own.
        progress: Told of the windows.
    """
    from quantcli.options import EvaluateOptions
    from quantcli.pipelines import evaluate

    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return evaluate.run(
        EvaluateOptions(
            str(options.output),
            reference,
            seq_len=min(EvaluateOptions.seq_len, longest or EvaluateOptions.seq_len),
            device=options.device,
            trust_remote_code=options.trust_remote_code,
            simulation=options.simulation,
        ),
        progress,
    )


def _name_unseen(plan: Plan, work: "_Run", progress: Progress) -> None:
    """Names the matrices that too few tokens reached."""
    if plan.algorithm.calibration != "required":
        return
    unseen = [r.name for r in work.journal.reports if r.algorithm != plan.algorithm.name and r.name in plan.targets]
    if unseen:
        progress.warn(
            f"{len(unseen)} matrices saw too few calibration tokens (none, or fewer than {FEW_TOKENS} for an expert's) "
            f"and are quantized by kquant, without data: {first_names(unseen)}; more --num-samples"
            f"{' or --moe-calibration all' if plan.skeleton.stacked else ''} would help"
        )


def _check_scales(plan: Plan, work: "_Run", progress: Progress) -> None:
    """Tells of a transform that had nothing to scale; one that does nothing else is refused."""
    step, scales = plan.scaling, work.journal.scales
    if step is None:
        return
    if step.algorithm.sees != "channels":
        if work.scales_nothing:
            progress.warn(f"{step.algorithm.name} had no effect: nothing in front of these linears takes a division")
        return
    if not scales:
        raise InputError(
            f"{step.algorithm.name} can scale no input of {plan.folder}: nothing in front of a linear takes a division",
            hint=f"leave {step.algorithm.name} out",
        )
    for pattern in step.settings.patterns:
        if not any(re.search(pattern, name) for scale in scales for name in scale.linears):
            progress.warn(f"no input of {pattern!r} can be scaled, its alpha had no effect")


def _bits_per_weight(plan: Plan) -> float:
    weights = [*plan.targets.values(), *([plan.embedding] if plan.embedding else [])]
    if not weights:
        return 8.0 * plan.dtype.itemsize
    count = sum(t.rows * t.columns for t in weights)
    return sum(t.rows * t.columns * _stored_bits(t) for t in weights) / count


def _stored_bits(target: Target) -> float:
    kind = block_type_of(target.scheme)
    return target.scheme.bits_per_weight(target.columns) if kind is None else kind.bits_per_weight


class _Run:
    """The loops of one run: its blocks, then what stands outside them."""

    def __init__(self, plan: Plan, partial: PartialFolder, journal: Journal, heap: Heap, progress: Progress):
        self.plan = plan
        self.partial = partial
        self.journal = journal
        self.heap = heap
        self.progress = progress
        self.scaling = Scaling(plan, journal.scales)
        self.solver = StageSolver(plan, self.scaling, journal.reports, journal.outliers, progress)
        self.shards = ShardWriter(plan, partial.model)
        self.streams = Streams()
        self.scales_nothing = False

    def blocks(self) -> None:
        """Quantizes and writes every block that an earlier run has not finished."""
        plan, journal, count = self.plan, self.journal, len(self.plan.layout.blocks)
        head_follows = plan.layout.head in plan.targets
        if plan.calibrates and (journal.done < count or head_follows):
            saved = saved_tokens(plan, self.partial.state, self.progress)
            self.streams = begin_streams(plan, saved, self.partial.state, journal.done)
        self.heap.settle()  # tokenizer and embedding
        calibrated = CalibratedBlocks(plan, self.streams, self.solver, self.heap) if plan.calibrates else None
        what = "quantizing" if plan.targets else "scaling" if plan.scaled else "writing"
        with self.progress.track(what, count, start=journal.done) as task:
            for number in range(journal.done, count):
                begun = len(journal.reports)
                if calibrated is not None:
                    results = calibrated.quantize(number)
                else:
                    results = self.solver.solve_without_data(plan.block_targets(number))
                added = calibrated.take_cache_scales() if calibrated is not None else {}
                self.shards.write(number, results, self.scaling.edited, added)
                journal.remember(number + 1, self.streams)
                del results
                self.heap.settle()
                errors = [r.relative_error for r in journal.reports[begun:]]
                task.advance(1, f"worst error {max(errors):.2%}" if errors else "")
        self.scales_nothing = calibrated is not None and calibrated.scales_nothing
        if calibrated is not None and calibrated.undivided:
            names = ", ".join(sorted(calibrated.undivided))
            self.progress.note(f"outputs of {names} are not scaled: {plan.codec.name} has no scales that fit then")
        del calibrated
        self.streams.finish_blocks(keep_hidden=head_follows)
        self.heap.settle()

    def outside(self) -> None:
        """Writes embedding, norms and head, quantized where asked."""
        plan = self.plan
        results: dict[str, QuantizedTensor] = {}
        head = plan.targets.get(plan.layout.head or "")
        if head is not None:
            results |= self._solve_head(head)
        if plan.embedding is not None:
            results |= self.solver.solve_embedding(plan.embedding)
        self.shards.write(len(plan.layout.blocks), results, self.scaling.edited)

    def _solve_head(self, head: Target) -> dict[str, QuantizedTensor]:
        plan = self.plan
        sees = plan.calibrates and plan.gathering.moments
        moments = self.streams.head_moments(head.columns, plan.device) if sees else None
        if moments is None:
            if sees:
                self.progress.warn(
                    "the norm before the head is not known; the head is quantized by kquant, without data"
                )
            return self.solver.solve_without_data([head])
        return self.solver.solve([head], moments)[0]
