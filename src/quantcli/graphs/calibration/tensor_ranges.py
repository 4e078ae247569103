"""Ranges of a graph's activations, measured on samples that go by one at a time.

onnxruntime's calibrators for histograms keep every output of every sample until the end, and its entropy search with
its own defaults (128 bins for 128 codes) has one candidate, the full range. Here the bins alone are kept. The cache
file is onnxruntime's `calibration_cache_path` with what it was measured on beside it.
"""

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from quantcli.errors import InputError, UsageError, first_line
from quantcli.folder import fingerprint
from quantcli.graphs.calibration.body_extremes import add_body_extremes
from quantcli.graphs.model.files import DATA_SUFFIX
from quantcli.graphs.model.inputs import CalibrationReader
from quantcli.graphs.model.session import open_session
from quantcli.json_files import as_type, read_json
from quantcli.tensors.histogram import StreamedHistogram, entropy_range, percentile_range

__all__ = ["RangeOptions", "Ranges", "measure_ranges", "read_ranges", "tensors_of", "write_ranges"]

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
    without: Mapping[str, str] = field(default_factory=dict)
    """Why tensors have no range."""


def tensors_of(model: ir.Model, op_types: Collection[str]) -> list[str]:
    """Names of the activations that nodes of these types read and write."""
    found: dict[str, None] = {}
    for node in model.graph.all_nodes():
        if node.op_type in op_types:
            for value in (*node.inputs, *node.outputs):
                if value is None or value.dtype is not ir.DataType.FLOAT or value.is_initializer():
                    continue
                if value.name:
                    found[value.name] = None
    return list(found)


def measure_ranges(path: Path, names: Sequence[str], reader: CalibrationReader, options: RangeOptions) -> Ranges:
    """Runs the samples through a graph and keeps two numbers, or one histogram, per tensor.

    With minmax the extremes are taken inside the run; with histograms the tensors of one sample are held at a time. Of
    tensors in bodies, a loop's say, the extremes are the range with every method.

    Raises:
        InputError: no samples, or one that is not finite or that the graph cannot run.
    """
    full = options.method == "minmax"
    histograms = {name: StreamedHistogram(bins=2 if full else 8192) for name in names}
    session, outputs = _open_session(path, names, extremes=full)
    without: dict[str, str] = {}

    def update(name: str, values: np.ndarray) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            without[name] = "not finite"
        histograms[name].update(values[finite])

    samples = 0
    while feed := reader.get_next():
        try:
            arrays = session.run(list(outputs), feed) if outputs else []
        except Exception as error:  # onnxruntime raises its own types
            reason = first_line(error)
            raise InputError(f"sample {samples} does not run through the graph: {reason}") from error
        for (tensors, nothing), array in zip(outputs.values(), arrays, strict=True):
            parts = [array] if nothing is None else array.reshape(len(tensors), -1)
            for name, values in zip(tensors, parts, strict=True):
                # of an empty tensor, or a body that did not run, the least is inf and the greatest -inf
                update(name, values[values != nothing] if nothing is not None else values)
        for name in (n for n in names if n in feed):
            if not np.isfinite(feed[name]).all():
                raise InputError(
                    f"{name} holds values that are not finite in sample {samples}",
                    hint="exclude the nodes that read it with nodes_exclude",
                )
            update(name, feed[name])
        samples += 1
    if not samples:
        raise InputError("there are no samples to calibrate with")
    found = {n: _range(h, options) for n, h in histograms.items() if math.isfinite(h.lowest) and n not in without}
    found |= _empty_caches(path, set(names) - set(found) - set(without), found)
    without |= dict.fromkeys(sorted(set(names) - set(found) - set(without)), "empty in every sample, or never computed")
    return Ranges(found, samples, without)


def _empty_caches(
    path: Path, names: Collection[str], known: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Ranges of tensors that were empty in every sample: a cache will hold what the Concat that reads it gives."""
    found: dict[str, tuple[float, float]] = {}
    for node in ir.load(path).graph:
        output = str(node.outputs[0].name)
        if node.op_type == "Concat" and output in known:
            found |= {str(v.name): known[output] for v in node.inputs if v is not None and v.name in names}
    return found


def _range(histogram: StreamedHistogram, options: RangeOptions) -> tuple[float, float]:
    if options.method == "entropy":
        return entropy_range(histogram)
    if options.method == "percentile":
        return percentile_range(histogram, options.percentile, options.symmetric)
    return histogram.lowest, histogram.highest


_Outputs = dict[str, tuple[Sequence[str], float | None]]
"""By output: the tensors that it tells of, and what it says of one without values."""


def _open_session(path: Path, names: Sequence[str], extremes: bool) -> tuple[ort.InferenceSession, _Outputs]:
    """A session on the graph that gives these tensors too, or their extremes; in bodies always the extremes."""
    model = ir.load(path)
    wanted = set(names)
    outputs: _Outputs = {}
    for tensors, *ends in add_body_extremes(model.graph, wanted):
        for value, nothing in zip(ends, (math.inf, -math.inf), strict=True):
            model.graph.outputs.append(value)
            outputs[str(value.name)] = tensors, nothing
    for value in [v for n in model.graph for v in n.outputs if v.name in wanted]:
        if not extremes:
            if not value.is_graph_output():
                model.graph.outputs.append(value)
            outputs[str(value.name)] = [str(value.name)], None
            continue
        for op_type, nothing in (("ReduceMin", math.inf), ("ReduceMax", -math.inf)):
            node = ir.node(op_type, [value], {"keepdims": 0})
            output = node.outputs[0]
            output.name, output.dtype = f"{value.name}.{op_type}", ir.DataType.FLOAT
            model.graph.append(node)
            model.graph.outputs.append(output)
            outputs[output.name] = [str(value.name)], nothing
    # beside the graph, so that its weights are found
    with NamedTemporaryFile(dir=path.parent, prefix=".calibrate-", suffix=".onnx") as file:
        ir.save(model, file.name, format="protobuf")
        # fused nodes would compute other tensors than those that are quantized
        return open_session(Path(file.name), optimized=False), outputs


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
    plain = json.loads(part.read_text()) | {
        "quantcli": _origin(path, options) | {"samples": ranges.samples, "without": dict(ranges.without)}
    }
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
    without = as_type(origin.pop("without", {}), dict[str, str], f"{file}: tensors without a range", "delete it")
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
    lacking = [name for name in names if name not in values and name not in without]
    if lacking:
        raise InputError(
            f"{file} was measured for other operators: it lacks {lacking[0]} and {len(lacking) - 1} more",
            hint="delete it, or name another --calibration-cache",
        )
    return Ranges(
        {name: values[name] for name in names if name in values},
        samples,
        {n: without[n] for n in names if n in without},
    )
