"""A product with packed codes whose gradient reaches their scales; the weight is float a block of outputs at a time.

Symbols: K inputs, N outputs, G groups, M rows of input, g(k) the group of input k.

    W[n, k] = (code[n, k] - zero[n, g(k)]) * scale[n, g(k)]
    dL/dscale[n, g] = sum over k of group g of dL/dW[n, k] * (code[n, k] - zero[n, g])
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantcli.tensors.activations import InputRounding

__all__ = ["Codes", "round_through", "rounded_in_forward", "scaled_product"]


class Codes(Protocol):
    """A packed matrix, as `models.linear.PackedLinear` has it."""

    in_features: int
    out_features: int
    g_idx: Tensor
    """[K]: the group of each input."""
    rounding: InputRounding | None
    """What becomes of x first; gradients pass as if it did not."""

    def blocks(self) -> list[tuple[int, int]]:
        """Outputs [start, stop) whose float weights may exist at once."""
        ...

    def dequantize_outputs(self, scale: Tensor, start: int, stop: int) -> Tensor:
        """[K, stop - start] float32 under scales [G, N]."""
        ...


def round_through(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values rounded to a stored dtype, as float32; gradients pass as if nothing was rounded."""
    if values.dtype == dtype:
        return values
    return values + (values.detach().to(dtype).to(values.dtype) - values.detach())


def rounded_in_forward(module: nn.Module, name: str, dtype: torch.dtype) -> nn.Parameter:
    """Lets a module see a parameter rounded to a stored dtype; returns the float32 parameter that can be trained."""
    parametrize.register_parametrization(module, name, _Rounded(dtype), unsafe=True)
    original: nn.Parameter = module.parametrizations[name].original  # type: ignore[union-attr, index]
    return original


class _Rounded(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype

    def forward(self, values: Tensor) -> Tensor:
        return round_through(values, self._dtype)


def scaled_product(x: Tensor, scale: Tensor, layer: Codes) -> Tensor:
    """Multiplies, with gradients of the input and of the scales.

    Args:
        x: [..., K], any float dtype.
        scale: [G, N] float32, in the place of the layer's own.
        layer: Its codes and zero points.

    Returns:
        [..., N] in x's dtype.
    """
    # rows in and rows out: models may write into a product, which a view made inside a Function forbids
    out: Tensor = _ScaledProduct.apply(x.reshape(-1, layer.in_features), scale, layer)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], layer.out_features)


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, layer: Codes) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        rows = x.float()
        if layer.rounding is not None:
            rows = x = layer.rounding(rows)
        ctx.save_for_backward(x, scale)
        out = rows.new_empty(len(rows), layer.out_features)
        for start, stop in layer.blocks():
            out[:, start:stop] = rows @ layer.dequantize_outputs(scale, start, stop)
        return out.to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,), layer = grads, ctx.layer
        x, scale = ctx.saved_tensors
        rows, back = x.float(), grad.float()
        index = layer.g_idx.long()
        of_rows, of_scale, ones = torch.zeros_like(rows), torch.zeros_like(scale), torch.ones_like(scale)
        for start, stop in layer.blocks():
            levels = layer.dequantize_outputs(ones, start, stop)
            part = back[:, start:stop]
            of_weight = rows.T @ part
            summed = scale.new_zeros(len(scale), stop - start).index_add_(0, index, of_weight.mul_(levels))
            of_scale[:, start:stop] = summed
            of_rows += part @ levels.mul_(scale[index, start:stop]).T
        return of_rows.to(ctx.dtype), of_scale, None
