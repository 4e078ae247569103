"""What people see: progress and notes on stderr, results on stdout.

On a terminal there are bars with the time left; in a pipe or a log file there are plain lines, seconds apart.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import rich.console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from quantcli.cli.command import Talk
from quantcli.progress import Board, Task

__all__ = ["SECONDS_BETWEEN_LINES", "Console", "human_duration", "human_size"]

SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BEHIND_ROWS = 30.0
"""After which a step is told of while a table grows by a line for each of its steps."""
_PIPE_WIDTH = 160
_BOARD_WIDTH, _BOARD_WIDTHS = 10, {"trial": 5, "what": 36}


class Console:
    """Implements `progress.Progress`, and prints results."""

    def __init__(self, talk: Talk):
        self.talk = talk
        self._err = _stream(sys.stderr)
        self._out = _stream(sys.stdout)
        self._bars: Bars | None = None
        self._patience = 0.0
        self.live: TextIO = sys.stdout
        """Where `stream` writes: stdout, also while libraries are kept from it."""

    def note(self, message: str) -> None:
        """Says something worth knowing, unless quiet."""
        if not self.talk.quiet:
            self._err.print(escape(message), soft_wrap=True)

    def warn(self, message: str) -> None:
        """Says something that the user should act on or expect; also when quiet."""
        self._err.print(f"[bold yellow]warning[/]: {escape(message)}", soft_wrap=True)

    def plan(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Shows what is about to be done, unless quiet."""
        if not self.talk.quiet:
            self._pairs(self._err, title, rows)

    @contextmanager
    def track(self, label: str, total: float, start: float = 0) -> Iterator[Task]:
        """A bar on a terminal, lines in a pipe, nothing when quiet; tasks may nest."""
        if self.talk.quiet:
            yield _NoTask()
        elif self._err.is_terminal:
            with self._bar(label, total, start) as bar:
                yield bar
        else:
            lines = _Lines(self, label, total, start, self._patience)
            yield lines
            lines.finish()

    @contextmanager
    def board(self, title: str, columns: Sequence[str]) -> Iterator[Board]:
        """A table that grows on a terminal, above the bars of what goes on; a line for each row in a pipe."""
        if self.talk.quiet:
            yield _NoBoard()
        elif not self._err.is_terminal:
            self._patience = _SECONDS_BEHIND_ROWS
            try:
                yield _RowLines(self, columns)
            finally:
                self._patience = 0.0
        else:
            yield _Rows(self._err, title, columns)

    @contextmanager
    def _bar(self, label: str, total: float, start: float) -> Iterator[Task]:
        outermost = self._bars is None
        if self._bars is None:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[detail]}"),
                console=self._err,
                redirect_stdout=False,  # stdout is for results, whatever a library prints
            )
            self._bars.start()
        task = self._bars.add_task(escape(label), total=total, detail="")
        self._bars.update(task, completed=start)
        try:
            yield _Bar(self._bars, task)
        finally:
            if outermost:
                self._bars.stop()
                self._bars = None
            else:
                self._bars.update(task, visible=False)

    def stream(self, piece: str) -> None:
        """A piece of the result as soon as it is there."""
        self.live.write(piece)
        self.live.flush()

    def text(self, line: str) -> None:
        """A line of the result."""
        self._out.print(escape(line), soft_wrap=True)

    def pairs(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """A result of names and values."""
        self._pairs(self._out, title, rows)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, title: str = "") -> None:
        """A result table; the first `left` columns are words, the others figures set to the right."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title or None, title_justify="left")
        for i, name in enumerate(columns):
            words = i < left
            table.add_column(escape(name), justify="left" if words else "right", no_wrap=not words, overflow="fold")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        _print(self._out, table)

    def json(self, value: Any) -> None:
        """The result for programs: one JSON document, with null where a figure is not finite."""
        self._out.file.write(json.dumps(_finite(value), indent=2, default=str) + "\n")
        self._out.file.flush()

    @staticmethod
    def _pairs(console: rich.console.Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
        if title:
            console.print(f"[bold]{escape(title)}[/]")
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(f"  {escape(name)}", escape(value))
        _print(console, grid)


class _NoBoard:
    def add(self, cells: Sequence[str]) -> None:
        pass


class _RowLines:
    """`trial 3: gptq bits=4, kl 0.012, size 81 MB, best so far`."""

    def __init__(self, console: Console, columns: Sequence[str]):
        self._console, self._columns = console, columns

    def add(self, cells: Sequence[str]) -> None:
        first, *rest = zip(self._columns, cells, strict=True)
        said = [cell if name in ("", "what") else f"{name} {cell}" for name, cell in rest if cell]
        self._console.note(f"{first[0]} {first[1]}: {', '.join(said)}")


class _Rows:
    """Rows of a table, each printed once, above whatever moves below; columns keep their width."""

    def __init__(self, console: rich.console.Console, title: str, columns: Sequence[str]):
        self._console, self._columns = console, columns
        console.print(f"[bold]{escape(title)}[/]")
        self._widths = [max(len(name), _BOARD_WIDTHS.get(name, _BOARD_WIDTH)) for name in columns]
        console.print("[dim]" + escape(self._line(columns)) + "[/]", soft_wrap=True)

    def add(self, cells: Sequence[str]) -> None:
        self._widths = [max(width, len(cell)) for width, cell in zip(self._widths[:-1], cells, strict=False)] + [0]
        self._console.print(escape(self._line(cells)), soft_wrap=True)

    def _line(self, cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True)).rstrip()


class _NoTask:
    def advance(self, amount: float = 1, detail: str = "") -> None:
        pass


class _Bar:
    def __init__(self, bars: Bars, task: Any):
        self._bars, self._task = bars, task

    def advance(self, amount: float = 1, detail: str = "") -> None:
        self._bars.update(self._task, advance=amount)
        if detail:
            self._bars.update(self._task, detail=escape(detail))


class _Lines:
    """Progress for pipes: the first step is said at once, later ones when some seconds have passed.

    With patience, nothing is said of what takes less than so many seconds.
    """

    def __init__(self, console: Console, label: str, total: float, start: float, patience: float = 0.0):
        self._console, self._label, self._total = console, label, total
        self._start = self._done = start
        self._began = time.monotonic()
        self._patience, self._said = patience, -math.inf

    def advance(self, amount: float = 1, detail: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES or self._done >= self._total or now - self._began < self._patience:
            return
        self._said = now
        rate = (self._done - self._start) / max(now - self._began, 1e-9)
        left = f", {human_duration((self._total - self._done) / rate)} left" if rate > 0 else ""
        self._console.note(f"{self._label}: {self._count()}{left}{f', {detail}' if detail else ''}")

    def finish(self) -> None:
        seconds = time.monotonic() - self._began
        if seconds < self._patience:
            return
        self._console.note(f"{self._label}: {self._count()} in {human_duration(seconds)}")

    def _count(self) -> str:
        return f"{self._done:g}/{self._total:g}"


def human_size(size_bytes: float) -> str:
    """`812 MB`, `1.35 GB`: decimal units, three figures."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 999.5:
            return f"{size_bytes:.0f} {unit}" if unit == "B" or size_bytes >= 99.95 else f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"


def human_duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _print(console: rich.console.Console, table: Table) -> None:
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def _stream(file: Any) -> rich.console.Console:
    terminal = bool(file.isatty()) and os.environ.get("TERM") != "dumb"
    return rich.console.Console(
        # a pipe has no width: wide enough that no line of a table breaks, so that grep and cut work on it
        file=file,
        force_terminal=terminal,
        width=None if terminal else _PIPE_WIDTH,
        no_color=bool(os.environ.get("NO_COLOR")) or not terminal,
        color_system="auto" if terminal else None,
        highlight=False,
        emoji=False,
        soft_wrap=False,
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
