"""`quantcli finetune`: an adapter trained beside a model, float or quantized, in a folder that holds both."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quantcli.data.calibration import load_tokenizer
from quantcli.data.examples import ExampleSets, local_files, read_examples
from quantcli.data.labels import find_labels, read_questions
from quantcli.errors import UsageError
from quantcli.evaluate.memory import peak_memory
from quantcli.finetune.loftq import begin_with_residuals
from quantcli.finetune.lora import add_lora, save_lora
from quantcli.finetune.score import Score, measure, refuse_leaking_packs, tell_labels
from quantcli.finetune.settings import Rhythm, read_settings
from quantcli.finetune.train import train, training_rows
from quantcli.folder import (
    Manifest,
    PartialFolder,
    create_output,
    describe_parent,
    file_digest,
    fingerprint,
    folder_size_bytes,
    public_options,
    read_state,
    require_free_bytes,
    write_json,
)
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.load import load
from quantcli.models.online import refuse_online
from quantcli.models.opened import open_checkpoint
from quantcli.models.source import locate_model
from quantcli.options import FinetuneOptions
from quantcli.pipelines.finetuning.base import find_float_source, place_base
from quantcli.progress import Progress, Silent
from quantcli.report.training import draw_losses

__all__ = ["CURVE", "FinetuneResult", "run"]

CURVE = "loss.svg"


@dataclass(frozen=True)
class FinetuneResult:
    """What `run` wrote and measured."""

    output: Path
    """The folder."""
    train_examples: int
    """Examples that were trained on."""
    eval_examples: int
    """Examples that were held out."""
    steps: int
    """Steps of the optimizer."""
    losses: list[float]
    """Training loss at each step."""
    eval_losses: list[tuple[int, float]]
    """Step and eval loss, where it was measured on the way."""
    best_step: int | None
    """The step whose adapter was kept for its eval loss; None: the last one's."""
    base_loss: float
    """Cross entropy per counted token of the held-out examples, without the adapter."""
    eval_loss: float
    """The same with it."""
    begin_loss: float | None
    """The same where the adapter began with the rounding error; None where it began as the base."""
    base_accuracy: float | None
    """Share of held-out completions that the base tells exactly; None where examples have none."""
    eval_accuracy: float | None
    """The same with the adapter."""
    labels: list[str]
    """The completions, where they are labels: few, and each many times."""
    base_label_accuracy: float | None
    """Share of held-out prompts behind which the base finds the right label likelier than the others; None without."""
    eval_label_accuracy: float | None
    """The same with the adapter."""
    trained_parameters: int
    """Entries of the adapter."""
    adapter_size_bytes: int
    """Bytes of adapter/."""
    base_size_bytes: int
    """Bytes of model/."""
    peak_bytes: int
    """Memory above what the process held when it began, that of the GPU included."""
    seconds: float
    """How long it took."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return asdict(self) | {"output": str(self.output)}


def run(options: FinetuneOptions, progress: Progress | None = None) -> FinetuneResult:
    """Trains an adapter.

    Raises:
        UsageError: options that exclude each other or do not apply to this model.
        InputError: the model or the data cannot be read or trained on.
        ResourceError: not enough disk.
    """
    progress, begin = progress or Silent(), time.perf_counter()
    read_settings(options.settings)
    folder = locate_model(options.model)
    checkpoint = open_checkpoint(folder)
    refuse_online(checkpoint.config, folder, "for which an adapter would serve nobody but quantcli")
    if (folder.parent / "adapter").is_dir() and folder.name == "model":
        progress.warn(f"{folder.parent / 'adapter'} is not taken along: a new adapter is trained on the base alone")
    is_quantized = checkpoint.config.get("quantization_config") is not None
    quantizes = options.method == "qlora" and not is_quantized
    source = find_float_source(options, checkpoint, quantizes)
    tokenizer = load_tokenizer(folder, options.trust_remote_code)
    sets = read_examples(options.examples, tokenizer, options.seed, progress)
    rows = len(training_rows(sets.train, options))
    rhythm = Rhythm.of(options, rows)
    how = "quantized" if is_quantized else "float, quantized to nf4 first" if quantizes else "float"
    progress.plan(
        "Finetune",
        [
            ("model", f"{options.model} ({how})"),
            ("adapter", f"{_kind(options)} of rank {options.lora_r}, alpha {options.lora_alpha:g}"),
            ("examples", f"{len(sets.train)} to train on, {len(sets.eval)} held out, from {sets.source}"),
            ("training", rhythm.describe(rows, options)),
            ("loss on", "completions" if options.examples.completion_only else "all tokens"),
            ("output", str(options.output)),
        ],
    )
    require_free_bytes(options.output.absolute().parent, checkpoint.size_bytes)
    digest = fingerprint(folder)
    plan = _identity(options, digest, source)
    with (
        create_output(options.output, plan=plan, inputs=[folder], force=options.force, resumable=True) as partial,
        peak_memory() as watched,
    ):
        if options.resume and not partial.resumed:
            raise UsageError(f"--resume: no interrupted run left anything for {options.output}", hint="leave it out")
        place_base(checkpoint, partial, options, quantizes, progress)
        model = load(
            partial.model if quantizes else folder,  # the same files, under the name that errors should have
            device=options.device,
            dtype=options.torch_dtype,
            trust_remote_code=options.trust_remote_code,
        )
        result = _train(options, model, source, sets, tokenizer, partial, progress)
        resolved = public_options(asdict(options))
        write_json(partial.root / "report.json", result)
        last = result["best_step"] or result["steps"]
        held_out = {0: result["base_loss"]} | dict(result["eval_losses"]) | {last: result["eval_loss"]}
        (partial.root / CURVE).write_text(draw_losses(result["losses"], list(held_out.items())))
        costs: dict[str, Any] = {"peak_bytes": watched.above_start_bytes, "seconds": time.perf_counter() - begin}
        metrics = {k: v for k, v in result.items() if k not in ("losses", "eval_losses")} | costs
        partial.commit(Manifest("finetuned", "finetune", resolved, describe_parent(folder, digest), metrics))
    return FinetuneResult(output=options.output, **costs, **result)


def _train(
    options: FinetuneOptions,
    model: Any,
    source: Checkpoint | None,
    sets: ExampleSets,
    tokenizer: Any,
    partial: PartialFolder,
    progress: Progress,
) -> dict[str, Any]:
    """Base loss, training, adapted loss, adapter; returns the fields of a result."""
    pad = _pad_token(tokenizer)
    adapted = add_lora(
        model,
        r=options.lora_r,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        target_modules=options.target_modules,
        use_dora=options.use_dora,
        seed=options.seed,
    )
    if options.examples.packing:
        refuse_leaking_packs(adapted, sets.train, pad)

    labels = find_labels(sets)
    questions = read_questions(sets.eval, labels, options.examples, tokenizer) if labels else []

    def judge(label: str) -> Score:
        score = measure(adapted, sets.eval, options.batch_size, pad, progress, label)
        if not questions:
            return score
        told = tell_labels(adapted, questions, options.batch_size, pad, progress, label.replace("loss", "labels"))
        return replace(score, label_accuracy=told)

    before = _measured_once(partial.state / "base_score.json", lambda: _without_adapter(adapted, judge))
    begun = None
    if source is not None:
        share = begin_with_residuals(adapted, source, options.seed, progress, options.trust_remote_code)
        begun = _measured_once(partial.state / "begin_score.json", lambda: judge("loss with the residuals"))
        progress.note(f"the adapters begin with {share:.0%} of the squared rounding error, eval loss {begun.loss:.4f}")
        if begun.loss > before.loss:
            progress.warn(
                f"they begin worse than the base (eval loss {before.loss:.4f}): --init-lora zero may be better"
            )
    curve = train(adapted, sets.train, sets.eval, options, pad, partial.state / "trainer", progress)
    after = judge("loss with the adapter")
    adapter = partial.root / "adapter"
    save_lora(adapted, adapter, options.output / "model")
    return {
        "train_examples": len(sets.train),
        "eval_examples": len(sets.eval),
        "steps": len(curve.losses),
        **asdict(curve),
        "base_loss": before.loss,
        "eval_loss": after.loss,
        "begin_loss": None if begun is None else begun.loss,
        "base_accuracy": before.accuracy,
        "eval_accuracy": after.accuracy,
        "labels": labels,
        "base_label_accuracy": before.label_accuracy,
        "eval_label_accuracy": after.label_accuracy,
        "trained_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "adapter_size_bytes": folder_size_bytes(adapter),
        "base_size_bytes": folder_size_bytes(partial.model),
    }


def _kind(options: FinetuneOptions) -> str:
    return ("DoRA" if options.use_dora else "LoRA") + (", begun by LoftQ," if options.init_lora == "loftq" else "")


def _identity(options: FinetuneOptions, digest: str, source: Checkpoint | None) -> dict[str, Any]:
    """What decides the result: a run continues another only where all of it is the same."""
    examples = options.examples
    files = [
        Path(name) for name in (*local_files(examples), examples.eval_split or "") if name and Path(name).is_file()
    ]
    asked = {name: value for name, value in public_options(asdict(options)).items() if name != "resume"}
    asked["float_model"] = None if source is None else fingerprint(source.folder)
    return {**asked, "parent": digest, "data": {str(path): file_digest(path) for path in files}}


def _measured_once(path: Path, measured: Callable[[], Score]) -> Score:
    """A score that a run which continues finds."""
    if path.is_file():
        return read_state(path, Score)
    score = measured()
    write_json(path, asdict(score))
    return score


def _without_adapter(adapted: Any, judge: Callable[[str], Score]) -> Score:
    with adapted.disable_adapter():
        return judge("loss of the base")


def _pad_token(tokenizer: Any) -> int:
    """Rows are filled up behind a mask: any token will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
