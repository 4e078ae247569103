"""What is asked of every way to quantize a graph: a right result, or a refusal that names what is in the way."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx

from graph_strategy import Case, open_session, sqnr_db
from quantcli.errors import InputError, QualityError, UsageError
from quantcli.options import CalibrationOptions, GraphOptions, QuantizeOptions
from quantcli.pipelines import quantize
from rounded_graph import reached_db

__all__ = ["METHODS", "Verdict", "floors_db", "judge", "options_of"]

GATE_DB = 10.0
"""What the product holds itself to on the inputs that it has: --min-sqnr."""
UNSEEN_DB = 3.0
"""What an output may lose beside that on inputs that were not there."""
SLACK_DB = 9.0
"""By how much a result may be worse than that (rounded_graph.py): a bit and a half."""
HEADROOM_DB = 28.0
"""What lies between a grid's 6.02 dB a bit and what is asked of a graph: 7 for a range of four standard deviations
instead of an even spread, 14 for errors of a dozen nodes' inputs and outputs, one bit for grids that onnxruntime fixes
(Softmax)."""


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
    seen: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for feed in case.judged:
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
    if any(db < 6.02 * method.bits - HEADROOM_DB for db in measured.values()):
        floors = floors_db(case, method)
        low = {name: db for name, db in measured.items() if db < floors[name]}
        faults += [f"{name} has {db:.1f} dB, the floor is {floors[name]:.1f} dB" for name, db in low.items()]
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
    """The least SQNR of each output: near what its tensors keep when they are rounded by the letter.

    Of the static methods, which have the calibration inputs, no output may be worse than the gate lets pass.
    """
    least = GATE_DB - UNSEEN_DB if method.calibrates else -np.inf
    most = 6.02 * method.bits - HEADROOM_DB
    names = [output.name for output in case.session.get_outputs()]
    if not case.steps:
        return dict.fromkeys(names, max(least, most))
    moved = "smoothquant" in method.flags["algorithm"]
    if case.has_bodies or moved:  # what is rounded inside them, and what weights become, is not known here
        return dict.fromkeys(names, least)
    reached = reached_db(case, method.bits, method.group)
    # an output that no rounding changes lies at the end of a Softmax, where the first change is a whole one
    reached = {name: db if db < np.inf else least for name, db in reached.items()}
    return {name: max(least, min(most, reached[name] - SLACK_DB)) for name in names}
