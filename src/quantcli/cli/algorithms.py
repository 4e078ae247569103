"""`quantcli algorithms`: what can quantize what, and the options of each."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from quantcli.cli.command import Command, FlagStyle
from quantcli.cli.docs import field_docs
from quantcli.errors import UsageError, nearest

if TYPE_CHECKING:
    from quantcli.cli.console import Console

__all__ = ["COMMAND", "AlgorithmsOptions", "Listing", "run", "show"]

_HEADS = ("algorithm", "kind", "input", "bits", "calibration", "formats", "what")


@dataclass(frozen=True)
class AlgorithmsOptions:
    """What `quantcli algorithms` was asked to do."""

    name: str | None = None
    """One algorithm, to see its options with their defaults."""


@dataclass(frozen=True)
class Listing:
    """Algorithms as plain values."""

    algorithms: list[dict[str, Any]]
    """One dictionary each: name, kind, summary, inputs, bits, calibration, formats, options."""
    detailed: bool
    """Whether the options are to be shown."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a program."""
        return {"algorithms": self.algorithms}


def run(options: AlgorithmsOptions, console: "Console") -> Listing:
    """Reads the registry."""
    from quantcli.algorithms import ALGORITHMS

    if options.name is not None and options.name not in ALGORITHMS:
        raise UsageError(
            f"unknown algorithm {options.name!r}, {nearest(options.name, ALGORITHMS)}", hint="quantcli algorithms"
        )
    chosen = ALGORITHMS.values() if options.name is None else [ALGORITHMS[options.name]]
    return Listing([_plain(algorithm) for algorithm in chosen], options.name is not None)


def show(result: Listing, console: "Console") -> None:
    """The matrix, or one algorithm with its options."""
    if not result.detailed:
        rows = [[a["name"], a["kind"], *_limits(a), a["summary"]] for a in result.algorithms]
        console.table(_HEADS, rows, left=len(_HEADS))
        console.text("\nquantcli algorithms NAME shows the options of one.")
        return
    for a in result.algorithms:
        console.pairs(
            f"{a['name']}: {a['summary']}",
            list(zip(_HEADS[1:-1], [a["kind"], *_limits(a)], strict=True)),
        )
        if not a["options"]:
            console.text("\nIt has no options of its own.")
            continue
        console.text("\nOptions, given as --set NAME=VALUE:")
        options = [(o["name"], o["type"], _value_words(o["default"]), o["help"]) for o in a["options"]]
        console.table(("name", "type", "default", "what"), options, left=4)


def _value_words(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _limits(plain: dict[str, Any]) -> list[str]:
    """What an algorithm takes and writes, in words."""
    return [", ".join(plain["inputs"]), _ranges(plain["bits"]), plain["calibration"], ", ".join(plain["formats"])]


def _plain(algorithm: Any) -> dict[str, Any]:
    docs, types = field_docs(algorithm.options), get_type_hints(algorithm.options)
    return {
        "name": algorithm.name,
        "kind": algorithm.kind,
        "summary": algorithm.summary,
        "inputs": list(algorithm.inputs),
        "bits": list(algorithm.bits),
        "calibration": algorithm.calibration,
        "formats": list(algorithm.formats),
        "options": [
            {
                "name": f.name,
                "type": _type_words(types[f.name]),
                "default": _default(f),
                "help": docs.get(f.name, ""),
            }
            for f in fields(algorithm.options)
        ],
    }


def _type_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    return {bool: "true|false", int: "whole number", float: "number", str: "text"}.get(hint, str(hint))


def _default(field: "Field[Any]") -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _ranges(numbers: Sequence[int]) -> str:
    """`2-8`, `2-4, 8`: runs of three or more as a range."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{r[0]}-{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs]
    return ", ".join(words)


COMMAND = Command(
    name="algorithms",
    summary="List the algorithms with what they take and write, or the options of one.",
    options=AlgorithmsOptions,
    run=run,
    show=show,
    styles={"name": FlagStyle(("name",), metavar="[NAME]")},
    examples=("quantcli algorithms", "quantcli algorithms gptq", "quantcli algorithms --json"),
)
