"""`quantcli convert-adapter`: one more adapter for a base that exists."""

from typing import TYPE_CHECKING, Any

from quantcli.cli.command import Command, FlagStyle
from quantcli.options import ADAPTER_FORMATS, ConvertAdapterOptions

if TYPE_CHECKING:
    from quantcli.cli.console import Console

__all__ = ["COMMAND", "run", "show"]


def run(options: ConvertAdapterOptions, console: "Console") -> Any:
    """Converts the adapter."""
    from quantcli.pipelines import convert_adapter

    return convert_adapter.run(options)


def show(result: Any, console: "Console") -> None:
    """One summary line."""
    from quantcli.cli.console import human_size

    console.text(f"{result.output}: {result.linears} linears, {human_size(result.size_bytes)}")


COMMAND = Command(
    name="convert-adapter",
    summary="Turn a LoRA adapter that peft saved into a file for an ONNX base of generate-adapter.",
    options=ConvertAdapterOptions,
    run=run,
    show=show,
    styles={
        "model": FlagStyle(("-m", "--model")),
        "adapter": FlagStyle(("--adapter-path",)),
        "output": FlagStyle(("-o", "--output"), metavar="FILE"),
        "adapter_format": FlagStyle(choices=ADAPTER_FORMATS, metavar="|".join(ADAPTER_FORMATS)),
    },
    examples=("quantcli convert-adapter -m A --adapter-path shop/adapter -o shop.onnx_adapter",),
)
