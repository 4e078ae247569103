"""Two graphs that should compute the same, run on inputs that are made up from what the graph says of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from quantcli.errors import InputError, first_line
from quantcli.graphs.model.made_inputs import graph_session, made_up_inputs, run_samples

__all__ = ["largest_difference", "made_up_inputs"]


def largest_difference(one: ir.Model, other: ir.Model, folder: Path, axes: Mapping[str, int]) -> float | str:
    """Runs one graph, then the other: never are both in memory.

    Args:
        one: The graph that is right.
        other: The graph to compare with it; its outputs have the same names.
        folder: Where their external data lies.
        axes: Lengths of axes that the graphs only name.

    Returns:
        The largest difference of an output relative to its own largest value, infinite where shapes or places of NaN
        differ; or why they cannot be compared.

    Raises:
        InputError: the second graph does not run where the first one does.
    """
    try:
        ((feed, wanted),) = run_samples(one, folder, axes, 1)
    except InputError as error:
        return error.message
    try:
        found = graph_session(other, folder).run([str(v.name) for v in one.graph.outputs], feed)
    except InputError as error:
        raise InputError(f"the other graph does not run: {error.message}") from error
    except Exception as error:  # onnxruntime raises types of its own
        raise InputError(f"the other graph does not run: {first_line(error)}") from error
    return max(map(_difference, wanted, found), default=0.0)


def _difference(wanted: Any, found: Any) -> float:
    if isinstance(wanted, list):  # a sequence of tensors
        same_length = isinstance(found, list) and len(wanted) == len(found)
        return max(map(_difference, wanted, found), default=0.0) if same_length else np.inf
    if wanted is None or found is None:
        return 0.0 if wanted is found else np.inf
    one, other = np.asarray(wanted), np.asarray(found)
    if one.shape != other.shape or one.dtype != other.dtype:
        return np.inf
    if one.dtype.kind not in "fiub":
        return 0.0 if np.array_equal(one, other) else np.inf
    one, other = one.astype(np.float64), other.astype(np.float64)
    same = (one == other) | (np.isnan(one) & np.isnan(other))  # infinities too
    if same.all():
        return 0.0
    largest = np.abs(one[np.isfinite(one)]).max(initial=0) or 1.0
    off = np.abs(one - other)[~same].max() / largest
    return float(off) if np.isfinite(off) else np.inf
