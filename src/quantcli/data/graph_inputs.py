"""Samples for any ONNX graph: from `.npz` files, a folder of images, or a function of the user's own.

Every source is a `Samples`: read one at a time, again from the start after `rewind`, and usable wherever onnxruntime
takes a `CalibrationDataReader`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from quantcli.data.array_files import read_npz
from quantcli.data.user_script import explained, load_function, takes_by_name
from quantcli.errors import InputError
from quantcli.graphs.model.inputs import Feed, InputSpec, check_feed

__all__ = ["Samples", "npz_samples", "script_samples"]

Specs = tuple[InputSpec, ...]


class Samples:
    """Samples that are read one at a time, each checked against the graph's inputs.

    Args:
        specs: The graph's inputs.
        open_source: Opens the source at its start: pairs of a sample and where it comes from.
    """

    def __init__(self, specs: Specs, open_source: Callable[[], Iterator[tuple[Feed, str]]]):
        self._specs = specs
        self._open = open_source
        self._rest = open_source()
        self._count: int | None = None

    def get_next(self) -> Feed | None:
        """The next sample; None after the last."""
        found = next(self._rest, None)
        return None if found is None else check_feed(self._specs, *found)

    def rewind(self) -> None:
        """Begins once more."""
        self._rest = self._open()

    def __iter__(self) -> Iterator[Feed]:
        self.rewind()
        return iter(self.get_next, None)

    def __len__(self) -> int:
        """How many there are; the source is read once for it."""
        if self._count is None:
            self._count = sum(1 for _ in self._open())
        return self._count


def npz_samples(path: Path, specs: Specs, *, batch_size: int = 1, limit: int | None = None) -> Samples:
    """Samples of one `.npz` file or of all in a folder, in the order of their names; the keys are the input's names.

    Arrays with as many axes as the input has rows along the first, which are fed `batch_size` at a time (as many as the
    graph takes where that is fixed); arrays with one axis less are one row.

    Raises:
        InputError: no such files, none that can be read, or arrays that the graph does not take.
    """
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files or not all(f.is_file() for f in files):
        raise InputError(f"{path} has no .npz files", hint="write them with numpy.savez(FILE, input_name=array, …)")
    fixed = {s.shape[0] for s in specs if s.shape and isinstance(s.shape[0], int)}
    rows = max(1, int(fixed.pop())) if len(fixed) == 1 else batch_size

    def read() -> Iterator[tuple[Feed, str]]:
        count = 0
        for file in files:
            for feed in _batches(read_npz(file), specs, rows):
                if count == limit:
                    return
                count += 1
                yield feed, str(file)

    return Samples(specs, read)


def _batches(arrays: Feed, specs: Specs, rows: int) -> Iterator[Feed]:
    ranks = {s.name: len(s.shape) for s in specs}
    whole = {n: a[None] if a.ndim + 1 == ranks.get(n, -1) else a for n, a in arrays.items()}
    lengths = {a.shape[0] for a in whole.values() if a.ndim}
    if len(lengths) != 1 or 0 in ranks.values():  # no common first axis: one sample as it is
        yield whole
        return
    for start in range(0, lengths.pop(), rows):
        yield {n: a[start : start + rows] for n, a in whole.items()}


def script_samples(
    script: Path,
    function: str,
    specs: Specs,
    *,
    batch_size: int = 1,
    limit: int | None = None,
    data_dir: str | None = None,
) -> Samples:
    """Samples of a function in the user's Python file, which is run.

    The function takes no arguments, or any of `data_dir` and `batch_size` by name. It returns an object with
    `get_next`, or an iterable of samples, each a dictionary by input name, or a pair of that and a label.

    Raises:
        UsageError: no such function in the file.
        InputError: the file or the function fails, or it returns something else.
    """
    make = load_function(script, function)
    arguments = takes_by_name(make, {"data_dir": data_dir, "batch_size": batch_size})

    def read() -> Iterator[tuple[Feed, str]]:
        origin = f"{script}:{function}"
        with explained(origin):
            for item in islice(_items(make(**arguments), origin), limit):
                feed = item[0] if isinstance(item, tuple | list) and len(item) == 2 else item
                if not isinstance(feed, Mapping):
                    raise InputError(f"{origin} gave {type(feed).__name__}, expected a dictionary by input name")
                yield {str(name): np.asarray(value) for name, value in feed.items()}, origin

    return Samples(specs, read)


def _items(source: Any, origin: str) -> Iterable[Any]:
    if hasattr(source, "get_next"):
        return iter(source.get_next, None)
    if isinstance(source, Iterable):
        return source
    raise InputError(f"{origin} returned {type(source).__name__}, expected get_next() or an iterable of samples")
