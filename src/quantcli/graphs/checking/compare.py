"""A float graph and what it was quantized to, node by node: whose own rounding hurts, and what has become of it.

Two figures for each node, as signal-to-quantization-noise ratios in dB, 10 log10(sum y^2 / sum (y' - y)^2):

- own: y' is the node in integers on the float graph's input (`graphs.checking.node_errors`). It says which node to
  leave float;
- model: y' is the tensor inside the quantized graph, the errors of all earlier nodes included.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from quantcli.graphs.checking.node_errors import Grids, measure_twins
from quantcli.graphs.checking.side_by_side import GraphRunError, decibels
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.model.inputs import CalibrationReader, rewound
from quantcli.graphs.model.session import open_session, run_sample
from quantcli.graphs.walk.channels import constant_of

__all__ = ["Comparison", "NodeError", "compare"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class NodeError:
    """One quantized node."""

    name: str
    """Its name."""
    op_type: str
    """Its operator."""
    own_db: float
    """What its own rounding costs."""
    model_db: float | None
    """How far its output is off inside the quantized graph; None where that graph has no such tensor."""


@dataclass(frozen=True)
class Comparison:
    """A float and a quantized graph."""

    nodes: tuple[NodeError, ...]
    """Quantized nodes, the one that loses most by its own rounding first."""
    outputs: Mapping[str, float]
    """Of the quantized graph as onnxruntime runs it, in dB by name."""
    samples: int
    """How many samples were compared."""


def compare(ready: Path, made: Path, names: Collection[str], reader: CalibrationReader) -> Comparison:
    """Runs samples through both graphs.

    Args:
        ready: The float graph that was quantized.
        made: What became of it.
        names: Nodes that were asked to be quantized.
        reader: Samples; read twice.

    Raises:
        UsageError: the reader cannot begin again.
        InputError: no samples, or one that a graph cannot run.
        GraphRunError: onnxruntime cannot open the quantized graph.
    """
    twins = measure_twins(ready, made, names, rewound(reader, "a comparison"))
    model, told = open_graph(ready), open_graph(made)
    grids = Grids(made, model)
    kinds = {str(n.name): n for n in model.graph if n.name in twins}
    tensors = {name: str(n.outputs[0].name) for name, n in kinds.items()}
    shown = {t: found for t in tensors.values() if (found := _counterpart(t, told, grids)) is not None}
    outputs = [str(v.name) for v in model.graph.outputs if v.dtype in _FLOATS]
    inside: dict[str, list[float]] = {t: [0.0, 0.0] for t in shown}
    outside: dict[str, list[float]] = {t: [0.0, 0.0] for t in outputs}
    samples = 0
    with TemporaryDirectory(dir=ready.parent, prefix=".compare-") as folder:
        _expose(model, list(shown))
        _expose(told, [name for name, _ in shown.values()])
        save_graph(model, Path(folder) / "float.onnx")
        save_graph(told, Path(folder) / "integers.onnx")
        sessions = [open_session(Path(folder) / n, optimized=False) for n in ("float.onnx", "integers.onnx")]
        fused = open_session(made, what="the quantized graph", error=GraphRunError)
        reader = rewound(reader, "a comparison")
        while feed := reader.get_next():
            float_values, values, final = (
                dict(zip([o.name for o in s.get_outputs()], run_sample(s, feed, samples), strict=True))
                for s in (*sessions, fused)
            )
            for tensor, (name, grid) in shown.items():
                _add(inside[tensor], float_values[tensor], _real(values[name], grid))
            for tensor in outputs:
                _add(outside[tensor], float_values[tensor], final[tensor])
            samples += 1
    nodes = [
        NodeError(
            name,
            kinds[name].op_type,
            decibels(twin.signal, twin.noise),
            decibels(*inside[tensors[name]]) if tensors[name] in inside else None,
        )
        for name, twin in twins.items()
    ]
    nodes.sort(key=lambda n: n.own_db)
    return Comparison(tuple(nodes), {t: decibels(*sums) for t, sums in outside.items()}, samples)


_Grid = tuple[np.ndarray, np.ndarray] | None


def _counterpart(tensor: str, told: ir.Model, grids: Grids) -> tuple[str, _Grid] | None:
    """The quantized graph's tensor for one of the float graph's, with the grid of one that holds integers."""
    for name in (f"{tensor}_DequantizeLinear_Output", tensor):
        if name in grids.floats:
            return name, None
    grid = grids.of(tensor) if f"{tensor}_quantized" in grids.floats else None
    if grid is None:
        return None
    scale, zero = (constant_of(v) for v in grid)
    return None if scale is None or zero is None else (f"{tensor}_quantized", (scale, zero))


def _real(values: np.ndarray, grid: _Grid) -> np.ndarray:
    return values if grid is None else (values.astype(np.float64) - grid[1].astype(np.float64)) * grid[0]


def _expose(model: ir.Model, names: Collection[str]) -> None:
    """Makes tensors outputs; types that are not known are taken from the tensor's node by onnxruntime."""
    known = {str(v.name) for v in model.graph.outputs}
    values = {str(v.name): v for n in model.graph for v in n.outputs}
    model.graph.outputs.extend(values[name] for name in names if name not in known and name in values)


def _add(sums: list[float], expected: np.ndarray, found: np.ndarray) -> None:
    expected = expected.astype(np.float64)
    sums[0] += float(np.square(expected).sum())
    sums[1] += float(np.square(found.astype(np.float64) - expected).sum())
