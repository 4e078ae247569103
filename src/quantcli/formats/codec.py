"""What a format owes: to write a quantized linear, to say what it wrote, and to refuse what it cannot hold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.formats.layouts import Layout
from quantcli.scheme import ActivationScheme, Scheme
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["Codec", "Described", "Held", "require", "require_groups", "require_scales"]


@dataclass(frozen=True)
class Held:
    """One linear that a format is asked to hold."""

    rows: int
    columns: int
    scheme: Scheme
    is_default: bool
    """Whether the scheme is that of the whole model."""
    ordered: bool
    """Whether groups are runs of neighbouring columns."""
    float_zeros: bool = False
    """Whether its zero points are fractions of a step."""
    transposed: bool = False
    """Whether the model keeps the matrix as [K, N] (GPT-2's Conv1D)."""
    expert: bool = False
    """Whether it is one of many experts, which transformers keeps in one tensor."""


@dataclass(frozen=True)
class Described:
    """What `quantization_config` says of a checkpoint."""

    default: Scheme
    """Scheme of the linears that have no entry of their own."""
    exceptions: Mapping[str, Scheme]
    """Linears with another scheme, by module name."""
    excluded: Sequence[str]
    """Linears that stayed float, by module name."""
    desc_act: bool
    """Whether groups follow the order of the solver and not of memory."""
    head: str | None
    """The head's module name where it is quantized."""
    producer: str
    """Name and version of the tool."""
    damp_percent: float | None = None
    """Damping that the solver began with, if any."""
    quantized: Sequence[str] = ()
    """Linears that are quantized, by module name."""
    float_linears: Sequence[str] = ()
    """Every linear that stays float, by module name: the excluded ones, routers, and the head where it is one."""
    blocks: Sequence[str] = ()
    """Module names of the blocks."""
    outlier_threshold: float | None = None
    """Magnitude from which on activations stay out of the int8 product, if some do."""
    dtype: torch.dtype = torch.float32
    """What the linears would have been stored in as float tensors."""
    layout: str = "pack-quantized"
    """Of compressed-tensors: how the linears are stored."""
    activations: ActivationScheme | None = None
    """How what they read is rounded."""
    fp8_cache: bool = False
    """Whether keys and values are rounded to FP8 by scales that are stored."""


@dataclass(frozen=True)
class Codec:
    """One on-disk format of quantized linears."""

    name: str
    """As in `--format`."""
    lowest_zero: int
    """Smallest zero point that it can hold."""
    refuse: Callable[[Held], str | None]
    """Why it cannot hold a linear, of what is its own to say; see `why_not`."""
    pack: Callable[..., dict[str, Tensor]]
    """Of a QuantizedTensor, the stored tensors by the part of their name that follows the module's."""
    unpack: Callable[[Mapping[str, Tensor], Scheme], QuantizedTensor] | None
    """Reads them back; None where only the float weight is stored."""
    config: Callable[[Described], dict[str, Any] | None]
    """`quantization_config` of config.json; None where there is none."""
    packed_bytes: Callable[[int, int, Scheme], int] | None
    """Bytes of a linear of N rows and K columns; None where it is an ordinary tensor."""
    takes_dtype: bool = False
    """Whether `pack` takes a second argument: the dtype that the weight would have as a float tensor."""
    float_zeros: bool = False
    """Whether it holds zero points that are no whole numbers."""
    codebooks: bool = False
    """Whether it holds codes of a codebook."""
    layout: Layout | None = None
    """Where it fixes the grid: what it fixes."""

    def why_not(self, held: Held) -> str | None:
        """Why it cannot hold a linear exactly; None where it can."""
        if held.float_zeros and not self.float_zeros:
            return "it holds whole zero points only"
        if held.scheme.codebook is not None and not self.codebooks:
            return "it holds uniform grids, not a codebook"
        if self.layout is not None and held.scheme not in map(self.layout.weights, self.layout.group_sizes):
            return f"it has one grid, of {self.layout.bits} bits"
        return self.refuse(held)


def require(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int | None, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """A stored tensor, once its shape and dtype are known to be right: kernels do not check bounds.

    Args:
        tensors: What is stored of one linear.
        name: The tensor wanted.
        shape: Its shape; None for an axis of any length above 0.
        dtype: Its dtype; None for any float.

    Raises:
        InputError: it is missing or another than expected.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise InputError(f"{name} is missing")
    if tensor.ndim != len(shape):
        raise InputError(f"{name} has shape {list(tensor.shape)}, expected {len(shape)} axes")
    if any(n == 0 if wanted is None else n != wanted for n, wanted in zip(tensor.shape, shape, strict=True)):
        expected = ["?" if wanted is None else wanted for wanted in shape]
        raise InputError(f"{name} has shape {list(tensor.shape)}, expected {expected}".replace("'", ""))
    if tensor.dtype != dtype if dtype is not None else not tensor.is_floating_point():
        raise InputError(f"{name} is {tensor.dtype}, expected {dtype or 'a float'}")
    return tensor


def require_scales(tensors: Mapping[str, Tensor], name: str, shape: tuple[int | None, ...]) -> Tensor:
    """As `require`, for scales: finite floats."""
    scales = require(tensors, name, shape)
    if not bool(torch.isfinite(scales).all()):
        raise InputError(f"{name} ({scales.dtype}) are not finite numbers")
    return scales


def require_groups(tensors: Mapping[str, Tensor], name: str, columns: int, groups: int) -> Tensor:
    """As `require`, for the group of each column: whole numbers [K] in [0, G), returned as int32."""
    index = tensors.get(name)
    wide = index is not None and index.dtype == torch.int64  # some writers
    index = require(tensors, name, (columns,), torch.int64 if wide else torch.int32)
    if not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise InputError(f"{name} names groups {int(index.min())} to {int(index.max())}, there are {groups}")
    return index.to(torch.int32)
