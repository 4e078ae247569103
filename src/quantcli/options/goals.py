"""What a search must reach: `kl<=0.05`, `accuracy>=reference-0.01`, `size<=60MB`."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from quantcli.errors import UsageError, nearest

__all__ = ["COSTS", "METRICS", "Goal", "Metric"]

METRICS = ("kl", "perplexity", "sqnr", "accuracy")
"""Figures of quality that quantcli measures itself."""
COSTS = ("size", "latency", "time")
"""Figures that are better where they are lower, whatever a model is good for."""
_HIGHER = ("sqnr", "accuracy")
_FORM = re.compile(
    r"\s*(?P<name>[^<>=]+?)\s*(?P<way><=|>=|<|>)\s*(?P<of>reference\s*(?P<sign>[-+*])?\s*)?"
    r"(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)?\s*(?P<unit>[kMG]?B)?\s*"
)
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_HINT = "write it as 'kl<=0.05', 'accuracy>=reference-0.01' or 'size<=60MB'"


@dataclass(frozen=True)
class Metric:
    """What tells how good a model is."""

    name: str
    """One of `METRICS`, or the name of a function."""
    script: str | None = None
    """The Python file of that function."""
    lower: bool = False
    """Whether lower is better."""

    @classmethod
    def parse(cls, text: str, lower: bool = False) -> "Metric":
        """From `kl`, or `script.py:function`.

        Args:
            text: As given.
            lower: Whether the number of a function is better where it is lower.

        Raises:
            UsageError: an unknown name.
        """
        script, colon, function = text.rpartition(":")
        if colon and script.endswith(".py") and function.isidentifier():
            return cls(function, script, lower)
        if text not in METRICS:
            raise UsageError(f"unknown --metric {text!r}, {nearest(text, METRICS)}", hint="or name FILE.py:FUNCTION")
        if lower and text in _HIGHER:
            raise UsageError(f"--lower-is-better is for functions, {text} is better where it is higher")
        return cls(text, None, text not in _HIGHER)


@dataclass(frozen=True)
class Goal:
    """A bound that a figure must keep."""

    name: str
    """The figure: a metric's name, or one of `COSTS`."""
    way: Literal["<=", ">=", "<", ">"]
    """On which side of the bound it must be."""
    number: float
    """The bound; with a sign, what is put to the float model's own figure."""
    sign: str = ""
    """`+`, `-` or `*`: the bound is the float model's figure with that much; empty: the number itself."""

    @classmethod
    def parse(cls, text: str) -> "Goal":
        """From `kl<=0.05`.

        Raises:
            UsageError: it is no bound on a figure.
        """
        found = _FORM.fullmatch(text)
        if found is None or (found["number"] is None and found["of"] is None):
            raise UsageError(f"--goal {text!r} says no bound", hint=_HINT)
        name, sign = found["name"], found["sign"] or ""
        if found["of"] and bool(found["sign"]) != bool(found["number"]):
            raise UsageError(f"--goal {text!r} says no bound", hint=_HINT)
        if found["unit"] and name != "size":
            raise UsageError(f"--goal {text!r}: {name} is not measured in {found['unit']}", hint=_HINT)
        number = float(found["number"] or 0.0) * _UNITS[found["unit"] or "B"]
        if not math.isfinite(number):
            raise UsageError(f"--goal {text!r}: the bound is not a finite number", hint=_HINT)
        way: Literal["<=", ">=", "<", ">"] = found["way"]  # type: ignore[assignment]
        return cls(name, way, number, (sign or "+") if found["of"] else "")

    @property
    def lower(self) -> bool:
        """Whether lower is better."""
        return self.way in ("<=", "<")

    def check(self, metric: Metric) -> None:
        """Refuses a bound on a figure that is not measured, or on its wrong side.

        Raises:
            UsageError: naming the figure.
        """
        known = (metric.name, *COSTS)
        if self.name not in known:
            raise UsageError(
                f"--goal {self}: {self.name} is not measured, {nearest(self.name, known)}",
                hint=f"add --metric {self.name}" if self.name in METRICS else None,
            )
        lower = metric.lower if self.name == metric.name else True
        if self.lower != lower:
            better = "lower" if lower else "higher"
            raise UsageError(
                f"--goal {self}: {self.name} is better where it is {better}",
                hint=f"write '{self.name}{'<=' if lower else '>='}…'",
            )

    def bound(self, reference: float | None) -> float:
        """The bound itself.

        Args:
            reference: The float model's figure, where the bound is relative to it.
        """
        if not self.sign:
            return self.number
        assert reference is not None
        return {"+": reference + self.number, "-": reference - self.number, "*": reference * self.number}[self.sign]

    def missed_by(self, value: float, reference: float | None) -> float:
        """How far a figure is on the wrong side, 0 or less where the goal holds."""
        bound = self.bound(reference)
        gap = value - bound if self.lower else bound - value
        return gap if gap or self.way in ("<=", ">=") else math.ulp(abs(bound))

    def __str__(self) -> str:
        reference = f"reference{self.sign}" if self.sign else ""
        return f"{self.name}{self.way}{reference}{self.number:g}"
