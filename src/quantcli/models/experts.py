"""Mixture-of-experts layers taken apart into one Linear per projection and expert, named as checkpoints name them.

transformers 5 holds all experts of a layer in two 3-dimensional parameters; files on disk and every quantized format
hold one matrix per expert. Symbols: E experts, D hidden size, F expert size.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Expert", "UnfusedExperts", "unfuse_experts"]

# gate, up and down as a family's files name them
_PROJECTIONS = {"mixtral": ("w1", "w3", "w2")}
_USUAL = ("gate_proj", "up_proj", "down_proj")


class Expert(nn.Module):
    """One gated feed-forward network: down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inner: int, activation: Any, names: tuple[str, str, str]):
        """Builds three Linears without bias under the names given."""
        super().__init__()
        gate, up, down = names
        self.add_module(gate, nn.Linear(hidden, inner, bias=False))
        self.add_module(up, nn.Linear(hidden, inner, bias=False))
        self.add_module(down, nn.Linear(inner, hidden, bias=False))
        self._names = names
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [T, D] to [T, D]."""
        gate, up, down = (self.get_submodule(name) for name in self._names)
        out: Tensor = down(self._activation(gate(x)) * up(x))
        return out


class UnfusedExperts(nn.ModuleList):
    """Stands in for transformers' fused experts: the same call, one Expert per entry."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Routes tokens [T, D] to their experts by index [T, top_k] and sums them by weight [T, top_k]."""
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            if token.numel():
                weighted = expert(hidden_states[token]) * top_k_weights[token, place, None]
                out.index_add_(0, token, weighted.to(out.dtype))
        return out


def unfuse_experts(model: nn.Module, model_type: str) -> int:
    """Replaces every fused experts module of a model by `UnfusedExperts`; returns how many there were."""
    names = _PROJECTIONS.get(model_type, _USUAL)
    found = [(path, module) for path, module in model.named_modules() if _is_fused(module)]
    for path, module in found:
        experts, hidden, inner = module.down_proj.shape
        activation = module.act_fn
        parts = [Expert(hidden, inner, activation, names) for _ in range(experts)]
        model.set_submodule(path, UnfusedExperts(parts))
    return len(found)


def _is_fused(module: nn.Module) -> bool:
    """Whether a module holds gate_up_proj [E, 2F, D] and down_proj [E, D, F]."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not (isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter) and gate_up.ndim == down.ndim == 3):
        return False
    return hasattr(module, "act_fn") and tuple(gate_up.shape) == (down.shape[0], 2 * down.shape[2], down.shape[1])
