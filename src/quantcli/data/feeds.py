"""Calibration inputs of an ONNX graph from a reader in onnxruntime's shape."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantcli.errors import InputError

__all__ = ["ReaderFeeds"]


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
