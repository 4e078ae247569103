"""SmoothQuant: divide the channels of activations by factors, and multiply the weights that read them by the same.

Guangxuan Xiao et al. (https://arxiv.org/abs/2211.10438). A few channels of a transformer's activations are a hundred
times as large as the rest, and one scale per token or tensor leaves the rest few codes. s = a^alpha / w^(1 - alpha)
hands that on to the weights, which have room for it; the float function stays.

Symbols: X [T, K] rows of an activation; W [N, K] each weight that reads it; a [R] largest |X| and w [R] largest |W| of
the columns that share a factor; s [R]; `columns` [K] names the factor of each column. R is K but where heads share a
value head.

Where this differs from the paper:

- alpha may be searched for each activation, by the error of X W^T with both sides rounded, on rows that a was not
  measured on where there are such; no scaling is among the candidates;
- factors go wherever a division can be undone (`models.folds`), so o and down of a Llama are smoothed too;
- on a graph, an activation that other nodes read too gets a Mul instead of being left out.

On checkpoints the search rounds activations per token, as `evaluate --a-bits` does, and weights as the rounder that
follows would to the nearest; on graphs, where onnxruntime's integers follow, each side has one grid per tensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.algorithms import Algorithm
from quantcli.errors import UsageError
from quantcli.options.regex import compile_regex

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from quantcli.graphs.model.inputs import CalibrationReader
    from quantcli.graphs.rewrite.smooth import Smoothed
    from quantcli.scheme import Scheme
    from quantcli.tensors.channels import Channels

__all__ = [
    "ALGORITHM",
    "SCORED_OUTPUTS",
    "Factors",
    "Rounding",
    "SmoothquantOptions",
    "find_scale",
    "find_tensor_scale",
    "search",
    "smooth_graph",
]

_LEAST = 1e-5
"""Of magnitudes: channels that never speak get the factor of one that hardly does."""
SCORED_OUTPUTS = 1024
"""Rows of the weights that score a value of alpha on checkpoints, drawn evenly."""
_INT8 = 8


@dataclass(frozen=True)
class SmoothquantOptions:
    """How much to move, and where."""

    alpha: str = "auto"
    """Share of the difficulty that weights take, 0 to 1, or auto, which searches it for each activation; for some of
    them as REGEX=VALUE, by the names of the linears or nodes that read them: down_proj=0.8,0.5. The last match wins."""
    n_grid: int = 20
    """Of auto: values of alpha tried between 0 and 1."""
    rows: int = 256
    """Of auto: rows of an activation that score a value."""
    a_bits: int = 8
    """Of auto: bits to which activations are rounded, 2 to 8: one grid per token; one per tensor on ONNX graphs."""
    w_bits: int = 0
    """Of auto: bits to which weights are rounded, 2 to 8: one grid per output; one per tensor on ONNX graphs. 0: as the
    rounder that follows would, 8 bits where none does."""
    fold_only: bool = False
    """ONNX graphs: leave activations as they are that would need a Mul."""
    nodes_include: tuple[str, ...] = ()
    """ONNX graphs: names or regular expressions, with commas; empty: all MatMul and Gemm nodes."""
    nodes_exclude: tuple[str, ...] = ()
    """ONNX graphs: names or regular expressions of nodes whose inputs stay as they are."""

    def __post_init__(self) -> None:
        if self.n_grid < 1 or self.rows < 1:
            raise UsageError("smoothquant: n_grid and rows must be 1 or more")
        for name, low in (("a_bits", 2), ("w_bits", 0)):
            if not (low <= getattr(self, name) <= 8 and getattr(self, name) != 1):
                raise UsageError(f"smoothquant: {name} must be 2 to 8, got {getattr(self, name)}")
        parts = self._parts()
        if [pattern for pattern, _ in parts].count(None) > 1:
            raise UsageError(
                f"smoothquant: alpha {self.alpha!r} has two values for all", hint="write REGEX=VALUE,VALUE"
            )
        for pattern, value in parts:
            if pattern is not None:
                compile_regex(pattern, "--set alpha")
            if value != "auto" and not _is_share(value):
                raise UsageError(f"smoothquant: alpha is auto or from 0 to 1, got {value!r}")
        if not self.searches:
            changed = [n for n in ("n_grid", "rows", "a_bits", "w_bits") if getattr(self, n) != getattr(type(self), n)]
            if changed:
                raise UsageError(
                    "smoothquant: n_grid, rows, a_bits and w_bits are of alpha=auto", hint=f"leave {changed[0]} out"
                )

    @property
    def searches(self) -> bool:
        """Whether alpha is searched anywhere."""
        values = dict(self._parts())
        return "auto" in values.values() or None not in values

    @property
    def patterns(self) -> tuple[str, ...]:
        """Regular expressions that an alpha is given for."""
        return tuple(pattern for pattern, _ in self._parts() if pattern is not None)

    def alpha_of(self, names: Sequence[str]) -> float | None:
        """The alpha of an activation, by the names of all that reads it; None where it is to be searched."""
        parts = self._parts()
        found = next((value for pattern, value in parts if pattern is None), "auto")
        for pattern, value in parts:
            if pattern is not None and any(re.search(pattern, name) for name in names):
                found = value
        return None if found == "auto" else float(found)

    def _parts(self) -> list[tuple[str | None, str]]:
        """Each regular expression, or None, with its value."""
        words = [word.strip().rpartition("=") for word in self.alpha.split(",")]
        return [(pattern if equals else None, value) for pattern, equals, value in words]


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


@dataclass(frozen=True)
class Factors:
    """What was found for one activation."""

    scale: Tensor | None
    """s [R] float32, positive; None where none is better than s = 1."""
    alpha: float | None
    """That gave it."""
    relative_error: float | None
    """Of the searched: squared error of the rounded product over that without scaling."""


@dataclass(frozen=True)
class Rounding:
    """How both sides of a product will be rounded."""

    inputs: Callable[[Tensor, Tensor], Tensor]
    """(rows [T, K], largest magnitude of each column [K]) to the values that codes stand for."""
    weight: Callable[[int, Tensor], Tensor]
    """(number of the weight, [N, K]) to the same."""


def search(
    seen: Channels,
    weights: Sequence[Tensor],
    alpha: float | None,
    n_grid: int,
    rounding: Rounding,
    columns: Tensor,
    outputs: int | None = None,
) -> Factors:
    """The factors of an activation.

    Args:
        seen: Its largest magnitudes [K], and rows [T, K] that score.
        weights: [N, K] float32 of each reader.
        alpha: Where it is given, which nothing is compared with.
        n_grid: How many steps of alpha are tried otherwise.
        rounding: How products are rounded.
        columns: [K] int64: the factor of each column.
        outputs: About how many rows of the weights score, drawn evenly; None for all.
    """
    import torch

    count = int(columns.max()) + 1
    tops = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    a, w = (_floored(_shared(v.double(), columns, count)) for v in (seen.largest.to(tops.device), tops))

    def scale(share: float) -> Tensor:
        found = a**share / w ** (1 - share)
        return (found / (found.max() * found.min()).sqrt()).float()

    if alpha is not None:
        return Factors(scale(alpha), alpha, None)
    rows = seen.sample().to(tops.device)
    if not len(rows):  # an expert that no judging token reached
        return Factors(None, None, None)
    step = max(1, sum(map(len, weights)) // outputs) if outputs is not None else 1
    scored = [weight[::step] for weight in weights]
    wanted = [rows @ weight.T for weight in scored]
    largest = torch.maximum(seen.largest.to(tops.device), rows.abs().amax(0))

    def error(factors: Tensor) -> float:
        s = factors[columns]
        inputs, total = rounding.inputs(rows / s, largest / s), 0.0
        for number, (weight, product) in enumerate(zip(scored, wanted, strict=True)):
            total += float((inputs @ rounding.weight(number, weight * s).T - product).square().sum())
        return total

    none = error(torch.ones(count, device=tops.device))
    best, least, chosen = None, none, None
    for share in (number / n_grid for number in range(n_grid + 1)):
        tried = scale(share)
        found = error(tried)
        if found < least:
            best, least, chosen = tried, found, share
    return Factors(best, chosen, least / none if none > 0 else 1.0)


def _shared(values: Tensor, columns: Tensor, count: int) -> Tensor:
    """The largest of the columns of each factor, [K] to [R]."""
    return values.new_zeros(count).scatter_reduce_(0, columns, values, "amax")


def _floored(sizes: Tensor) -> Tensor:
    return sizes.clamp(min=_LEAST * max(float(sizes.max()), 1e-30))


def find_scale(
    names: Sequence[str],
    weights: Sequence[Tensor],
    schemes: Sequence[Scheme],
    options: SmoothquantOptions,
    seen: Channels,
    columns: Tensor,
) -> Factors:
    """The factors of an activation of a checkpoint.

    Args:
        names: Of the linears that read it.
        weights: [N, K] float32 of each.
        schemes: The grid of each.
        options: alpha, or how to search it.
        seen: Of the activation.
        columns: [K] int64: the factor of each column.
    """
    from quantcli.options import SimulationOptions
    from quantcli.scheme import PER_CHANNEL, Scheme
    from quantcli.tensors.activations import quantize_per_token
    from quantcli.tensors.grids import round_nearest

    given = [Scheme(options.w_bits, PER_CHANNEL, symmetric=True)] * len(weights) if options.w_bits else schemes
    simulated = SimulationOptions(a_bits=options.a_bits)
    grid: dict[str, Any] = {"symmetric": simulated.a_symmetric, "clip_ratio": simulated.activation_clip}
    rounding = Rounding(
        lambda x, _: quantize_per_token(x, options.a_bits, **grid),
        lambda number, weight: round_nearest(weight, given[number]).dequantize(),
    )
    return search(seen, weights, options.alpha_of(names), options.n_grid, rounding, columns, SCORED_OUTPUTS)


def find_tensor_scale(
    names: Sequence[str], weights: Sequence[Tensor], options: SmoothquantOptions, seen: Channels
) -> Factors:
    """The same of an activation inside a graph: each side is rounded with one grid per tensor.

    Args:
        names: Of the nodes that read it.
        weights: [N, K] float32 of each.
        options: alpha, or how to search it.
        seen: Of the activation.
    """
    import torch

    def inputs(x: Tensor, largest: Tensor) -> Tensor:
        top = float(largest.max())
        return _rounded(x, 0.0 if bool((x >= 0).all()) else -top, top, options.a_bits)

    def weight(_: int, values: Tensor) -> Tensor:
        return _rounded(values, float(values.min()), float(values.max()), options.w_bits or _INT8)

    columns = torch.arange(len(seen.largest))
    return search(seen, weights, options.alpha_of(names), options.n_grid, Rounding(inputs, weight), columns)


def _rounded(values: Tensor, low: float, high: float, bits: int) -> Tensor:
    """Through 2^bits codes that hold zero and back."""
    top = 2**bits - 1
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / top or 1.0
    zero = round(-low / step)
    return (((values / step).round() + zero).clamp(0, top) - zero) * step


def smooth_graph(source: Path, target: Path, options: SmoothquantOptions, reader: CalibrationReader | None) -> Smoothed:
    """Writes the smoothed float graph; see `graphs.rewrite.smooth`.

    Raises:
        UsageError: no samples, nodes that the graph does not have, or an alpha for none.
        InputError: a graph that cannot be prepared, or samples that do not fit.
    """
    from quantcli.graphs.rewrite.smooth import smooth

    if reader is None:
        raise UsageError("smoothquant measures activations on samples, there are none", hint="give calibration data")
    return smooth(
        source,
        target,
        reader,
        lambda names, seen, weights: find_tensor_scale(names, weights, options, seen).scale,
        rows=options.rows,
        fold_only=options.fold_only,
        include=options.nodes_include,
        exclude=options.nodes_exclude,
        named=options.patterns,
    )


_ON_GRAPHS = Algorithm(
    name="smoothquant",
    kind="transform",
    summary="move outliers of activations into the weights, then round both",
    bits=(4, 8, 16),
    calibration="required",
    options=SmoothquantOptions,
    run=smooth_graph,
    inputs=("onnx",),
    formats=("qdq", "qoperator"),
    scope="graph",
    then="static",
)

ALGORITHM = Algorithm(
    name="smoothquant",
    kind="transform",
    summary="move outliers of activations into the weights; alone it writes a float checkpoint, or a graph of integers",
    bits=(2, 3, 4, 5, 6, 7, 8),
    calibration="required",
    options=SmoothquantOptions,
    run=find_scale,
    inputs=("checkpoint", "onnx"),
    sees="channels",
    idle=("fold_only", "nodes_include", "nodes_exclude"),
    on_graphs=_ON_GRAPHS,
)
