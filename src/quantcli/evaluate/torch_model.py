"""A checkpoint folder, float or quantized, as a language model on torch."""

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.evaluate.sampling import Sampling
from quantcli.models.checkpoint import read_config
from quantcli.models.linear import QuantizedLinear
from quantcli.models.load import load
from quantcli.models.machine import free_bytes
from quantcli.models.online import refuse_online
from quantcli.options import SimulationOptions

__all__ = ["TorchModel"]


class TorchModel:
    """Implements `LanguageModel`."""

    def __init__(
        self,
        folder: Path,
        device: str | torch.device | None,
        trust_remote_code: bool,
        simulation: SimulationOptions | None = None,
        adapter: Path | None = None,
    ):
        """Opens a folder, with an adapter folder of peft; see `models.load.load` for what it raises.

        Raises:
            InputError: the adapter is damaged, or does not fit the model.
        """
        self.folder = folder
        self._model: Any = load(folder, device=device, trust_remote_code=trust_remote_code, simulation=simulation)
        if adapter is not None:
            self._model = _adapted(self._model, folder, adapter)
        self._device = self._model.device
        text_config = self._model.config.get_text_config()
        self.max_positions: int | None = getattr(text_config, "max_position_embeddings", None)
        ends = self._model.generation_config.eos_token_id
        self.end_tokens = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self._past: Any = None
        self._sampling: Sampling | None = None
        self._random = torch.Generator()
        self._next: Tensor | None = None
        self._pending: Tensor | None = None

    def logits(self, tokens: Tensor) -> Tensor:
        """See `LanguageModel`."""
        self._past = None
        with torch.inference_mode():
            out = self._model(input_ids=self._checked(tokens)[None], use_cache=False).logits[0]
        return out.float().cpu()  # type: ignore[no-any-return]

    def start(self, tokens: Tensor, room: int, sampling: Sampling | None = None) -> None:
        """See `LanguageModel`; like `generate`, only the last position goes through the head."""
        self._past, self._sampling = None, sampling
        if sampling is not None:
            self._random.manual_seed(sampling.seed)
        self._run(self._checked(tokens)[None])

    def step(self) -> int:
        """See `LanguageModel`."""
        if self._next is None:  # the token that the last step chose has not been read yet
            assert self._pending is not None
            self._run(self._pending)
        assert self._next is not None
        self._pending, self._next = self._next, None
        return int(self._pending)

    def keep_float_weights(self) -> None:
        """Keeps dequantized weights from now on, where memory suffices: long inputs run as fast as in a float model."""
        packed = [m for m in self._model.modules() if isinstance(m, QuantizedLinear)]
        needed = 4 * sum(m.in_features * m.out_features for m in packed)
        if needed < free_bytes(self._device) / 3:
            for module in packed:
                module.cache = True

    def close(self) -> None:
        """See `LanguageModel`."""
        self._model = self._past = None
        gc.collect()

    def _run(self, ids: Tensor) -> None:
        with torch.inference_mode():
            out = self._model(input_ids=ids, past_key_values=self._past, use_cache=True, logits_to_keep=1)
            self._past = out.past_key_values
            self._next = self._choose(out.logits[:, -1])

    def _choose(self, logits: Tensor) -> Tensor:
        """The next token, [1, 1] int64, from logits [1, V]."""
        if self._sampling is None:
            return logits.argmax(-1, keepdim=True)
        # drawn on the CPU: one seed gives the same tokens wherever the model runs
        probabilities = (logits.double().cpu() / self._sampling.temperature).softmax(-1)
        ordered, index = probabilities.sort(-1, descending=True)
        # a token belongs to the nucleus where those before it do not fill it; the first always does
        ordered[ordered.cumsum(-1) - ordered >= self._sampling.top_p] = 0
        drawn = torch.multinomial(ordered, 1, generator=self._random)
        return index.gather(-1, drawn).to(self._device)

    def _checked(self, tokens: Tensor) -> Tensor:
        rows = self._model.get_input_embeddings().num_embeddings
        if int(tokens.max()) >= rows:
            raise InputError(
                f"{self.folder}: its tokenizer gives token {int(tokens.max())}, the model has {rows} embeddings"
            )
        return tokens.to(self._device)


def _adapted(model: Any, folder: Path, adapter: Path) -> Any:
    from quantcli.finetune.lora import open_lora  # peft takes seconds to import

    refuse_online(read_config(folder), folder, "and its hidden states are not those that an adapter was trained on")
    return open_lora(model, adapter)
