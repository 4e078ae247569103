"""A linear that computes as LLM.int8() does, from bitsandbytes' codes: int8 products, outlier columns beside them."""

from collections.abc import Mapping

from torch import Tensor

from quantcli.formats import bnb_int8
from quantcli.models.linear import QuantizedLinear
from quantcli.tensors.quantized import QuantizedTensor
from quantcli.tensors.vectorwise import decomposed_product, with_codes

__all__ = ["Int8Linear"]


class Int8Linear(QuantizedLinear):
    """Takes over the tensors of a bitsandbytes checkpoint of 8 bits.

    What counts as an outlier column is decided for all tokens of a call together, as there. Outliers are multiplied in
    the type that products are taken in: float32 on CPU, elsewhere the model's. Gradients go through the float weight.
    """

    codes: Tensor
    largest: Tensor
    frozen = ("codes", "largest")

    def __init__(
        self, tensors: Mapping[str, Tensor], threshold: float, *, bias: Tensor | None = None, cache: bool = False
    ):
        """Keeps codes and scales as they are stored.

        Args:
            tensors: weight, SCB and weight_format; see `formats.bnb_int8`.
            threshold: Magnitude from which on an activation is an outlier; 0: none is.
            bias: [N], any float dtype.
            cache: Keep the float weight once a gradient has needed it.

        Raises:
            InputError: the tensors do not fit together.
        """
        codes, largest = bnb_int8.check(tensors)
        super().__init__(codes.shape[0], codes.shape[1], bias, cache)
        self.threshold = threshold
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("largest", largest.contiguous())

    @property
    def bits(self) -> int:
        """Bits per code."""
        return 8

    def quantized(self) -> QuantizedTensor:
        """The codes and scales."""
        return with_codes(self.codes, self.largest)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, threshold={self.threshold:g}, "
            f"bias={self.bias is not None}"
        )

    def _multiply(self, rows: Tensor) -> Tensor:
        return decomposed_product(rows, self.codes, self.largest, self.threshold)

    def _transposed(self, start: int, stop: int) -> Tensor:
        return ((self.codes[start:stop].float() / 127) * self.largest[start:stop, None]).T
