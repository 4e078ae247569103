"""What a search may choose: dimensions, of which some are there only where others have certain values."""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from quantcli.errors import QuantcliError, UsageError
from quantcli.options import QuantizeOptions

__all__ = ["Dimension", "Point", "Space", "checked"]

Point: TypeAlias = dict[str, Any]
"""Values by the names of dimensions."""

_ENUMERATED = 4096
"""Points that are checked one by one; of larger spaces, a draw of as many."""


@dataclass(frozen=True)
class Dimension:
    """One thing to choose."""

    name: str
    """Different from all others' of a space."""
    values: tuple[Any, ...] = ()
    """What it may be; empty: a range of numbers."""
    low: float = 0.0
    """Of a range."""
    high: float = 0.0
    """Of a range, included."""
    step: float | None = None
    """Of a range with steps."""
    log: bool = False
    """Whether a range is drawn from by its logarithm."""
    whole: bool = False
    """Whether the numbers of a range are whole."""
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """By the names of earlier dimensions, the values with which there is this one; one that is absent has none."""

    def there(self, point: Mapping[str, Any]) -> bool:
        """Whether a point with these choices has it."""
        return all(name in point and point[name] in values for name, values in self.when.items())

    def listed(self) -> tuple[Any, ...] | None:
        """All values; None of a range without steps."""
        if self.values:
            return self.values
        if self.step is None and not self.whole:
            return None
        step = self.step or 1
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        found = [self.low + i * step for i in range(count)]
        return tuple(round(v) if self.whole else v for v in found)

    def ends(self) -> tuple[Any, ...]:
        """Values that show whether the others can be had: all of a list, both ends of a range."""
        if self.values:
            return self.values
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)


@dataclass(frozen=True)
class Space:
    """Dimensions, and what a point of them means."""

    dimensions: tuple[Dimension, ...]
    """Those that others depend on come first."""
    make: Callable[[Point], QuantizeOptions]
    """The options of `quantize`; raises UsageError where they cannot be."""
    label: Callable[[Point], str]
    """How a trial is called."""
    origin: str
    """Where it comes from, for messages."""
    skipped: int = 0
    """Points that cannot be; nobody is to ask for them."""
    why: str = ""
    """Why the first of them cannot be."""

    def points(self, ends: bool = False) -> Iterator[Point]:
        """All points in order, the last dimension fastest; with `ends`, ranges have their ends alone.

        Raises:
            ValueError: there are infinitely many.
        """

        def below(number: int, point: Point) -> Iterator[Point]:
            if number == len(self.dimensions):
                yield dict(point)
                return
            dimension = self.dimensions[number]
            if not dimension.there(point):
                yield from below(number + 1, point)
                return
            values = dimension.ends() if ends else dimension.listed()
            if values is None:
                raise ValueError(f"{dimension.name} is a range")
            for value in values:
                yield from below(number + 1, point | {dimension.name: value})

        yield from below(0, {})

    @property
    def finite(self) -> bool:
        """Whether its points can be listed."""
        return all(d.listed() is not None for d in self.dimensions)

    def draw(self, generator: random.Random) -> Point:
        """A point, ranges by their ends."""
        point: Point = {}
        for dimension in self.dimensions:
            if dimension.there(point):
                point[dimension.name] = generator.choice(dimension.ends())
        return point

    def allowed(self, point: Point) -> bool:
        """Whether its options can be."""
        try:
            self.make(point)
        except UsageError:
            return False
        return True


def checked(space: Space, check: Callable[[QuantizeOptions], None]) -> Space:
    """The space, once every value of it is known to be possible together with some of the others.

    Args:
        space: Any.
        check: Raises where options cannot be, beyond what they refuse themselves.

    Returns:
        The same space with points that cannot be counted; `make` refuses them.

    Raises:
        UsageError: a value that goes with no others, or no point at all; before anything is tried.
    """

    def make(point: Point) -> QuantizeOptions:
        options = space.make(point)
        check(options)
        return options

    tried = list(itertools.islice(space.points(ends=True), _ENUMERATED + 1))
    if len(tried) > _ENUMERATED:
        generator = random.Random(0)
        tried = tried[: _ENUMERATED // 2] + [space.draw(generator) for _ in range(_ENUMERATED // 2)]
    reasons: dict[tuple[str, str], QuantcliError] = {}
    seen: set[tuple[str, str]] = set()
    refused: list[tuple[Point, QuantcliError]] = []
    for point in tried:
        try:
            make(point)
        except UsageError as error:
            refused.append((point, error))
        else:
            seen |= {_key(*item) for item in point.items()}
    for point, refusal in refused:
        for item in point.items():
            reasons.setdefault(_key(*item), refusal)
    if refused and not seen:
        raise UsageError(f"{space.origin}: {refused[0][1].message}", hint=refused[0][1].hint)
    for dimension in space.dimensions:
        for value in dimension.ends():
            key = _key(dimension.name, value)
            if key not in seen and key in reasons:
                said = f"{dimension.name} {_shown(value)}: {reasons[key].message}"
                raise UsageError(f"{space.origin}: {said}", hint=reasons[key].hint)
    why = refused[0][1].message if refused else ""
    return Space(space.dimensions, make, space.label, space.origin, len(refused), why)


def _key(name: str, value: Any) -> tuple[str, str]:
    return name, json.dumps(value, default=str)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def token(value: Any) -> bool | int | float | str:
    """A value as Optuna's categories have it."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def values_of(dimension: Dimension) -> Sequence[bool | int | float | str]:
    """All of a list, as tokens."""
    return [token(value) for value in dimension.values]
