"""An ONNX Runtime GenAI folder as a language model."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.adapters.files import require_fit
from quantcli.errors import InputError, UsageError, first_line, nearest
from quantcli.evaluate.sampling import Sampling
from quantcli.graphs.model.files import open_graph
from quantcli.graphs.model.finite import name_not_finite
from quantcli.graphs.model.genai_config import GENAI_CONFIG, read_genai_config

__all__ = ["GenaiModel"]

_SUFFIX = ".onnx_adapter"
_ACTIVE = "active"


class GenaiModel:
    """Implements `LanguageModel`."""

    def __init__(self, folder: Path, adapter: str | None = None):
        """Opens a folder, with an adapter of it (NAME of a NAME.onnx_adapter) or an adapter file.

        Raises:
            InputError: onnxruntime-genai cannot open it, or the adapter.
            UsageError: there is no such adapter.
        """
        import onnxruntime_genai as og

        self.folder = folder
        config = read_genai_config(folder).model
        if config.context_length is None:
            raise InputError(f"{folder / GENAI_CONFIG} is not a GenAI configuration: it has no model.context_length")
        self.max_positions: int = config.context_length
        self._graph = folder / config.decoder.filename
        ends = config.eos_token_id
        self.end_tokens = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        try:
            self._model = og.Model(str(folder))
        except Exception as error:  # the package raises RuntimeError and its own types
            raise InputError(f"{folder} cannot be opened by onnxruntime-genai: {error}") from error
        self._adapters: Any = None
        if adapter is not None:
            file = _adapter_file(folder, adapter)
            require_fit(file, self._graph)
            try:
                self._adapters = og.Adapters(self._model)
                self._adapters.load(str(file), _ACTIVE)
            except Exception as error:
                raise InputError(f"{file} cannot be loaded as an adapter: {first_line(error)}") from error
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
        # -inf rules a token out; an adapter's own numbers are whoever's who made it
        if self._adapters is None and not np.isfinite(out.max()):
            named = name_not_finite(open_graph(self._graph))
            why = "" if named is None else f": initializer {named} holds NaN or infinite values"
            raise InputError(f"{self.folder} gives logits that are not finite{why}", hint="capture it again")
        return torch.from_numpy(out[0].astype(np.float32))

    def start(self, tokens: Tensor, room: int, sampling: Sampling | None = None) -> None:
        """See `LanguageModel`."""
        import onnxruntime_genai as og

        self._generator = None  # its cache goes before the next one comes
        params = og.GeneratorParams(self._model)
        longest = min(len(tokens) + room, self.max_positions)
        params.set_search_options(max_length=longest, num_beams=1, do_sample=sampling is not None)
        if sampling is not None:
            # all tokens take part: the configuration may hold a top_k of the original's
            params.set_search_options(
                temperature=sampling.temperature, top_p=sampling.top_p, top_k=0, random_seed=sampling.seed
            )
        try:
            self._generator = og.Generator(self._model, params)
            if self._adapters is not None:
                self._generator.set_active_adapter(self._adapters, _ACTIVE)
            self._generator.append_tokens(tokens.numpy().astype(np.int32)[None])
        except Exception as error:
            raise InputError(f"{self.folder} does not run: {first_line(error)}") from error

    def step(self) -> int:
        """See `LanguageModel`."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def keep_float_weights(self) -> None:
        """See `LanguageModel`; the runtime decides for itself."""

    def close(self) -> None:
        """See `LanguageModel`."""
        self._generator = self._adapters = self._model = None
        gc.collect()


def _adapter_file(folder: Path, adapter: str) -> Path:
    """The file of an adapter that is given by name or path."""
    beside, given = folder / (adapter + _SUFFIX), Path(adapter)
    if beside.is_file() or given.is_file():
        return beside if beside.is_file() else given
    if (given / "adapter_config.json").is_file():
        raise UsageError(
            f"--adapter {adapter} is a folder of peft; {folder} is an ONNX base, which takes files made for it",
            hint=f"make one: quantcli convert-adapter -m {folder} --adapter-path {adapter} -o {given.name}",
        )
    names = [file.name.removesuffix(_SUFFIX) for file in folder.glob("*" + _SUFFIX)]
    if not names:
        raise UsageError(
            f"{folder} has no adapters",
            hint="make them with `quantcli generate-adapter` (without another --adapter-format)",
        )
    raise UsageError(f"{folder} has no adapter {adapter!r}, {nearest(adapter, names)}")
