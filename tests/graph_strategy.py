"""Graphs of every kind, drawn by hypothesis: what onnxruntime can quantize and what it cannot, with samples."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import assume
from hypothesis import strategies as st

from graph_bodies import OPERATORS, grow
from graph_products import PRODUCTS
from graph_scope import FLOATS, IR_VERSIONS, Scope, Step, Tensor, declared, options

__all__ = ["Case", "Feed", "graphs", "open_session", "sqnr_db"]

Feed = dict[str, np.ndarray]
CALIBRATION, HELD_OUT = 8, 4
ROWS = ("fixed", "fixed", "symbolic")
SHAPES = ((64,), (6, 32), (8, 8, 8), (3, 12, 12), (4, 10), (2, 4, 16))
BREAKS = {"ArgMax", "ArgMin", "TopK", "NonZero", "Floor", "Round", "Sign", "Cast", "Greater", "If", "Sin"}
"""Where a step of the least size may change everything behind it."""


@dataclass
class Case:
    """A graph and what it is run on."""

    proto: onnx.ModelProto
    calibration: list[Feed]
    held_out: list[Feed]
    steps: list[Step]
    constants: Feed
    """Of the main graph."""
    operators: set[str]
    external: bool
    """Whether the weights lie in a file of their own."""
    breaks: bool = field(default=False)
    """Whether inputs that differ little may give outputs that differ much."""
    has_bodies: bool = field(default=False)

    @property
    def batch(self) -> int:
        """Rows of a sample."""
        return len(next(iter(self.calibration[0].values())))

    @property
    def judged(self) -> list[Feed]:
        """What a result is judged by: what no method saw, unless the graph breaks."""
        return self.calibration if self.breaks else self.held_out

    def save(self, folder: Path) -> Path:
        """The model file; beside it `samples.npz`."""
        path = folder / "model.onnx"
        if self.external:
            copy = onnx.ModelProto()
            copy.CopyFrom(self.proto)
            onnx.save(copy, path, save_as_external_data=True, location="model.data", size_threshold=0)
        else:
            path.write_bytes(self.proto.SerializeToString())
        arrays = {k: np.concatenate([feed[k] for feed in self.calibration]) for k in self.calibration[0]}
        np.savez(folder / "samples.npz", **arrays)
        return path

    @cached_property
    def session(self) -> ort.InferenceSession:
        return open_session(self.proto.SerializeToString())

    def trace(self, feed: Feed, change: Callable[[Step, str, np.ndarray], np.ndarray]) -> Feed:
        """All tensors of the main graph, computed node by node; each read goes through `change`."""
        values = {**self.constants, **feed}
        for step in self.steps:
            read = {name: change(step, name, values[name]) for name in step.reads}
            values |= dict(zip(step.writes, step.session.run(None, read), strict=True))
        return values

    def __repr__(self) -> str:
        return "\n".join(line[:160] for line in onnx.printer.to_text(self.proto).splitlines())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print every weight


def open_session(model: bytes | str) -> ort.InferenceSession:
    """As a user opens it: on the CPU, with all optimizations."""
    return ort.InferenceSession(model, options(), providers=["CPUExecutionProvider"])


def sqnr_db(signal: np.ndarray, got: np.ndarray) -> float:
    """Signal to quantization noise in dB; infinite where nothing differs."""
    wanted = signal.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        noise, power = np.square(got.astype(np.float64) - wanted).sum(), np.square(wanted).sum()
    if noise == 0:
        return np.inf
    return float(10 * np.log10(power / noise)) if power else -np.inf


def _inputs(g: Scope) -> tuple[list[Tensor], list[Feed]]:
    """The graph's inputs, and their samples."""
    batch = g.one_of(4, 1, 2)
    rows = "n" if g.one_of(*ROWS) == "symbolic" else None
    feeds: list[Feed] = [{} for _ in range(CALIBRATION)]
    for number in range(g.one_of(1, 1, 2)):
        name, shape, random = f"x{number}", (batch, *g.one_of(*SHAPES)), g.random()
        scale = g.one_of(1.0, 1.0, 1e-3, 100.0)
        lowest = g.one_of(-1.0, -1.0, 0.0)
        channels = 10 ** random.uniform(-1, 1, shape[-1]) if g.chance(6) else 1.0
        for feed in feeds:
            feed[name] = (random.uniform(lowest, 1, shape) * scale * channels).astype(np.float32)
        g.inputs.append(g.own(Tensor(declared(name, feeds[0][name], rows), feeds[0][name])))
    if g.chance(5):
        random, shape = g.random(), (batch, 6)
        for feed in feeds:
            feed["ids"] = random.integers(0, 32, shape)
        g.inputs.append(g.own(Tensor(declared("ids", feeds[0]["ids"], rows), feeds[0]["ids"])))
    g.pool += g.inputs
    return list(g.inputs), feeds


def _held_out(g: Scope, feeds: list[Feed]) -> list[Feed]:
    """Samples between two of the calibration: a range holds for what lies inside it."""
    random, made = g.random(), []
    for _ in range(HELD_OUT):
        a, b = random.choice(len(feeds), 2, replace=False)
        share = random.uniform(0.1, 0.4)
        mixed = {k: (1 - share) * v + share * feeds[b][k] if v.dtype.kind == "f" else v for k, v in feeds[a].items()}
        made.append({k: v.astype(feeds[0][k].dtype) for k, v in mixed.items()})
    return made


def _outputs(g: Scope, inputs: list[Tensor]) -> list[Tensor]:
    read = {value for node in g.nodes for value in node.inputs} | {t.value for t in g.captured.values()}
    for step in g.steps:
        read |= {v for name in step.reads for v in [next((t.value for t in g.pool if t.value.name == name), None)]}
    made = [t for t in g.pool if t not in inputs]
    leaves = [t for t in made if t.value not in read][-5:]
    between = [t for t in made if t.value in read]
    if between and g.chance(4):
        leaves.append(between[g.draw(st.integers(0, len(between) - 1))])
    if g.chance(10):
        leaves.append(g.add("Identity", [inputs[0]]))
    return leaves


@st.composite
def graphs(draw: Any) -> Case:
    """A graph of 2 to 12 drawn kinds of nodes that checks, runs, and gives finite outputs on its samples."""
    opset = draw(st.sampled_from([17, 13, 21, 11, 20, 18, *range(7, 26)]))
    g = Scope(draw, opset)
    g.nameless = g.chance(8)
    inputs, calibration = _inputs(g)
    grow(g, 1, PRODUCTS)
    grow(g, draw(st.integers(1, 11)), OPERATORS)
    outputs = _outputs(g, inputs)
    floats = [t for t in outputs if t.array.dtype in FLOATS]
    assume(floats)
    held_out = _held_out(g, calibration)
    graph = g.graph(outputs, g.one_of("g", ""))
    if not graph.name:
        graph.name = "main_graph"
    version = next(v for opsets, v in IR_VERSIONS.items() if opset in opsets)
    proto = ir.to_proto(ir.Model(graph, ir_version=version))
    constants = {str(t.value.name): t.array for t in g.initializers}
    for node in g.nodes:
        if node.op_type == "Constant":
            constants[str(node.outputs[0].name)] = node.attributes["value"].as_tensor().numpy()
    bodies = bool(g.operators & {"If", "Loop", "Scan"})
    case = Case(proto, calibration, held_out, g.steps, constants, g.operators, draw(st.integers(0, 9)) == 9)
    case.breaks, case.has_bodies = bool(g.operators & BREAKS), bodies
    assume(_runs(case))
    return case


def _runs(case: Case) -> bool:
    """Whether the graph is one to judge by: it checks, and gives the same finite numbers whole and node by node."""
    try:
        onnx.checker.check_model(case.proto, full_check=True)
        session = case.session
    except Exception:  # what onnx and onnxruntime raise has no common base
        return False
    for feed in itertools.chain(case.calibration, case.held_out):
        try:
            whole = session.run(None, feed)
            parts = case.trace(feed, lambda step, name, array: array)
        except Exception:  # a Reshape that this sample does not fit, an index outside
            return False
        for output, array in zip(session.get_outputs(), whole, strict=True):
            if array.dtype.kind == "f" and not (
                np.isfinite(array).all()
                and (not array.any() or np.abs(array).max() > 1e-30)
                and array.shape == parts[output.name].shape
                and sqnr_db(parts[output.name], array) > (60 if array.dtype != np.float16 else 35)
            ):
                return False
    return True
