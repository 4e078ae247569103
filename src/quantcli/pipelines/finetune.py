"""`quantcli finetune`: an adapter trained beside a model, float or quantized, in a folder that holds both."""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from quantcli.data.calibration import load_tokenizer
from quantcli.data.examples import ExampleSets, read_examples
from quantcli.errors import QuantcliError, UsageError
from quantcli.finetune.lora import add_lora, save_lora
from quantcli.finetune.score import Score, measure, refuse_leaking_packs
from quantcli.finetune.settings import read_settings
from quantcli.finetune.train import train
from quantcli.folder import (
    Manifest,
    PartialFolder,
    create_output,
    describe_parent,
    file_digest,
    fingerprint,
    folder_size_bytes,
    public_options,
    require_free_bytes,
    write_json,
)
from quantcli.models.checkpoint import Checkpoint, copy_companions
from quantcli.models.load import load
from quantcli.models.online import refuse_online
from quantcli.models.source import locate_model
from quantcli.options import FinetuneOptions, QuantizeOptions
from quantcli.pipelines import quantize
from quantcli.progress import Progress, Silent
from quantcli.report.curve import Series, draw_curves

__all__ = ["CURVE", "FinetuneResult", "run"]

CURVE = "loss.svg"
_NF4_BLOCKS = (64, 32, 16)


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
    base_accuracy: float | None
    """Share of held-out completions that the base tells exactly; None where examples have none."""
    eval_accuracy: float | None
    """The same with the adapter."""
    trained_parameters: int
    """Entries of the adapter."""
    adapter_size_bytes: int
    """Bytes of adapter/."""
    base_size_bytes: int
    """Bytes of model/."""
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
    checkpoint = Checkpoint.open(folder)
    refuse_online(checkpoint.config, folder, "for which an adapter would serve nobody but quantcli")
    is_quantized = checkpoint.config.get("quantization_config") is not None
    quantizes = options.method == "qlora" and not is_quantized
    tokenizer = load_tokenizer(folder, options.trust_remote_code)
    sets = read_examples(options.examples, tokenizer, options.seed, progress)
    how = "quantized" if is_quantized else "float, quantized to nf4 first" if quantizes else "float"
    progress.plan(
        "Finetune",
        [
            ("model", f"{options.model} ({how})"),
            ("adapter", f"LoRA of rank {options.lora_r}, alpha {options.lora_alpha:g}"),
            ("examples", f"{len(sets.train)} to train on, {len(sets.eval)} held out, from {sets.source}"),
            ("loss on", "completions" if options.examples.completion_only else "all tokens"),
            ("output", str(options.output)),
        ],
    )
    require_free_bytes(options.output.absolute().parent, checkpoint.size_bytes)
    digest = fingerprint(folder)
    with create_output(
        options.output, plan=_identity(options, digest), inputs=[folder], force=options.force, resumable=True
    ) as partial:
        if options.resume and not partial.resumed:
            raise UsageError(f"--resume: no interrupted run left anything for {options.output}", hint="leave it out")
        _base(checkpoint, partial, options, quantizes, progress)
        model = load(
            partial.model,
            device=options.device,
            dtype=options.torch_dtype,
            trust_remote_code=options.trust_remote_code,
        )
        result = _train(options, model, sets, _pad_token(tokenizer), partial, progress)
        resolved = public_options(asdict(options))
        write_json(partial.root / "report.json", result)
        (partial.root / CURVE).write_text(_picture(result))
        metrics = {k: v for k, v in result.items() if k not in ("losses", "eval_losses")}
        partial.commit(Manifest("finetuned", "finetune", resolved, describe_parent(folder, digest), metrics))
    return FinetuneResult(output=options.output, seconds=time.perf_counter() - begin, **result)


def _train(
    options: FinetuneOptions, model: Any, sets: ExampleSets, pad: int, partial: PartialFolder, progress: Progress
) -> dict[str, Any]:
    """Base loss, training, adapted loss, adapter; returns the fields of a result."""
    adapted = add_lora(
        model,
        r=options.lora_r,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        target_modules=options.target_modules,
        seed=options.seed,
    )
    if options.examples.packing:
        refuse_leaking_packs(adapted, sets.train, pad)

    def judge(label: str) -> Score:
        return measure(adapted, sets.eval, options.batch_size, pad, progress, label)

    before = _measured_once(partial.state / "base_score.json", lambda: _without_adapter(adapted, judge))
    curve = train(adapted, sets.train, sets.eval, options, pad, partial.state / "trainer", progress)
    after = judge("loss with the adapter")
    adapter = partial.root / "adapter"
    save_lora(adapted, adapter)
    _verify(adapted, adapter)
    return {
        "train_examples": len(sets.train),
        "eval_examples": len(sets.eval),
        "steps": len(curve.losses),
        **asdict(curve),
        "base_loss": before.loss,
        "eval_loss": after.loss,
        "base_accuracy": before.accuracy,
        "eval_accuracy": after.accuracy,
        "trained_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "adapter_size_bytes": folder_size_bytes(adapter),
        "base_size_bytes": folder_size_bytes(partial.model),
    }


def _identity(options: FinetuneOptions, digest: str) -> dict[str, Any]:
    """What decides the result: a run continues another only where all of it is the same."""
    examples = options.examples
    files = [Path(name) for name in (*examples.data_files, examples.eval_split) if Path(name).is_file()]
    asked = {name: value for name, value in public_options(asdict(options)).items() if name != "resume"}
    return {**asked, "parent": digest, "data": {str(path): file_digest(path) for path in files}}


def _measured_once(path: Path, measured: Callable[[], Score]) -> Score:
    """A score that a run which continues finds."""
    if path.is_file():
        return Score(**json.loads(path.read_text()))
    score = measured()
    write_json(path, asdict(score))
    return score


def _without_adapter(adapted: Any, judge: Callable[[str], Score]) -> Score:
    with adapted.disable_adapter():
        return judge("loss of the base")


def _base(
    checkpoint: Checkpoint, partial: PartialFolder, options: FinetuneOptions, quantizes: bool, progress: Progress
) -> None:
    """Fills model/, unless an interrupted run has done so."""
    done = partial.state / "base.json"
    if done.is_file():
        return
    shutil.rmtree(partial.model, ignore_errors=True)
    if quantizes:
        _quantize_base(checkpoint.folder, partial, options, progress)
    else:
        partial.model.mkdir()
        _place_base(checkpoint, partial.model, options.copy_base)
    write_json(done, {"files": sorted(p.name for p in partial.model.iterdir())})


def _picture(result: Mapping[str, Any]) -> str:
    """The losses over the steps; the eval loss from the base's to that of the adapter that was kept."""
    last = result["best_step"] or result["steps"]
    measured = {0: result["base_loss"]} | dict(result["eval_losses"]) | {last: result["eval_loss"]}
    return draw_curves(
        "Loss while finetuning",
        "step",
        [
            Series("training", list(enumerate(result["losses"], 1))),
            Series("held out", sorted(measured.items()), marked=True),
        ],
    )


def _place_base(checkpoint: Checkpoint, target: Path, copy: bool) -> None:
    """The base as it is: weights linked where the file system can, unless they are to be copied; the rest copied."""
    names = {"config.json", *(p.name for p in checkpoint.folder.glob("*.safetensors*"))}
    for name in sorted(names):
        source = (checkpoint.folder / name).resolve()  # the hub's cache holds links
        if copy or not name.endswith(".safetensors"):
            shutil.copyfile(source, target / name)
            continue
        try:
            os.link(source, target / name)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, target / name)
    copy_companions(checkpoint.folder, target)


def _quantize_base(folder: Path, partial: PartialFolder, options: FinetuneOptions, progress: Progress) -> None:
    """The base as nf4, in the largest blocks that divide every linear's inputs."""
    made = partial.state / "nf4"
    if (made / "model").is_dir():  # finished, and not yet put in its place
        (made / "model").rename(partial.model)
        return
    shutil.rmtree(made, ignore_errors=True)
    for size in _NF4_BLOCKS:
        try:
            wanted = QuantizeOptions(
                str(folder),
                made,
                "nf4",
                group_size=size,
                device=options.device,
                trust_remote_code=options.trust_remote_code,
            )
            quantize.run(wanted, progress)
            break
        except QuantcliError as error:
            if "do not divide" not in error.message or size == _NF4_BLOCKS[-1]:
                raise
    (made / "model").rename(partial.model)


def _verify(adapted: Any, folder: Path) -> None:
    """What was written reads back as what was trained."""
    trained = {n.replace(".default.", "."): p for n, p in adapted.named_parameters() if p.requires_grad}
    written = load_file(folder / "adapter_model.safetensors")
    if written.keys() != trained.keys():
        raise AssertionError("the adapter that was written has other tensors than the one that was trained")
    for name, tensor in written.items():
        if not torch.equal(tensor, trained[name].detach().cpu()) or not bool(torch.isfinite(tensor).all()):
            raise AssertionError(f"adapter tensor {name} is not what was trained, or not finite")


def _pad_token(tokenizer: Any) -> int:
    """Rows are filled up behind a mask: any token will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
