"""What readers answered: kept as results.json, shown in docs/formats.md."""

import json
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from interop.folders import CASES, FAMILIES

__all__ = ["OPENS", "Answer", "page_with", "read_results", "table", "write_results"]

RESULTS = Path(__file__).resolve().parent / "results.json"
_NO_KERNEL = re.compile(r"Marlin does not support weight_bits|Failed to find a kernel")
_BEGIN, _END = "<!-- interop: written by `make interop` -->", "<!-- interop: end -->"
OPENS = 0.06
"""Relative error of the centred log probabilities up to which a folder is opened right: bfloat16 costs 0.01 to 0.04,
codes in the wrong place 0.5 and more."""


@dataclass(frozen=True)
class Answer:
    """What a reader made of a folder."""

    reader: str
    family: str
    format: str
    case: str
    error: float | None
    """Against quantcli.load; None where it did not open."""
    refusal: str | None
    """Its first line, where it did not."""

    @property
    def verdict(self) -> str:
        """opens, refuses, nonsense, or no kernel: its weights are read, and this processor cannot multiply by them."""
        if self.error is None:
            return "no kernel" if _NO_KERNEL.search(self.refusal or "") else "refuses"
        return "opens" if self.error <= OPENS else "nonsense"


def read_results() -> tuple[list[Answer], dict[str, str], str]:
    """Answers, by reader its versions in words, the date."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"answers": [], "versions": {}, "date": ""}
    return [Answer(**values) for values in kept["answers"]], kept["versions"], kept["date"]


def write_results(answers: list[Answer], versions: dict[str, str], date: str) -> None:
    """Keeps them, in the order of the cases."""
    cases, names = [(c.format, c.name) for c in CASES], list(FAMILIES)
    known = [a for a in answers if (a.format, a.case) in cases]
    known.sort(key=lambda a: (a.reader, cases.index((a.format, a.case)), names.index(a.family)))
    lines = ",\n".join(f"  {json.dumps(asdict(answer))}" for answer in known)
    versions_text = json.dumps(versions, indent=1)
    RESULTS.write_text(f'{{"date": "{date}",\n"versions": {versions_text},\n"answers": [\n{lines}\n]}}\n')


def table(answers: list[Answer], versions: dict[str, str], date: str) -> str:
    """Rows by format and case, a column for each reader, the worst error or the families in question."""
    readers = list(versions)
    found: dict[tuple[str, str, str], list[Answer]] = defaultdict(list)
    for answer in answers:
        found[answer.format, answer.case, answer.reader].append(answer)
    lines = [
        f"Tried on {date}: " + "; ".join(versions.values()) + ".",
        "",
        "| format | options | models | " + " | ".join(readers) + " |",
        "|---|---|---|" + "---|" * len(readers),
    ]
    for case in CASES:
        cells = [_cell(found[case.format, case.name, reader], len(case.families)) for reader in readers]
        if any(cell != "" for cell in cells):
            models = ", ".join(case.families)
            lines.append(f"| {case.format} | {case.name} | {models} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(answers: list[Answer], models: int) -> str:
    by_verdict: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_verdict[answer.verdict].append(answer)
    parts = []
    for verdict in ("opens", "no kernel", "nonsense", "refuses"):
        group = by_verdict[verdict]
        if not group:
            continue
        word = verdict
        if verdict in ("opens", "nonsense"):
            word += f" ({max(a.error for a in group if a.error is not None):.1g})"
        if len(group) < models:  # which
            word += " " + ", ".join(a.family for a in group)
        parts.append(word)
    return "; ".join(parts)


def page_with(page: str, text: str) -> str:
    """A page with another table between its marks."""
    head, rest = page.split(_BEGIN)
    return f"{head}{_BEGIN}\n{text}\n{_END}{rest.split(_END)[1]}"
