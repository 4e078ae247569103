"""From the keys of a configuration to words of the command line."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantcli.cli.aliases import Dropped, Refused, apply
from quantcli.cli.configuration.keys import Data, Key, Keys, Kind, Missing, Names, Nested, Overrides, Together
from quantcli.errors import UsageError, nearest

__all__ = ["Said", "is_given", "translate"]

_DEFAULT, _SEARCH = "DEFAULT_VALUE", "SEARCHABLE_VALUES"
_ARTICLES: Mapping[str, str] = {"true or false": "", "object": "an "}
_MAX = sys.float_info.max
_OVERRIDE_KEYS = {"bits": "bits", "group_size": "group_size", "sym": "sym", "symmetric": "sym"}


@dataclass
class Said:
    """What a configuration says, in words of the command line."""

    words: list[str] = field(default_factory=list)
    """Flags and their values, aliases among them."""
    notes: list[str] = field(default_factory=list)
    """What there is to tell."""
    data: list[Any] = field(default_factory=list)
    """Data configurations: a name or an object."""
    idle: dict[str, list[str]] = field(default_factory=dict)
    """Why something has nothing to do, and the keys of which that is so."""

    def told(self) -> list[str]:
        """All that there is to tell, one line for each reason."""
        shared = [
            f"{', '.join(keys)} {'has' if len(keys) == 1 else 'have'} nothing to do: {why}"
            for why, keys in self.idle.items()
        ]
        return [*self.notes, *shared]


def is_given(value: Any) -> bool:
    """Whether a value says anything: null, what is empty and "DEFAULT_VALUE" leave the default."""
    return value is not None and value not in ({}, [], "", _DEFAULT)


def translate(owner: str, values: Mapping[str, Any], keys: Keys, said: Said) -> None:
    """Adds to `said` what `values` say.

    Args:
        owner: What has these keys, as errors call it.
        values: What was read.
        keys: What it may hold.
        said: Gets the words.

    Raises:
        UsageError: an unknown key, a value that it cannot have, or what cannot be served.
    """
    for name in values:
        if name not in keys:
            raise UsageError(
                f"{owner} has no key {name!r}, {nearest(name, keys)}", hint="docs/configurations.md lists the keys"
            )
    for name, key in keys.items():  # in the table's order: what decides comes first
        if isinstance(key.to, Together):
            said.words += _together(owner, name, key, values, keys)
        elif is_given(values.get(name)):
            _translate_one(owner, name, key, values[name], said)


def _translate_one(owner: str, name: str, key: Key, value: Any, said: Said) -> None:
    called, to = f'"{name}"', key.to
    if value == _SEARCH:
        raise UsageError(f"{owner}: {called} asks for a search", hint="use `quantcli tune`, or name a value")
    if to is None or isinstance(to, Together):
        _checked(owner, called, key.kind, value)
        return
    if isinstance(to, Data):
        said.data.append(_checked(owner, called, "text" if isinstance(value, str) else "object", value))
        return
    if isinstance(to, Refused):
        apply(to, called, [], owner, said.notes)
    value = _checked(owner, called, key.kind, value)
    match to:
        case Nested(inner):
            for part in value if isinstance(value, list) else [value]:
                translate(f"{called} of {owner}", part, inner, said)
        case Missing(hint):
            raise UsageError(f"{owner}: {value} is not in quantcli yet", hint=hint)
        case Names(flag, whole):
            escaped = [re.escape(text) for text in value]
            said.words += [w for text in escaped for w in (flag, f"^{text}$" if whole else text)]
        case Overrides():
            said.words += _overrides(owner, called, value)
        case _:
            try:
                said.words += apply(to, called, _texts(value), owner, [] if isinstance(to, Dropped) else said.notes)
            except UsageError as error:
                raise UsageError(f"{owner}: {error.message}", hint=error.hint) from error
            if isinstance(to, Dropped) and called not in said.idle.setdefault(to.why, []):
                said.idle[to.why].append(called)


def _together(owner: str, name: str, key: Key, values: Mapping[str, Any], keys: Keys) -> Sequence[str]:
    assert isinstance(key.to, Together)
    others = [other for other in key.to.other if is_given(values.get(other))]
    if len(others) > 1:
        raise UsageError(f"{owner}: {others[0]!r} and {others[1]!r} are the same", hint="leave one out")
    given: list[str | None] = []
    for known in (name, *(others or key.to.other[:1])):
        value = values.get(known)
        if value == _SEARCH:
            raise UsageError(f'{owner}: "{known}" asks for a search', hint="use `quantcli tune`, or name a value")
        given.append(_texts(_checked(owner, f'"{known}"', keys[known].kind, value))[0] if is_given(value) else None)
    if given == [None, None]:
        return ()
    first, second = given
    found = key.to.words.get((first, second))
    if found is not None:
        return found
    allowed = sorted({b or "" for a, b in key.to.words if a == first} - {""})
    if not allowed:
        allowed = sorted({a or "" for a, _ in key.to.words} - {""})
        raise UsageError(f'{owner}: unknown "{name}" {first!r}, {nearest(str(first), allowed)}', hint="name another")
    beside = f' beside "{name}" {first!r}' if first is not None else ""
    raise UsageError(
        f"{owner}: unknown {(others or key.to.other)[0]!r} {second!r}{beside}", hint=f"one of {', '.join(allowed)}"
    )


def _checked(owner: str, called: str, kind: Kind, value: Any) -> Any:
    """The value, of the right kind; one in a list is that one.

    Raises:
        UsageError: it is of another kind.
    """
    if kind == "any":
        return value
    if kind.startswith("list"):
        value = value if isinstance(value, list) else [value]
        inner = str if kind == "list of texts" else dict
        right = all(isinstance(part, inner) for part in value)
    else:
        if isinstance(value, list):
            if len(value) > 1:
                raise UsageError(
                    f"{owner}: {called} has {len(value)} values: to choose among them is a search",
                    hint="use `quantcli tune`, or name one value",
                )
            value = value[0]
        right = _is_of(kind, value)
    if not right:
        shown = value if len(repr(value)) < 60 else "something else"
        raise UsageError(
            f"{owner}: {called} is {_ARTICLES.get(kind, 'a ')}{kind}, got {shown!r}",
            hint="docs/configurations.md lists the keys",
        )
    return value


def _is_of(kind: Kind, value: Any) -> bool:
    match kind:
        case "whole number":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool) and -_MAX < value < _MAX
        case "true or false":
            return isinstance(value, bool)
        case "object":
            return isinstance(value, dict)
        case _:
            return isinstance(value, str)


def _texts(value: Any) -> list[str]:
    """As words of a command line."""
    return [str(part) for part in value] if isinstance(value, list) else [str(value)]


def _overrides(owner: str, called: str, value: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for layer, settings in value.items():
        pattern = layer.removeprefix("re:") if layer.startswith("re:") else re.escape(layer)
        if not isinstance(settings, dict) or not settings:
            raise UsageError(f"{owner}: {called} says nothing of {layer!r}", hint=f'write "{layer}": {{"bits": 8}}')
        parts = []
        for key, given in settings.items():
            if key not in _OVERRIDE_KEYS:
                raise UsageError(
                    f"{owner}: {called} of {layer!r} has no key {key!r}, {nearest(key, _OVERRIDE_KEYS)}",
                    hint="bits, group_size and sym can be others",
                )
            kind: Kind = "true or false" if _OVERRIDE_KEYS[key] == "sym" else "whole number"
            checked = _checked(owner, f'{called} of {layer!r}: "{key}"', kind, given)
            parts.append(f"{_OVERRIDE_KEYS[key]}={str(checked).lower()}")
        words += ["--override", f"{pattern}={','.join(parts)}"]
    return words
