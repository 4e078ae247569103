"""A page of docs that a script writes, and a check that it is up to date."""

import sys
from pathlib import Path

__all__ = ["write_or_check"]


def write_or_check(target: Path, text: str) -> None:
    """Writes a page of docs/; with --check on the command line, says whether it is stale.

    Raises:
        SystemExit: it is.
    """
    if "--check" not in sys.argv[1:]:
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)
    elif not target.is_file() or target.read_text() != text:
        sys.exit(f"docs/{target.name} is stale: run `python scripts/{Path(sys.argv[0]).name}`")
