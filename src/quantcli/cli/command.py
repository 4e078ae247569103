"""What a command is: a name, an options dataclass, the flags that differ from its fields' names, and what runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantcli.cli.console import Console

__all__ = ["Command", "FlagStyle", "Request", "Talk"]


@dataclass(frozen=True)
class FlagStyle:
    """How one options field looks on the command line, where that is not what its name, type and default say."""

    names: tuple[str, ...] = ()
    """Spellings, such as ("-m", "--model"); empty: `--` and the field's name. No dashes: a positional argument."""
    metavar: str | None = None
    """What stands for the value in the help."""
    read: Callable[[Any], Any] | None = None
    """From the words given to the field's value; raises UsageError."""
    choices: tuple[str, ...] = ()
    """Values that shell completion offers."""


@dataclass(frozen=True)
class Talk:
    """How a command speaks."""

    json: bool = False
    """Print the result as JSON on stdout; everything else goes to stderr as ever."""
    quiet: bool = False
    """No plan, no progress, no notes; warnings, errors and the result only."""
    verbose: bool = False
    """Show what the libraries below say, and the traceback of every error."""


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    name: str
    """The word on the command line."""
    summary: str
    """What it does, in a sentence."""
    options: type[Any]
    """Frozen dataclass that a parsed command line becomes."""
    run: Callable[[Any, "Console"], Any]
    """Does it, and returns a result with `to_dict`."""
    show: Callable[[Any, "Console"], None]
    """Prints the result for people."""
    examples: tuple[str, ...]
    """Command lines for the end of the help."""
    styles: Mapping[str, FlagStyle] = field(default_factory=dict)
    """Field name to how its flag differs from the rule."""
    panels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Title to the fields below it; the rest stands under Options."""
    settings: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)
    """Shorthands for `--set KEY=VALUE`: flag to key and value; without a value it is the flag that takes one."""
    check: Callable[[Any], None] = lambda result: None
    """Raises where the result is not what the user required."""


@dataclass(frozen=True)
class Request:
    """A parsed command line."""

    command: Command
    """What to run."""
    options: Any
    """With which options."""
    talk: Talk
    """How to speak."""
