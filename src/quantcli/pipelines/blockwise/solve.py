"""One solve: the linears that share an input, through a rounder, judged against round-to-nearest."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantcli.algorithms import Algorithm
from quantcli.errors import InputError
from quantcli.models.checkpoint import Checkpoint
from quantcli.pipelines.planning.target import Target
from quantcli.report.layer import LayerReport
from quantcli.scheme import CODEBOOKS, Scheme
from quantcli.tensors.affine import LARGEST_SCALE
from quantcli.tensors.finite import require_finite
from quantcli.tensors.grids import round_nearest
from quantcli.tensors.hessian import Statistics, output_error
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["read_weight", "solve_linears"]

_RTN_ROWS = 128


def read_weight(checkpoint: Checkpoint, target: Target, disk: str) -> Tensor:
    """W [N, K] float32 from the file.

    Raises:
        InputError: it holds NaN or infinity, or has another shape than the configuration says.
    """
    weight = checkpoint.read(disk).float()
    if target.transposed:
        weight = weight.T.contiguous()
    if tuple(weight.shape) != (target.rows, target.columns):
        raise InputError(f"tensor {disk} has shape {list(weight.shape)}, expected {[target.rows, target.columns]}")
    require_finite(weight, disk)
    if weight.numel() and float(weight.abs().max()) > LARGEST_SCALE:
        raise InputError(f"tensor {disk} holds values beyond float16's range, which scales are stored in")
    return weight


def solve_linears(
    targets: Sequence[Target],
    weights: Mapping[str, Tensor],
    algorithm: Algorithm,
    settings: Any,
    statistics: Statistics | None,
    scale: Tensor | None = None,
) -> tuple[dict[str, QuantizedTensor], list[LayerReport]]:
    """Quantizes linears that share an input; those that are rounded alike in one solve, stacked along their rows.

    Args:
        targets: The linears.
        weights: [N, K] float32, by module path.
        algorithm: The rounder.
        settings: Its options.
        statistics: Of the input.
        scale: [K]; the columns of W times it are what is quantized, for an input divided by it.

    Returns:
        The quantized tensors and a report on each, by module path in the order of `targets`.
    """
    alike: dict[tuple[Scheme, float | None, int], list[Target]] = defaultdict(list)
    for number, target in enumerate(targets):
        # nested scales, and blocks, run over the rows of a matrix: those of two matrices must not mix
        apart = target.scheme.double_quant or target.scheme.block_rows > 1
        alike[target.scheme, target.clip_ratio, number if apart else 0].append(target)
    results: dict[str, QuantizedTensor] = {}
    reports: dict[str, LayerReport] = {}
    seen = statistics.scaled(scale) if statistics is not None and scale is not None else statistics
    for (scheme, clip_ratio, _), members in alike.items():
        begun = time.perf_counter()
        stacked = torch.cat([weights[t.name] for t in members]) if len(members) > 1 else weights[members[0].name]
        own = settings if clip_ratio is None else replace(settings, clip_ratio=clip_ratio)
        try:
            solved = algorithm.run(stacked if scale is None else stacked * scale, scheme, own, seen)
        except InputError as error:
            raise InputError(f"{members[0].name}: {error.message}", error.hint) from error
        seconds = (time.perf_counter() - begun) / len(members)
        first = 0
        for target in members:
            part = solved.rows(first, first + target.rows)
            first += target.rows
            results[target.name] = part
            reports[target.name] = _report(target, weights[target.name], part, algorithm, statistics, scale, seconds)
    return results, [reports[t.name] for t in targets]


def _report(
    target: Target,
    weight: Tensor,
    part: QuantizedTensor,
    algorithm: Algorithm,
    statistics: Statistics | None,
    scale: Tensor | None,
    seconds: float,
) -> LayerReport:
    hessian = statistics.hessian if statistics is not None else None
    quantized = part.dequantize()
    error = output_error(weight, quantized if scale is None else quantized / scale, hessian)
    rows = weight[:: max(1, target.rows // _RTN_ROWS)]  # rtn is a yardstick: a sample of rows tells it
    uniform = target.scheme.codebook in CODEBOOKS  # which bitsandbytes' codebooks are measured by
    rtn = round_nearest(rows, replace(target.scheme, codebook=None, double_quant=False) if uniform else target.scheme)
    plain = algorithm.name == "rtn" and target.clip_ratio is None
    rtn_error = error if plain else output_error(rows, rtn.dequantize(), hessian)
    tokens = statistics.tokens if statistics is not None else 0
    return target.report(algorithm.name, error, rtn_error, seconds, tokens, scale is not None)
