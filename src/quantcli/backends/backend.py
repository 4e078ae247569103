"""What a backend is: an external package that quantizes instead of our own code, and what it can be asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from quantcli.errors import UsageError, nearest

__all__ = ["Backend", "Method", "Setting"]


@dataclass(frozen=True)
class Setting:
    """An option of a method, given as `--set NAME=VALUE`."""

    default: bool | int | float | str
    """Its type is the option's."""
    help: str
    """What it does."""
    choices: tuple[str, ...] = ()
    """Texts that it may be; none: any."""
    least: float | None = None
    """The least that a number may be."""

    def read(self, name: str, text: str) -> bool | int | float | str:
        """The value that a word stands for.

        Raises:
            UsageError: it is of another type, out of range or not among the choices.
        """
        kind = type(self.default)
        allowed = " or ".join(self.choices) or {bool: "true or false", int: "a whole number", float: "a number"}.get(
            kind, ""
        )
        try:
            value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError) as error:
            raise UsageError(f"--set {name}={text} is not {allowed}") from error
        if self.choices and value not in self.choices:
            raise UsageError(f"--set {name}={text}: {nearest(text, self.choices)}", hint=f"it is {allowed}")
        if self.least is not None and not float(value) >= self.least:  # also what is no number
            raise UsageError(f"--set {name}={text} must be {self.least:g} or more")
        return value


@dataclass(frozen=True)
class Method:
    """One thing that a backend does."""

    summary: str
    """In a few words."""
    bits: tuple[int, ...]
    """Widths of weights; the first is taken where none is asked for."""
    calibrates: bool = False
    """Whether it looks at calibration data."""
    group_size: int | None = None
    """Columns that share a scale where nothing is said; None: there are no groups to choose."""
    group_sizes: tuple[int, ...] = ()
    """Those that it takes, -1 for one scale per row; none: any."""
    symmetric: bool | None = None
    """Grid where nothing is said; None: there is no choice."""
    grids: tuple[bool, ...] = (True, False)
    """Grids that it takes: symmetric, asymmetric."""
    takes: frozenset[str] = frozenset()
    """Further options of `quantize`, and of graphs, that reach it, by field."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """Its own options by name."""
    formats: tuple[str, ...] = ()
    """As in `--format`, what it stores checkpoints in; with two, the first is for symmetric grids."""
    aliases: tuple[str, ...] = ()
    """What our own command line, or a pass configuration, calls it."""
    warning: str = ""
    """What to say wherever it is asked for."""
    opset: int | None = None
    """Of graphs: the least that its result needs; the graph is converted first."""
    optimized: bool = True
    """Of graphs: whether onnxruntime runs its result with graph optimizations, as users open it."""
    cuda_only: bool = False
    """Whether it needs a GPU where its backend does not."""


@dataclass(frozen=True)
class Backend:
    """An external package."""

    name: str
    """As on the command line."""
    package: str
    """As package indexes call it."""
    summary: str
    """What it is for."""
    input: Literal["checkpoint", "onnx"]
    """Kind of model that it takes."""
    methods: Mapping[str, Method]
    """What it does, by the name for `-a`; the first is taken where none is named."""
    imports: tuple[str, ...]
    """Modules that have to be importable in its environment."""
    packages: tuple[str, ...]
    """Packages whose versions a manifest keeps."""
    own_environment: bool = True
    """Whether it needs one; else it runs in quantcli's."""
    processors: tuple[Literal["cpu", "cuda"], ...] = ("cpu",)
    """Where it runs, as tried."""
    size_mb: int = 0
    """Of its environment, as measured."""
    instead: str = ""
    """What to use where its processor is missing."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that it needs."""

    def find_method(self, word: str | None) -> tuple[str, Method]:
        """The method of a name or alias; the first where none is given.

        Raises:
            UsageError: there is none of that name.
        """
        if word is None:
            return next(iter(self.methods.items()))
        for name, method in self.methods.items():
            if word == name or word in method.aliases:
                return name, method
        raise UsageError(
            f"{self.name} has no {word!r}, {nearest(word, self.methods)}", hint=f"quantcli backends list {self.name}"
        )

    def plain(self) -> dict[str, Any]:
        """For machines: what is known of it without looking at the disk."""
        return {
            "name": self.name,
            "package": self.package,
            "summary": self.summary,
            "input": self.input,
            "methods": {name: method.summary for name, method in self.methods.items()},
            "processors": list(self.processors),
        }
