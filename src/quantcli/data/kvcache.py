"""A key-value cache for sampling many rows at once: written in place, never copied as it grows.

transformers' own cache concatenates, which copies every layer's keys and values for each new token; at 64 rows of 512
tokens that moves more memory than the model itself. The layers here hand out views of one buffer instead. Layers of
other kinds (state space, hybrid, indexed) stay as transformers makes them.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["preallocated_cache"]


class _PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, heads, capacity, head_dim] of a layer; `keys` and `values` are views of what is filled."""

    def __init__(self, capacity: int, window: int | None = None):
        super().__init__()
        self.capacity = capacity
        self.window = window
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the buffers once the first states show shape, dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_buffer = key_states.new_empty(*key_states.shape[:2], self.capacity, key_states.shape[-1])
        self.value_buffer = value_states.new_empty(*value_states.shape[:2], self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds states [B, heads, T, head_dim]; returns all that the new tokens may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, count = self.filled, key_states.shape[-2]
        self.filled += count
        self.key_buffer[:, :, start : self.filled] = key_states
        self.value_buffer[:, :, start : self.filled] = value_states
        first = self._first_visible(start)
        self.keys = self.key_buffer[:, :, first : self.filled]
        self.values = self.value_buffer[:, :, first : self.filled]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` will return for that many new tokens."""
        first = self._first_visible(self.filled)
        return self.filled + query_length - first, first

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.filled

    def _first_visible(self, start: int) -> int:
        return 0 if self.window is None else max(start - self.window + 1, 0)


class _PreallocatedSlidingLayer(_PreallocatedLayer):
    """The same for a layer that sees a window of the last tokens only."""

    is_sliding = True


def preallocated_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """A cache for `capacity` tokens per row that fits the model's layer kinds."""
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        # exactly these types: a subclass keeps more than keys and values
        if type(layer) is DynamicLayer:
            cache.layers[index] = _PreallocatedLayer(capacity)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = _PreallocatedSlidingLayer(capacity, layer.sliding_window)
    return cache
