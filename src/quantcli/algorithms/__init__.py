"""The algorithms; the folder listing is the registry.

An algorithm is one file: idea and paper, a frozen options dataclass, a pure function on tensors, and `ALGORITHM`. Files
import torch inside their functions only: `quantcli algorithms` lists them without waiting for it.
"""

import dataclasses
import importlib
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quantcli.errors import UsageError, nearest

__all__ = ["ALGORITHMS", "Algorithm", "find", "make_options"]

Calibration = Literal["none", "optional", "required"]


@dataclass(frozen=True)
class Algorithm:
    """One algorithm and what it can do."""

    name: str
    """As on the command line; the file's name."""
    kind: Literal["rounder", "transform"]
    """rounder: weight to codes; transform: float model to float model of the same function."""
    summary: str
    """One line."""
    bits: tuple[int, ...]
    """Widths it makes."""
    calibration: Calibration
    """Whether it needs the statistics of calibration text."""
    options: type
    """Frozen dataclass of its own options; the fields' docstrings are their help."""
    run: Callable[..., Any]
    """rounder: (weight [N, K], scheme, options, statistics or None) -> QuantizedTensor."""
    inputs: tuple[str, ...] = ("checkpoint",)
    """Kinds of model it takes."""
    formats: tuple[str, ...] = ("gptq",)
    """Formats that hold its result exactly."""


def _load() -> Iterator[Algorithm]:
    for kind in pkgutil.iter_modules(__path__):
        package = importlib.import_module(f"{__name__}.{kind.name}")
        for module in pkgutil.iter_modules(package.__path__):
            found = importlib.import_module(f"{package.__name__}.{module.name}")
            yield found.ALGORITHM


ALGORITHMS: Mapping[str, Algorithm] = {a.name: a for a in _load()}


def find(name: str) -> Algorithm:
    """The algorithm of that name, or a UsageError that names the nearest."""
    if name not in ALGORITHMS:
        raise UsageError(f"unknown algorithm {name!r}, {nearest(name, ALGORITHMS)}", hint="see `quantcli algorithms`")
    return ALGORITHMS[name]


def make_options(algorithm: Algorithm, settings: Mapping[str, str]) -> Any:
    """The algorithm's options from text values; unknown keys and values of the wrong type are usage errors."""
    types = typing.get_type_hints(algorithm.options)
    values: dict[str, Any] = {}
    for key, text in settings.items():
        name = key.replace("-", "_")
        if name not in types:
            known = [f.name for f in dataclasses.fields(algorithm.options)]
            what = nearest(name, known) if known else "it has none"
            raise UsageError(
                f"{algorithm.name} has no option {key!r}, {what}", hint=f"see `quantcli algorithms {algorithm.name}`"
            )
        values[name] = _parse(algorithm.name, name, text, types[name])
    return algorithm.options(**values)


def _parse(algorithm: str, name: str, text: str, wanted: Any) -> Any:
    choices = typing.get_args(wanted) if typing.get_origin(wanted) is Literal else ()
    if choices:
        if text not in choices:
            raise UsageError(f"{algorithm}: {name} is one of {', '.join(choices)}, got {text!r}")
        return text
    if wanted is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{algorithm}: {name} is true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return wanted(text)
    except ValueError as error:
        raise UsageError(f"{algorithm}: {name} is a {wanted.__name__}, got {text!r}") from error
