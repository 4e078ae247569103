"""A model's cache as plain tensors: what a traced graph takes and gives, layer by layer.

transformers keeps what a layer remembers in an object; a graph has inputs and outputs. Layers that remember keys and
values of every position can be flattened so, whatever their heads and widths. What else models keep (the states of
recurrent layers, the keys of an indexer) is named and refused: a graph for any number of tokens cannot hold the loop
that makes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, EncoderDecoderCache

from quantcli.errors import InputError, first_line

__all__ = ["PlainCache", "read_cache"]


@dataclass(frozen=True)
class PlainCache:
    """Keys [B, heads, T, width] and values of each layer that keeps any."""

    heads: tuple[int, ...]
    """Key-value heads by layer."""
    key_widths: tuple[int, ...]
    """Columns of a key by layer."""
    value_widths: tuple[int, ...]
    """Columns of a value by layer."""

    @classmethod
    def of(cls, cache: Any) -> "PlainCache":
        """What transformers' object holds, all of whose layers have keys and values."""
        layers = cache.layers
        return cls(
            tuple(layer.keys.shape[1] for layer in layers),
            tuple(layer.keys.shape[3] for layer in layers),
            tuple(layer.values.shape[3] for layer in layers),
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns that keys and values have in a graph by layer: ONNX Runtime GenAI has one width for both."""
        return tuple(map(max, self.key_widths, self.value_widths))

    @property
    def layers(self) -> int:
        """Layers that keep something."""
        return len(self.heads)

    def names(self, stem: str) -> list[str]:
        """Names of its tensors: `STEM.0.key`, `STEM.0.value` and so on."""
        return [f"{stem}.{i}.{kind}" for i in range(self.layers) for kind in ("key", "value")]

    def zeros(self, batch: int, positions: int) -> tuple[Tensor, ...]:
        """A past of zeros, in the order of `names`."""
        return tuple(
            torch.zeros(batch, heads, positions, width)
            for heads, width in zip(self.heads, self.widths, strict=True)
            for _ in range(2)
        )

    def fill(self, past: Sequence[Tensor]) -> DynamicCache:
        """A cache with a past; made without the config, so that every layer keeps all and masks do the windows."""
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(self.key_widths, self.value_widths, strict=True)):
            cache.update(past[2 * layer][..., :key], past[2 * layer + 1][..., :value], layer)
        return cache

    def flatten(self, cache: Any) -> tuple[Tensor, ...]:
        """What a cache holds, in the order of `names`, the narrower of keys and values filled up with zeros."""
        kept = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        widths = [width for width in self.widths for _ in range(2)]
        return tuple(
            t if t.shape[-1] == width else pad(t, (0, width - t.shape[-1]))
            for t, width in zip(kept, widths, strict=True)
        )


def read_cache(model: Any) -> PlainCache:
    """Runs two tokens and looks at what the model keeps.

    Raises:
        InputError: it keeps something else than keys and values of every position.
    """
    kind = f"model type {model.config.model_type!r}"
    try:
        with torch.no_grad():
            found = model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True)
    except Exception as error:  # whatever model code raises
        raise InputError(f"{kind} does not run two tokens: {first_line(error)}") from error
    cache = getattr(found, "past_key_values", None)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is None:
        other = next((n for n in ("cache_params", "state", "mems") if getattr(found, n, None) is not None), None)
        why = f"keeps its past as {other!r}, not as keys and values" if other else "keeps no past from token to token"
        raise InputError(f"{kind} {why}: no graph with a key-value cache can be made of it")
    if type(cache) is not DynamicCache:
        raise InputError(f"{kind} keeps a cache of its own kind ({type(cache).__name__}): no graph can be made of it")
    layers = list(cache.layers)
    for number, layer in enumerate(layers):
        others = [n for n, v in vars(layer).items() if n.lstrip("_") == n and _holds_tensors(v)]
        others = [n for n in others if n not in ("keys", "values")]
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not (isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == values.ndim == 4):
            raise InputError(
                f"{kind} has recurrent layers (layer {number} is a {type(layer).__name__}): their state is made by a "
                "loop over positions, which torch.export cannot trace for any number of tokens"
            )
        if others:
            raise InputError(
                f"{kind} keeps {', '.join(others)} in layer {number} beside keys and values, which no runtime has"
            )
    if not layers:
        raise InputError(f"{kind} keeps a {type(cache).__name__} without layers: no graph can be made of it")
    return PlainCache.of(cache)


def _holds_tensors(value: Any) -> bool:
    held = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(v, Tensor) for v in held)
