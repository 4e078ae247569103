"""Two graphs that should compute the same, run on inputs that are made up from what the graph says of them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from quantcli.errors import InputError, first_line
from quantcli.graphs.calibration.token_inputs import INPUT_IDS, TokenFeeds
from quantcli.graphs.model.inputs import Feed, InputSpec, specs_of

__all__ = ["largest_difference", "made_up_inputs"]

_LENGTHS = (32, 64, 8, 224, 1, 640)
"""Tried one after the other for axes that a graph only names, the first of each input apart, which is 1; then the
lengths of its weights."""
_MOST_LENGTHS = 32


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
        feeds = list(made_up_inputs(one, axes))
    except InputError as error:
        return error.message
    names = [str(v.name) for v in one.graph.outputs]
    wanted = _run(one, folder, names, feeds)
    if isinstance(wanted, str):
        return f"no inputs could be made up for it: {wanted}"
    feed, outputs = wanted
    found = _run(other, folder, names, [feed])
    if isinstance(found, str):
        raise InputError(f"the other graph does not run: {found}")
    return max(map(_difference, outputs, found[1]), default=0.0)


def made_up_inputs(model: ir.Model, axes: Mapping[str, int]) -> Iterator[Feed]:
    """Feeds that a graph may take: normal numbers, and zeros and ones where it takes whole ones or truth values.

    Args:
        model: The graph.
        axes: Lengths of axes that it only names. Others are tried out: the first axis of an input is 1.

    Raises:
        InputError: an input of which the graph does not say type and axes, or that nothing can be made up for.
    """
    if any(v.name == INPUT_IDS for v in model.graph.inputs):  # mask, positions and cache depend on each other
        yield from TokenFeeds(
            model.graph, torch.randint(2, (1, 8), generator=torch.Generator().manual_seed(0)), axes=axes
        )
        return
    specs = specs_of(model.graph)
    unknown = any(isinstance(axis, str) and axis not in axes for spec in specs for axis in spec.shape)
    weights = [v.const_value for v in model.graph.initializers.values()]
    sizes = [int(n) for w in weights if w is not None and len(w.shape) > 1 for n in w.shape.numpy()]
    lengths = list(dict.fromkeys([*_LENGTHS, *sizes]))[:_MOST_LENGTHS]
    for length in lengths if unknown else lengths[:1]:
        random = np.random.default_rng(0)
        yield {spec.name: _array(spec, length, axes, random) for spec in specs}


def _array(spec: InputSpec, length: int, axes: Mapping[str, int], random: np.random.Generator) -> np.ndarray:
    shape = [
        axis if isinstance(axis, int) else axes.get(axis, length if place else 1)
        for place, axis in enumerate(spec.shape)
    ]
    if spec.dtype.kind in "iub":
        return random.integers(0, 2, shape).astype(spec.dtype)
    return random.standard_normal(shape).astype(spec.dtype)


def _difference(wanted: Any, found: Any) -> float:
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


def _run(model: ir.Model, folder: Path, names: list[str], feeds: list[Feed]) -> tuple[Feed, list[Any]] | str:
    """The first feed that the graph takes, and its outputs; or why there are none."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    # as it is written, and weights only mapped: onnxruntime would keep a copy in another order
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.add_session_config_entry("session.disable_prepacking", "1")
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        content = ir.to_proto(model).SerializeToString()
        session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own
        return first_line(error)
    why = ""
    for feed in feeds:
        try:
            return feed, list(session.run(names, feed))
        except Exception as error:  # onnxruntime raises types of its own
            why = why or first_line(error)
    return why
