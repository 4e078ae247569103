"""A linear that runs from the blocks of a GGUF file: rows of them dequantized, used, dropped.

Types that we write are unpacked by `formats.gguf`, all others by the `gguf` package.
"""

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.formats import gguf
from quantcli.models.linear import RowLookup
from quantcli.tensors.block_types import BLOCK_TYPES, scheme_of
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["BlockLinear", "block_size"]


def block_size(kind: str) -> tuple[int, int]:
    """Columns and bytes of a block of a type.

    Raises:
        InputError: no such type is known.
    """
    if kind in BLOCK_TYPES:
        return BLOCK_TYPES[kind].columns, BLOCK_TYPES[kind].size_bytes
    import gguf as package

    try:
        columns, size = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind.upper()]]
    except KeyError as error:
        raise InputError(f"unknown GGML type {kind}") from error
    return int(columns), int(size)


class BlockLinear(RowLookup):
    """Takes over the bytes of a GGUF tensor."""

    stored: Tensor
    frozen = ("stored",)

    def __init__(self, blocks: Tensor, kind: str, *, bias: Tensor | None = None, cache: bool = False):
        """Keeps the blocks as they are stored.

        Args:
            blocks: [N, bytes of a row] uint8.
            kind: Their type, in lower case.
            bias: [N], any float dtype.
            cache: Keep the float weight once it was computed.

        Raises:
            InputError: the rows are no whole number of blocks.
        """
        columns, size = block_size(kind)
        if blocks.shape[1] % size:
            raise InputError(f"rows of {blocks.shape[1]} bytes are no blocks of {size}, as {kind} has")
        super().__init__(len(blocks), blocks.shape[1] // size * columns, bias, cache)
        self.kind = kind
        self.register_buffer("stored", blocks)

    @property
    def bits(self) -> int:
        """Bits per code; of a type that we do not write, stored bits per weight rounded down."""
        columns, size = block_size(self.kind)
        return BLOCK_TYPES[self.kind].bits if self.kind in BLOCK_TYPES else 8 * size // columns

    def quantized(self) -> QuantizedTensor:
        """The codes and scales, unpacked.

        Raises:
            InputError: of a type that we do not write.
        """
        if self.kind not in BLOCK_TYPES:
            raise InputError(f"codes of type {self.kind} are not read, only its float weights are")
        return gguf.unpack({gguf.PART: self.stored.cpu()}, scheme_of(self.kind)).to(self.stored.device)

    def rows(self, numbers: Tensor) -> Tensor:
        """As in the base class."""
        return self._expanded(self.stored[numbers])

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, type={self.kind}, "
            f"bias={self.bias is not None}"
        )

    def _transposed(self, start: int, stop: int) -> Tensor:
        return self._expanded(self.stored[start:stop]).T

    def _expanded(self, blocks: Tensor) -> Tensor:
        """Rows of blocks as float32."""
        if self.kind in BLOCK_TYPES:
            tensor = gguf.unpack({gguf.PART: blocks.cpu()}, scheme_of(self.kind))
            return tensor.dequantize().to(blocks.device)
        import gguf as package

        values = package.quants.dequantize(blocks.cpu().numpy(), package.GGMLQuantizationType[self.kind.upper()])
        return torch.from_numpy(values).to(blocks.device)
