"""The training loop, transformers' Trainer, with checkpoints that a killed run continues from."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainerState

from quantcli.data.examples import Example, collate, pack
from quantcli.errors import InputError
from quantcli.finetune.lora import quiet_peft
from quantcli.finetune.score import keep_no_cache, measure
from quantcli.finetune.settings import Rhythm, trainer_arguments
from quantcli.folder import read_state, write_json
from quantcli.options import FinetuneOptions
from quantcli.progress import Progress, Silent, Task

__all__ = ["Curve", "train", "training_rows"]

_WHOLE = "whole.json"


@dataclass(frozen=True)
class Curve:
    """How a training went."""

    losses: list[float]
    """Training loss at each step."""
    eval_losses: list[tuple[int, float]]
    """Step and eval loss, where it was measured on the way."""
    best_step: int | None
    """The step whose adapter was kept for its eval loss; None: the last one's."""

    @classmethod
    def of(cls, state: TrainerState, *, keeps_best: bool) -> "Curve":
        """What the Trainer remembers."""
        losses = [float(entry["loss"]) for entry in state.log_history if "loss" in entry]
        found = [(int(entry["step"]), float(entry["eval_loss"])) for entry in state.log_history if "eval_loss" in entry]
        return cls(losses, found, state.best_global_step if keeps_best else None)


def training_rows(examples: Sequence[Example], options: FinetuneOptions) -> list[list[Example]]:
    """What goes through the model as one row of a batch: an example, or several where they are packed."""
    return pack(examples, options.examples.seq_len) if options.examples.packing else [[e] for e in examples]


def train(
    model: Any,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    options: FinetuneOptions,
    pad: int,
    scratch: Path,
    progress: Progress,
) -> Curve:
    """Trains whatever of a model takes gradients, in place; continues where checkpoints of the same run are found.

    Args:
        model: With adapters, as `finetune.lora.add_lora` makes it.
        examples: What to learn.
        held_out: What the eval loss is measured on, where options ask for it on the way.
        options: Steps, rates, batch size, seed and the Trainer's other arguments.
        pad: Token that fills rows up.
        scratch: Folder for checkpoints.
        progress: Told of every step and its loss.

    Raises:
        UsageError: an argument that the Trainer refuses.
        InputError: the loss is no longer finite.
    """
    keep_no_cache(model)
    rows = training_rows(examples, options)
    rhythm = Rhythm.of(options, len(rows))
    keeps_best = options.early_stopping is not None
    cpu = model.device.type == "cpu"
    arguments = trainer_arguments(options, rhythm, scratch, cpu=cpu)
    checkpoint = _newest_whole(scratch)
    with quiet_peft():
        if checkpoint is not None and read_state(checkpoint / _WHOLE, dict[str, bool])["finished"]:
            progress.note("training had come to its end, its adapter is taken")
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            best = Path(state.best_model_checkpoint) if keeps_best and state.best_model_checkpoint else checkpoint
            model.load_adapter(str(best), "default", is_trainable=True, torch_device=str(model.device))
            model.eval()
            return Curve.of(state, keeps_best=keeps_best)
        begun = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        if begun:
            progress.note(f"continuing after {begun} finished steps")
        with progress.track("training", rhythm.steps, start=begun) as task:
            trainer = _Trainer(
                model=model,
                args=arguments,
                train_dataset=rows,
                eval_dataset=list(held_out) if rhythm.eval_steps is not None else None,
                data_collator=partial(collate, pad=pad),
                callbacks=[_Watch(task, rhythm)],
            )
            trainer.judge = partial(measure, model, held_out, options.batch_size, pad, Silent(), "")
            trainer.remove_callback(PrinterCallback)
            if options.early_stopping is not None:
                trainer.add_callback(EarlyStoppingCallback(options.early_stopping))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.eval()
    curve = Curve.of(trainer.state, keeps_best=keeps_best)
    if not all(map(math.isfinite, curve.losses)):
        raise InputError(
            f"the loss is no longer finite after {len(curve.losses)} steps",
            hint=f"add --learning-rate {options.learning_rate / 10:g}, or --torch-dtype float32",
        )
    return curve


def _newest_whole(scratch: Path) -> Path | None:
    """The newest checkpoint that was written to its end; what a kill cut off is removed."""
    found = {int(p.name.rpartition("-")[2]): p for p in scratch.glob("checkpoint-*")}
    for step in [step for step, path in found.items() if not (path / _WHOLE).is_file()]:
        shutil.rmtree(found.pop(step))
    return found[max(found)] if found else None


class _Trainer(Trainer):  # type: ignore[misc]
    """Judges by our own eval loss: per counted token, where the Trainer's is a mean over batches."""

    judge: Any
    control: Any

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The eval loss of the held-out examples."""
        metrics = {f"{metric_key_prefix}_loss": self.judge().loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Hands each step's loss to our progress, stops where it is not finite, and marks whole checkpoints."""

    def __init__(self, task: Task, rhythm: Rhythm):
        self.task, self.rhythm = task, rhythm

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.rhythm.steps and self.rhythm.eval_steps is not None:
            control.should_evaluate = True  # the last step may be the best

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None:
            self.task.advance(1, f"loss {loss:.4f}")
            if not math.isfinite(loss):
                control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        finished = bool(control.should_training_stop) or state.global_step >= self.rhythm.steps
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE
        write_json(path, {"finished": finished})
