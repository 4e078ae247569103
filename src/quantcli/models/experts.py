"""Mixture-of-experts layers taken apart into one Linear per projection and expert.

transformers 5 holds all experts of a layer in 3-dimensional parameters; every quantized format holds one matrix per
expert, with a grid of its own. The modules keep their own forward, whatever it computes: what stands where such a
parameter stood gives, when it is indexed or multiplied by, the product of that expert's Linears. So gates, clamps and
biases of any architecture stay its own. Symbols: E experts, N outputs, K inputs of one expert's matrix.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.errors import InputError

__all__ = ["Expert", "Stacked", "routed_only", "show_all_tokens", "unfuse_experts"]

_LINEAR = (nn.functional.linear,)
_MATMUL = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
_BATCHED = (torch.bmm, torch.Tensor.bmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


@dataclass(frozen=True)
class Stacked:
    """A 3-dimensional parameter that was taken apart."""

    owner: str
    """Path of the module that had it."""
    parameter: str
    shape: tuple[int, ...]
    """[E, N, K], or [E, K, N] where transposed."""
    transposed: bool
    leaves: tuple[str, ...]
    """Names of the Linears of one expert that it became: one, or gate and up one after another along N."""

    @property
    def name(self) -> str:
        """The parameter's path."""
        return f"{self.owner}.{self.parameter}"

    def weight(self, expert: int, leaf: str) -> str:
        """Path of the weight of one of the Linears."""
        return f"{self.owner}.{expert}.{leaf}.weight"

    def rows(self, leaf: str) -> slice:
        """The outputs that it holds of the expert's matrix."""
        size = self.shape[2 if self.transposed else 1] // len(self.leaves)
        first = self.leaves.index(leaf) * size
        return slice(first, first + size)


class Expert(nn.Module):
    """The Linears of one expert; the module that owns it says how they are called."""


class _Matrix:
    """One expert's matrix [N, K], or [K, N] where transposed: a product with it runs the expert's Linears."""

    def __init__(self, stack: "_Stack", expert: int, transposed: bool):
        self._stack, self._expert, self._transposed = stack, expert, transposed
        shape = stack.shape[1:]
        self.shape = shape if transposed == stack.transposed else torch.Size(shape[::-1])

    @property
    def T(self) -> "_Matrix":  # noqa: N802
        """The other way round."""
        return _Matrix(self._stack, self._expert, not self._transposed)

    def t(self) -> "_Matrix":
        """The same under torch's other name."""
        return self.T

    def product(self, x: Tensor, transposed: bool, bias: Tensor | None = None) -> Tensor:
        """X [..., K] through the Linears, [..., N]."""
        if transposed != self._transposed:
            raise InputError(f"{self._stack.what} is multiplied the other way round than its shape says")
        owner = self._stack.owner
        parts = [owner.get_submodule(f"{self._expert}.{leaf}")(x) for leaf in self._stack.leaves]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if bias is None else out + bias

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
        if func in _LINEAR:
            return given["weight"].product(given["input"], False, given.get("bias"))
        if func in _MATMUL and isinstance(args[1], cls):
            return args[1].product(args[0], True)
        raise InputError(f"experts are used in {getattr(func, '__name__', func)}, which is not known to be a product")


class _Stack:
    """All experts' matrices of one parameter; stands in the parameter's place."""

    def __init__(self, owner: nn.Module, what: str, leaves: tuple[str, ...], shape: torch.Size, transposed: bool):
        self.owner, self.what, self.leaves, self.shape, self.transposed = owner, what, leaves, shape, transposed
        self._turned = transposed

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> _Matrix:
        return _Matrix(self, int(index), self._turned)

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def dtype(self) -> torch.dtype:
        """Of what it holds, or of the scales of what it holds."""
        tensors = (*self.owner.parameters(), *self.owner.buffers())
        return next((t.dtype for t in tensors if t.dtype.is_floating_point), torch.float32)

    def transpose(self, first: int, second: int) -> "_Stack":
        """Every matrix the other way round."""
        if {first % 3, second % 3} != {1, 2}:
            raise InputError(f"{self.what} is transposed across its experts")
        turned = _Stack(self.owner, self.what, self.leaves, self.shape, self.transposed)
        turned._turned = not self._turned
        return turned

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _BATCHED and isinstance(args[1], cls):
            x, stack = args
            return torch.stack([stack[e].product(x[e], True) for e in range(len(stack))])
        raise InputError(f"experts are used in {getattr(func, '__name__', func)}, which is not known to be a product")


def unfuse_experts(model: nn.Module, names: Mapping[str, tuple[str, ...]]) -> dict[str, Stacked]:
    """Takes every stack of experts' matrices apart.

    Args:
        model: On the meta device; changed in place. Its expert modules compute one expert at a time afterwards.
        names: By the path of a stacked parameter, what its files call the matrices of one expert, where they have some.

    Returns:
        What was taken apart, by the path of the parameter.
    """
    found: dict[str, Stacked] = {}
    for path, module in list(model.named_modules()):
        if "Expert" not in type(module).__name__:
            continue
        stacks = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim == 3}
        for name, parameter in stacks.items():
            transposed = _is_transposed(module, name, stacks)
            if transposed is None:
                continue
            leaves = names.get(f"{path}.{name}") or _leaves(module, name)
            rows, columns = parameter.shape[1:][::-1] if transposed else parameter.shape[1:]
            for expert in range(parameter.shape[0]):
                if str(expert) not in module._modules:
                    module.add_module(str(expert), Expert())
                for leaf in leaves:
                    linear = nn.Linear(columns, rows // len(leaves), bias=False, device=parameter.device)
                    module.get_submodule(str(expert)).add_module(leaf, linear)
            del module._parameters[name]
            setattr(module, name, _Stack(module, f"{path}.{name}", leaves, parameter.shape, transposed))
            found[f"{path}.{name}"] = Stacked(path, name, tuple(parameter.shape), transposed, leaves)
        if stacks and hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    return found


def routed_only(model: nn.Module) -> list[str]:
    """Paths of the modules whose experts are called in another way than (tokens, who was chosen, weights)."""
    return [
        path
        for path, module, _ in _with_experts(model)
        if len(signature(module.forward).parameters) != 3 and not hasattr(type(module), "_apply_gate")
    ]


def show_all_tokens(block: nn.Module) -> None:
    """Lets every expert of a block see every token before each is routed as ever; the output stays what it was.

    Those of `routed_only` see what they are given.
    """
    left = routed_only(block)
    for path, module, experts in _with_experts(block):
        if path not in left:
            module.forward = partial(_forward_twice, module.forward, experts)


def _with_experts(model: nn.Module) -> list[tuple[str, nn.Module, int]]:
    """Modules that own experts, by path, with how many."""
    counts = [(p, m, sum(isinstance(c, Expert) for c in m.children())) for p, m in model.named_modules()]
    return [(path, module, count) for path, module, count in counts if count]


def _forward_twice(
    routed: Callable[..., Tensor], experts: int, hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Once with every token at every expert, for who listens; then as the router says."""
    count = index.shape[0]
    every = torch.arange(experts, device=index.device, dtype=index.dtype).expand(count, experts)
    routed(hidden, every, weights.new_ones(count, experts))
    return routed(hidden, index, weights)


def _leaves(module: nn.Module, name: str) -> tuple[str, ...]:
    if name == "gate_up_proj" and getattr(module, "is_concatenated", True):
        return ("gate_proj", "up_proj")
    return ("proj" if name == "weight" else name,)


def _is_transposed(module: nn.Module, name: str, stacks: Mapping[str, nn.Parameter]) -> bool | None:
    """Whether the matrices are [K, N]; None where nothing tells. Wrong, it is refused as it runs."""
    declared = getattr(module, "is_transposed", None)
    if declared is not None:
        return bool(declared)
    first, second = stacks[name].shape[1:]
    sizes = getattr(module, "output_size", None), getattr(module, "input_size", None)
    if (first, second) == sizes:
        return False
    hidden = next((s for a in ("hidden_size", "hidden_dim") if isinstance(s := getattr(module, a, None), int)), None)
    down = stacks.get("down_proj")
    if hidden is None and down is not None:  # both matrices have the hidden size, only it is on both sides
        others = [p.shape[1:] for n, p in stacks.items() if n != "down_proj"]
        common = set(down.shape[1:]).intersection(*map(set, others)) if others else set()
        hidden = common.pop() if len(common) == 1 else None
    if hidden is None or first == second or hidden not in (first, second):
        return None
    reads = second if name != "down_proj" else first
    return reads != hidden
