"""What became of a trial, one line of JSON each, written before anything else knows of it."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from quantcli.errors import InputError
from quantcli.json_files import parse_json

__all__ = ["TRIALS", "Record", "append_record", "read_records"]

TRIALS = "trials.jsonl"


@dataclass(frozen=True)
class Record:
    """One trial."""

    number: int
    """In the order in which they began."""
    label: str
    """How it is called."""
    point: dict[str, Any]
    """What was chosen."""
    state: Literal["complete", "pruned", "failed"]
    """pruned: given up as it could not become the best; failed: it could not be done."""
    figures: dict[str, float] = field(default_factory=dict)
    """size in bytes, time in seconds, error (mean relative error of the matrices), latency in ms, and the metric."""
    missed: dict[str, float] = field(default_factory=dict)
    """By goal, how far the figure is on its wrong side; none where all hold."""
    reason: str = ""
    """Why it was pruned or failed."""
    notes: tuple[str, ...] = ()
    """What there was to say on the way."""
    seconds: float = 0.0
    """What it took, judging included."""
    windows: int | None = None
    """Windows of text on which a language model was judged."""
    node: str | None = None
    """Of Ray: where it ran."""

    @property
    def meets(self) -> bool:
        """Whether it was judged to the end and all goals hold."""
        return self.state == "complete" and not self.missed


def append_record(file: Path, record: Record) -> None:
    """Adds a line that is there whole, whatever happens next."""
    with file.open("a") as stream:
        stream.write(json.dumps(asdict(record), default=str) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_records(file: Path) -> list[Record]:
    """The trials of an interrupted run; a last line that was cut is taken off the file.

    Raises:
        InputError: another line is damaged.
    """
    if not file.is_file():
        return []
    lines = file.read_bytes().splitlines(keepends=True)
    found: list[Record] = []
    for number, line in enumerate(lines):
        last = number == len(lines) - 1
        try:
            found.append(parse_json(line, Record, f"line {number + 1} of {file}", "add --force to start anew"))
        except InputError:
            if not last:
                raise
        if last and (len(found) < len(lines) or not line.endswith(b"\n")):
            found = found[: len(lines) - 1]
            aside = file.with_name(file.name + ".tmp")
            aside.write_bytes(b"".join(lines[:-1]))
            aside.replace(file)
    return found


def by_point(records: Sequence[Record]) -> dict[str, Record]:
    """Trials by what was chosen."""
    return {json.dumps(r.point, sort_keys=True, default=str): r for r in records}
