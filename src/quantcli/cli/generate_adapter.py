"""`quantcli generate-adapter`: an ONNX base and adapters that are switched at run time."""

from typing import TYPE_CHECKING, Any

from quantcli.cli.command import Command, FlagStyle
from quantcli.options import ADAPTER_FORMATS, GenerateAdapterOptions

if TYPE_CHECKING:
    from quantcli.cli.console import Console

__all__ = ["COMMAND", "run", "show"]


def run(options: GenerateAdapterOptions, console: "Console") -> Any:
    """Makes the base and its adapters."""
    from quantcli.pipelines import generate_adapter

    return generate_adapter.run(options, console)


def show(result: Any, console: "Console") -> None:
    """Each adapter's file, and one summary line."""
    from quantcli.cli.console import human_duration, human_size

    rows = [
        (a.name, f"{a.file}: {a.linears} linears, rank {a.ranks}, {human_size(a.size_bytes)}") for a in result.adapters
    ]
    console.pairs("", rows)
    console.text(f"{result.output}: {human_size(result.size_bytes)}, in {human_duration(result.seconds)}")


COMMAND = Command(
    name="generate-adapter",
    summary="Turn a model and its LoRA adapters into an ONNX base and adapter files for ONNX Runtime.",
    options=GenerateAdapterOptions,
    run=run,
    show=show,
    styles={
        "model": FlagStyle(("-m", "--model")),
        "output": FlagStyle(("-o", "--output")),
        "adapters": FlagStyle(("--adapter-path",), metavar="[NAME=]FOLDER"),
        "adapter_format": FlagStyle(choices=ADAPTER_FORMATS, metavar="|".join(ADAPTER_FORMATS)),
    },
    examples=(
        "quantcli generate-adapter -m F -o A",
        "quantcli generate-adapter -m Q -o A --adapter-path tone=movies/adapter --adapter-path shop=shop/adapter",
    ),
)
