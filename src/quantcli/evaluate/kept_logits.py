"""Logits of a reference, kept in files: it then runs once, however many models are judged beside it."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quantcli.data.array_files import read_npy
from quantcli.errors import InputError
from quantcli.evaluate.language_model import LanguageModel

__all__ = ["KeptLogits", "Scorer"]


class Scorer(Protocol):
    """What a comparison needs of a reference."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores text: tokens [T] int64 to [T, V] float32 on CPU; row t predicts token t + 1."""
        ...

    def close(self) -> None:
        """Drops the model's memory."""
        ...


class KeptLogits:
    """A model that is opened for those windows only whose logits are not there yet.

    A window is a file of its own, [T, V] float32 as .npy, named by a digest of the model and its tokens. It appears
    whole or not at all; runs that overlap, or were interrupted, share what there is.
    """

    def __init__(self, folder: Path, model_digest: str, open_model: Callable[[], LanguageModel]):
        self._folder = folder
        self._digest = model_digest
        self._open_model = open_model
        self._model: LanguageModel | None = None

    def logits(self, tokens: Tensor) -> Tensor:
        """Reads the file, or runs the model and writes it.

        Raises:
            InputError: a file that is not of such a window.
        """
        name = hashlib.sha256(self._digest.encode() + tokens.numpy().tobytes()).hexdigest()[:32]
        path = self._folder / f"{name}.npy"
        if path.is_file():
            return _read(path, len(tokens))
        if self._model is None:
            self._model = self._open_model()
        found = self._model.logits(tokens)
        aside = path.with_name(f".{name}.{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as stream:
                np.save(stream, found.numpy())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        return found

    def close(self) -> None:
        """Drops the model's memory, if it was opened."""
        if self._model is not None:
            self._model.close()


def _read(path: Path, rows: int) -> Tensor:
    hint = "delete it, it is made again"
    try:
        found = read_npy(path)
    except InputError as error:
        raise InputError(f"{path} holds no logits: {error.message}", hint) from error
    if found.dtype != np.float32 or found.ndim != 2 or len(found) != rows:
        raise InputError(
            f"{path} holds {found.dtype}{list(found.shape)}, not the logits of {rows} tokens",
            hint,
        )
    return torch.from_numpy(found)
