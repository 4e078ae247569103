"""Our options and the user's own words as arguments of transformers' Trainer."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from quantcli.errors import UsageError, first_line, nearest
from quantcli.options import FinetuneOptions

__all__ = ["Rhythm", "read_settings", "trainer_arguments"]

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
    "save_steps": "--save-steps",
    "eval_steps": "--eval-steps",
    "resume_from_checkpoint": "--resume",
}
_OURS = (
    *("output_dir", "report_to", "disable_tqdm", "remove_unused_columns", "label_names", "run_name", "do_", "log"),
    *("push_to_hub", "hub_", "save_", "eval_", "load_best", "restore_", "metric_for", "greater_is", "ignore_data_skip"),
)
_PARTS = 10
"""Without --save-steps a run keeps a checkpoint this many times."""


@dataclass(frozen=True)
class Rhythm:
    """How long a run is, and what happens every so many steps of it."""

    steps: int
    """Steps of the optimizer, unless it stops early."""
    save_steps: int
    """Steps between checkpoints."""
    eval_steps: int | None
    """Steps between measurements of the eval loss; None: it is not measured on the way."""

    @classmethod
    def of(cls, options: FinetuneOptions, rows: int) -> "Rhythm":
        """Resolves what was not asked for.

        Raises:
            UsageError: the best adapter could not be kept, since checkpoints and measurements do not meet.
        """
        per_epoch = math.ceil(math.ceil(rows / options.batch_size) / options.gradient_accumulation)
        steps = options.max_steps or max(math.ceil((options.num_epochs or 3.0) * per_epoch), 1)
        tenth = math.ceil(steps / _PARTS)
        eval_steps = options.eval_steps
        if eval_steps is None and options.early_stopping is not None:
            eval_steps = options.save_steps or tenth
        save_steps = options.save_steps or eval_steps or tenth
        if eval_steps is not None and options.early_stopping is not None and save_steps % eval_steps:
            raise UsageError(
                f"--early-stopping keeps the best checkpoint, but --save-steps {save_steps} is no multiple of "
                f"--eval-steps {eval_steps}",
                hint="leave --save-steps out",
            )
        return cls(steps, save_steps, eval_steps)

    def describe(self, rows: int, options: FinetuneOptions) -> str:
        """In words: how far so many steps reach over so many rows."""
        each = options.batch_size * options.gradient_accumulation
        times = self.steps * each / rows
        reach = f"{times:.2g} times through the examples" if times >= 1 else f"over {times:.0%} of the examples"
        return f"{self.steps} steps of {each} {'rows' if options.examples.packing else 'examples'}, {reach}"


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


def trainer_arguments(options: FinetuneOptions, rhythm: Rhythm, scratch: Path, *, cpu: bool) -> TrainingArguments:
    """What the Trainer is given.

    Args:
        options: Rates, batch size, seed and the user's own arguments.
        rhythm: Steps.
        scratch: Folder that checkpoints go to.
        cpu: Whether the model is on the CPU.

    Raises:
        UsageError: an argument that the Trainer refuses.
    """
    steps = rhythm.steps
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
        "save_strategy": "steps",
        "save_steps": rhythm.save_steps,
        "save_total_limit": 2,  # the newest may be cut off by a kill
        "restore_callback_states_from_checkpoint": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "label_names": ["labels"],
    }
    if rhythm.eval_steps is not None:
        arguments |= {"eval_strategy": "steps", "eval_steps": rhythm.eval_steps}
    if options.early_stopping is not None:
        arguments |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    try:
        return TrainingArguments(**(arguments | read_settings(options.settings)))
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"Trainer refuses its arguments: {first_line(error)}") from error
