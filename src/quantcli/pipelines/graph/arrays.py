"""Round-to-nearest on the matrices of a graph, in numpy: nothing here imports torch."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from quantcli.algorithms import Step
from quantcli.graphs.model.files import Graph
from quantcli.graphs.walk.matrices import GraphTarget, read_matrix
from quantcli.pipelines.planning.target import Target
from quantcli.progress import Progress
from quantcli.report.layer import LayerReport
from quantcli.tensors.quantized_array import QuantizedArray, array_error, round_array

__all__ = ["round_matrices"]


def round_matrices(
    graph: Graph, found: Sequence[GraphTarget], targets: Mapping[str, Target], step: Step, progress: Progress
) -> tuple[dict[str, QuantizedArray], list[LayerReport]]:
    """Codes by name, and a report on each matrix.

    Args:
        graph: Holds the float weights.
        found: The matrices.
        targets: Each with its scheme.
        step: A rounder that works on arrays.
        progress: Told of each matrix.

    Raises:
        InputError: a matrix cannot be read, or holds NaN or infinity.
    """
    assert step.algorithm.on_arrays is not None
    results: dict[str, QuantizedArray] = {}
    reports: list[LayerReport] = []
    with progress.track("Quantizing", len(found)) as task:
        for place in found:
            target, weight = targets[place.name], read_matrix(graph, place)
            begun, clip_ratio = time.perf_counter(), target.clip_ratio
            settings = step.settings if clip_ratio is None else replace(step.settings, clip_ratio=clip_ratio)
            made = results[place.name] = step.algorithm.on_arrays(weight, target.scheme, settings)
            seconds = time.perf_counter() - begun
            error = plain = array_error(weight, made.dequantize())
            if clip_ratio is not None:
                plain = array_error(weight, round_array(weight, target.scheme).dequantize())
            reports.append(target.report(step.algorithm.name, error, plain, seconds))
            task.advance(detail=place.name)
    return results, reports
