"""Inputs of a language model's graph, made from tokens alone: ids, mask, positions, and a cache with nothing in it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["INPUT_IDS", "TokenFeeds"]

INPUT_IDS = "input_ids"
"""The input that says that a graph takes tokens."""


@dataclass(frozen=True)
class TokenFeeds:
    """One batch per run of rows, as a graph wants it."""

    graph: ir.Graph
    """The language model: input_ids [B, T], and attention_mask, position_ids and past_* where it has them."""
    rows: "np.ndarray | Tensor"
    """[R, T] int64 tokens."""
    batch_size: int = 1
    """Rows of a batch."""
    axes: Mapping[str, int] = field(default_factory=dict)
    """Lengths of axes that the graph only names, as `kv_cache_dim`: the head size of GenAI's graphs."""

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """The batches in order.

        Raises:
            InputError: the graph has no input_ids, or an input that tokens say nothing about.
        """
        inputs = {str(v.name): v for v in self.graph.inputs}
        if INPUT_IDS not in inputs:
            raise InputError(f"the graph has no input_ids, its inputs are {', '.join(inputs)}")
        for start in range(0, len(self.rows), self.batch_size):
            ids = np.asarray(self.rows[start : start + self.batch_size])
            known = {
                INPUT_IDS: ids,
                "attention_mask": np.ones_like(ids),
                "position_ids": np.arange(ids.shape[1])[None].repeat(len(ids), 0),
                "token_type_ids": np.zeros_like(ids),
                "cache_position": np.arange(ids.shape[1]),
                "past_sequence_length": np.array([ids.shape[1] - 1]),
                "total_sequence_length": np.array(ids.shape[1]),
            }
            feed = {}
            for name, value in inputs.items():
                if name in known:
                    feed[name] = known[name].astype(_dtype(value))
                elif name.startswith("past"):
                    feed[name] = np.zeros(_cache_shape(value, len(ids), self.axes), _dtype(value))
                else:
                    raise InputError(
                        f"tokens say nothing about the graph's input {name!r}",
                        hint="give --calibration-inputs with arrays for all inputs",
                    )
            yield feed


def _dtype(value: ir.Value) -> np.dtype:
    return (value.dtype or ir.DataType.INT64).numpy()


def _cache_shape(value: ir.Value, batch: int, axes: Mapping[str, int]) -> list[int]:
    """The batch first, no tokens in the axis after the heads; every other axis has to have a length."""
    if value.shape is None or len(value.shape) < 3:
        raise InputError(f"the cache {value.name!r} has no shape of at least three axes")
    known = [axis if isinstance(axis, int) else axes.get(str(axis.value)) for axis in value.shape]
    shape = [batch, *(0 if axis == len(known) - 2 else known[axis] for axis in range(1, len(known)))]
    if None in shape:
        raise InputError(f"the cache {value.name!r} has axes of unknown length: {value.shape}")
    return [int(n or 0) for n in shape]
