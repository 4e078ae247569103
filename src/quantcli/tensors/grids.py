"""What uniform grids and codebooks share: rounding without a search, and other scales under the same codes."""

from torch import Tensor

from quantcli.scheme import Scheme
from quantcli.tensors import affine, codebook
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["divide_rows", "round_nearest"]


def round_nearest(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Rounds W [N, K] to the nearest code: of the scheme's codebook, or of each group's min/max grid."""
    if scheme.codebook is not None:
        return codebook.round_to_codebook(weight, scheme)
    return affine.round_to_grid(weight, *affine.minmax_grid(weight, scheme), scheme)


def divide_rows(tensor: QuantizedTensor, rows: Tensor, divisor: Tensor) -> QuantizedTensor:
    """With the weights of row rows[i] divided by divisor[i]: the same codes, other scales, as they are stored."""
    if tensor.codebook is None:
        return affine.divide_rows(tensor, rows, divisor)
    scale = tensor.scale.clone()
    scale[rows] = scale[rows] / divisor[:, None]
    return codebook.with_scale(tensor, scale)
