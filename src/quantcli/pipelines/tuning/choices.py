"""A space in the words of `quantize`: an object of options, each with a value, a list of values or a range."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from quantcli.algorithms import ALGORITHMS, find_chain
from quantcli.errors import UsageError, nearest
from quantcli.options import CalibrationOptions, GraphOptions, Override, QuantizeOptions
from quantcli.pipelines.tuning.space import Dimension, Point, Space

__all__ = ["make_space", "without_idle_data"]

_RUN = {
    "model", "output", "config", "device", "max_memory", "trust_remote_code", "evaluate", "force", "dry_run",
    "a_bits", "a_symmetric", "a_clip_ratio", "k_bits", "v_bits", "kv_symmetric", "kv_clip_ratio", "kv_group_size",
    "calibration_cache", "debug_activations", "smaller_only",
}  # fmt: skip
"""Options of a run that are no choice."""
_OTHER_NAMES = {"sym": "symmetric", "override": "overrides", "for": "readers"}
_RANGE = ("low", "high", "step", "log")
_VARIANT = "variant"


@dataclass(frozen=True)
class _Field:
    """An option of `quantize`."""

    path: tuple[str, ...]
    kind: type
    several: bool
    """Whether it is a tuple of these."""
    optional: bool


@cache
def _fields(owner: type = QuantizeOptions, path: tuple[str, ...] = ()) -> Mapping[str, _Field]:
    found: dict[str, _Field] = {}
    hints = get_type_hints(owner)
    for spec in fields(owner):
        hint, here = hints[spec.name], (*path, spec.name)
        if is_dataclass(hint) and spec.name in ("calibration", "graph"):
            found |= _fields(hint, here)  # type: ignore[arg-type]
        elif spec.name not in _RUN | {"settings", "simulation"}:
            optional = get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)
            inner = next(t for t in get_args(hint) if t is not NoneType) if optional else hint
            several = get_origin(inner) is tuple
            kind = get_args(inner)[0] if several else inner
            found[spec.name] = _Field(here, kind, several, optional)
    return found


def make_space(said: Any, origin: str, base: QuantizeOptions, model: str) -> Space:
    """The space that an object, or a list of objects, says.

    Args:
        said: By option of `quantize` or of an algorithm, a value, a list of values or a range; `name` calls an object.
        origin: Where it comes from, for messages.
        base: What all trials share.
        model: checkpoint or onnx.

    Raises:
        UsageError: unknown options, values of the wrong type, ranges that are none.
    """
    objects = said if isinstance(said, list) else [said]
    if not objects or not all(isinstance(found, dict) for found in objects):
        raise UsageError(f"{origin} is no object of options, nor a list of them", hint='as in {"bits": [3, 4]}')
    names = [str(found.get("name", number + 1)) for number, found in enumerate(objects)]
    if len(set(names)) < len(names):
        raise UsageError(f"{origin}: two objects have one name", hint="name one of them otherwise")
    dimensions: list[Dimension] = []
    keys: dict[str, str] = {}
    several = len(objects) > 1
    if several:
        dimensions.append(Dimension(_VARIANT, tuple(names)))
    for name, found in zip(names, objects, strict=True):
        reader = _Reader(origin, base, model, f"{name}." if several else "", {_VARIANT: (name,)} if several else {})
        dimensions += reader.read({k: v for k, v in found.items() if k != "name"})
        keys |= reader.keys

    def make(point: Point) -> QuantizeOptions:
        return _options(base, {keys[name]: value for name, value in point.items() if name != _VARIANT}, model)

    def label(point: Point) -> str:
        return _label(point, {d.name: d for d in dimensions}, keys, named="name" in objects[0])

    return Space(tuple(dimensions), make, label, origin)


class _Reader:
    """One object."""

    def __init__(
        self, origin: str, base: QuantizeOptions, model: str, prefix: str, when: Mapping[str, tuple[Any, ...]]
    ):
        self._origin, self._base, self._model, self._prefix, self._when = origin, base, model, prefix, dict(when)
        self.keys: dict[str, str] = {}
        """By dimension, the option that it sets."""

    def read(self, values: Mapping[str, Any]) -> list[Dimension]:
        """Its dimensions, the algorithm first."""
        plain = {_OTHER_NAMES.get(k.replace("-", "_"), k.replace("-", "_")): v for k, v in values.items()}
        if len(plain) < len(values):
            raise UsageError(f"{self._origin} says the same option in two spellings", hint="leave one out")
        chains = self._chains(plain)
        found = []
        for key in sorted(plain, key=lambda key: key != "algorithm"):
            name = self._prefix + key
            self.keys[name] = key
            when = dict(self._when)
            if key in _fields():
                self._refuse_fixed(key)
                dimension = self._of_field(name, key, plain[key])
            else:
                having = self._having(key, chains)
                if len(having) < len(chains) and "algorithm" in plain:
                    when[self._prefix + "algorithm"] = tuple(having)
                dimension = self._listed(name, key, plain[key])
            found.append(replace(dimension, when=when))
        return found

    def _chains(self, plain: Mapping[str, Any]) -> list[str]:
        """The algorithms of which options may be said."""
        given = plain.get("algorithm", self._base.algorithm)
        if given is None:
            preset = plain.get("preset")
            return ["awq,gptq"] if preset is not None and preset != "fast" else ["gptq"]
        names = given if isinstance(given, list) else [given]
        for name in names:
            if not isinstance(name, str):
                raise UsageError(f"{self._origin}: algorithm is a text, got {name!r}")
            try:
                find_chain(name, self._model)
            except UsageError as error:
                raise UsageError(f"{self._origin}: {error.message}", hint=error.hint) from error
        return list(names)

    def _having(self, key: str, chains: Sequence[str]) -> list[str]:
        """Those that have an option.

        Raises:
            UsageError: none has.
        """
        owner, _, plain = key.rpartition(".")
        having = []
        options: set[str] = set()
        for chain in chains:
            for algorithm in find_chain(chain, self._model):
                own = {f.name for f in fields(algorithm.options)}
                options |= own
                if plain in own and owner in ("", algorithm.name) and chain not in having:
                    having.append(chain)
        if having:
            return having
        if key in _RUN:
            raise UsageError(
                f"{self._origin}: {key} is no choice of a search", hint="give it as a flag, if tune has it"
            )
        elsewhere = [a.name for a in ALGORITHMS.values() if plain in {f.name for f in fields(a.options)}]
        if elsewhere and not owner:
            raise UsageError(
                f"{self._origin}: {key} is an option of {', '.join(elsewhere)}, which {'; '.join(chains)} is not",
                hint="leave it out, or add the algorithm",
            )
        known = [*_fields(), "name", *options]
        raise UsageError(f"{self._origin} has no option {key!r}, {nearest(key, known)}", hint="see docs/tuning.md")

    def _refuse_fixed(self, key: str) -> None:
        at: Any = self._base
        default: Any = QuantizeOptions(self._base.model, self._base.output)
        for step in _fields()[key].path:
            at, default = getattr(at, step), getattr(default, step)
        if at != default:
            flag = "-a" if key == "algorithm" else "--" + key.replace("_", "-")
            raise UsageError(f"{self._origin} chooses {key}, which {flag} fixes", hint="leave one of them out")

    def _of_field(self, name: str, key: str, value: Any) -> Dimension:
        spec = _fields()[key]
        if isinstance(value, dict):
            if spec.several or spec.kind not in (int, float):
                raise UsageError(f"{self._origin}: {key} is no number, it has no range", hint="give a list of values")
            return self._range(name, key, value, whole=spec.kind is int)
        values = value if isinstance(value, list) else [value]
        if not values:
            raise UsageError(f"{self._origin}: {key} has no values", hint="leave it out")
        return Dimension(name, tuple(self._typed(key, spec, v) for v in values))

    def _typed(self, key: str, spec: _Field, value: Any) -> Any:
        if value is None and spec.optional:
            return None
        parts = value if spec.several and isinstance(value, list) else [value]
        for part in parts:
            wanted: Any = {float: (int, float), Path: str, Override: str}.get(spec.kind, spec.kind)
            if not isinstance(part, wanted) or (isinstance(part, bool) and spec.kind is not bool):
                kinds = {int: "a whole number", float: "a number", bool: "true or false"}
                raise UsageError(f"{self._origin}: {key} is {kinds.get(spec.kind, 'a text')}, got {part!r}")
        return value

    def _listed(self, name: str, key: str, value: Any) -> Dimension:
        if isinstance(value, dict):
            return self._range(name, key, value, whole=False)
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, str | int | float | bool) for v in values):
            raise UsageError(f"{self._origin}: {key} has no value that an option can have, got {value!r}")
        return Dimension(name, tuple(values))

    def _range(self, name: str, key: str, value: Mapping[str, Any], *, whole: bool) -> Dimension:
        odd = [k for k in value if k not in _RANGE]
        if odd:
            raise UsageError(f"{self._origin}: a range of {key} has no {odd[0]!r}, {nearest(odd[0], _RANGE)}")
        numbers = [value.get(k) for k in ("low", "high") if True] + [value.get("step", 1)]
        right = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
        log = value.get("log", False)
        if not right or not isinstance(log, bool) or not value["low"] < value["high"] or value.get("step", 1) <= 0:
            raise UsageError(
                f"{self._origin}: the range of {key} is none, got {dict(value)}",
                hint=f'write "{key}": {{"low": 0.001, "high": 0.1, "log": true}}',
            )
        if log and (value["low"] <= 0 or "step" in value):
            raise UsageError(f"{self._origin}: a range of {key} by its logarithm begins above 0 and has no step")
        whole = whole or all(isinstance(n, int) for n in (value["low"], value["high"], value.get("step", 1)))
        return Dimension(name, (), value["low"], value["high"], value.get("step"), log, whole)


def _options(base: QuantizeOptions, values: Mapping[str, Any], model: str) -> QuantizeOptions:
    """Options with these values; what of data nothing reads is left out."""
    top: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {"calibration": {}, "graph": {}}
    settings = dict(base.settings)
    for key, value in values.items():
        spec = _fields().get(key)
        if spec is None:
            settings[key] = str(value).lower() if isinstance(value, bool) else str(value)
            continue
        if value is not None and spec.kind in (Path, Override):
            read: Any = Path if spec.kind is Path else Override.parse
            value = [read(v) for v in value] if isinstance(value, list) else read(value)
        if spec.several and value is not None:
            value = tuple(value) if isinstance(value, list) else (value,)
        (nested[spec.path[0]] if len(spec.path) > 1 else top)[spec.path[-1]] = value
    calibration, graph = replace(base.calibration, **nested["calibration"]), replace(base.graph, **nested["graph"])
    options = replace(base, settings=settings, calibration=calibration, graph=graph, **top)
    return without_idle_data(options, model)


def without_idle_data(options: QuantizeOptions, model: str) -> QuantizeOptions:
    """Without calibration data where the algorithm reads none: it is given for the trials that do.

    Args:
        options: Of a trial.
        model: checkpoint or onnx.
    """
    if options.preset is not None:
        reads = options.preset != "fast"
    else:
        needs = {a.calibration for a in find_chain(options.algorithm or "gptq", model)}
        text = options.calibration
        graph = options.graph
        given = text.data or text.data_name or graph.calibration_inputs or graph.user_script
        reads = "required" in needs or ("optional" in needs and given is not None)
    if reads:
        return options
    bare = GraphOptions()
    graph = replace(
        options.graph,
        **{n: getattr(bare, n) for n in ("calibration_inputs", "image_spec", "user_script", "data_function")},
    )
    return replace(options, calibration=CalibrationOptions(), graph=graph)


def _label(point: Point, dimensions: Mapping[str, Dimension], keys: Mapping[str, str], *, named: bool) -> str:
    """`GPTQ_G32ASYM`, or `gptq bits=4 group_size=32`: what differs between trials."""
    parts = []
    for name, value in point.items():
        if name == _VARIANT:
            parts += [str(value)] if named else []
        elif len(dimensions[name].values) != 1 or (keys[name] == "algorithm" and not named):
            shown = (
                f"{value:.4g}" if isinstance(value, float) else str(value).lower() if value in (True, False) else value
            )
            parts.append(str(value) if keys[name] == "algorithm" else f"{keys[name]}={shown}")
    return " ".join(parts) or "as given"
