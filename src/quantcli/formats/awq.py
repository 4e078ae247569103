"""AWQ checkpoints of the `gemm` layout, 4 bits, as AutoAWQ and gptqmodel write them; read only.

For a linear with K inputs, N outputs and G groups of g columns:

- qweight [K, N/8] int32: eight outputs of one input per word, in the order 0 2 4 6 1 3 5 7 from the low bits up;
- qzeros  [G, N/8] int32: the zero points, packed alike and stored as they are;
- scales  [G, N] float16 or bfloat16.

Groups are runs of neighbouring columns. `zero_point: false` stores no qzeros: the zero is 8.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index

__all__ = ["scheme_of", "unpack"]

_BITS = 4
_PER_WORD = 32 // _BITS
# output number within a word, from its low bits up
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    """The scheme by a `quantization_config`.

    Raises:
        InputError: bits or layout are others than 4-bit gemm.
    """
    bits = config.get("bits", config.get("w_bit", _BITS))
    version = str(config.get("version", config.get("checkpoint_format", "gemm"))).lower()
    if bits != _BITS or version != "gemm":
        raise InputError(f"AWQ checkpoint with {bits} bits and layout {version!r}: 4 bits and 'gemm' are read")
    group_size = config.get("group_size", config.get("q_group_size", 128))
    return Scheme(bits=_BITS, group_size=int(group_size), symmetric=not config.get("zero_point", True))


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Reads one linear.

    Args:
        tensors: qweight, scales and, unless the zero is fixed, qzeros.
        scheme: From `scheme_of`.

    Raises:
        InputError: the shapes do not fit together.
    """
    qweight, scales = tensors["qweight"], tensors["scales"]
    if qweight.ndim != 2 or scales.ndim != 2:
        raise InputError(f"qweight and scales have {qweight.ndim} and {scales.ndim} axes, expected 2")
    columns, rows = qweight.shape[0], qweight.shape[1] * _PER_WORD
    expected = scheme.group_count(columns), rows
    if tuple(scales.shape) != expected:
        raise InputError(f"scales has shape {list(scales.shape)}, expected {list(expected)}")
    qzeros = tensors.get("qzeros")
    if qzeros is None:
        zero = torch.full(expected, scheme.middle, dtype=torch.uint8)
    elif tuple(qzeros.shape) != (expected[0], qweight.shape[1]):
        raise InputError(f"qzeros has shape {list(qzeros.shape)}, expected {[expected[0], qweight.shape[1]]}")
    else:
        zero = _unpack_words(qzeros)
    return QuantizedTensor(
        codes=_unpack_words(qweight).T.contiguous(),
        scale=scales.T.contiguous(),
        zero=zero.T.contiguous(),
        scheme=scheme,
        group=group_index(columns, scheme, qweight.device),
    )


def _unpack_words(words: Tensor) -> Tensor:
    """[R, C] int32 to [R, 8 C] uint8."""
    out = torch.empty(words.shape[0], words.shape[1], _PER_WORD, dtype=torch.uint8, device=words.device)
    for place, output in enumerate(_ORDER):
        out[:, :, output] = ((words >> (_BITS * place)) & 15).to(torch.uint8)
    return out.view(words.shape[0], -1)
