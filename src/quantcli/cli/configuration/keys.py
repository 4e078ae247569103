"""What the keys of a configuration may hold, and what becomes of them on our command line."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from quantcli.cli.aliases import Dropped, Refused, Rename, Setting, Switch, Words, describe

__all__ = [
    "Data",
    "Key",
    "Keys",
    "Kind",
    "Missing",
    "Names",
    "Nested",
    "Overrides",
    "Pass",
    "Together",
    "Variants",
    "describe_key",
    "only",
]

Kind = Literal["whole number", "number", "true or false", "text", "list of texts", "object", "list of objects", "any"]


@dataclass(frozen=True)
class Names:
    """Names that are flags' regular expressions here, one flag for each."""

    to: str
    whole: bool = False
    """Whether only the whole name is meant, not what contains it."""


@dataclass(frozen=True)
class Overrides:
    """Other settings for some layers, by name or `re:REGEX`."""


@dataclass(frozen=True)
class Data:
    """A data configuration, by name or in place."""


@dataclass(frozen=True)
class Nested:
    """An object, or a list of objects, with keys of its own."""

    keys: Mapping[str, "Key"]


@dataclass(frozen=True)
class Missing:
    """A value that names what is not here."""

    hint: str


@dataclass(frozen=True)
class Together:
    """Two keys that only together say something; the other one's own entry is None."""

    other: tuple[str, ...]
    """Names that the other one may have."""
    words: Mapping[tuple[str | None, str | None], tuple[str, ...]]
    """Values of this key and the other, None where it is not given, to our words."""


To = Rename | Words | Setting | Switch | Dropped | Refused | Names | Overrides | Data | Missing | Nested | Together


@dataclass(frozen=True)
class Key:
    """What a key may hold and what becomes of it."""

    kind: Kind
    to: To | None
    """None: another key says what becomes of it."""


Keys = Mapping[str, Key]


@dataclass(frozen=True)
class Pass:
    """One type of pass."""

    words: tuple[str, ...]
    """What it means without any key; a key may say otherwise."""
    keys: Keys
    simulating: tuple[str, ...] = ()
    """What it means, too, where it rounds activations or the cache."""
    data_hint: str = field(default="add --data FILE, text to calibrate on", kw_only=True)
    """What to do where it names data that nobody defined."""


@dataclass(frozen=True)
class Variants:
    """A type of pass that is one of several by a key of its own."""

    key: str
    default: str
    passes: Mapping[str, Pass]


def describe_key(key: Key) -> str:
    """What becomes of it, in Markdown."""
    match key.to:
        case None:
            return "see the other keys"
        case Data():
            return 'calibration data: an object, or its name under "data_configs"; a data flag wins'
        case Names(flag, whole):
            return f"`{flag}`, once for each {'name' if whole else 'part of a name'}"
        case Overrides():
            return "`--override`, once for each name or `re:REGEX`, with `bits`, `group_size`, `sym`"
        case Nested(inner):
            return f"an object with {', '.join(f'`{name}`' for name in inner)}"
        case Missing(hint):
            return f"refused: not in quantcli yet; {hint}"
        case Together(other, words):
            told = [
                f"{first or 'nothing'} with {second or 'nothing'}: `{' '.join(ours)}`"
                for (first, second), ours in words.items()
            ]
            return f"with {' or '.join(f'`{name}`' for name in other)}: {'; '.join(told)}"
        case alias:
            return describe(alias)


def only(kind: Kind, why: str, *values: str) -> Key:
    """A key that asks for what is so anyway, with these values; with any where none is named."""
    return Key(kind, Dropped(why, value=bool(values), only=values))
