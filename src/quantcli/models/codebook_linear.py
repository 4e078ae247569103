"""A linear that runs from nf4 or fp4 codes as bitsandbytes stores them: blocks of outputs dequantized, used, dropped.

Symbols: K inputs, N outputs, B weights per block of the flattened [N, K] matrix; a block may cross rows.
"""

from collections.abc import Mapping

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantcli.errors import InputError
from quantcli.formats import bnb
from quantcli.models.linear import QuantizedLinear
from quantcli.models.packed_matmul import share_out
from quantcli.tensors.quantized import NestedScale, QuantizedTensor

__all__ = ["CodebookLinear"]


class CodebookLinear(QuantizedLinear):
    """Takes over the tensors of a bitsandbytes checkpoint."""

    codes: Tensor
    absmax: Tensor
    table: Tensor
    frozen = ("codes", "absmax", "table")

    def __init__(self, tensors: Mapping[str, Tensor], *, bias: Tensor | None = None, cache: bool = False):
        """Keeps the codes as they are stored and the scales expanded.

        Args:
            tensors: weight, weight.absmax and the rest of `formats.bnb.PARTS`.
            bias: [N], any float dtype.
            cache: Keep the float weight once it was computed.

        Raises:
            InputError: the tensors do not fit together.
        """
        state = bnb.read_state(tensors)
        super().__init__(*state.shape, bias, cache)
        self.codebook, self.block_size = state.codebook, state.block_size
        self.double_quant, self._nested = state.nested is not None, state.nested
        self.register_buffer("codes", tensors["weight"].reshape(-1).view(torch.uint8).contiguous())
        self.register_buffer("absmax", state.absmax.contiguous())
        self.register_buffer("table", state.table)

    @property
    def bits(self) -> int:
        """Bits per code."""
        return 4

    def quantized(self) -> QuantizedTensor:
        """The codes and scales, unpacked.

        Raises:
            InputError: blocks cross rows.
        """
        nested: NestedScale | None = self._nested
        state = bnb.State(
            self.codebook,
            (self.out_features, self.in_features),
            self.block_size,
            self.table,
            self.absmax,
            None if nested is None else nested.to(self.absmax.device),
        )
        if state.crosses_rows:
            raise InputError(f"blocks of {self.block_size} cross rows of {self.in_features}")
        return bnb.to_quantized(self.codes, state, state.scheme)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, codebook={self.codebook}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}, bias={self.bias is not None}"
        )

    def _transposed(self, start: int, stop: int) -> Tensor:
        columns = self.in_features
        if self.codes.device.type == "cpu":
            out = torch.empty(stop - start, columns, dtype=torch.float32)
            arrays = (self.codes.numpy(), self.absmax.numpy(), self.table.numpy(), self.block_size, start, out.numpy())
            share_out(lambda first, last: _expand(*arrays, first, last), stop - start, columns)
            return out.T
        at = torch.arange(start * columns, stop * columns, device=self.codes.device)
        pairs = self.codes[at >> 1]
        codes = torch.where(at % 2 == 0, pairs >> 4, pairs & 15)
        values = self.table[codes.long()] * self.absmax[at // self.block_size]
        return values.view(stop - start, columns).T


@numba.njit(cache=True, nogil=True)
def _expand(
    codes: NDArray[np.uint8],
    absmax: NDArray[np.float32],
    table: NDArray[np.float32],
    block_size: int,
    offset: int,
    out: NDArray[np.float32],
    start: int,
    stop: int,
) -> None:
    """Fills rows [start, stop) of `out` with rows offset + start onwards of the matrix."""
    columns = out.shape[1]
    for row in range(start, stop):
        first = (offset + row) * columns
        for k in range(columns):
            at = first + k
            pair = np.int64(codes[at >> 1])  # uint8 with a signed number is a float to numba
            code = pair & 15 if at & 1 else pair >> 4
            out[row, k] = table[code] * absmax[at // block_size]
