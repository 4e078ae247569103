"""An ONNX Runtime GenAI folder as a language model."""

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.errors import InputError

__all__ = ["GenaiModel"]


class GenaiModel:
    """Implements `LanguageModel`."""

    def __init__(self, folder: Path):
        """Opens a folder.

        Raises:
            InputError: onnxruntime-genai cannot open it.
        """
        import onnxruntime_genai as og

        self.folder = folder
        try:
            config = json.loads((folder / "genai_config.json").read_text())
            self.max_positions: int = int(config["model"]["context_length"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / 'genai_config.json'} is not a GenAI configuration: {error}") from error
        try:
            self._model = og.Model(str(folder))
        except Exception as error:  # the package raises RuntimeError and its own types
            raise InputError(f"{folder} cannot be opened by onnxruntime-genai: {error}") from error
        self._generator: Any = None

    def logits(self, tokens: Tensor) -> Tensor:
        """See `LanguageModel`."""
        self.start(tokens, room=1)
        out = np.asarray(self._generator.get_output("logits"))
        self._generator = None
        if out.shape[1] != len(tokens):
            raise InputError(
                f"{self.folder} gives logits for {out.shape[1]} of {len(tokens)} positions: its head was pruned",
                hint="capture it again without prune_lm_head",
            )
        return torch.from_numpy(out[0].astype(np.float32))

    def start(self, tokens: Tensor, room: int) -> None:
        """See `LanguageModel`."""
        import onnxruntime_genai as og

        self._generator = None  # its cache goes before the next one comes
        params = og.GeneratorParams(self._model)
        longest = min(len(tokens) + room, self.max_positions)
        params.set_search_options(max_length=longest, do_sample=False, num_beams=1)
        try:
            self._generator = og.Generator(self._model, params)
            self._generator.append_tokens(tokens.numpy().astype(np.int32)[None])
        except Exception as error:
            raise InputError(f"{self.folder} does not run: {str(error).splitlines()[0]}") from error

    def step(self) -> int:
        """See `LanguageModel`."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def keep_float_weights(self) -> None:
        """See `LanguageModel`; the runtime decides for itself."""

    def close(self) -> None:
        """See `LanguageModel`."""
        self._generator = self._model = None
        gc.collect()
