"""Writes docs/cli.md from the commands' own help; with --check says whether it is up to date."""

from pathlib import Path

from quantcli import errors
from quantcli.cli.aliases import ALIASES, describe
from quantcli.cli.app import COMMANDS, help_text
from written_page import write_or_check

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
WIDTH = 100


def exit_codes() -> str:
    classes = [getattr(errors, name) for name in errors.__all__ if isinstance(getattr(errors, name), type)]
    words = {c.exit_code: c.__doc__.splitlines()[0] for c in classes if c is not errors.QuantcliError}
    words |= {0: "Done.", 1: "Our bug, with its traceback: please report it."}
    return "\n".join(["| code | meaning |", "|---|---|", *(f"| {code} | {words[code]} |" for code in sorted(words))])


def aliases(command: str) -> str:
    rows = [f"| `{name}` | {describe(alias)} |" for name, alias in sorted(ALIASES[command].items())]
    return "\n".join(["| spelling | here |", "|---|---|", *rows])


def page() -> str:
    parts = [
        "# The command line",
        "Written by `scripts/make_cli_docs.py` from the commands' help; a test compares.",
        f"```\n{help_text(width=WIDTH)}\n```",
    ]
    for name in COMMANDS:
        parts += [f"## quantcli {name}", f"```\n{help_text(name, WIDTH)}\n```"]
    parts += ["## Exit codes", exit_codes(), "## Other spellings"]
    parts.append(
        "Every flag may be written with underscores (`--group_size 64`), switches written so may carry True or False."
    )
    for name in COMMANDS:
        if name in ALIASES:
            parts += [f"### {name}", aliases(name)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    write_or_check(TARGET, page())


if __name__ == "__main__":
    main()
