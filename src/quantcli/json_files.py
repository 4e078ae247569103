"""JSON files that are read: parsed, and held against a type that says what they must be."""

import json
from pathlib import Path
from typing import Any, TypeVar

from quantcli.errors import InputError

__all__ = ["as_type", "parse_json", "read_json"]

T = TypeVar("T")


def read_json(path: Path, expected: type[T], what: str, hint: str | None = None) -> T:
    """A file as a dataclass, a typed dictionary or plain values; keys that a dataclass does not know are left out.

    Args:
        path: The file.
        expected: What it must hold.
        what: The same in words, for the message: "a manifest of ours".
        hint: What to do where it does not.

    Raises:
        InputError: it cannot be read, is no JSON, or holds something else; the message names the place.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", hint) from error
    return parse_json(data, expected, f"{path} is not {what}", hint)


def parse_json(data: bytes | str, expected: type[T], refusal: str, hint: str | None = None) -> T:
    """JSON text as `read_json` takes it; `refusal` begins the message where it is something else.

    Raises:
        InputError: it is no JSON, or holds something else.
    """
    try:
        values = json.loads(data)
        # half of a surrogate pair can be written as an escape, and then neither printed nor kept
        json.dumps(values, ensure_ascii=False).encode()
    except RecursionError as error:
        raise InputError(f"{refusal}: it is nested too deeply", hint) from error
    except ValueError as error:
        raise InputError(f"{refusal}: not valid JSON: {error}", hint) from error
    return as_type(values, expected, refusal, hint)


def as_type(values: Any, expected: type[T], refusal: str, hint: str | None = None) -> T:
    """Plain values as a type; `refusal` begins the message where they are something else.

    Raises:
        InputError: they are.
    """
    import msgspec  # not on the path of --help

    try:
        return msgspec.convert(values, expected)
    except (msgspec.ValidationError, RecursionError) as error:
        raise InputError(f"{refusal}: {_plainly(str(error))}", hint) from error


def _plainly(complaint: str) -> str:
    """A complaint of msgspec in our words: `$.a.b` is where, as seen from the file."""
    text, _, place = complaint.partition(" - at `$")
    text = f"{text[:1].lower()}{text[1:]}".replace("`", "")
    return f"{place.strip('.`')}: {text}" if place.strip(".`") else text
