"""Inputs for a graph of which nobody gave any: made from its names, types, axes and nodes, and tried out on it.

Whole numbers stay inside the tables that they index, masks are ones, a named axis has one length wherever it stands,
and lengths that weights ask for are those. What is left open is tried out until the graph runs.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from quantcli.errors import InputError, first_line
from quantcli.graphs.calibration.token_inputs import INPUT_IDS, TokenFeeds
from quantcli.graphs.model.input_uses import InputUse, use_of
from quantcli.graphs.model.inputs import Feed
from quantcli.graphs.model.session import open_session

__all__ = ["graph_session", "made_up_inputs", "run_samples", "sample_inputs"]

_LENGTHS = (32, 64, 8, 224, 1, 640)
"""Tried one after the other for axes that a graph only names, then the lengths of its weights."""
_MOST_LENGTHS = 32
_MOST_VALUES = 1 << 24
"""Of all inputs together: longer axes are not tried."""
_MOST_TRIES = 400
_TOKENS = 8
_WAYS = ("read", "small", "ones", "zeros")
"""How numbers are chosen: as the nodes say and normal ones, then simpler ones."""


@dataclass(frozen=True)
class _Input:
    """One input to make up."""

    name: str
    axes: tuple[int | str, ...]
    """Lengths; a name, or a sum of names, where the graph leaves it open."""
    dtype: np.dtype[Any]
    sequence: bool
    """Whether it is a sequence of tensors."""
    use: InputUse


@dataclass(frozen=True)
class _Recipe:
    """One way to feed a graph."""

    lengths: Mapping[str, int]
    """Of the axes that it only names."""
    way: str
    """One of `_WAYS`, or tokens."""


def sample_inputs(model: ir.Model, folder: Path, axes: Mapping[str, int], samples: int) -> list[Feed]:
    """Feeds that a graph runs on in onnxruntime, each with other numbers.

    Args:
        model: The graph.
        folder: Where its external data lies.
        axes: Lengths of axes that it only names.
        samples: How many feeds.

    Raises:
        InputError: an input that nothing can be made up for, or the graph runs on nothing that is.
    """
    return [feed for feed, _ in run_samples(model, folder, axes, samples)]


def run_samples(model: ir.Model, folder: Path, axes: Mapping[str, int], samples: int) -> list[tuple[Feed, list[Any]]]:
    """Like `sample_inputs`, with the graph's outputs for each feed in their order.

    Feeds that give finite outputs come before others.

    Raises:
        InputError: an input that nothing can be made up for, or the graph runs on nothing that is.
    """
    maker = _Maker(model, axes)
    recipes = list(maker.recipes())[:_MOST_TRIES]
    session = graph_session(model, folder)
    found: list[tuple[Feed, list[Any]]] = []
    for sample in range(samples):
        ran: tuple[Feed, list[Any], _Recipe] | None = None
        why = ""
        for choice, recipe in ((c, r) for c in dict.fromkeys((sample, 0)) for r in recipes):
            try:
                feed = maker.feed(recipe, sample, choice)
                outputs = list(session.run(None, feed))
            except Exception as error:  # onnxruntime raises types of its own
                why = why or first_line(error)
                continue
            finite = _finite(outputs)
            if ran is None or finite:
                ran = feed, outputs, recipe
            if finite:
                break
        if ran is None:
            raise InputError(f"no inputs could be made up for it: {why}")
        found.append(ran[:2])
        recipes = [ran[2], *(r for r in recipes if r is not ran[2])]
    return found


def made_up_inputs(model: ir.Model, axes: Mapping[str, int], sample: int = 0) -> Iterator[Feed]:
    """Feeds that a graph may take, the likeliest first; nothing is run.

    Args:
        model: The graph.
        axes: Lengths of axes that it only names.
        sample: Other numbers for each.

    Raises:
        InputError: an input of which the graph does not say type and axes, or that nothing can be made up for.
    """
    maker = _Maker(model, axes)
    return (maker.feed(recipe, sample, sample) for recipe in maker.recipes())


def graph_session(model: ir.Model, folder: Path) -> Any:
    """A session that computes a graph as it is written, its weights only mapped from where they lie.

    Raises:
        InputError: onnxruntime cannot open it.
    """
    try:
        content = ir.to_proto(model).SerializeToString()
    except Exception as error:  # protobuf raises types of its own
        raise InputError(f"onnxruntime cannot open the graph: {first_line(error)}") from error
    # as it is written, and weights only mapped: onnxruntime would keep a copy in another order
    return open_session(content, optimized=False, prepacked=False, folder=folder)


class _Maker:
    """Makes feeds for one graph."""

    def __init__(self, model: ir.Model, axes: Mapping[str, int]):
        if model.functions:  # what they do with an input stands in their nodes
            model = model.clone()
            InlinePass()(model)
        self._model, self._axes = model, axes
        self._inputs = [_read(v) for v in model.graph.inputs if not v.is_initializer()]
        weights = [v.const_value for v in model.graph.initializers.values()]
        sizes = [int(n) for w in weights if w is not None and len(w.shape) > 1 for n in w.shape.numpy() if n]
        self._lengths = list(dict.fromkeys([*_LENGTHS, *sizes]))[:_MOST_LENGTHS]

    def recipes(self) -> Iterator[_Recipe]:
        """What to try, the likeliest first."""
        try:
            self._tokens(0)
            yield _Recipe({}, "tokens")  # mask, positions and cache depend on each other
        except InputError:
            pass
        fitting = [lengths for lengths in self._assignments() if self._count(lengths) <= _MOST_VALUES]
        for way in _WAYS:
            yield from (_Recipe(lengths, way) for lengths in fitting)

    def feed(self, recipe: _Recipe, seed: int, choice: int) -> Feed:
        """Numbers by a recipe; `choice` counts through modes, sampling rates and branches."""
        if recipe.way == "tokens":
            return self._tokens(seed)
        random = np.random.default_rng(seed)
        made: dict[str, Any] = {}
        for wanted in self._inputs:
            shape = [_length(axis, recipe.lengths) for axis in wanted.axes]
            arrays = [_array(wanted, shape, recipe.way, random, choice) for _ in range(2 if wanted.sequence else 1)]
            made[wanted.name] = arrays if wanted.sequence else arrays[0]
        return made

    def _tokens(self, seed: int) -> Feed:
        ids = next((i for i in self._inputs if i.name == INPUT_IDS), None)
        if ids is None or len(ids.axes) != 2:
            raise InputError(f"the graph has no {INPUT_IDS}")
        named = [axis if isinstance(axis, int) else self._axes.get(axis) for axis in ids.axes]
        rows, length = named[0] or 1, named[1] or _TOKENS
        high = ids.use.high if ids.use.high is not None and ids.use.high > 0 else 1
        tokens = np.random.default_rng(seed).integers(0, high + 1, (rows, length))
        return next(iter(TokenFeeds(self._model.graph, tokens, rows, axes=self._axes)))

    def _assignments(self) -> Iterator[dict[str, int]]:
        """Lengths for all names of axes."""
        places: dict[str, set[int]] = {}
        known = dict(self._axes)
        for wanted in self._inputs:
            for place, axis in enumerate(wanted.axes):
                for name in _names(axis):
                    places.setdefault(name, set()).add(place)
                if isinstance(axis, str) and _names(axis) == [axis] and place in wanted.use.axes:
                    known.setdefault(axis, wanted.use.axes[place])
        free = [name for name in places if name not in known]
        leading = {w.axes[0] for w in self._inputs if len(w.axes) > 1}
        first = {name for name in free if places[name] == {0} and name in leading}  # rows of a batch: one
        if not free:
            yield known
            return
        for length in self._lengths:
            yield {name: 1 if name in first else length for name in free} | known
        for length in self._lengths:
            yield dict.fromkeys(free, length) | known
            past = {name: 0 for name in free if "past" in name.lower()}
            if past:
                yield {name: 1 if name in first else length for name in free} | past | known
        for name in free:
            for one in self._lengths:
                for others in (32, 1, 64):
                    yield {n: 1 if n in first else others for n in free} | {name: one} | known

    def _count(self, lengths: Mapping[str, int]) -> int:
        return sum(math.prod(_length(axis, lengths) for axis in wanted.axes) for wanted in self._inputs)


def _read(value: ir.Value) -> _Input:
    kind, name = value.type, str(value.name)
    if isinstance(kind, ir.OptionalType):
        kind = kind.elem_type
    sequence = isinstance(kind, ir.SequenceType)
    use = use_of(value)
    axes: Iterable[int | ir.SymbolicDim | None] | None = value.shape
    if axes is None and use.rank is not None:
        axes = [use.axes.get(axis) for axis in range(use.rank)]
    if value.dtype is None or axes is None:
        raise InputError(f"type and shape of the graph's input {name!r} are not known", hint="export it again")
    if value.dtype is ir.DataType.STRING:
        raise InputError(f"the graph's input {name!r} takes text, only numbers can be fed")
    found: list[int | str] = []
    for place, axis in enumerate(axes):
        text = axis.value if isinstance(axis, ir.SymbolicDim) else None
        if isinstance(axis, int) and axis >= 0:
            found.append(axis)
        else:  # axes without a name may differ from one another
            found.append(text if text not in (None, "", "?") else f"{name}.{place}")
    return _Input(name, tuple(found), value.dtype.numpy(), sequence, use)


def _names(axis: int | str) -> list[str]:
    """Names in an axis such as `past_sequence_length + sequence_length`."""
    if isinstance(axis, int):
        return []
    if not re.fullmatch(r"[\w.]+(\s*[+*]\s*[\w.]+)+", axis):
        return [axis]
    return [part for part in re.split(r"\s*[+*]\s*", axis) if not part.isdigit()]


def _length(axis: int | str, lengths: Mapping[str, int]) -> int:
    if isinstance(axis, int):
        return axis
    if axis in lengths:
        return lengths[axis]
    terms = [[part.strip() for part in term.split("*")] for term in axis.split("+")]
    return sum(math.prod(int(p) if p.isdigit() else lengths[p] for p in term) for term in terms)


def _array(wanted: _Input, shape: list[int], way: str, random: np.random.Generator, choice: int) -> np.ndarray:
    kind, use, count = wanted.dtype.kind, wanted.use, math.prod(shape)
    whole = kind in "iub"
    sizes = {
        "ones": np.ones(count),
        "zeros": np.zeros(count),
        "few": np.full(count, 3),
        "many": np.full(count, np.iinfo(np.int32).max),
        "axes": np.arange(count),
        "reshape": np.where(np.arange(count), 1, -1),
    }
    if way in ("ones", "zeros"):
        values = sizes[way]
    elif use.size:
        values = sizes[use.size]
    elif "mask" in wanted.name.lower():
        values = sizes["ones"]
    elif kind == "b" and way == "read":
        values = np.full(count, choice % 2 == 0 or count > 1)
    elif not whole:
        values = random.standard_normal(count) if way == "read" else random.random(count)
    elif way == "small":
        values = random.integers(0, 2, count)
    elif use.compared:
        values = np.full(count, use.compared[choice % len(use.compared)])
    elif use.high is not None:
        values = random.integers(min(use.low, use.high), use.high + 1, count)
    elif wanted.dtype.itemsize == 1:  # pixels, or integers that were quantized
        values = random.integers(np.iinfo(wanted.dtype).min, np.iinfo(wanted.dtype).max + 1, count)
    else:
        values = random.integers(0, 2, count)
    return np.asarray(values).reshape(shape).astype(wanted.dtype)


def _finite(outputs: Iterable[Any]) -> bool:
    """Whether no float of any output is infinite or NaN."""
    for output in outputs:
        if isinstance(output, list | tuple):
            if not _finite(output):
                return False
        elif output is not None:
            array = np.asarray(output)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                return False
    return True
