"""`quantcli finetune`: an adapter for a model, float or quantized, and what it gained."""

from typing import TYPE_CHECKING, Any

from quantcli.cli.command import Command, FlagStyle
from quantcli.cli.flags import parse_settings
from quantcli.options import DTYPES, INITS, METHODS, FinetuneOptions

if TYPE_CHECKING:
    from quantcli.cli.console import Console

__all__ = ["COMMAND", "run", "show"]


def run(options: FinetuneOptions, console: "Console") -> Any:
    """Trains."""
    from quantcli.pipelines import finetune

    return finetune.run(options, console)


def show(result: Any, console: "Console") -> None:
    """Loss and accuracy on what was held out, of the base and with the adapter; and one summary line."""
    from quantcli.cli.console import human_duration, human_size

    rows = [("eval loss", f"{result.base_loss:.4f}", f"{result.eval_loss:.4f}")]
    if result.eval_accuracy is not None:
        rows.append(("completions told exactly", f"{result.base_accuracy:.1%}", f"{result.eval_accuracy:.1%}"))
    if result.eval_label_accuracy is not None:
        told = f"{result.base_label_accuracy:.1%}", f"{result.eval_label_accuracy:.1%}"
        rows.append((f"right one of {len(result.labels)} labels", *told))
    console.table((f"on {result.eval_examples} held-out examples", "base", "adapted"), rows, left=1)
    if result.best_step is not None and result.best_step < result.steps:
        console.text(f"stopped after {result.steps} steps; the adapter is that of step {result.best_step}")
    console.text(
        f"{result.output}: {result.trained_parameters:,} parameters trained in {result.steps} steps on "
        f"{result.train_examples} examples, in {human_duration(result.seconds)}, "
        f"{human_size(result.peak_bytes)} of memory at most; adapter "
        f"{human_size(result.adapter_size_bytes)}, base {human_size(result.base_size_bytes)}; losses drawn in loss.svg"
    )


def _words(words: list[str]) -> tuple[str, ...]:
    return tuple(word.strip() for text in words for word in text.split(",") if word.strip())


COMMAND = Command(
    name="finetune",
    summary="Train a LoRA adapter on a model, float or quantized.",
    options=FinetuneOptions,
    run=run,
    show=show,
    styles={
        "model": FlagStyle(("-m", "--model")),
        "output": FlagStyle(("-o", "--output")),
        "method": FlagStyle(choices=METHODS, metavar="|".join(METHODS)),
        "init_lora": FlagStyle(choices=INITS, metavar="|".join(INITS)),
        "target_modules": FlagStyle(metavar="NAME,NAME,...", read=_words),
        "torch_dtype": FlagStyle(choices=DTYPES[1:], metavar="|".join(DTYPES[1:])),
        "settings": FlagStyle(("--set",), metavar="KEY=VALUE", read=parse_settings),
        "data_files": FlagStyle(metavar="FILE,FILE,...", read=_words),
    },
    panels={
        "Data": ("examples",),
        "Adapter": (
            *("lora_r", "lora_alpha", "lora_dropout", "target_modules"),
            *("use_dora", "init_lora", "float_model"),
        ),
        "Training": (
            *("max_steps", "num_epochs", "learning_rate", "batch_size", "gradient_accumulation", "warmup"),
            *("eval_steps", "early_stopping", "save_steps", "resume", "settings"),
        ),
        "Run": ("seed", "copy_base", "device", "trust_remote_code", "force"),
    },
    examples=(
        "quantcli finetune -m Q -o F --data-files tones.jsonl --text-template '{phrase}\\n{tone}' --completion-only",
        "quantcli finetune -m SmolLM2-135M -o F --method qlora --data-files notes.txt --max-steps 100",
        "quantcli finetune -m Q -o F --data-name org/set --text-field body --lora-r 8 --set weight_decay=0.01",
    ),
)
