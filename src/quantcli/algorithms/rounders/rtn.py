"""Round to nearest on the grid that spans each group's range: no data, the base line that every other method must beat.

Symmetric grids are full-range signed (as GGUF's Q4_0 and onnxruntime's default): the weight of largest magnitude sits
on code 0, so that no code is wasted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantcli.algorithms import UNIFORM_FORMATS, Algorithm
from quantcli.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from quantcli.scheme import Scheme
    from quantcli.tensors.hessian import Statistics
    from quantcli.tensors.quantized import QuantizedTensor
    from quantcli.tensors.quantized_array import QuantizedArray

__all__ = ["ALGORITHM", "RtnOptions", "quantize"]


@dataclass(frozen=True)
class RtnOptions:
    """Where ranges are cut."""

    clip_ratio: float = 1.0
    """Share of each group's range that the grid spans, above 0 and at most 1; weights outside go to its ends."""

    def __post_init__(self) -> None:
        if not 0 < self.clip_ratio <= 1:
            raise UsageError(f"clip_ratio is above 0 and at most 1, got {self.clip_ratio}")


def quantize(weight: Tensor, scheme: Scheme, options: RtnOptions, statistics: Statistics | None) -> QuantizedTensor:
    """Rounds each weight of W [N, K] to the nearest code of its group's min/max grid, or of a share of that."""
    from quantcli.tensors.grids import round_nearest

    return round_nearest(weight, scheme, options.clip_ratio)


def quantize_array(weight: np.ndarray, scheme: Scheme, options: RtnOptions) -> QuantizedArray:
    """The same of W [N, K] float32 in numpy, bit for bit."""
    from quantcli.tensors.quantized_array import round_array

    return round_array(weight, scheme, options.clip_ratio)


ALGORITHM = Algorithm(
    name="rtn",
    kind="rounder",
    summary="round to nearest on each group's range; no data",
    bits=(2, 3, 4, 5, 6, 7, 8),
    calibration="none",
    options=RtnOptions,
    run=quantize,
    on_arrays=quantize_array,
    inputs=("checkpoint", "onnx"),
    formats=(*UNIFORM_FORMATS, "gguf"),
    beats_rtn=False,
)
