"""From the fields of an options dataclass to flags, and from parsed flags back to the dataclass.

A field `group_size: int = 64` is the flag `--group-size INTEGER [default: 64]` with the field's docstring as its help.
Nested dataclasses are laid flat. What cannot be told from the field stands in the command's `styles`.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer

from quantcli.cli.command import Command, FlagStyle, Request, Talk
from quantcli.cli.docs import field_docs
from quantcli.errors import UsageError

__all__ = ["Flag", "flags_of", "parse_duration", "parse_settings", "parse_size", "typer_function"]

_TALK_STYLES = {"quiet": FlagStyle(("-q", "--quiet")), "verbose": FlagStyle(("-v", "--verbose"))}
_METAVARS: dict[Any, str] = {str: "TEXT", Path: "FOLDER", int: "N", float: "X"}
_SIZES = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a whole number") from error


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a number") from error
    if not math.isfinite(value):
        raise typer.BadParameter(f"{text!r} is not a finite number")
    return value


_NUMBERS: dict[Any, Callable[[str], Any]] = {int: _whole_number, float: _number}


@dataclass(frozen=True)
class Flag:
    """One flag or positional argument."""

    name: str
    """Name of the field it sets."""
    path: tuple[str, ...]
    """Fields from the options dataclass down to it, its own name last."""
    annotation: Any
    """What typer parses it as: str, int, float, bool, Path or a list of str; None allowed where that is the default."""
    default: Any
    """Value where it is not given; MISSING where it must be."""
    help: str
    """The field's docstring."""
    panel: str
    """Heading it stands under."""
    style: FlagStyle
    """How it looks where that is not the rule."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its spellings, on/off pairs as typer writes them."""
        plain = "--" + self.name.replace("_", "-")
        if self.style.names:
            return self.style.names
        return (f"{plain}/--no-{plain[2:]}",) if self.default is True else (plain,)

    def typer_parameter(self) -> inspect.Parameter:
        """The keyword parameter that typer makes a flag of."""
        required = self.default is MISSING
        default = ... if required else self.default
        kind = next((t for t in get_args(self.annotation) if t is not NoneType), self.annotation)
        common: dict[str, Any] = {"help": self.help, "rich_help_panel": self.panel}
        common["metavar"] = self.style.metavar or _METAVARS.get(kind)
        if kind in _NUMBERS:
            common["parser"] = _NUMBERS[kind]
        if self.style.choices:
            common["autocompletion"] = _completer(self.style.choices)
        if self.positional:
            info = typer.Argument(default, show_default=not required, **common)
        else:
            shown = not (required or default is False or default is None or default == [])
            shown = shown or any("/" in name for name in self.names)
            info = typer.Option(default, *self.names, show_default=shown, **common)
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=self.annotation)

    @property
    def positional(self) -> bool:
        """Whether it is an argument and not a flag."""
        return bool(self.style.names) and not self.style.names[0].startswith("-")

    def read(self, value: Any) -> Any:
        """The field's value from what typer parsed."""
        if self.style.read is None or value is None:
            return tuple(value) if isinstance(value, list) else value
        return self.style.read(value)


def flags_of(command: Command) -> list[Flag]:
    """Every flag of a command, in the order of its fields, then those about how it speaks."""
    panels = {name: title for title, names in command.panels.items() for name in names}
    flags = list(_flags_of_type(command.options, command.styles, panels))
    for name, (key, word) in command.settings.items():
        style = command.styles.get(name, FlagStyle() if word else FlagStyle(metavar="VALUE"))
        annotation: Any = bool if word else str | None
        default = False if word else None
        text = f"Short for --set {key}={word or 'VALUE'}."
        flags.append(Flag(name, ("settings", name), annotation, default, text, panels.get(name, "Options"), style))
    talk = _flags_of_type(Talk, _TALK_STYLES, {}, path=("talk",), default_panel="Output")
    return flags + talk


def typer_function(command: Command) -> Callable[..., Request]:
    """A function whose signature typer turns into the command's flags, and which returns what was asked for."""
    flags = flags_of(command)

    def parse(**values: Any) -> Request:
        return _request(command, flags, values)

    parse.__signature__ = inspect.Signature([f.typer_parameter() for f in flags])  # type: ignore[attr-defined]
    parse.__annotations__ = {f.name: f.annotation for f in flags}
    return parse


def parse_size(text: str) -> int:
    """Bytes from `4GB`, `500MB`, `1.5GiB` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)", text.strip().lower())
    if match is None or (match[3] and not match[2]):
        raise UsageError(f"{text!r} is not a size", hint="write it as 4GB, 500MB or 3.5GiB")
    unit = _SIZES[match[2]]
    if match[3]:
        unit = 1024 ** ("kmgt".index(match[2]) + 1)
    size = int(float(match[1]) * unit)
    if size < 1:
        raise UsageError(f"a size of {text!r} is nothing", hint="write it as 4GB, 500MB or 3.5GiB")
    return size


def parse_duration(text: str) -> float:
    """Seconds from `90`, `90s`, `30m` or `1.5h`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match is not None else 0.0
    if seconds <= 0:
        raise UsageError(f"{text!r} is not a time", hint="write it as 90s, 30m or 2h")
    return seconds


def parse_settings(words: list[str]) -> dict[str, str]:
    """Algorithm options from `KEY=VALUE` words; a key given twice is an error."""
    settings: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.strip().replace("-", "_")
        if not (key and equals and value):
            raise UsageError(f"--set {word!r} is not of the form KEY=VALUE", hint="write --set damp_percent=0.05")
        _put(settings, key, value.strip())
    return settings


def _put(settings: dict[str, str], key: str, value: str) -> None:
    if key in settings:
        raise UsageError(
            f"algorithm option {key} is given twice: {settings[key]!r} and {value!r}", hint="leave one out"
        )
    settings[key] = value


def _flags_of_type(
    owner: Any,
    styles: Mapping[str, FlagStyle],
    panels: Mapping[str, str],
    path: tuple[str, ...] = (),
    default_panel: str = "Options",
) -> list[Flag]:
    flags: list[Flag] = []
    hints, docs = get_type_hints(owner), field_docs(owner)
    for spec in fields(owner):
        hint: Any = hints[spec.name]
        here = (*path, spec.name)
        if is_dataclass(hint):
            flags += _flags_of_type(hint, styles, panels, here, panels.get(spec.name, default_panel))
            continue
        default: Any = spec.default if spec.default_factory is MISSING else spec.default_factory()
        annotation = _parsed_as(hint, styles.get(spec.name))
        if default in ((), {}):
            default = []
        panel = panels.get(spec.name, default_panel)
        style = styles.get(spec.name, FlagStyle())
        flags.append(Flag(spec.name, here, annotation, default, docs.get(spec.name, ""), panel, style))
    return flags


def _parsed_as(hint: Any, style: FlagStyle | None) -> Any:
    """What typer parses: simple types as they are, several words as a list, what a reader takes as text."""
    optional = get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)
    inner = next(t for t in get_args(hint) if t is not NoneType) if optional else hint
    if get_origin(inner) in (tuple, dict, list):
        return list[str]
    if style is not None and style.read is not None:
        inner = str
    if inner not in (str, int, float, bool, Path):
        raise TypeError(f"no flag can be made of {hint}; give it a FlagStyle with `read`")
    return inner | None if optional else inner


def _completer(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def _request(command: Command, flags: list[Flag], values: dict[str, Any]) -> Request:
    tree: dict[str, Any] = {}
    shorthands: dict[str, str] = {}
    for flag in flags:
        value = values[flag.name]
        if flag.path[0] == "settings" and len(flag.path) == 2:
            if value is not None and value is not False:
                key, word = command.settings[flag.name]
                shorthands[key] = word or value
            continue
        branch = tree
        for step in flag.path[:-1]:
            branch = branch.setdefault(step, {})
        branch[flag.name] = flag.read(value)
    for key, text in shorthands.items():
        _put(tree["settings"], key, text)
    talk = Talk(**tree.pop("talk"))
    if talk.quiet and talk.verbose:
        raise UsageError("--quiet and --verbose exclude each other", hint="leave one out")
    return Request(command, _build(command.options, tree), talk)


def _build(owner: type[Any], tree: dict[str, Any]) -> Any:
    hints: dict[str, Any] = get_type_hints(owner)
    return owner(**{k: _build(hints[k], v) if is_dataclass(hints[k]) else v for k, v in tree.items()})
