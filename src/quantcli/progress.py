"""How work reports itself to whoever shows it; the command line's console is the one real implementation."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["Board", "Progress", "Silent", "Task"]


class Task(Protocol):
    """A counted piece of work."""

    def advance(self, amount: float = 1, detail: str = "") -> None:
        """Moves on by `amount`; `detail` is a few words on the latest step, such as a loss."""
        ...


class Board(Protocol):
    """A table that grows."""

    def add(self, cells: Sequence[str]) -> None:
        """Adds a row."""
        ...


class Progress(Protocol):
    """What a pipeline may say while it works; results are returned, never said here."""

    def note(self, message: str) -> None:
        """Says something worth knowing."""
        ...

    def warn(self, message: str) -> None:
        """Says something that the user should act on or expect."""
        ...

    def plan(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Shows what is about to be done."""
        ...

    def track(self, label: str, total: float, start: float = 0) -> AbstractContextManager[Task]:
        """Opens a counted piece of work that is shown until the context ends; `start` is what is done already."""
        ...

    def board(self, title: str, columns: Sequence[str]) -> AbstractContextManager[Board]:
        """Opens a table that grows while work goes on."""
        ...


class Silent:
    """Says nothing: the default for library use and tests."""

    def note(self, message: str) -> None:
        """Ignores the message."""

    def warn(self, message: str) -> None:
        """Ignores the message."""

    def plan(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Ignores the plan."""

    @contextmanager
    def track(self, label: str, total: float, start: float = 0) -> Iterator[Task]:
        """Counts for nobody."""
        yield _SilentTask()

    @contextmanager
    def board(self, title: str, columns: Sequence[str]) -> Iterator[Board]:
        """Ignores the rows."""
        yield _SilentBoard()


class _SilentBoard:
    def add(self, cells: Sequence[str]) -> None:
        pass


class _SilentTask:
    def advance(self, amount: float = 1, detail: str = "") -> None:
        pass
