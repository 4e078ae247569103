"""From the last block's output to logits, by the model's own code: final norm, head and whatever stands around them."""

from typing import Any

from torch import Tensor, nn

from quantcli.models.layout import Layout
from quantcli.models.walk import StandIn

__all__ = ["tail_logits"]


class _Given(StandIn):
    """Its output is given."""

    def __init__(self, original: nn.Module, output: Tensor | tuple[Any, ...]):
        super().__init__(original)
        self._output = output

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._output


def tail_logits(model: Any, layout: Layout, tokens: Tensor, hidden: Tensor, *, tuples: bool) -> Tensor:
    """Logits [b, T, V] float32 of hidden states [b, T, D] that leave the last block.

    Args:
        model: Skeleton whose tensors outside the blocks are in place, the head's included.
        layout: Its parts.
        tokens: [b, T] int64, the text that the hidden states belong to.
        hidden: What the last block gave.
        tuples: Whether blocks of this model return tuples.
    """
    path = layout.blocks[0].rpartition(".")[0]
    originals = model.get_submodule(path)
    output = (hidden, None) if tuples else hidden
    try:
        model.set_submodule(path, nn.ModuleList(_Given(block, output) for block in originals))
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits.float()
    finally:
        model.set_submodule(path, originals)
