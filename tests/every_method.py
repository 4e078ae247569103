"""What is asked of every way to quantize a graph: a right result, or a refusal that names what is in the way."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx

from graph_scope import Step
from graph_strategy import Case, open_session, sqnr_db
from quantcli.errors import InputError, QualityError, UsageError
from quantcli.options import CalibrationOptions, GraphOptions, QuantizeOptions
from quantcli.pipelines import quantize

__all__ = ["METHODS", "Verdict", "floors_db", "judge", "options_of"]

GATE_DB = 10.0
"""What the product holds itself to on the inputs that it has: --min-sqnr."""
UNSEEN_DB = 3.0
"""What an output may lose beside that on inputs that were not there."""
SLACK_DB = 9.0
"""By how much a result may be worse than every tensor rounded by the letter to one bit less."""
HEADROOM_DB = 28.0
"""What lies between a grid's 6.02 dB a bit and what is asked of a graph: 7 for a range of four standard deviations
instead of an even spread, 14 for errors of a dozen nodes' inputs and outputs, one bit for grids that onnxruntime fixes
(Softmax)."""
WEIGHTS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class Method:
    """Flags, and what they round."""

    flags: MappingProxyType[str, Any]
    bits: int
    group: int | None = None
    """Rows of a weight that share a grid; None where whole tensors do, activations too."""

    @property
    def calibrates(self) -> bool:
        return "static" in self.flags["algorithm"]


def _method(
    algorithm: str, bits: int = 8, group: int | None = None, encoding: str | None = None, **settings: str
) -> Method:
    weights = {"bits": bits, "group_size": group} if group else {}
    flags = {"algorithm": algorithm, "encoding": encoding, "settings": settings, **weights}
    return Method(MappingProxyType(flags), bits, group)


METHODS = {
    "rtn, 8 bits": _method("rtn", group=32),
    "rtn, 4 bits, qdq": _method("rtn", 4, 32, "qdq"),
    "dynamic": _method("dynamic"),
    "dynamic, per channel": _method("dynamic", per_channel="true"),
    "static": _method("static"),
    "static, per channel": _method("static", per_channel="true"),
    "static, qoperator": _method("static", encoding="qoperator"),
    "smoothquant,static": _method("smoothquant,static"),
}


@dataclass(frozen=True)
class Verdict:
    """What became of a graph."""

    refusal: str | None
    """The error that named what is in the way."""
    faults: tuple[str, ...]
    """What is wrong: none where the result, or the refusal, is right."""
    sqnr_db: dict[str, float] = field(default_factory=dict)
    """By output, on inputs that were not there."""


def options_of(method: Method, model: Path, output: Path, batch: int) -> QuantizeOptions:
    """The command line of a method."""
    flags = dict(method.flags)
    given = {"calibration_inputs": model.parent / "samples.npz"} if method.calibrates else {}
    graph = GraphOptions(encoding=flags.pop("encoding"), **given)
    calibration = CalibrationOptions(batch_size=batch) if method.calibrates else CalibrationOptions()
    return QuantizeOptions(str(model), output, graph=graph, calibration=calibration, force=True, **flags)


def judge(case: Case, method: Method, folder: Path) -> Verdict:
    """Quantizes, and says what is wrong with the result; any other error than a refusal is let through."""
    model = case.save(folder)
    try:
        quantize.run(options_of(method, model, folder / "Q", case.batch))
    except (InputError, UsageError, QualityError) as error:
        said = f"{error.message} {error.hint or ''}"
        faults = () if _names_part(case.proto, said) else (f"a refusal that names nothing: {said}",)
        return Verdict(f"{type(error).__name__}: {error.message}", faults)
    session = open_session(str(folder / "Q" / "model" / "model.onnx"))
    floors = floors_db(case, method)
    seen: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for feed in case.calibration if case.breaks else case.held_out:
        runs = [s.run(None, feed) for s in (case.session, session)]
        for output, wanted, got in zip(case.session.get_outputs(), *runs, strict=True):
            if wanted.dtype.kind == "f":
                both = seen.setdefault(output.name, ([], []))
                both[0].append(wanted.ravel())
                both[1].append(got.ravel())
    faults, measured = [], {}
    for name, (wanted, got) in seen.items():
        whole, result = np.concatenate(wanted), np.concatenate(got)
        if whole.shape != result.shape and "NonZero" in case.operators:
            continue  # as many rows as there are numbers above 0: another count is no noise
        if whole.shape != result.shape:
            faults.append(f"{name} has {result.size} numbers, expected {whole.size}")
        elif not np.isfinite(result).all():
            faults.append(f"{name} is not finite")
        elif whole.any():
            measured[name] = sqnr_db(whole, result)
            if measured[name] < floors[name]:
                faults.append(f"{name} has {measured[name]:.1f} dB, the floor is {floors[name]:.1f} dB")
    return Verdict(None, tuple(faults), measured)


def _names_part(proto: onnx.ModelProto, said: str) -> bool:
    """Whether the text names a node, tensor or operator of the graph."""
    names: set[str] = set()
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        for node in graph.node:
            names |= {node.name, node.op_type, *node.input, *node.output}
            graphs += [a.g for a in node.attribute if a.HasField("g")]
        names |= {value.name for value in [*graph.input, *graph.output]}
    return any(re.search(rf"(?<!\w){re.escape(name)}(_\d+)?(?!\w)", said) for name in names - {""})


def floors_db(case: Case, method: Method) -> dict[str, float]:
    """The least SQNR of each output.

    Every tensor that the method may round is rounded by the letter: a grid over its range; a range, and a scale in
    float16, for each group of a weight, or one for all of a tensor, activations too. The grid has one bit less than the
    method's, since a Softmax or a product of products makes much of how each number happens to fall. Of the static
    ones, which have the calibration inputs, no output may be worse than the gate lets pass.
    """
    ranges: dict[str, tuple[float, float]] = {}

    def measure(_step: Step | None, name: str, array: np.ndarray) -> np.ndarray:
        if array.dtype.kind == "f" and array.size:
            low, high = ranges.get(name, (0.0, 0.0))
            ranges[name] = min(low, float(array.min())), max(high, float(array.max()))
        return array

    def rounded(step: Step | None, name: str, array: np.ndarray) -> np.ndarray:
        is_size = step is not None and step.node.op_type in ("Resize", "Upsample") and step.reads[0] != name
        if array.dtype.kind != "f" or name not in ranges or is_size:
            return array
        if method.group is None:
            return _on_grid(array, *ranges[name], method.bits - 1)
        is_weight = step is not None and step.node.op_type in WEIGHTS and step.node.inputs[1].name == name
        return _in_groups(step, array, method) if is_weight and array.ndim == 2 else array

    least = GATE_DB - UNSEEN_DB if method.calibrates else -np.inf
    most = 6.02 * method.bits - HEADROOM_DB
    if not case.steps:
        return {output.name: max(least, most) for output in case.session.get_outputs()}
    for feed in case.calibration:
        for name, array in case.trace(feed, measure).items():
            measure(None, name, array)
    outputs = {o.name: ([], []) for o in case.session.get_outputs()}
    for feed in case.calibration if case.breaks else case.held_out:
        exact, near = case.trace(feed, lambda _step, _name, array: array), case.trace(feed, rounded)
        for name, (wanted, got) in outputs.items():
            wanted.append(exact[name].ravel())
            got.append(rounded(None, name, near[name]).ravel())
    reached = {name: _reached(wanted, got) - SLACK_DB for name, (wanted, got) in outputs.items()}
    if case.has_bodies:  # what is rounded inside them is not seen here
        most = GATE_DB - UNSEEN_DB if method.calibrates else -np.inf
    return {name: max(least, min(most, db)) for name, db in reached.items()}


def _reached(wanted: list[np.ndarray], got: list[np.ndarray]) -> float:
    a, b = np.concatenate(wanted), np.concatenate(got)
    return sqnr_db(a, b) if a.shape == b.shape and np.isfinite(b).all() else -np.inf


def _on_grid(array: np.ndarray, low: float, high: float, bits: int) -> np.ndarray:
    step = (high - low) / (2**bits - 1)
    if not 0 < step < 1e30:  # a mask, or nothing but zeros
        return array
    return np.asarray(np.round(np.clip(array.astype(np.float64), low, high) / step) * step, array.dtype)


def _in_groups(step: Step, array: np.ndarray, method: Method) -> np.ndarray:
    across = "transB" in step.node.attributes and step.node.attributes["transB"].as_int()
    rows = array.T.copy() if across else array.copy()
    for start in range(0, len(rows), method.group or 1):
        for column in range(rows.shape[1]):
            part = rows[start : start + (method.group or 1), column]
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            scale = np.float64(np.float16((high - low) / (2**method.bits - 1)))  # as the file holds it
            if high > low and np.isfinite(scale):
                size = 2 * max(scale, 2.0**-24)
                part[...] = np.round(part / size) * size
    return rows.T if across else rows
