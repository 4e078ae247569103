"""A pass or a workflow of Olive as a space: which of its keys are chosen, and from what."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantcli.cli.configuration.expand import words_of
from quantcli.cli.configuration.keys import Key, Nested, Variants
from quantcli.cli.configuration.passes import PASSES
from quantcli.cli.configuration.searchable import SEARCHABLE, Values
from quantcli.errors import UsageError
from quantcli.options import QuantizeOptions
from quantcli.pipelines.tuning.space import Dimension, Point, Space

__all__ = ["is_configuration", "search_space"]

_SEARCH, _DEFAULT = "SEARCHABLE_VALUES", "DEFAULT_VALUE"
_OF_SEARCH = ("evaluators", "evaluator", "search_strategy")
_BESIDE = ("disable_search", "evaluator", "metric", "tuning_criterion")
_OF_RUN = {
    "data_config", "type", "config", *_BESIDE, "save_as_external_data", "all_tensors_to_one_file", "external_data_name",
    "convert_attribute", "calibration_sampling_size", "calibration_providers", "device", "backend", "domain",
    "quant_level", "excluded_precisions", "quant_preprocess",
}  # fmt: skip
"""Keys that choose nothing of how numbers are rounded: a pass with these alone is searched."""


def is_configuration(values: Any) -> bool:
    """Whether an object is a pass, named passes or a workflow, and not a space of our own options."""
    if not isinstance(values, dict):
        return False
    named = bool(values) and all(isinstance(v, dict) and "type" in v for v in values.values())
    return "type" in values or "passes" in values or named


@dataclass
class _Choices:
    """What is chosen in a configuration."""

    dimensions: list[Dimension] = field(default_factory=list)
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    """By dimension, where its value stands."""


def search_space(
    values: Mapping[str, Any],
    path: Path,
    typed: list[str],
    flags: Mapping[str, bool],
    names: Mapping[str, str],
    parse: Callable[[list[str]], QuantizeOptions],
) -> Space:
    """The space of a configuration.

    Args:
        values: As read.
        path: The file, for messages and scripts that lie beside it.
        typed: Flags of `quantize` that win over it.
        flags: Those of `quantize`, each with whether it takes a value.
        names: The same, each with the option that it sets.
        parse: Makes options of a command line of `quantize`.

    Raises:
        UsageError: a key without values to search, or what cannot be served.
    """
    root = copy.deepcopy(dict(values))
    for key in _OF_SEARCH:
        root.pop(key, None)
    if isinstance(root.get("engine"), dict):
        for key in _OF_SEARCH:
            root["engine"].pop(key, None)
    found = _Choices()
    for label, at, one in _passes(root):
        _read_pass(label, at, one, found, path)

    def make(point: Point) -> QuantizeOptions:
        chosen = copy.deepcopy(root)
        for dimension in found.dimensions:
            where = found.paths[dimension.name]
            if dimension.name in point:
                _put(chosen, where, point[dimension.name])
            else:
                _drop(chosen, where)
        return parse(words_of(chosen, path, typed, flags, names))

    def label_of(point: Point) -> str:
        shown = (f"{name}={str(v).lower() if isinstance(v, bool) else v}" for name, v in point.items())
        return " ".join(shown) or "as given"

    return Space(tuple(found.dimensions), make, label_of, str(path))


def _passes(root: dict[str, Any]) -> list[tuple[str, tuple[str | int, ...], dict[str, Any]]]:
    """Passes with the place of each; those with several versions have a place for the version."""
    if "type" in root:
        return [("", (), root)]
    places: tuple[str | int, ...] = ("passes",) if "passes" in root else ()
    held = root.get("passes", root)
    found = []
    for name, one in held.items() if isinstance(held, dict) else ():
        if isinstance(one, list) and len(one) == 1:
            one = held[name] = one[0]
        found.append((name, (*places, name), one))
    prefix = len(found) > 1
    return [(name if prefix else "", at, one) for name, at, one in found]


def _read_pass(label: str, at: tuple[str | int, ...], one: Any, found: _Choices, path: Path) -> None:
    prefix = f"{label}." if label else ""
    if isinstance(one, list):
        raise UsageError(
            f"{path}: pass {at[-1]!r} has {len(one)} versions", hint="write lists of values for the keys that differ"
        )
    if not isinstance(one, dict):
        return
    quiet = one.pop("disable_search", None) is True
    for key in _BESIDE[1:]:
        one.pop(key, None)
    inner = one["config"] if isinstance(one.get("config"), dict) else one
    where = (*at, "config") if inner is not one else at
    for key in _BESIDE[2:]:
        inner.pop(key, None)
    kind = next((name for name in PASSES if name.lower() == str(one.get("type", "")).lower()), None)
    if kind is None:  # the reader says what is wrong with it
        return
    documented = SEARCHABLE.get(kind, {})
    spec = PASSES[kind]
    keys: dict[str, Key | None] = {}
    for variant in spec.passes.values() if isinstance(spec, Variants) else (spec,):
        keys |= variant.keys
    if isinstance(spec, Variants):
        keys[spec.key] = None
    given = [key for key in _flat(inner, keys) if key not in ("type", "config", "data_config")]
    nothing_chosen = not quiet and bool(documented) and _OF_RUN.issuperset(given)
    order = [*documented, *(key for key in given if key not in documented)]
    for key in order:
        value = _at(inner, key)
        if nothing_chosen and key in documented:
            chosen: Values | None = documented[key]
        else:
            chosen = _asked(kind, key, value, documented, keys, quiet=quiet, path=path)
        if chosen is None:
            continue
        when = {prefix + other: tuple(v) for other, v in chosen.when.items() if _searched(other, found, prefix)}
        if any(
            not _searched(other, found, prefix) and _fixed(inner, other, documented) not in allowed
            for other, allowed in chosen.when.items()
        ):
            continue  # a choice that has a meaning only with another value of what is fixed
        name = prefix + key
        found.dimensions.append(Dimension(name, chosen.values, when=when))
        found.paths[name] = (*where, *key.split("."))


def _flat(inner: Mapping[str, Any], keys: Mapping[str, Key | None]) -> list[str]:
    """Keys, those of objects with keys of their own as `outer.inner`."""
    names: list[str] = []
    for key, value in inner.items():
        spec = keys.get(key)
        nested = spec is not None and isinstance(spec.to, Nested) and isinstance(value, dict)
        names += [f"{key}.{part}" for part in value] if nested else [key]
    return names


def _asked(
    kind: str,
    key: str,
    value: Any,
    documented: Mapping[str, Values],
    keys: Mapping[str, Key | None],
    *,
    quiet: bool,
    path: Path,
) -> Values | None:
    """What a key asks to be searched; None where it asks for nothing."""
    if value == _SEARCH:
        if quiet:
            raise UsageError(f'{path}: {kind}: "{key}" is to be searched, "disable_search" says no', hint="leave one")
        if key not in documented:
            raise UsageError(
                f'{path}: {kind}: "{key}" has no documented values to search',
                hint="give a list of values; those that have some: " + (", ".join(documented) or "none of this type"),
            )
        return documented[key]
    if not isinstance(value, list):
        return None
    outer, _, inner = key.partition(".")
    spec = keys.get(outer)
    if spec is not None and inner and isinstance(spec.to, Nested):
        spec = spec.to.keys.get(inner)
    if spec is not None and spec.kind.startswith("list"):
        return Values(tuple(value)) if value and all(isinstance(v, list) for v in value) else None
    when = documented[key].when if key in documented else {}
    return Values(tuple(value), when) if len(value) > 1 else None


def _searched(key: str, found: _Choices, prefix: str) -> bool:
    return prefix + key in found.paths


def _fixed(inner: Mapping[str, Any], key: str, documented: Mapping[str, Values]) -> Any:
    """The value of a key that is not chosen: as given, else the default."""
    value = _at(inner, key)
    if value is None or value == _DEFAULT:
        return documented[key].values[0]
    return value[0] if isinstance(value, list) and value else value


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _put(values: Any, where: tuple[str | int, ...], value: Any) -> None:
    for part in where[:-1]:
        values = values.setdefault(part, {}) if isinstance(values, dict) else values[part]
    values[where[-1]] = value


def _drop(values: Any, where: tuple[str | int, ...]) -> None:
    for part in where[:-1]:
        values = values.get(part, {})
    values.pop(where[-1], None)
