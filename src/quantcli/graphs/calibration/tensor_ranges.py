"""Ranges of a graph's activations, measured on samples that go by one at a time.

onnxruntime's calibrators for histograms keep every output of every sample until the end, and its entropy search with
its own defaults (128 bins for 128 codes) has one candidate, the full range. Here the bins alone are kept. The cache
file is onnxruntime's `calibration_cache_path` with what it was measured on beside it.
"""

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from quantcli.errors import InputError, UsageError, first_line
from quantcli.folder import fingerprint
from quantcli.graphs.model.files import DATA_SUFFIX
from quantcli.graphs.model.inputs import CalibrationReader
from quantcli.graphs.model.session import open_session
from quantcli.graphs.walk.channels import has_weight
from quantcli.json_files import as_type, read_json
from quantcli.tensors.histogram import StreamedHistogram, entropy_range, percentile_range

__all__ = ["RangeOptions", "Ranges", "masked_nodes", "measure_ranges", "read_ranges", "tensors_of", "write_ranges"]

_MASK, _ONE_SIDED = -1000.0, 32.0
"""A range that reaches below the one, and so many times as far as above 0, holds a mask in front of a Softmax."""
_ORT_NAMES = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}


@dataclass(frozen=True)
class RangeOptions:
    """How a range is found."""

    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    """minmax: all values; entropy: the threshold of least divergence; percentile: so many percent of the values."""
    percentile: float = 99.999
    """Of percentile: how many percent lie within."""
    symmetric: bool = False
    """Of percentile: one threshold for both signs."""

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise UsageError(f"percentile is above 50 and at most 100, got {self.percentile}")


@dataclass(frozen=True)
class Ranges:
    """Ranges by tensor name."""

    values: Mapping[str, tuple[float, float]]
    """Lowest and highest value that codes are to hold."""
    samples: int
    """How many samples were seen."""


def tensors_of(model: ir.Model, op_types: Collection[str]) -> list[str]:
    """Names of the activations that nodes of these types read and write."""
    found: dict[str, None] = {}
    for node in model.graph:
        if node.op_type in op_types:
            for value in (*node.inputs, *node.outputs):
                if value is None or value.dtype is not ir.DataType.FLOAT or value.is_initializer():
                    continue
                if value.name:
                    found[value.name] = None
    return list(found)


def measure_ranges(path: Path, names: Sequence[str], reader: CalibrationReader, options: RangeOptions) -> Ranges:
    """Runs the samples through a graph and keeps two numbers, or one histogram, per tensor.

    With minmax the extremes are taken inside the run; with histograms the tensors of one sample are held at a time.

    Raises:
        InputError: no samples, a sample that the graph cannot run, or a tensor whose values are not finite.
    """
    histograms = {name: StreamedHistogram(bins=2 if options.method == "minmax" else 8192) for name in names}
    session, outputs = _open_session(path, names, extremes=options.method == "minmax")
    samples = 0
    while feed := reader.get_next():
        try:
            arrays = session.run(list(outputs), feed) if outputs else []
        except Exception as error:  # onnxruntime raises its own types
            reason = first_line(error)
            raise InputError(f"sample {samples} does not run through the graph: {reason}") from error
        found = [*zip(outputs.values(), arrays, strict=True), *((n, feed[n]) for n in names if n in feed)]
        for name, array in found:
            if not np.isfinite(array).all():
                raise InputError(
                    f"{name} holds values that are not finite in sample {samples}",
                    hint="exclude the nodes that read it with nodes_exclude",
                )
            histograms[name].update(array)
        samples += 1
    if not samples:
        raise InputError("there are no samples to calibrate with")
    found_ranges = {n: _range(h, options) for n, h in histograms.items() if math.isfinite(h.lowest)}
    return Ranges(found_ranges | _empty_caches(path, set(names) - set(found_ranges), found_ranges), samples)


def _empty_caches(
    path: Path, names: Collection[str], known: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Ranges of tensors that were empty in every sample: a cache will hold what the Concat that reads it gives."""
    found: dict[str | None, tuple[float, float]] = {}
    for node in ir.load(path).graph:
        output = str(node.outputs[0].name)
        if node.op_type == "Concat" and output in known:
            found |= {v.name: known[output] for v in node.inputs if v is not None and v.name in names}
    left = sorted(set(names) - set(found))
    if left:
        raise InputError(
            f"{left[0]} was empty in every sample, it has no range",
            hint="exclude the nodes that read it with nodes_exclude, or choose op_types",
        )
    return {str(name): bounds for name, bounds in found.items()}


def _range(histogram: StreamedHistogram, options: RangeOptions) -> tuple[float, float]:
    if options.method == "entropy":
        return entropy_range(histogram)
    if options.method == "percentile":
        return percentile_range(histogram, options.percentile, options.symmetric)
    return histogram.lowest, histogram.highest


def _open_session(path: Path, names: Sequence[str], extremes: bool) -> tuple[ort.InferenceSession, dict[str, str]]:
    """A session on the graph that gives these tensors too, or their extremes; and the tensor of each output."""
    model = ir.load(path)
    wanted = set(names)
    values = [v for n in model.graph for v in n.outputs if v.name in wanted]
    outputs: dict[str, str] = {}
    for value in values:
        if not extremes:
            if not value.is_graph_output():
                model.graph.outputs.append(value)
            outputs[str(value.name)] = str(value.name)
            continue
        for op_type in ("ReduceMin", "ReduceMax"):
            node = ir.node(op_type, [value], {"keepdims": 1})
            output = node.outputs[0]
            output.name, output.dtype = f"{value.name}.{op_type}", ir.DataType.FLOAT
            model.graph.append(node)
            model.graph.outputs.append(output)
            outputs[output.name] = str(value.name)
    # beside the graph, so that its weights are found
    with NamedTemporaryFile(dir=path.parent, prefix=".calibrate-", suffix=".onnx") as file:
        ir.save(model, file.name, format="protobuf")
        # fused nodes would compute other tensors than those that are quantized
        return open_session(Path(file.name), optimized=False), outputs


def masked_nodes(model: ir.Model, nodes: Sequence[ir.Node], ranges: Ranges) -> tuple[set[str], list[str]]:
    """Nodes that cannot be integers because a mask goes through them: one scale for -3e38 and 5 rounds 5 to 0.

    Masks are added to, or chosen into, the input of a Softmax; they are all but minus infinity, which says that a range
    reaches far below 0 and not far above.

    Returns:
        Names of such nodes, none of them with a weight; and what there is to say of them.
    """
    masks: set[str] = set()
    waiting = [n.inputs[0] for n in model.graph if n.op_type == "Softmax"]
    while waiting:
        value = waiting.pop()
        low, high = ranges.values.get(str(value.name), (0.0, 0.0)) if value is not None else (0.0, 0.0)
        if value is None or value.name in masks or low > _MASK or -low < _ONE_SIDED * high:
            continue
        masks.add(str(value.name))
        producer = value.producer()
        waiting += producer.inputs if producer is not None else ()
    found = {
        str(n.name): n.op_type
        for n in nodes
        if not has_weight(n) and any(v is not None and v.name in masks for v in (*n.inputs, *n.outputs))
    }
    kinds = ", ".join(f"{list(found.values()).count(t)} {t}" for t in sorted(set(found.values())))
    return set(found), [f"a mask goes through {kinds}: these nodes stay float"] if found else []


def _origin(path: Path, options: RangeOptions) -> dict[str, Any]:
    graph = fingerprint(path.parent, (path.name, path.name + DATA_SUFFIX))
    return {"graph": graph, **asdict(options)}


@dataclass(frozen=True)
class _Range:
    """One tensor's in the file."""

    lowest: float
    highest: float


@dataclass(frozen=True)
class _Cache:
    """The file, as far as it is read."""

    data: dict[str, _Range]
    quantcli: dict[str, Any]


def write_ranges(file: Path, ranges: Ranges, path: Path, options: RangeOptions) -> None:
    """Writes ranges as onnxruntime reads them, with what they were measured on."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData, save_tensors_data

    data = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in ranges.values.items()
    }
    part = file.with_name(file.name + ".part")
    save_tensors_data(TensorsData(CalibrationMethod[_ORT_NAMES[options.method]], data), part)
    plain = json.loads(part.read_text()) | {"quantcli": _origin(path, options) | {"samples": ranges.samples}}
    part.write_text(json.dumps(plain))
    os.replace(part, file)


def read_ranges(file: Path, path: Path, names: Sequence[str], options: RangeOptions) -> Ranges:
    """Reads ranges that were written for the same graph with the same options.

    Raises:
        InputError: no file of ours, or one of another graph or other options.
    """
    found = read_json(file, _Cache, "a calibration cache of ours", hint="delete it")
    origin, values = found.quantcli, {name: (d.lowest, d.highest) for name, d in found.data.items()}
    samples = as_type(origin.pop("samples", None), int, f"{file}: the number of samples cannot be read", "delete it")
    odd = [name for name, (low, high) in values.items() if not -math.inf < low <= high < math.inf]
    if odd:
        raise InputError(f"{file}: the range of {odd[0]} is {values[odd[0]]}, which is none", hint="delete it")
    wanted = _origin(path, options)
    different = [key for key, value in wanted.items() if origin.get(key) != value]
    if different:
        raise InputError(
            f"{file} was measured with another {' and '.join(different)}",
            hint="delete it, or name another --calibration-cache",
        )
    lacking = [name for name in names if name not in values]
    if lacking:
        raise InputError(
            f"{file} was measured for other operators: it lacks {lacking[0]} and {len(lacking) - 1} more",
            hint="delete it, or name another --calibration-cache",
        )
    return Ranges({name: values[name] for name in names}, samples)
