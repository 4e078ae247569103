"""The training loop, transformers' Trainer, and the loss and accuracy that it is judged by."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from quantcli.data.examples import IGNORED, Example, collate, pack
from quantcli.errors import InputError, UsageError, nearest
from quantcli.options import FinetuneOptions
from quantcli.progress import Progress, Task

__all__ = ["Score", "measure", "read_settings", "refuse_leaking_packs", "train"]

# flags of ours, and what would write, send or show something beside our own output
_FLAGS = {
    "max_steps": "--max-steps",
    "num_train_epochs": "--num-epochs",
    "learning_rate": "--learning-rate",
    "per_device_train_batch_size": "--batch-size",
    "per_device_eval_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation",
    "warmup_steps": "--warmup",
    "warmup_ratio": "--warmup",
    "seed": "--seed",
    "data_seed": "--seed",
    "use_cpu": "--device",
}
_OURS = (
    *("output_dir", "report_to", "disable_tqdm", "remove_unused_columns", "label_names", "run_name", "do_", "log"),
    *("push_to_hub", "hub_", "save_", "eval_", "load_best", "resume_from", "restore_", "metric_for", "greater_is"),
)
_LEAK = 1e-3


@dataclass(frozen=True)
class Score:
    """How well a model tells the held-out examples."""

    loss: float
    """Cross entropy per counted token, in nats."""
    accuracy: float | None
    """Share of completions whose every token is the most likely one: what greedy decoding would write. None where
    examples have no completion."""


def read_settings(settings: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of transformers' Trainer out of KEY=VALUE words.

    Raises:
        UsageError: it has no such argument, or it is not for the user to set.
    """
    known = {f.name for f in fields(TrainingArguments) if f.init}
    values: dict[str, Any] = {}
    for key, text in settings.items():
        if key in _FLAGS:
            raise UsageError(f"--set {key} has a flag of its own", hint=f"write {_FLAGS[key]}")
        if key not in known:
            raise UsageError(f"Trainer has no argument {key!r}, {nearest(key, known)}")
        if key.startswith(_OURS):
            raise UsageError(f"--set {key} is not taken: output, evaluation and logs are quantcli's own")
        try:
            values[key] = json.loads(text.lower() if text.lower() in ("true", "false") else text)
        except ValueError:
            values[key] = text
    return values


def train(
    model: Any, examples: Sequence[Example], options: FinetuneOptions, pad: int, scratch: Path, progress: Progress
) -> list[float]:
    """Trains whatever of a model takes gradients, in place.

    Args:
        model: With adapters, as `finetune.lora.add_lora` makes it.
        examples: What to learn.
        options: Steps, rates, batch size, seed and the Trainer's other arguments.
        pad: Token that fills rows up.
        scratch: Folder that the Trainer may write to.
        progress: Told of every step and its loss.

    Returns:
        The loss at each step.

    Raises:
        UsageError: an argument that the Trainer refuses.
        InputError: the loss is no longer finite.
    """
    _keep_no_cache(model)
    rows = pack(examples, options.examples.seq_len) if options.examples.packing else [[e] for e in examples]
    per_epoch = math.ceil(math.ceil(len(rows) / options.batch_size) / options.gradient_accumulation)
    epochs = options.num_epochs or 3.0
    steps = options.max_steps or max(math.ceil(epochs * per_epoch), 1)
    cpu = model.device.type == "cpu"
    arguments: dict[str, Any] = {
        "output_dir": str(scratch),
        "max_steps": steps,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation,
        "learning_rate": options.learning_rate,
        "warmup_steps": round(options.warmup * steps) if options.warmup < 1 else int(options.warmup),
        "seed": options.seed,
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "label_names": ["labels"],
    }
    try:
        trainer_options = TrainingArguments(**(arguments | read_settings(options.settings)))
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"Trainer refuses its arguments: {str(error).splitlines()[0]}") from error
    with progress.track("training", steps) as task:
        shown = _Shown(task)
        trainer = Trainer(
            model=model,
            args=trainer_options,
            train_dataset=rows,
            data_collator=partial(collate, pad=pad),
            callbacks=[shown],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    if not all(map(math.isfinite, shown.losses)):
        raise InputError(
            f"the loss is no longer finite after {len(shown.losses)} steps",
            hint=f"add --learning-rate {options.learning_rate / 10:g}, or --torch-dtype float32",
        )
    return shown.losses


@torch.no_grad()
def measure(
    model: Any, examples: Sequence[Example], batch_size: int, pad: int, progress: Progress, label: str
) -> Score:
    """Loss per token and, where examples have completions, how many are told exactly.

    Raises:
        InputError: no token counts, or the model's output is not finite.
    """
    _keep_no_cache(model)
    model.eval()
    loss, counted, right, answers = 0.0, 0, 0, 0
    with progress.track(label, len(examples)) as task:
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            batch = {k: v.to(model.device) for k, v in collate([[e] for e in part], pad).items()}
            labels = batch.pop("labels")
            logits = model(**batch).logits[:, :-1].float()
            targets = labels[:, 1:]
            loss += float(cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"))
            counted += int((targets != IGNORED).sum())
            hits = logits.argmax(-1) == batch["input_ids"][:, 1:]
            for row, example in enumerate(part):
                first, stop = example.answer
                if stop > first:
                    answers += 1
                    right += bool(hits[row, max(first - 1, 0) : stop - 1].all())
            task.advance(len(part))
    if counted == 0:
        raise InputError("the held-out examples hold no token to predict")
    if not math.isfinite(loss):
        raise InputError("the model's output is not finite", hint="add --torch-dtype float32")
    return Score(loss / counted, right / answers if answers else None)


@torch.no_grad()
def refuse_leaking_packs(model: Any, examples: Sequence[Example], pad: int) -> None:
    """Refuses to pack for a model whose examples would see each other in one row: some families know no such mask.

    Raises:
        UsageError: it is one.
    """
    two = sorted(examples, key=lambda e: len(e.tokens))[-2:]
    if len(two) < 2:
        return
    _keep_no_cache(model)
    model.eval()
    batch = {k: v.to(model.device) for k, v in collate([two], pad).items() if k != "labels"}
    together = model(**batch).logits[0, len(two[0].tokens) :].float()
    alone = model(input_ids=torch.tensor([two[1].tokens], device=model.device)).logits[0].float()
    if (together - alone).norm() > _LEAK * max(float(alone.norm()), 1.0) * (1 if alone.device.type == "cpu" else 30):
        raise UsageError("examples packed into one row would see each other in this model", hint="leave --packing out")


def _keep_no_cache(model: Any) -> None:
    # nothing is generated; and beside a cache transformers would not look for examples packed into one row
    model.config.get_text_config().use_cache = False


class _Shown(TrainerCallback):  # type: ignore[misc]
    """Hands each step's loss to our progress, and stops where it is not finite."""

    def __init__(self, task: Task):
        self.task = task
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None:
            self.losses.append(float(loss))
            self.task.advance(1, f"loss {loss:.4f}")
            if not math.isfinite(loss):
                control.should_training_stop = True
