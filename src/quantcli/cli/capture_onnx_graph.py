"""`quantcli capture-onnx-graph`: a folder that ONNX Runtime GenAI runs."""

from typing import TYPE_CHECKING, Any

from quantcli.cli.command import Command, FlagStyle
from quantcli.options import CaptureOptions

if TYPE_CHECKING:
    from quantcli.cli.console import Console

__all__ = ["COMMAND", "run", "show"]


def run(options: CaptureOptions, console: "Console") -> Any:
    """Captures the graph."""
    from quantcli.pipelines import capture

    return capture.run(options, console)


def show(result: Any, console: "Console") -> None:
    """The figures of the captured folder."""
    console.pairs("", [(name.replace("_", " "), str(value)) for name, value in result.to_dict().items()])


COMMAND = Command(
    name="capture-onnx-graph",
    summary="Turn a checkpoint, float or quantized, into an ONNX Runtime GenAI folder.",
    options=CaptureOptions,
    run=run,
    show=show,
    styles={
        "model": FlagStyle(("-m", "--model")),
        "output": FlagStyle(("-o", "--output")),
        "exporter": FlagStyle(choices=("genai", "torch"), metavar="genai|torch"),
        "precision": FlagStyle(choices=("fp32", "fp16", "int4", "int8"), metavar="fp32|fp16|int4|int8"),
    },
    examples=(
        "quantcli capture-onnx-graph -m Q -o onnx",
        "quantcli capture-onnx-graph -m SmolLM2-135M -o onnx --precision int4 --block-size 32",
        "quantcli capture-onnx-graph -m Q -o onnx --accuracy-level 0 --lm-head-bits 8",
    ),
)
