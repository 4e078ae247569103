"""`quantcli generate`: try a model folder on a prompt."""

from typing import TYPE_CHECKING, Any

from quantcli.cli.command import Command, FlagStyle
from quantcli.options import GenerateOptions

if TYPE_CHECKING:
    from quantcli.cli.console import Console

__all__ = ["COMMAND", "run", "show"]


def run(options: GenerateOptions, console: "Console") -> Any:
    """Writes the answer to stdout as it comes; with --json it is in the result only."""
    from quantcli.pipelines import generate

    return generate.run(options) if console.talk.json else generate.run(options, console.stream)


def show(result: Any, console: "Console") -> None:
    """Ends the line of the answer, and says on stderr how fast it came."""
    console.text("")
    speed = result.decode_tokens_per_second
    decoding = "" if speed is None else f", {speed:.1f} tokens/s"
    console.note(
        f"{len(result.tokens)} tokens{decoding}; prompt of {result.prompt_tokens} tokens, "
        f"{result.prefill_tokens_per_second:.1f} tokens/s"
    )


COMMAND = Command(
    name="generate",
    summary="Continue a prompt with any model folder, float, quantized or ONNX.",
    options=GenerateOptions,
    run=run,
    show=show,
    styles={
        "model": FlagStyle(("-m", "--model")),
        "prompt": FlagStyle(("-p", "--prompt")),
        "adapter": FlagStyle(metavar="NAME|PATH"),
    },
    panels={"Sampling": ("temperature", "top_p", "seed")},
    examples=(
        "quantcli generate -m Q -p 'The capital of France is'",
        "quantcli generate -m onnx -p 'Write a haiku.' --use-chat-template --temperature 0.8 --seed 1",
        "quantcli generate -m A --adapter tone -p 'A charming film.'",
        "quantcli generate -m F --adapter adapter -p 'A charming film.'",
    ),
)
