"""What a format owes: to write a quantized linear, to say what it wrote, and to refuse what it cannot hold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["Codec", "Described", "Held"]


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
    lm_head: bool
    """Whether the head is quantized."""
    producer: str
    """Name and version of the tool."""
    damp_percent: float | None = None
    """Damping that the solver began with, if any."""
    float_linears: Sequence[str] = ()
    """Every linear that stays float, by module name: the excluded ones, routers, and the head where it is one."""
    dtype: torch.dtype = torch.float32
    """What the linears would have been stored in as float tensors."""


@dataclass(frozen=True)
class Codec:
    """One on-disk format of quantized linears."""

    name: str
    """As in `--format`."""
    lowest_zero: int
    """Smallest zero point that it can hold."""
    refuse: Callable[[Held], str | None]
    """Why it cannot hold a linear exactly; None where it can."""
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
