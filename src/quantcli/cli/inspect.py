"""`quantcli inspect`: what a folder or a graph is and how it came to be."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.cli.command import Command, FlagStyle
from quantcli.errors import InputError

if TYPE_CHECKING:
    from quantcli.cli.console import Console

__all__ = ["COMMAND", "InspectOptions", "check", "run", "show"]


@dataclass(frozen=True)
class InspectOptions:
    """What `quantcli inspect` was asked to do."""

    folder: Path
    """Model folder, an output folder of quantcli, or FILE.onnx."""
    nodes: bool = False
    """List the nodes of a graph that have weights, by the names that --nodes-exclude takes."""


def run(options: InspectOptions, console: "Console") -> Any:
    """Looks at the folder."""
    from quantcli.pipelines import inspect

    return inspect.run(options.folder, nodes=options.nodes)


def show(result: Any, console: "Console") -> None:
    """What it is, its weights by bits, the commands that made it, and the files that are not as they were written."""
    from quantcli.cli.console import human_size

    bits = "-" if result.bits_per_weight is None else f"{result.bits_per_weight:.2f}"
    if result.quantized_bits_per_weight is not None:
        bits += f" ({result.quantized_bits_per_weight:.2f} where quantized)"
    rows = [
        ("what", result.what),
        ("format", result.format),
        ("architecture", result.model_type or "-"),
        ("parameters", f"{result.parameters:,}"),
        ("size", human_size(result.size_bytes)),
        ("bits per weight", bits),
        *([("share", result.share["words"])] if result.share else []),
        *(
            ("left float", f"{one['kind']} ({one['count']}): {one['reason']}")
            for one in (result.share or {}).get("left", ())
        ),
        ("files", _files_in_words(result)),
        *_readers_in_words(result.opens),
    ]
    console.pairs(result.folder, rows)
    histogram = [(r.label, str(r.tensors), f"{r.parameters:,}", human_size(r.size_bytes)) for r in result.histogram]
    console.text("")
    console.table(("weights", "tensors", "parameters", "size"), histogram)
    if result.operators:
        console.text("")
        console.text("nodes: " + ", ".join(f"{count} {name}" for name, count in result.operators.items()))
    if result.nodes:
        console.text("")
        listed = [(n.name or "-", n.op_type, n.weight, n.dtype, "x".join(map(str, n.shape))) for n in result.nodes]
        console.table(("node", "operator", "weight", "type", "stored shape"), listed, left=4)
    for step in result.history:
        console.text("")
        console.pairs(f"made by {step.command} from {step.parent}", [("options", _options_in_words(step.options))])


def check(result: Any) -> None:
    """Exit code 3 where files are not as they were written.

    Raises:
        InputError: naming the first few.
    """
    bad = [f"{file.name} is {file.state}" for file in result.files if file.state not in ("ok", "extra")]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise InputError(
            f"{result.folder} is not as it was written: {', '.join(bad[:3])}{more}",
            hint="make it anew with the command that `quantcli inspect` shows",
        )


def _options_in_words(options: Mapping[str, Any], prefix: str = "") -> str:
    """`bits=4 calibration.seed=0`: nested ones laid flat, empty and switched-off ones left out."""
    words = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            words.append(_options_in_words(value, f"{prefix}{name}."))
        elif value is not None and value is not False and value not in ([], (), ""):
            words.append(f"{prefix}{name}={value}")
    return " ".join(word for word in words if word)


def _readers_in_words(opens: Mapping[str, str | None]) -> list[tuple[str, str]]:
    """Who opens it and, of each that does not, why."""
    if not opens:
        return []
    from quantcli.pipelines.inspect import ONLY_CHECKPOINTS

    through: dict[str, str] = {}
    if opens["transformers"] != ONLY_CHECKPOINTS:
        from quantcli.formats.readers import READERS

        through = {name: f" (through {reader.through})" for name, reader in READERS.items() if reader.through}
    able = [name + through.get(name, "") for name, why in opens.items() if why is None]
    rows = [("opens in", ", ".join(able))] if able else []
    return rows + [(f"not in {name}", why) for name, why in opens.items() if why is not None]


def _files_in_words(result: Any) -> str:
    if not result.files:
        return "no manifest: not made by quantcli"
    counts = Counter(file.state for file in result.files)
    return ", ".join(f"{counts[state]} {state}" for state in ("ok", "changed", "missing", "extra") if counts[state])


COMMAND = Command(
    name="inspect",
    summary="Say what a folder or graph holds, how it came to be, and whether its files are intact.",
    options=InspectOptions,
    run=run,
    show=show,
    check=check,
    styles={"folder": FlagStyle(("folder",), metavar="FOLDER|FILE")},
    examples=(
        "quantcli inspect Q",
        "quantcli inspect Q/model",
        "quantcli inspect onnx --json",
        "quantcli inspect net.onnx --nodes",
    ),
)
