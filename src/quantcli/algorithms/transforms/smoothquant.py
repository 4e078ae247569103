"""SmoothQuant: divide the channels of activations by factors, and multiply the weights that read them by the same.

Guangxuan Xiao et al. (https://arxiv.org/abs/2211.10438). A few channels of a transformer's activations are a hundred
times as large as the rest, and one scale per tensor leaves the rest few codes. s[k] = a[k]^alpha / w[k]^(1 - alpha)
hands that on to the weights, which have room for it; the float function stays.

Symbols: X [T, K] rows of an activation; W [K, N] weight; a [K] largest |X| of each channel, w [K] largest |W|; s [K].

Where this differs from the paper: alpha may be searched for each activation, by the error of X W in int8 on some rows,
no scaling among the candidates; and an activation that other nodes read too gets a Mul instead of being left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.algorithms import Algorithm
from quantcli.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from quantcli.graphs.inputs import CalibrationReader
    from quantcli.graphs.smooth import Channels, Smoothed

__all__ = ["ALGORITHM", "SmoothquantOptions", "find_scale", "smooth_graph"]

_LEAST = 1e-5
"""Of magnitudes: channels that never speak get the factor of one that hardly does."""


@dataclass(frozen=True)
class SmoothquantOptions:
    """How much to move, and where."""

    alpha: str = "auto"
    """Share of the difficulty that weights take, 0 to 1; auto searches it for each activation."""
    n_grid: int = 20
    """Of auto: values of alpha tried between 0 and 1."""
    rows: int = 256
    """Of auto: rows of an activation that score a value."""
    fold_only: bool = False
    """Leave activations as they are that would need a Mul."""
    nodes_include: tuple[str, ...] = ()
    """Names or regular expressions, with commas; empty: all MatMul and Gemm nodes."""
    nodes_exclude: tuple[str, ...] = ()
    """Names or regular expressions of nodes whose inputs stay as they are."""

    def __post_init__(self) -> None:
        if self.n_grid < 1 or self.rows < 1:
            raise UsageError("smoothquant: n_grid and rows must be 1 or more")
        if self.alpha != "auto":
            try:
                inside = 0 <= float(self.alpha) <= 1
            except ValueError:
                inside = False
            if not inside:
                raise UsageError(f"smoothquant: alpha is auto or from 0 to 1, got {self.alpha!r}")
            if self.n_grid != SmoothquantOptions.n_grid or self.rows != SmoothquantOptions.rows:
                raise UsageError("smoothquant: n_grid and rows are of alpha=auto", hint="leave them out")


def find_scale(seen: Channels, weights: list[np.ndarray], options: SmoothquantOptions) -> np.ndarray | None:
    """The factors of an activation.

    Args:
        seen: Of the activation: largest magnitudes [K] and rows [R, K].
        weights: [K, N] float32 of each reader.
        options: alpha, or how to search it.

    Returns:
        s [K] float64, positive; None where none is better than s = 1.
    """
    import numpy as np

    largest = np.maximum(seen.largest, _LEAST * max(float(seen.largest.max()), 1e-30))
    sizes = np.max([np.abs(w).max(1) for w in weights], 0).astype(np.float64)
    sizes = np.maximum(sizes, _LEAST * max(float(sizes.max()), 1e-30))

    def scale(alpha: float) -> np.ndarray:
        found = largest**alpha / sizes ** (1 - alpha)
        return np.asarray(found / np.sqrt(found.max() * found.min()))

    if options.alpha != "auto":
        return scale(float(options.alpha))
    expected = [seen.rows @ w for w in weights]
    best, least = None, _error(seen, weights, expected, np.ones_like(largest))
    for step in range(options.n_grid + 1):
        tried = scale(step / options.n_grid)
        error = _error(seen, weights, expected, tried)
        if error < least:
            best, least = tried, error
    return best


def _error(seen: Channels, weights: list[np.ndarray], expected: list[np.ndarray], scale: np.ndarray) -> float:
    """Squared error of X W in int8, one grid for X / s and one for each s W."""
    import numpy as np

    tops = seen.largest / scale
    low, high = -tops.max(), tops.max()
    if (seen.rows >= 0).all():
        low = 0.0
    inputs = _rounded(seen.rows / scale, low, high)
    total = 0.0
    for weight, wanted in zip(weights, expected, strict=True):
        scaled = weight * scale[:, None]
        total += float(np.square(inputs @ _rounded(scaled, scaled.min(), scaled.max()) - wanted).sum())
    return total


def _rounded(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Through 256 codes that hold zero and back."""
    import numpy as np

    low, high = min(float(low), 0.0), max(float(high), 0.0)
    step = (high - low) / 255 or 1.0
    zero = np.rint(-low / step)
    return np.asarray(((np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step).astype(np.float32))


def smooth_graph(source: Path, target: Path, options: SmoothquantOptions, reader: CalibrationReader | None) -> Smoothed:
    """Writes the smoothed float graph; see `graphs.smooth`.

    Raises:
        UsageError: no samples, or nodes that the graph does not have.
        InputError: a graph that cannot be prepared, or samples that do not fit.
    """
    from quantcli.graphs.smooth import smooth

    if reader is None:
        raise UsageError("smoothquant measures activations on samples, there are none", hint="give calibration data")
    return smooth(
        source,
        target,
        reader,
        lambda seen, weights: find_scale(seen, weights, options),
        rows=options.rows,
        fold_only=options.fold_only,
        include=options.nodes_include,
        exclude=options.nodes_exclude,
    )


ALGORITHM = Algorithm(
    name="smoothquant",
    kind="transform",
    summary="move outliers of activations into the weights, then round both, for ONNX graphs",
    bits=(4, 8, 16),
    calibration="required",
    options=SmoothquantOptions,
    run=smooth_graph,
    inputs=("onnx",),
    formats=("qdq", "qoperator"),
    scope="graph",
    then="static",
)
