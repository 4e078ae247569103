"""`quantcli compare`: our own code and backends at the same job, in one table."""

from typing import TYPE_CHECKING, Any

from quantcli.cli.command import Command, FlagStyle
from quantcli.cli.flags import parse_duration, parse_size
from quantcli.errors import QualityError
from quantcli.options import READER_NAMES, CompareOptions

if TYPE_CHECKING:
    from quantcli.cli.console import Console

__all__ = ["COMMAND", "check", "run", "show"]

_HEADS = ("by", "method", "scheme", "KL", "perplexity", "size", "time", "peak memory", "opens in")


def run(options: CompareOptions, console: "Console") -> Any:
    """Quantizes by each and scores the results."""
    from quantcli.pipelines import compare

    return compare.run(options, console)


def show(result: Any, console: "Console") -> None:
    """One row for each."""
    from quantcli.cli.console import human_duration, human_size

    rows = []
    for e in result.entrants:
        if e.failure:
            rows.append((e.name, e.algorithm, "failed", *["-"] * 5, e.failure))
            continue
        error = "" if e.kl_error is None else f" ± {e.kl_error:.4f}"
        rows.append(
            (
                e.name,
                e.algorithm,
                e.scheme,
                f"{e.kl:.4f}{error}",
                f"{e.perplexity:.2f}",
                human_size(e.size_bytes),
                human_duration(e.seconds),
                human_size(e.peak_bytes),
                _readers(e.opens),
            )
        )
    console.table(_HEADS, rows, left=3)
    if result.reference_perplexity is not None:
        console.text(
            f"original: perplexity {result.reference_perplexity:.2f}, {human_size(result.reference_size_bytes)}; "
            f"scored on {result.text}"
        )


def _readers(opens: tuple[str, ...]) -> str:
    """Those that open it, or those that do not where they are fewer."""
    others = [name for name in READER_NAMES if name not in opens]
    if len(others) < len(opens):
        return f"all but {', '.join(others)}" if others else "all"
    return ", ".join(opens)


def check(result: Any) -> None:
    """Exit code 5 where one gave no result.

    Raises:
        QualityError: naming them.
    """
    failed = [e.name for e in result.entrants if e.failure]
    if failed:
        raise QualityError(f"no result: {', '.join(failed)}", hint="the table says why")


def _entrants(words: list[str]) -> tuple[str, ...]:
    return tuple(word.strip() for text in words for word in text.split(",") if word.strip())


COMMAND = Command(
    name="compare",
    summary="Let our own code and other packages do the same job on a checkpoint, and compare what they give and take.",
    options=CompareOptions,
    run=run,
    show=show,
    check=check,
    styles={
        "model": FlagStyle(("-m", "--model")),
        "entrants": FlagStyle(("--with",), metavar="NAME,...", read=_entrants),
        "output": FlagStyle(("-o", "--output")),
        "algorithm": FlagStyle(("-a", "--algorithm")),
        "symmetric": FlagStyle(("--sym/--asym",)),
        "data": FlagStyle(metavar="FILE|self|builtin", choices=("self", "builtin")),
        "eval_data": FlagStyle(metavar="FILE"),
        "timeout": FlagStyle(metavar="TIME", read=parse_duration),
        "max_memory": FlagStyle(metavar="SIZE", read=parse_size),
    },
    panels={"Calibration": ("calibration",), "Run": ("timeout", "max_memory", "trust_remote_code", "force")},
    examples=(
        "quantcli compare -m SmolLM2-135M --with ours,gptqmodel,auto-round,llm-compressor --sym",
        "quantcli compare -m SmolLM2-135M -o C --with ours,gptqmodel --bits 3 --group-size 32 --eval-data notes.txt",
        "quantcli compare -m SmolLM2-135M --with ours:awq,autoawq,gptqmodel:awq --data notes.txt --json",
    ),
)
