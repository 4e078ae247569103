"""`--config FILE`: what the file says, put among the words of the command line, whose own flags win."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quantcli.algorithms import Algorithm, find_chain
from quantcli.backends import find_backend
from quantcli.cli.aliases import rewrite
from quantcli.cli.configuration.backend_passes import BACKEND_PASSES
from quantcli.cli.configuration.keys import Pass, Variants
from quantcli.cli.configuration.passes import OTHER_TYPES, PASSES
from quantcli.cli.configuration.read import read_json
from quantcli.cli.configuration.translate import Said, is_given, translate
from quantcli.cli.configuration.workflows import BESIDE, DATA, INPUT_MODEL, SYSTEM, WORKFLOW
from quantcli.errors import UsageError, nearest
from quantcli.options import ConfigurationFile

__all__ = ["Expanded", "expand", "words_of"]

_SOURCES = {"data", "data_name", "calibration_inputs", "user_script"}
_OF_SOURCE = {
    *_SOURCES,
    "data_split",
    "text_field",
    "text_template",
    "use_chat_template",
    "image_spec",
    "data_function",
}
_SAMPLES = {*_OF_SOURCE, "num_samples", "seq_len", "batch_size"}
_EXCLUDING = (
    {"bits", "target_bits", "target_size", "set weight_type"},
    {"text_field", "text_template", "use_chat_template"},
    {"quiet", "verbose"},
)
"""Flags of which one rules out the others."""
_REPEATED = {"exclude", "overrides", "nodes_include", "nodes_exclude"}


@dataclass(frozen=True)
class Expanded:
    """A command line with the file's words in it."""

    args: list[str]
    """Without --config."""
    notes: list[str]
    """What there is to tell."""
    file: ConfigurationFile
    """Where they come from."""


@dataclass(frozen=True)
class _Item:
    """A flag with its value, or a word that is none."""

    sets: str
    """The option that it sets, `set KEY` for an algorithm's."""
    words: tuple[str, ...]


def expand(args: Sequence[str], flags: Mapping[str, bool], names: Mapping[str, str]) -> Expanded | None:
    """The arguments of `quantize` with those of its configuration file before them; None where there is no file.

    Args:
        args: What follows the command's name, in our spelling.
        flags: Its flags, each with whether it takes a value.
        names: Its flags, each with the option that it sets.

    Raises:
        UsageError: the file cannot be read, says what cannot be, or names data that nobody defined.
    """
    items = _split(args, flags, names)
    files = [item for item in items if item.sets == "config" and len(item.words) == 2]
    if not files or any(word in ("-h", "--help") for item in items for word in item.words[:1]):
        return None
    if len(files) > 1:
        raise UsageError("--config is given twice", hint="leave one out")
    path = Path(files[0].words[1])
    typed = [item for item in items if item.sets != "config"]
    for item in typed:
        if item.sets == "algorithm" and len(item.words) == 2 and not any(i.sets == "backend" for i in typed):
            find_chain(item.words[1])  # what is wrong with it is not the file's fault
    read = read_json(path)
    said = _read(path, read.values, typed, flags, names)
    words = [word for item in said.items for word in item.words]
    notes = [f"{path.name}: {note}" for note in said.notes]
    notes.append(f"{path.name} says {shlex.join(words)}" if words else f"{path.name} says nothing else")
    return Expanded([*words, *(w for item in typed for w in item.words)], notes, read.file)


def words_of(
    values: Mapping[str, Any], path: Path, typed: Sequence[str], flags: Mapping[str, bool], names: Mapping[str, str]
) -> list[str]:
    """The whole command line of `quantize` for a configuration in which every choice is made.

    Args:
        values: The configuration.
        path: Where it was read, for messages.
        typed: Flags that win over it.
        flags: As of `expand`.
        names: As of `expand`.

    Raises:
        UsageError: it says what cannot be.
    """
    said = _read(path, values, _split(typed, flags, names), flags, names)
    return [*(word for item in said.items for word in item.words), *typed]


def _read(
    path: Path, values: Mapping[str, Any], typed: Sequence[_Item], flags: Mapping[str, bool], names: Mapping[str, str]
) -> "_Words":
    try:
        return _Reader(typed, flags, names).read(values)
    except UsageError as error:
        hint = error.hint or "docs/configurations.md lists types and keys"
        raise UsageError(f"{path}: {error.message}", hint=hint) from error


def _split(args: Sequence[str], flags: Mapping[str, bool], names: Mapping[str, str]) -> list[_Item]:
    """A command line in its parts."""
    items, at = [], 0
    while at < len(args):
        name, equals, inline = args[at].partition("=")
        if name not in names and flags.get(args[at][:2]):  # -a and its value in one word
            name, inline = args[at][:2], args[at][2:]
            items.append(_Item(names[name], (name, inline)))
            at += 1
            continue
        if name not in names:
            items.append(_Item("", (args[at],)))
            at += 1
            continue
        takes = flags[name] and not equals and at + 1 < len(args)
        words = (name, inline) if equals else tuple(args[at : at + 1 + takes])
        sets = names[name]
        if sets == "settings" and len(words) == 2:
            sets = "set " + words[1].partition("=")[0].strip().replace("-", "_").rpartition(".")[2]
        items.append(_Item(sets, words))
        at += 1 + takes
    return items


@dataclass
class _Words:
    items: list[_Item]
    notes: list[str]


@dataclass
class _Reader:
    """Reads one configuration beside the flags that were typed."""

    typed: Sequence[_Item]
    flags: Mapping[str, bool]
    names: Mapping[str, str]

    def read(self, values: Mapping[str, Any]) -> _Words:
        """What the file says and no typed flag says otherwise."""
        around, passes, defined = self._around(values)
        parts = [self._pass(label, found) for label, found in passes]
        items = self._joined([label for label, _ in passes], [items for items, _, _ in parts])
        notes = [*around.told(), *(note for _, said, _ in parts for note in said.told())]
        chosen = _value([*items, *self.typed], "algorithm")
        chain = find_chain(chosen) if self.backend is None else []
        data = [(source, spec.data_hint) for _, said, spec in parts for source in said.data]
        if self._calibrates(chosen, chain):
            items += self._data(data, defined, notes)
        else:
            idle = [item for item in items if item.sets in _SAMPLES]
            items = [item for item in items if item.sets not in _SAMPLES]
            if data or idle:
                notes.append(f"-a {chosen} reads no data, what it says of data has nothing to do")
        outer = self._ours(around.words, notes)
        return _Words(self._allowed(_once("the file", [*outer, *items]), chain, notes), notes)

    @property
    def backend(self) -> str | None:
        """The package that was named to do it."""
        return next((item.words[1] for item in self.typed if item.sets == "backend" and len(item.words) == 2), None)

    def _calibrates(self, chosen: str, chain: Sequence[Algorithm]) -> bool:
        if self.backend is not None:
            return find_backend(self.backend).find_method(chosen)[1].calibrates
        return any(algorithm.calibration != "none" for algorithm in chain)

    def _around(self, values: Mapping[str, Any]) -> tuple[Said, list[tuple[str, Mapping[str, Any]]], dict[str, Any]]:
        """What stands around the passes, the passes by name, the data configurations by name."""
        said = Said()
        if "type" in values:
            return said, [("", values)], {}
        if "passes" not in values:
            if not values or not all(isinstance(found, dict) and "type" in found for found in values.values()):
                raise UsageError(
                    'it has neither "type" nor "passes"', hint='write one pass, as {"type": "GptqQuantizer", "bits": 4}'
                )
            return said, list(values.items()), {}
        if isinstance(values.get("input_model"), dict):
            self._input_model(values["input_model"], said)
        translate("the workflow", values, WORKFLOW, said)
        for name, system in _objects(values, "systems").items():
            translate(f"system {name!r}", system, SYSTEM, said)
        passes = []
        for name, found in _objects(values, "passes", list).items():
            if isinstance(found, list):
                if len(found) != 1 or not isinstance(found[0], dict):
                    raise UsageError(
                        f"pass {name!r} has {len(found)} versions: to choose is a search",
                        hint="use `quantcli tune`, or keep one",
                    )
                found = found[0]
            passes.append((name, found))
        if not passes:
            raise UsageError("it has no passes", hint='add "passes": {"quantize": {"type": "GptqQuantizer"}}')
        return said, passes, _defined(values.get("data_configs"))

    def _input_model(self, found: Mapping[str, Any], said: Said) -> None:
        if any(item.sets == "model" for item in self.typed):
            said.notes.append('"input_model" is not read, --model is given')
            return
        inner = found.get("config")
        known = {**(inner if isinstance(inner, dict) else {}), **found}
        begun = len(said.words)
        translate('"input_model"', found, INPUT_MODEL, said)
        file = known.get("onnx_file_name")
        if isinstance(file, str) and "--model" in said.words[begun:]:
            at = said.words.index("--model", begun) + 1
            said.words[at] = str(Path(said.words[at]) / file)

    def _pass(self, label: str, values: Mapping[str, Any]) -> tuple[list[_Item], Said, Pass]:
        """What one pass says."""
        values = dict(values)
        inner = values.pop("config", None)
        kind = values.pop("type", None)
        called = f"pass {label!r}" if label else "the pass"
        if not isinstance(kind, str):
            raise UsageError(f'{called} has no "type"', hint='as in "type": "GptqQuantizer"')
        if is_given(inner):
            both = [name for name in values if isinstance(inner, dict) and name in inner]
            if not isinstance(inner, dict) or both:
                raise UsageError(
                    f'{called}: "config" is an object of the keys that do not stand beside it', hint="leave it out"
                )
            values |= inner
        owner, spec = _find(kind, called, values, BACKEND_PASSES.get(self.backend or "", {}))
        said = Said()
        translate(owner, values, {**spec.keys, **BESIDE}, said)
        base = self._ours(list(spec.words), [])
        raw = _split(said.words, self.flags, self.names)
        named = _once(owner, [item for item in raw if item.sets == "algorithm"]) or base[:1]
        # aliases may change which algorithm it is: the rounder after quarot
        rest = [word for item in raw if item.sets != "algorithm" for word in item.words]
        told = _once(owner, self._ours([*named[0].words, *rest], said.notes))
        rounded = {item.words[1] for item in told if item.sets in ("a_bits", "k_bits", "v_bits")} - {"16"}
        extra = self._ours(list(spec.simulating), []) if rounded else []
        return _over([*base, *extra], told), said, spec

    def _ours(self, words: list[str], notes: list[str]) -> list[_Item]:
        """Words in anybody's spelling as items of ours."""
        rewritten = rewrite("quantize", words, self.flags)
        notes += rewritten.notes
        return _split(rewritten.args, self.flags, self.names)

    def _joined(self, labels: Sequence[str], parts: Sequence[list[_Item]]) -> list[_Item]:
        """Several passes in a row as one command line."""
        if len(parts) == 1:
            return parts[0]
        chain = ",".join(_value(items, "algorithm") for items in parts)
        try:
            find_chain(chain)
        except UsageError as error:
            raise UsageError(
                f"passes {', '.join(labels)} cannot follow each other: {error.message}",
                hint="keep rotations, then awq, then one that rounds; or run them one after the other",
            ) from error
        rest = [item for items in parts for item in items if item.sets != "algorithm"]
        return [_Item("algorithm", ("-a", chain)), *_once("the workflow", rest)]

    def _data(self, named: Sequence[tuple[Any, str]], defined: Mapping[str, Any], notes: list[str]) -> list[_Item]:
        """What the data configurations say."""
        items: list[_Item] = []
        for source, hint in named:
            found = defined.get(source) if isinstance(source, str) else source
            if found is None and not any(item.sets in _SOURCES for item in self.typed):
                raise UsageError(f'"data_config" names {source!r}, which is not defined here', hint=hint)
            if found is None:
                notes.append(f'"data_config" {source!r} is not defined here, the data of the command line is read')
                continue
            said = Said()
            translate(f'"data_config" {found.get("name", "")!r}', found, DATA, said)
            items += self._ours(said.words, said.notes)
            notes += said.told()
        return _once("the data configuration", items)

    def _allowed(self, items: Sequence[_Item], chain: Sequence[Algorithm], notes: list[str]) -> list[_Item]:
        """Without what typed flags replace."""
        typed = {item.sets for item in self.typed}
        replaced = set(typed)
        for group in _EXCLUDING:
            replaced |= group if typed & group else set()
        if typed & _SOURCES:
            replaced |= _OF_SOURCE
        if typed & {"calibration_inputs", "user_script"}:
            replaced.add("seq_len")
        kept = [item for item in items if item.sets not in replaced]
        if "algorithm" in typed and chain:
            known = {f"set {f.name}" for algorithm in chain for f in fields(algorithm.options)}
            idle = [item for item in kept if item.sets.startswith("set ") and item.sets not in known]
            notes += [f"{shlex.join(item.words)} is left out: it is not of -a {chain[-1].name}" for item in idle]
            kept = [item for item in kept if item not in idle]
        return kept


def _find(kind: str, called: str, values: dict[str, Any], of_backend: Mapping[str, Pass]) -> tuple[str, Pass]:
    """The pass of a type, and what errors call it; takes the key that chooses a variant out of the values."""
    others = {name.lower(): name for name in OTHER_TYPES}
    if kind.lower() in others:
        name = others[kind.lower()]
        other = OTHER_TYPES[name]
        raise UsageError(f"{called} is {name}, which quantize does not run: {other.why}", hint=other.hint)
    known = {name.lower(): name for name in PASSES}
    if kind.lower() not in known:
        raise UsageError(
            f"{called}: quantize has no type {kind!r}, {nearest(kind, PASSES)}", hint="see docs/configurations.md"
        )
    name = known[kind.lower()]
    spec = of_backend.get(name, PASSES[name])
    if not isinstance(spec, Variants):
        return name, spec
    given = values.pop(spec.key, None)
    chosen = given if is_given(given) else spec.default
    if not isinstance(chosen, str) or chosen not in spec.passes:
        if chosen == "SEARCHABLE_VALUES":
            raise UsageError(f'{name}: "{spec.key}" asks for a search', hint="use `quantcli tune`, or name a value")
        raise UsageError(
            f'{name}: unknown "{spec.key}" {chosen!r}, {nearest(str(chosen), spec.passes)}',
            hint=f"one of {', '.join(spec.passes)}",
        )
    return f"{name} ({chosen})", spec.passes[chosen]


def _objects(values: Mapping[str, Any], key: str, *also: type) -> dict[str, Any]:
    """A key's object of objects."""
    found = values.get(key) or {}
    if not isinstance(found, dict) or not all(isinstance(v, (dict, *also)) for v in found.values()):
        raise UsageError(f'"{key}" is an object of objects by name', hint=f'as in "{key}": {{"name": {{…}}}}')
    return found


def _defined(found: Any) -> dict[str, Any]:
    """Data configurations by name, from a list of them or an object."""
    if isinstance(found, dict):
        return _objects({"data_configs": found}, "data_configs")
    listed = found or []
    if not isinstance(listed, list) or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in listed):
        raise UsageError('"data_configs" is a list of objects with a "name"', hint='as in [{"name": "wiki", …}]')
    names = [config["name"] for config in listed]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f'two of the "data_configs" are called {twice!r}', hint="name one of them otherwise")
    return dict(zip(names, listed, strict=True))


def _value(items: Sequence[_Item], sets: str) -> str:
    """The value of an option; the last one, where it is given more than once."""
    return next(item.words[1] for item in reversed(items) if item.sets == sets)


def _over(base: Sequence[_Item], told: Sequence[_Item]) -> list[_Item]:
    """The base with what is told in place of what it says of the same."""
    said = {item.sets for item in told}
    return [*(item for item in base if item.sets not in said), *told]


def _once(owner: str, items: Sequence[_Item]) -> list[_Item]:
    """Each option once.

    Raises:
        UsageError: two keys say different things of it.
    """
    kept: dict[tuple[str, ...], _Item] = {}
    for item in items:
        key = (item.sets,) if item.sets not in _REPEATED else (item.sets, *item.words)
        if key in kept and kept[key].words != item.words:
            raise UsageError(
                f"{owner} says both {shlex.join(kept[key].words)} and {shlex.join(item.words)}", hint="leave one out"
            )
        kept[key] = item
    return list(kept.values())
