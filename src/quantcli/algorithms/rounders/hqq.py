"""HQQ, half-quadratic quantization (https://mobiusml.github.io/hqq_blog/, Badri and Shaji 2023): no data.

Weights have heavy tails. Round-to-nearest's range serves the largest of them; the lp norm with p below 1 serves the
many and lets outliers be wrong. Splitting makes it solvable: an error matrix that takes large errors in by shrinkage,
and a grid fitted to the rest, in turn (`tensors.half_quadratic`). Each group keeps the best grid that came by in the lp
norm, round-to-nearest's own among them.

The paper moves the zero point and leaves the scale as it is. With whole zero points nothing moves then: the zero that
round-to-nearest has is the one that its codes ask for. There the scale is fitted instead, by the same least squares.
With float zeros a fitted scale lowers the error of most weights but clips the largest, so it is left as it is. Each
group stops for itself, where the paper looks at the whole matrix.

Left out: groups along the output axis, and quantized scales and zero points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quantcli.algorithms import Algorithm
from quantcli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.scheme import Scheme
    from quantcli.tensors.hessian import Statistics
    from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["ALGORITHM", "HqqOptions", "quantize"]


@dataclass(frozen=True)
class HqqOptions:
    """The paper's numbers, and what a zero point may be."""

    zero: Literal["auto", "float", "integer"] = "auto"
    """Zero points: float (any float16), integer, or auto: float where the format holds them."""
    fit_scale: Literal["auto", "true", "false"] = "auto"
    """Fit the scale as well as the zero point: true, false (the paper's), or auto: where zero points are whole and at
    1 bit."""
    p: float = 0.7
    """Norm of the error, above 0 and at most 1."""
    beta: float = 10.0
    """How hard the error matrix is tied to the true error at first."""
    kappa: float = 1.01
    """Factor by which beta grows each turn."""
    iterations: int = 20
    """Turns at most."""
    early_stop: bool = True
    """Stop a group at the first turn that does not lower its error."""

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise UsageError(f"hqq: p must be above 0 and at most 1, got {self.p}")
        if not (0 < self.beta < float("inf") and 1 <= self.kappa < float("inf")):
            raise UsageError(f"hqq: beta must be above 0 and kappa 1 or more, got {self.beta} and {self.kappa}")
        if self.iterations < 1:
            raise UsageError(f"hqq: iterations must be 1 or more, got {self.iterations}")


def quantize(weight: Tensor, scheme: Scheme, options: HqqOptions, statistics: Statistics | None) -> QuantizedTensor:
    """Rounds W [N, K] onto the grids of least lp error; a symmetric grid keeps its zero point."""
    from quantcli.tensors.affine import round_to_grid
    from quantcli.tensors.half_quadratic import Splitting, split_grid

    float_zeros = options.zero != "integer" and not scheme.symmetric
    needs_scale = not float_zeros or scheme.bits == 1
    how = Splitting(
        p=options.p,
        beta=options.beta,
        kappa=options.kappa,
        iterations=options.iterations,
        early_stop=options.early_stop,
        fit_scale=needs_scale if options.fit_scale == "auto" else options.fit_scale == "true",
        float_zeros=float_zeros,
    )
    scale, zero = split_grid(weight, scheme, how)
    return round_to_grid(weight, scale, zero, scheme, float_zeros=how.float_zeros)


ALGORITHM = Algorithm(
    name="hqq",
    kind="rounder",
    summary="least lp error by half-quadratic splitting, float zero points where the format holds them; no data",
    bits=(1, 2, 3, 4, 5, 6, 7, 8),
    calibration="none",
    options=HqqOptions,
    run=quantize,
    inputs=("checkpoint", "onnx"),
    formats=("gptq", "awq", "compressed-tensors", "float"),
)
