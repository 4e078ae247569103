"""Regular expressions of flags, checked where they are given."""

import re

from quantcli.errors import UsageError

__all__ = ["compile_regex"]


def compile_regex(pattern: str, flag: str) -> str:
    """The pattern itself, once it is known to be a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{flag} {pattern!r} is not a regular expression: {error}") from error
    return pattern
