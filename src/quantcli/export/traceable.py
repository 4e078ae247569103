"""What is put in the place of model code that torch.export cannot follow: the routing of experts, switching rotaries.

A mixture of experts loops over the experts that were hit, which depends on the data. Here every expert is in the
graph and gathers the tokens that chose it, none maybe: the arithmetic is the same and no expert runs on tokens that
did not choose it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

__all__ = ["make_traceable"]

_NAME = "quantcli_traced"


def make_traceable(model: Any) -> None:
    """Changes a model's experts and rotary embeddings for good; what it computes stays the same."""
    ALL_EXPERTS_FUNCTIONS.register(_NAME, _experts)
    for path, module in list(model.named_modules()):
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = _NAME
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str | dict) and hasattr(module, "original_max_seq_len"):
            model.set_submodule(path, _Rotary(module))


def _experts(self: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The experts of one layer, stacked in parameters or each with its own Linears; see `_gather`."""

    def expert(number: int, rows: Tensor) -> Tensor:
        first = "gate_up_proj" if self.has_gate else "up_proj"
        inner = _product(self, first, number, rows)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        out = _product(self, "down_proj", number, inner)
        normed: Tensor = self.post_expert_norm(out) if self.has_post_expert_norm else out
        return normed

    return _gather(expert, len(self.down_proj), hidden, chosen, weights)


def _gather(expert: Any, count: int, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Sums what the experts make of the tokens that chose them.

    Args:
        expert: (number, rows [R, D]) -> [R, D].
        count: Experts.
        hidden: [T, D].
        chosen: [T, top_k] numbers of experts.
        weights: [T, top_k].
    """
    out = torch.zeros_like(hidden)
    for number in range(count):
        token, place = torch.where(chosen == number)
        out = out.index_add(0, token, expert(number, hidden[token]) * weights[token, place, None])
    return out


def _product(experts: Any, name: str, number: int, rows: Tensor) -> Tensor:
    weight = getattr(experts, name)[number]
    bias = getattr(experts, f"{name}_bias")[number] if experts.has_bias else None
    out: Tensor = linear(rows, weight.T if experts.is_transposed else weight, bias)
    return out


class _Rotary(nn.Module):
    """A rotary embedding whose frequencies depend on the length, without a buffer that changes.

    `longrope` picks one of two by the length. `dynamic` changes them beyond the positions that the model has, which a
    graph's context does not reach.
    """

    def __init__(self, rotary: Any):
        super().__init__()
        self.kinds = rotary.rope_type
        rotary.rope_type = "default" if isinstance(self.kinds, str) else dict.fromkeys(self.kinds, "default")
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        kind, prefix = (self.kinds, "") if layer_type is None else (self.kinds[layer_type], f"{layer_type}_")
        words = {} if layer_type is None else {"layer_type": layer_type}
        if kind != "longrope":
            return self.rotary(x, position_ids, **words)
        config, name = self.rotary.config, f"{prefix}inv_freq"
        settings = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        limit = settings["original_max_position_embeddings"]
        long, _ = ROPE_INIT_FUNCTIONS[kind](config, x.device, seq_len=limit + 1, layer_type=layer_type)
        chosen = torch.where(position_ids.max() + 1 > limit, long, getattr(self.rotary, name))
        return functional_call(self.rotary, {name: chosen}, (x, position_ids), words)
