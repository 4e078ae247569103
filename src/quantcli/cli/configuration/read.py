"""JSON as people write configurations: with comments, and with or without the braces around named passes."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.errors import UsageError
from quantcli.options import ConfigurationFile

__all__ = ["ReadFile", "read_json"]

_MAX_BYTES = 1 << 20
_HINT = 'write one pass, as {"type": "GptqQuantizer", "bits": 4}, or a workflow with "passes"'
_PARTS = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)


@dataclass(frozen=True)
class ReadFile:
    """A configuration that was read."""

    values: Any
    """The object in it; what was not in braces is put into them."""
    file: ConfigurationFile
    """What a manifest keeps of it."""


def read_json(path: Path, *, lists: bool = False) -> ReadFile:
    """Reads an object, each file once: it may be a pipe; with `lists`, a list of objects is one too.

    Raises:
        UsageError: no such file, or it holds no object.
    """
    data = _bytes_of(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error.reason} at byte {error.start}", hint=_HINT) from error
    text = _without_comments(text)
    if not text.strip():
        raise UsageError(f"{path} is empty", hint=_HINT)
    if text.lstrip().startswith('"'):  # a piece of a larger file: "name": {…}, on its own, lines counted as there
        text = "{" + text.rstrip().removesuffix(",") + "}"
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", hint=error.hint) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}", hint=_HINT) from error
    if not isinstance(found, dict) and not (lists and isinstance(found, list)):
        raise UsageError(f"{path} holds a {_KINDS.get(type(found), 'null')}, expected an object", hint=_HINT)
    return ReadFile(found, ConfigurationFile(path.name, hashlib.sha256(data).hexdigest()))


_KINDS = {list: "list", str: "text", int: "number", float: "number", bool: "true or false"}


def _bytes_of(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"configuration {path} cannot be read: {error.strerror}", hint=_HINT) from error
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{path} is no configuration: it is larger than 1 MiB", hint=_HINT)
    return data


def _without_comments(text: str) -> str:
    """Comments become blanks, line breaks stay, so that an error names the right line; strings are left alone."""
    return _PARTS.sub(lambda part: part[1] or re.sub(r"[^\n]", " ", part[0]), text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{twice!r} is given twice", hint="leave one out")
    return found


def _refuse_constant(text: str) -> Any:
    raise UsageError(f"{text} is not a value that an option can have", hint="write a number, true, false or a text")
