"""Vector-wise int8 of LLM.int8() (https://arxiv.org/abs/2208.07339): codes k in [-127, 127], one scale per vector.

The value of a code is k / 127 times the vector's largest magnitude. Both sides of a product are rounded so: weights by
row once, activations by token at run time, but for their outliers, whose columns are multiplied as they are.

Symbols: X [M, K] activations of M tokens, W [N, K] weight, C codes, c_w [N] and c_x [M] largest magnitudes.
"""

import torch
from torch import Tensor

from quantcli.scheme import PER_CHANNEL, Scheme
from quantcli.tensors.codebook import codebook
from quantcli.tensors.quantized import QuantizedTensor, group_index

__all__ = ["SCHEME", "codes_of", "decomposed_product", "integer_product", "round_rows", "round_vectors", "with_codes"]

SCHEME = Scheme(8, PER_CHANNEL, codebook="int8")
_MIDDLE = 128
"""What codes are shifted by where they are unsigned."""
_UNIT = 1 / 127**2
"""Of a product of two codes. bitsandbytes 0.50 has 6.200124e-05 on CPU, 1.8e-5 more: enough to turn later codes."""
_EXACT = 1024
"""So many products of two codes add up exactly in float32."""


def round_rows(weight: Tensor) -> QuantizedTensor:
    """Rounds W [N, K], any float dtype within float16's range, as bitsandbytes does: in float16, row by row."""
    return with_codes(*round_vectors(weight.half()))


def with_codes(codes: Tensor, largest: Tensor) -> QuantizedTensor:
    """Codes [N, K] int8 and largest magnitudes of rows [N] float32 as a tensor on the codebook."""
    return QuantizedTensor(
        codes=(codes.to(torch.int16) + _MIDDLE).to(torch.uint8),
        scale=largest[:, None],
        zero=torch.zeros(len(codes), 1, dtype=torch.uint8, device=codes.device),
        scheme=SCHEME,
        group=group_index(codes.shape[1], SCHEME, codes.device),
        codebook=codebook("int8", codes.device),
    )


def codes_of(tensor: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """The arguments of `with_codes`."""
    return (tensor.codes.to(torch.int16) - _MIDDLE).to(torch.int8), tensor.scale[:, 0].contiguous()


def round_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [M, K] int8 and largest magnitudes [M] float32 of rows [M, K]; a row of zeros has codes 0."""
    largest = x.abs().amax(1).float()
    factor = torch.where(largest > 0, 127.0 / largest, torch.zeros_like(largest))
    return (x.float() * factor[:, None]).round().to(torch.int8), largest


def decomposed_product(x: Tensor, codes: Tensor, largest: Tensor, threshold: float) -> Tensor:
    """X W.T: outlier columns in X's dtype, the others as a product of int8 codes.

    As in bitsandbytes, a token's scale leaves out its outliers alone, not the smaller values of their columns.

    Args:
        x: X [M, K] float32, float16 or bfloat16. Rounded to float16 before it is compared and rounded to codes.
        codes: C [N, K] int8.
        largest: c_w [N] float32.
        threshold: Magnitude from which on a value is an outlier; 0: none is.

    Returns:
        [M, N] in X's dtype.
    """
    half = x.clamp(-65504, 65504).half()
    found = half.abs() >= threshold if threshold > 0 else torch.zeros_like(half, dtype=torch.bool)
    outliers = found.any(0)
    rounded, token = round_vectors(half.masked_fill(found, 0))
    rounded = rounded.masked_fill(outliers, 0)
    product = integer_product(rounded, codes).float() * (token[:, None] * largest) * _UNIT
    out = product.to(x.dtype)
    if bool(outliers.any()):
        weight = codes[:, outliers].float() * (largest / 127)[:, None]
        out = out + x[:, outliers] @ weight.to(x.dtype).T
    return out


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """A B.T of codes [M, K] and [N, K] int8, exact: [M, N] int32.

    `torch._int_mm` of torch 2.13 reads matrices of one column wrong on CPU; floats serve on every device.
    """
    out = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    for first in range(0, a.shape[1], _EXACT):
        part = slice(first, first + _EXACT)
        out += (a[:, part].float() @ b[:, part].float().T).int()
    return out
