"""Calibration inputs of an ONNX graph from .npz files: one file is one batch, arrays are named as the inputs are."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantcli.errors import InputError

__all__ = ["NpzFeeds"]


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
