"""Linear and embedding layers that run from packed codes, on CPU and CUDA, with no package beside torch.

Symbols: K inputs, N outputs, G groups. The weight is never kept in float unless asked for: a few rows of input are
multiplied straight from the codes, more rows by blocks of outputs that are dequantized, used and dropped.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.formats import gptq
from quantcli.formats.bitpack import pack_rows
from quantcli.models.packed_matmul import dequantize_columns, multiply, unpack_on_device
from quantcli.models.scaled_product import round_through, scaled_product
from quantcli.scheme import Scheme
from quantcli.tensors.activations import InputRounding
from quantcli.tensors.quantized import QuantizedTensor, group_index

__all__ = ["PackedEmbedding", "PackedLinear", "QuantizedLinear", "RowLookup"]

# Rows of input up to which unpacking in registers beats dequantizing and a matrix product, measured on 2 cores.
_FEW_ROWS = 16
# Float weights that may exist for a moment (32 MB): large heads go through in several blocks.
_BLOCK_ELEMENTS = 1 << 23


class QuantizedLinear(nn.Module, ABC):
    """`y = x @ dequantized.T + bias`; the codes are frozen, gradients reach x and the bias.

    Subclasses keep the codes and say how outputs are dequantized.
    """

    frozen: tuple[str, ...]
    """Names of the buffers that are part of the codes' meaning and keep their dtype."""

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None, cache: bool):
        """Takes N, K, a bias [N] of any float dtype, and whether the float weight is kept once it was computed."""
        super().__init__()
        self.out_features, self.in_features, self.cache = out_features, in_features, cache
        self.bias = None if bias is None else nn.Parameter(bias)
        self.rounding: InputRounding | None = None
        """How x is rounded first, where the checkpoint's layout says so; gradients pass as if it were not."""
        self._dense: Tensor | None = None

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits per code."""

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """The codes as stored, under the name by which peft finds a quantized layer's device."""
        codes: Tensor = getattr(self, self.frozen[0])
        return codes

    @property
    def weight(self) -> Tensor:
        """[N, K] dequantized anew each time, for models that multiply by it themselves (Mamba's step sizes)."""
        kinds = [t.dtype for t in (self.bias, *self.buffers()) if t is not None and t.dtype.is_floating_point]
        return self.dequantize(torch.float32 if self.W_q.device.type == "cpu" or not kinds else kinds[0])

    @abstractmethod
    def quantized(self) -> QuantizedTensor:
        """The codes and scales, unpacked."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight [N, K]."""
        return self._transposed(0, self.out_features).to(dtype).T.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies.

        Args:
            x: [..., K], any float dtype. On CPU the product is taken in float32, elsewhere in x's dtype.

        Returns:
            [..., N] in x's dtype.
        """
        # rows in and rows out: models may write into a product, which a view made inside a Function forbids
        rows: Tensor = _PackedProduct.apply(x.reshape(-1, self.in_features), self)  # type: ignore[no-untyped-call]
        out = rows.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        # `model.to(dtype)` must not touch what is stored: scales are part of the codes' meaning
        self._forget()
        stored = {name: getattr(self, name) for name in self.frozen}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in stored.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self

    def _forget(self) -> None:
        """Drops what was derived from the buffers."""
        self._dense = None

    @abstractmethod
    def _transposed(self, start: int, stop: int) -> Tensor:
        """The float weight's outputs [start, stop), transposed: [K, stop - start] float32."""

    def _multiply(self, rows: Tensor) -> Tensor:
        """[M, K] to [M, N], both in the dtype that the device computes in."""
        if self.cache:
            return rows @ self._cached(rows.dtype)
        blocks = self.blocks()
        if len(blocks) == 1:
            return rows @ self._transposed(0, self.out_features).to(rows.dtype)
        out = rows.new_empty(rows.shape[0], self.out_features)
        for start, stop in blocks:
            out[:, start:stop] = rows @ self._transposed(start, stop).to(rows.dtype)
        return out

    def _multiply_transposed(self, rows: Tensor) -> Tensor:
        """[M, N] to [M, K]: the gradient of the input."""
        if self.cache:
            return rows @ self._cached(rows.dtype).T
        out = rows.new_zeros(rows.shape[0], self.in_features)
        for start, stop in self.blocks():
            out += rows[:, start:stop] @ self._transposed(start, stop).to(rows.dtype).T
        return out

    def _cached(self, dtype: torch.dtype) -> Tensor:
        if self._dense is None or self._dense.dtype != dtype:
            self._dense = self._transposed(0, self.out_features).to(dtype)
        return self._dense

    def blocks(self) -> list[tuple[int, int]]:
        """Outputs [start, stop) whose float weights may exist at once."""
        step = max(256, _BLOCK_ELEMENTS // self.in_features // 256 * 256)
        return [(n, min(n + step, self.out_features)) for n in range(0, self.out_features, step)]


class RowLookup(QuantizedLinear):
    """A quantized linear whose rows can be had one by one, so that it may serve as an embedding."""

    @abstractmethod
    def rows(self, numbers: Tensor) -> Tensor:
        """The float rows [n, K] float32 of the outputs `numbers` [n] int64."""


class PackedLinear(RowLookup):
    """A linear in the layout of GPTQ checkpoints."""

    frozen = gptq.PARTS

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        scheme: Scheme,
        *,
        bias: Tensor | None = None,
        version: int = 1,
        cache: bool = False,
    ):
        """Takes over the tensors of a GPTQ checkpoint as they are stored.

        Args:
            tensors: qweight, qzeros, scales and, optionally, g_idx; see `formats.gptq`.
            scheme: Their grid.
            bias: [N], any float dtype.
            version: 1 where qzeros holds zero - 1, 2 where it holds the zero.
            cache: Keep the float weight once it was computed: fast over long inputs, at the memory of a float model.

        Raises:
            InputError: the shapes do not fit together.
        """
        super().__init__(*gptq.check(tensors, scheme), bias, cache)
        self.scheme, self.version = scheme, version
        for name in ("qweight", "qzeros", "scales"):
            self.register_buffer(name, tensors[name].contiguous())
        given = tensors.get("g_idx")
        group = group_index(self.in_features, scheme, tensors["qweight"].device) if given is None else given
        self.register_buffer("g_idx", group)
        self._grid: tuple[Tensor, Tensor, Tensor] | None = None
        self.trained_scales: nn.Parameter | None = None

    @classmethod
    def from_quantized(
        cls, tensor: QuantizedTensor, *, bias: Tensor | None = None, cache: bool = False
    ) -> "PackedLinear":
        """Packs a tensor in the v2 layout, which holds every zero point."""
        if tensor.has_float_zeros:
            raise AssertionError("packed layers hold whole zero points")
        bits = tensor.scheme.bits
        tensors = {
            "qweight": pack_rows(tensor.codes.T, bits),
            "qzeros": pack_rows(tensor.zero, bits).T.contiguous(),
            "scales": tensor.scale.T.contiguous(),
            "g_idx": tensor.group,
        }
        return cls(tensors, tensor.scheme, bias=bias, version=2, cache=cache)

    @property
    def bits(self) -> int:
        """Bits per code."""
        return self.scheme.bits

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; -1 is all of them."""
        return self.scheme.group_size

    def quantized(self) -> QuantizedTensor:
        """The codes, scales and zeros, unpacked."""
        return gptq.unpack({name: getattr(self, name) for name in gptq.PARTS}, self.scheme, self.version)

    def train_scales(self) -> nn.Parameter:
        """The scales [G, N] float32 as a parameter that products take from now on, rounded to the stored dtype."""
        self.trained_scales = nn.Parameter(self.scales.float())
        return self.trained_scales

    def forward(self, x: Tensor) -> Tensor:
        """As every quantized linear; gradients reach the scales too where they are trained."""
        if self.trained_scales is None:
            return super().forward(x)
        out = scaled_product(x, round_through(self.trained_scales, self.scales.dtype), self)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def rows(self, numbers: Tensor) -> Tensor:
        """As in the base class."""
        zero, scale, group = self._zero_scale_group()
        index = group.long()
        codes = unpack_on_device(self.qweight[:, numbers], self.bits, self.in_features)
        return ((codes.float() - zero[:, numbers].float()[index]) * scale[:, numbers][index]).T

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, symmetric={self.scheme.symmetric}, bias={self.bias is not None}"
        )

    def _zero_scale_group(self) -> tuple[Tensor, Tensor, Tensor]:
        """Zeros [G, N] uint8, scales [G, N] float32, groups [K] int32: what the kernels read, unpacked once."""
        if self._grid is None:
            zero = unpack_on_device(self.qzeros.T, self.bits, self.out_features).T
            if self.version == 1:
                zero = (zero + 1) & (self.scheme.levels - 1)
            self._grid = (
                zero.to(torch.uint8).contiguous(),
                self.scales.float().contiguous(),
                self.g_idx.to(torch.int32).contiguous(),
            )
        return self._grid

    def _transposed(self, start: int, stop: int) -> Tensor:
        return self.dequantize_outputs(self._zero_scale_group()[1], start, stop)

    def dequantize_outputs(self, scale: Tensor, start: int, stop: int) -> Tensor:
        """Outputs [start, stop) of the float weight under scales [G, N]; transposed: [K, stop - start] float32."""
        zero, _, group = self._zero_scale_group()
        scale = scale.detach()
        if _runs_kernels(self.qweight):
            return dequantize_columns(self.qweight, zero, scale, group, self.bits, start, stop)
        codes = unpack_on_device(self.qweight[:, start:stop], self.bits, self.in_features)
        index = group.long()
        return (codes.float() - zero[index, start:stop].float()) * scale[index, start:stop]

    def _multiply(self, rows: Tensor) -> Tensor:
        if not self.cache and _runs_kernels(rows) and rows.shape[0] <= _FEW_ROWS:
            return multiply(rows, self.qweight, *self._zero_scale_group(), self.bits)
        return super()._multiply(rows)

    def _forget(self) -> None:
        super()._forget()
        self._grid = None


class _PackedProduct(torch.autograd.Function):
    """Keeps the codes, not the float weight, for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        rows = x.to(_compute_dtype(x))
        out = layer._multiply(rows if layer.rounding is None else layer.rounding(rows))
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        back = ctx.layer._multiply_transposed(grad.to(_compute_dtype(grad)))
        return back.to(grad.dtype), None


def _runs_kernels(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _compute_dtype(x: Tensor) -> torch.dtype:
    # half precision products on CPU are slow where the processor lacks them, and less exact everywhere
    return torch.float32 if x.device.type == "cpu" else x.dtype


class PackedEmbedding(nn.Module):
    """An embedding that dequantizes the rows that are looked up, and no others."""

    _like: Tensor

    def __init__(self, weight: RowLookup, *, dtype: torch.dtype, embed_scale: float | Tensor | None = None):
        """Wraps packed codes of a [vocabulary, hidden] matrix.

        Args:
            weight: The codes; N is the vocabulary, K the hidden size.
            dtype: Type of the rows that come out.
            embed_scale: Factor that the model's own embedding class applies (Gemma).
        """
        super().__init__()
        self.packed = weight
        self.num_embeddings, self.embedding_dim = weight.out_features, weight.in_features
        self.embed_scale = embed_scale
        # moves with `model.to(dtype)` and says which dtype the rows take
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Looks rows up: ids [...] int64 to [..., hidden]."""
        rows = self.packed.rows(ids.reshape(-1))
        rows = rows.to(self._like.dtype).reshape(*ids.shape, self.embedding_dim)
        return rows if self.embed_scale is None else rows * torch.as_tensor(self.embed_scale).to(rows)
