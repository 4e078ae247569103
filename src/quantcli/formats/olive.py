"""Olive's own checkpoints (`quant_method: olive`), which we read and do not write.

For a linear or embedding with K inputs, N outputs, b = 2, 4 or 8 bits and G groups of g columns:

- qweight [N, ceil(K*b/8)] uint8: codes along K, the first in the low bits of a byte;
- scales  [N, G] float, in the dtype of the model;
- qzeros  [N, ceil(G*b/8)] uint8: zero points, packed alike along the groups; none where symmetric: then the zero is in
  the middle.

g divides K, or it is -1: one scale per row.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.formats.codec import require, require_scales
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index

__all__ = ["METHOD", "PARTS", "scheme_of", "unpack"]

METHOD = "olive"
PARTS = ("qweight", "scales", "qzeros")
_BITS = (2, 4, 8)


def scheme_of(config: Mapping[str, Any], name: str) -> Scheme:
    """The scheme of one packed module by a `quantization_config`.

    Raises:
        InputError: bits are others than 2, 4 and 8.
    """
    override = (config.get("overrides") or {}).get(name) or {}
    bits, group_size, symmetric = (
        config.get(key) if override.get(key) is None else override[key] for key in ("bits", "group_size", "symmetric")
    )
    if bits not in _BITS or not isinstance(group_size, int):
        raise InputError(f"Olive checkpoint with {bits} bits and group size {group_size}: 2, 4 and 8 bits are read")
    return Scheme(bits=bits, group_size=group_size, symmetric=bool(symmetric))


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Reads one linear or embedding.

    Args:
        tensors: qweight, scales and, where asymmetric, qzeros.
        scheme: From `scheme_of`.

    Raises:
        InputError: a tensor is missing, or they do not fit together.
    """
    stored = require(tensors, "qweight", (None, None), torch.uint8)
    rows, columns = stored.shape[0], stored.shape[1] * 8 // scheme.bits
    groups = scheme.group_count(columns)
    scales = require_scales(tensors, "scales", (rows, groups))
    if scheme.symmetric:
        if "qzeros" in tensors:
            raise InputError("qzeros is there, but quantization_config says symmetric")
        zero = torch.full((rows, groups), scheme.middle, dtype=torch.uint8)
    else:
        zero = _unpack(require(tensors, "qzeros", (rows, -(-groups * scheme.bits // 8)), torch.uint8), scheme.bits)
    return QuantizedTensor(
        codes=_unpack(stored, scheme.bits),
        scale=scales.contiguous(),
        zero=zero[:, :groups].contiguous(),
        scheme=scheme,
        group=group_index(columns, scheme, stored.device),
    )


def _unpack(stored: Tensor, bits: int) -> Tensor:
    """[R, C] bytes to [R, 8 C / bits] codes, both uint8."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stored.device)
    return ((stored[:, :, None] >> shifts) & ((1 << bits) - 1)).reshape(len(stored), -1)
