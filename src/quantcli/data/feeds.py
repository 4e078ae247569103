"""Calibration inputs of an ONNX graph: from .npz files, one batch each, or from a reader in onnxruntime's shape."""

import contextlib
import copy
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantcli.errors import InputError

__all__ = ["NpzFeeds", "ReaderFeeds"]


@dataclass(frozen=True)
class NpzFeeds:
    """Batches that are read anew each time, one after the other."""

    paths: tuple[Path, ...]
    """Files in order."""

    @classmethod
    def open(cls, source: Path, limit: int) -> "NpzFeeds":
        """The first `limit` files of a folder in the order of their names, or one file.

        Raises:
            InputError: there is none.
        """
        paths = sorted(source.glob("*.npz")) if source.is_dir() else [source]
        if not paths or not paths[0].is_file():
            raise InputError(f"{source} holds no calibration inputs", hint="give an .npz file or a folder of them")
        return cls(tuple(paths[:limit]))

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Each file's arrays by name; nothing is unpickled."""
        for path in self.paths:
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    values = {name: arrays[name] for name in arrays.files}
            except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
                raise InputError(f"{path} is not an .npz file of arrays: {str(error).splitlines()[0]}") from error
            yield values


@dataclass(frozen=True)
class ReaderFeeds:
    """What a reader gave; a reader can be read once, a graph may be run several times."""

    batches: tuple[dict[str, np.ndarray], ...]
    """In order."""

    @classmethod
    def drain(cls, reader: Any) -> "ReaderFeeds":
        """Everything that a copy of the reader gives, so that the reader itself can be used again.

        Args:
            reader: With `get_next()`, which gives arrays by input name and None at the end, as onnxruntime's
                CalibrationDataReader.

        Raises:
            InputError: it is no such reader, or gives nothing.
        """
        if not callable(getattr(reader, "get_next", None)):
            raise InputError(f"{type(reader).__name__} is no calibration data reader", hint="give it get_next()")
        with contextlib.suppress(TypeError):  # one that holds a generator is read once
            reader = copy.deepcopy(reader)
        batches = []
        while (batch := reader.get_next()) is not None:
            if not isinstance(batch, dict):
                raise InputError(f"the calibration data reader gives {type(batch).__name__}, not a dict of arrays")
            batches.append({str(name): np.asarray(array) for name, array in batch.items()})
        if not batches:
            raise InputError("the calibration data reader gives nothing")
        return cls(tuple(batches))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """The batches in order."""
        yield from self.batches
