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
    """What the graph holds, what it wrote when it was tried, and one summary line."""
    from quantcli.cli.console import human_duration, human_size

    if hasattr(result, "task"):
        rows = [(f"{name}.onnx", f"{error:.1e} off the checkpoint's outputs") for name, error in result.errors.items()]
        console.pairs("", [("task", result.task), *rows])
        console.text(f"{result.output}: {human_size(result.size_bytes)}, in {human_duration(result.seconds)}")
        return
    kinds = [f"{count} {f'in {kind} bits' if kind.isdigit() else kind}" for kind, count in result.nodes.items()]
    rows = [("matrices", ", ".join(kinds))]
    if result.accuracy_level is not None:
        level = str(result.accuracy_level)
        if result.flip_rate is not None:
            level += f" (level 4 changes {result.flip_rate:.1%} of the top tokens)"
        rows.append(("accuracy level", level))
    if result.tokens_per_second is not None:
        rows.append(("decoding", f"{result.tokens_per_second:.1f} tokens/s"))
    if result.sample is not None:
        rows.append(("sample", " ".join(result.sample.split())))
    console.pairs("", rows)
    console.text(f"{result.output}: {human_size(result.size_bytes)}, in {human_duration(result.seconds)}")


COMMAND = Command(
    name="capture-onnx-graph",
    summary="Turn a checkpoint, float or quantized, into ONNX: language models into an ONNX Runtime GenAI folder.",
    options=CaptureOptions,
    run=run,
    show=show,
    styles={
        "model": FlagStyle(("-m", "--model")),
        "output": FlagStyle(("-o", "--output")),
        "exporter": FlagStyle(choices=("auto", "genai", "torch"), metavar="auto|genai|torch"),
        "precision": FlagStyle(choices=("fp32", "fp16", "int4", "int8"), metavar="fp32|fp16|int4|int8"),
    },
    examples=(
        "quantcli capture-onnx-graph -m Q -o onnx",
        "quantcli capture-onnx-graph -m SmolLM2-135M -o onnx --precision int4 --block-size 32",
        "quantcli capture-onnx-graph -m Q -o onnx --accuracy-level 0 --lm-head-bits 8",
        "quantcli capture-onnx-graph -m MiniLM -o encoder",
    ),
)
