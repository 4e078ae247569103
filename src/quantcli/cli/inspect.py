"""`quantcli inspect`: what a folder is and how it came to be."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.cli.command import Command, FlagStyle

if TYPE_CHECKING:
    from quantcli.cli.console import Console

__all__ = ["COMMAND", "InspectOptions", "run", "show"]


@dataclass(frozen=True)
class InspectOptions:
    """What `quantcli inspect` was asked to do."""

    folder: Path
    """Model folder, or an output folder of quantcli."""


def run(options: InspectOptions, console: "Console") -> Any:
    """Looks at the folder."""
    from quantcli.pipelines import inspect

    return inspect.run(options.folder)


def show(result: Any, console: "Console") -> None:
    """What was found."""
    console.pairs("", [(name.replace("_", " "), str(value)) for name, value in result.to_dict().items()])


COMMAND = Command(
    name="inspect",
    summary="Say what a folder holds, how it came to be, and whether its files are intact.",
    options=InspectOptions,
    run=run,
    show=show,
    styles={"folder": FlagStyle(("folder",), metavar="FOLDER")},
    examples=("quantcli inspect Q", "quantcli inspect Q/model", "quantcli inspect onnx --json"),
)
