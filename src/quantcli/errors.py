"""Everything that can go wrong, by whose turn it is to act.

QuantcliError                 1   our bug, when nothing below fits
├── UsageError                2   a flag, name or value that cannot be
├── InputError                3   a model, folder or data file that we cannot take
│   └── DivergedError         3   training left the numbers; what was finished before is kept
├── ResourceError             4   not enough memory or disk
├── QualityError              5   a gate that the user set was not met
└── InterruptedRunError     130   Ctrl-C; the same command continues
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "DivergedError",
    "InputError",
    "InterruptedRunError",
    "QualityError",
    "QuantcliError",
    "ResourceError",
    "UsageError",
    "first_line",
    "nearest",
]


class QuantcliError(Exception):
    """An error with one line for the user and, where there is one, the command that would fix it."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(QuantcliError):
    """A flag, a name or a value that cannot be."""

    exit_code = 2


class InputError(QuantcliError):
    """A model, folder or data file that is missing, damaged or of a kind we do not support."""

    exit_code = 3


class DivergedError(InputError):
    """Training came to numbers that are not finite; what was finished before it is kept."""


class ResourceError(QuantcliError):
    """Not enough memory or disk for what was asked."""

    exit_code = 4


class QualityError(QuantcliError):
    """A quality gate that the user set was not met."""

    exit_code = 5


class InterruptedRunError(QuantcliError):
    """The user stopped the run; what is finished is kept."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """What a library's error says in its first line, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: the closest known name, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
