"""Results that a benchmark keeps as soon as it has them, cell by cell, so that it goes on where it was interrupted."""

import argparse
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from running import ROOT, describe_machine

__all__ = ["Kept", "cell_arguments", "file_digest"]


class Kept:
    """A benchmark of cells, each with a `name`."""

    results: Path
    """The file; it holds settings, machine, and values by cell."""
    settings: dict[str, Any]
    """How all cells are measured."""
    found: dict[str, Any]
    """What the file holds."""

    def measure(self, cell: Any) -> dict[str, Any]:
        """Values of a cell; `failed` says why there are none."""
        raise NotImplementedError

    def said(self, values: Mapping[str, Any]) -> str:
        """Of a cell, for the log."""
        raise NotImplementedError

    def open(self) -> None:
        """Takes up what earlier runs found, if they measured the same way."""
        if self.results.is_file():
            self.found = json.loads(self.results.read_text())
            if self.found["settings"] != self.settings:
                raise SystemExit(
                    f"{self.results} was measured with {self.found['settings']}, not {self.settings}: name another file"
                )
        else:
            self.found = {"settings": self.settings, "machine": describe_machine(), "cells": {}}

    def keep(self, name: str, values: dict[str, Any]) -> None:
        """Adds a cell to the file, which another run may fill too; a kill leaves the old file or the new one."""
        self.open()
        self.found["cells"][name] = values
        self.results.parent.mkdir(parents=True, exist_ok=True)
        aside = self.results.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(json.dumps(self.found, indent=1) + "\n")
        aside.replace(self.results)

    def run(
        self,
        cells: Sequence[Any],
        again: bool,
        version: str,
        write: Callable[[], None],
        skip: Callable[[Any], str | None],
    ) -> None:
        """Measures cells that were not yet, or `again`, and writes the page after each.

        Raises:
            SystemExit: some failed.
        """
        code, failed = code_digest(), False
        for cell in cells:
            self.open()
            kept = self.found["cells"].get(cell.name, {"failed": "not measured"})
            if "failed" not in kept and not again:
                continue
            why = skip(cell)
            if why is not None:
                print(f"{cell.name}: skipped, {why}", flush=True)
                continue
            print(f"{time.strftime('%H:%M:%S')} {cell.name}", flush=True)
            values = self.measure(cell)
            failed = failed or "failed" in values
            said = values.get("failed") or self.said(values)
            print(f"         {said}", flush=True)
            stamp = {"date": time.strftime("%Y-%m-%d"), "version": version, "code": code, "load": os.getloadavg()[0]}
            self.keep(cell.name, values | stamp)
            write()
        write()
        if failed:
            raise SystemExit("some cells failed; the next run tries them again")


def cell_arguments(description: str | None, results: str, page: str) -> argparse.ArgumentParser:
    """What every benchmark of cells takes.

    Args:
        description: Its own, for --help.
        results: Name of its file under benchmarks/results.
        page: Name of its page under docs.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX", help="cells to measure")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / results)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / page, help="the page to write")
    parser.add_argument("--again", action="store_true", help="measure the cells of --only anew")
    parser.add_argument("--list", action="store_true", help="print the names of the cells, and measure nothing")
    return parser


def code_digest() -> str:
    """Of the package: cells that other code made are told apart."""
    paths = sorted((ROOT / "src").rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def file_digest(path: Path) -> str:
    """Tells one text from another."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
