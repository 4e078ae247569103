"""A function of ours where a model dispatches its attention: it sees, or changes, queries, keys and values."""

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantcli.errors import InputError
from quantcli.models.layout import Layout
from quantcli.tensors.activations import InputRounding

__all__ = ["CacheRanges", "Change", "intercept", "round_cache"]

Change: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(attention, query [B, H, T, D], key and value [B, H', S, D]) -> the three that go on."""
_NUMBERS = itertools.count()


class _Attention:
    """An attention function: a change, then the function that the model had."""

    def __init__(self, base: str, change: Change):
        self._base, self._change = base, change
        self.seen: set[int] = set()
        """The modules that have called it."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        self.seen.add(id(module))
        query, key, value = self._change(module, query, key, value)
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(self._base, own)
        return function(module, query, key, value, *args, **kwargs)


def intercept(model: Any, blocks: int, change: Change, hint: str) -> None:
    """Changes queries, keys and values of a model with its weights, from now on.

    Args:
        model: A transformers model.
        blocks: How many attentions must come through: one per block.
        change: What becomes of them.
        hint: For a model that computes attention in another way.

    Raises:
        InputError: it is one.
    """
    attend = _dispatch(model.config.get_text_config(), change)
    if attend is not None:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    found = 0 if attend is None else len(attend.seen)
    if found != blocks:
        raise InputError(
            f"{type(model).__name__} computes attention in a way of its own ({found} of {blocks} blocks use "
            "transformers' interface): its keys and values cannot be quantized",
            hint=hint,
        )


def _dispatch(config: Any, change: Change) -> _Attention | None:
    """Puts a function of ours into a model's configuration; None where the model does not ask it."""
    base = config._attn_implementation
    if base not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    attend = _Attention(base, change)
    name = f"quantcli {base} {next(_NUMBERS)}"  # two models may be open at once
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    config._attn_implementation = name
    return attend


class CacheRanges:
    """The largest magnitudes of the keys and values of attentions that run while it looks."""

    def __init__(self, skeleton: Any):
        """Puts itself where the blocks of a skeleton will look for attention.

        Raises:
            InputError: its attention is computed in a way of its own.
        """
        self._found: dict[int, tuple[Tensor, Tensor]] = {}
        self._looks = False
        if _dispatch(skeleton.config.get_text_config(), self._note) is None:
            raise InputError(
                f"{type(skeleton).__name__} computes attention in a way of its own: its cache cannot be measured",
                hint="leave --kv-cache out",
            )

    def _note(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._looks:
            tops = tuple(x.abs().amax().float() for x in (key, value))
            old = self._found.get(id(module), tops)
            self._found[id(module)] = torch.maximum(old[0], tops[0]), torch.maximum(old[1], tops[1])
        return query, key, value

    @contextmanager
    def of_block(self, block: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """While a block runs; afterwards, by the name of each attention within it, the largest key and value."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        self._looks = True
        try:
            yield found
        finally:
            self._looks = False
            found |= {name: self._found[id(m)] for name, m in block.named_modules() if id(m) in self._found}
            self._found = {}


def round_cache(model: Any, layout: Layout, roundings: dict[str, tuple[InputRounding, InputRounding]]) -> None:
    """Rounds keys and values by stored scales.

    Args:
        model: With its weights.
        layout: Its parts.
        roundings: By the module path of each attention, of its keys and its values.

    Raises:
        InputError: the model computes attention in a way of its own.
    """
    by_module = {id(model.get_submodule(name)): found for name, found in roundings.items()}

    def change(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = by_module[id(module)]
        return query, keys(key), values(value)

    intercept(model, len(layout.blocks), change, "give a checkpoint whose cache stays float")
