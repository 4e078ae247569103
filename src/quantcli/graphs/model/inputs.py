"""What a graph wants to be fed with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from quantcli.errors import InputError, UsageError
from quantcli.graphs.model.files import open_graph

__all__ = ["CalibrationReader", "Feed", "InputSpec", "check_feed", "input_specs", "rewound", "specs_of"]

Feed = dict[str, np.ndarray]


class CalibrationReader(Protocol):
    """Samples one after the other, as onnxruntime's `CalibrationDataReader`; no class needs to be derived from."""

    def get_next(self) -> Feed | None:
        """The next sample by input name; None after the last."""


def rewound(reader: CalibrationReader | None, what: str) -> CalibrationReader:
    """The reader at its first sample again.

    Args:
        reader: Samples.
        what: What they are needed for, for the message.

    Raises:
        UsageError: there are none, or the reader cannot go back.
    """
    if reader is None:
        raise UsageError(f"{what} needs samples", hint="give calibration data")
    again = getattr(reader, "rewind", None)
    if again is None:
        raise UsageError(
            f"{what} reads the samples a second time, {type(reader).__name__} has no rewind()",
            hint="give the reader a method rewind() that starts again",
        )
    again()
    return reader


@dataclass(frozen=True)
class InputSpec:
    """One input of a graph."""

    name: str
    """Its name."""
    shape: tuple[int | str, ...]
    """Sizes; a name where any size will do."""
    dtype: np.dtype[Any]
    """Element type."""


def input_specs(path: Path) -> tuple[InputSpec, ...]:
    """The inputs of a graph file that have no default.

    Raises:
        InputError: no graph, or an input that is no tensor of known type and rank.
    """
    return specs_of(open_graph(path).graph)


def specs_of(graph: ir.Graph) -> tuple[InputSpec, ...]:
    """The inputs of a graph that have no default.

    Raises:
        InputError: an input that is no tensor of known type and rank.
    """
    found = []
    for value in graph.inputs:
        if value.is_initializer():
            continue
        if value.dtype is None or value.shape is None:
            raise InputError(
                f"type and shape of the graph's input {value.name!r} are not known", hint="export it again"
            )
        if value.dtype is ir.DataType.STRING:
            raise InputError(f"the graph's input {value.name!r} takes text, only numbers can be fed")
        # axes without a name may differ from one another
        shape = tuple(_length(d, f"{value.name}.{i}") for i, d in enumerate(value.shape))
        found.append(InputSpec(str(value.name), shape, value.dtype.numpy()))
    return tuple(found)


def _length(axis: int | ir.SymbolicDim, unnamed: str) -> int | str:
    """An axis of an input; exporters write -1 and ? where they mean any length."""
    if isinstance(axis, int):
        return axis if axis >= 0 else unnamed
    return str(axis.value) if axis.value not in (None, "", "?") else unnamed


def check_feed(specs: tuple[InputSpec, ...], feed: Feed, origin: str) -> Feed:
    """The sample in the graph's types.

    Args:
        specs: The graph's inputs.
        feed: Arrays by input name.
        origin: Where the sample comes from, for messages.

    Raises:
        InputError: an input is missing or unknown, has another rank or size, or a type that would lose values.
    """
    names = {s.name for s in specs}
    for what, odd in (("lacks", sorted(names - set(feed))), ("has no use for", sorted(set(feed) - names))):
        if odd:
            raise InputError(
                f"{origin}: the graph takes {', '.join(sorted(names))}; the sample {what} {', '.join(odd)}"
            )
    checked = {}
    sizes: dict[str, int] = {}
    for spec in specs:
        array = np.asarray(feed[spec.name])
        wanted = "x".join(map(str, spec.shape))
        fits = array.ndim == len(spec.shape) and all(
            size == (dim if isinstance(dim, int) else sizes.setdefault(dim, size))
            for size, dim in zip(array.shape, spec.shape, strict=True)
        )
        if not fits:
            got = "x".join(map(str, array.shape))
            raise InputError(f"{origin}: {spec.name} has shape {got}, the graph takes {wanted}")
        if not np.can_cast(array.dtype, spec.dtype, "same_kind"):
            raise InputError(f"{origin}: {spec.name} is {array.dtype}, the graph takes {spec.dtype}")
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise InputError(f"{origin}: {spec.name} holds values that are not finite")
        checked[spec.name] = array.astype(spec.dtype, copy=False)
    return checked
