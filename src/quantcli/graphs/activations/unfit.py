"""Nodes that stay float because one grid cannot hold what they compute, each kind with its reason.

A grid has one scale: what is under half a step of it becomes zero. Masks of -1e9 beside scores of 5, boxes in pixels
beside scores of 1, and biases far larger than the products they are added to have nothing in common that a scale
could be. What is found here is said, and goes on in float.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantcli.graphs.calibration.tensor_ranges import Ranges
from quantcli.graphs.walk.channels import constant_of, has_weight, weight_rows

__all__ = [
    "MIXING_TYPES",
    "RECURRENT",
    "Grid",
    "Unfit",
    "find_unfit",
    "find_unfit_constants",
    "list_float",
    "recurrent_without_integers",
]

_ENDLESS = 1e9
"""A range that reaches beyond is no range of values: masks are -1e9 to -3.4e38."""
_MASK, _ONE_SIDED = -1000.0, 32.0
"""A range that reaches below the one, and so many times as far as above 0, holds a mask in front of a Softmax."""
_FEWEST_CODES = 16
"""What is put together with larger values keeps at least so many codes of its own."""
_INT32_ROOM = 2.0**30
"""Half of int32: scales of activations and weights are only known to a factor here."""
_LEAST_PRODUCT = 1e-35
"""A bias' scale, the product of two, that is still a normal float32."""

RECURRENT = ("LSTM", "GRU", "RNN")
_JOINS: Mapping[str, tuple[int, ...] | None] = {
    "Concat": None,
    "Where": (1, 2),
    "ScatterND": (0, 2),
    "ScatterElements": (0, 2),
    "Pad": (0, 2),
}
"""Operators that put values side by side, and their inputs that hold them."""
_SPLITS = ("Slice", "Split", "Gather", "GatherElements", "GatherND")
_MOVES = (*_SPLITS, "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "Pad", "Identity")
_SAME_GRID = (*_MOVES, "Resize", "MaxPool", "AveragePool")
"""Operators whose output has their input's grid, whatever its own range is."""
MIXING_TYPES = frozenset((*_JOINS, *_SPLITS, "Add", "Sub"))
"""Operators at which ranges are compared, whether they become integers or not."""
_OWN_GRID = ("Conv", "MatMul", "Gemm", "Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "GlobalAveragePool", "Where")


@dataclass(frozen=True)
class Grid:
    """What values are rounded to."""

    activation_bits: int = 8
    """Of activations."""
    weight_bits: int = 8
    """Of weights."""
    per_channel: bool = False
    """Whether each output channel of a weight has its own scale."""
    operators: bool = False
    """Whether operators work on integers, instead of floats between QuantizeLinear and DequantizeLinear."""
    symmetric: bool = False
    """Whether 0 is in the middle of the activations' codes."""


@dataclass
class Unfit:
    """What was found."""

    reasons: dict[str, str]
    """Why nodes stay float, by their name."""
    spans: dict[str, np.ndarray]
    """How far the weights' grids of nodes have to reach, [output channels], so that their biases fit into int32."""


def find_unfit(model: ir.Model, nodes: Sequence[ir.Node], ranges: Ranges, grid: Grid) -> Unfit:
    """The nodes that stay float.

    Args:
        model: The float graph.
        nodes: Those that are to become integers, of bodies too.
        ranges: Of all tensors that they read and write.
        grid: What they would be rounded to.
    """
    known = _Known(model, nodes, ranges)
    reasons: dict[str, str] = {}
    for found in (
        tensors_without_range(known),
        constants_without_values(known),
        endless_tensors(known),
        masked_tensors(known),
        mixed_tensors(known, grid),
        shrinking_outputs(known, grid),
        lost_clips(known, grid),
        odd_operators(known, grid),
    ):
        for name, reason in found.items():
            reasons.setdefault(name, reason)
    spans: dict[str, np.ndarray] = {}
    for node in nodes:
        needed = bias_span(known, node, grid) if node.name not in reasons else None
        if isinstance(needed, str):
            reasons[str(node.name)] = needed
        elif needed is not None:
            spans[str(node.name)] = needed
    return Unfit(reasons, spans)


def find_unfit_constants(model: ir.Model, nodes: Sequence[ir.Node]) -> dict[str, str]:
    """Why nodes stay float whose activations are rounded as they come; no ranges are known."""
    known = _Known(model, nodes, Ranges({}, 0))
    found = constants_without_values(known) | endless_tensors(known) | odd_operators(known, Grid(operators=True))
    for node in nodes:
        if node.op_type in ("Conv", *RECURRENT) and any(
            constant_of(v) is None for v in node.inputs[1 : _weights(node)]
        ):
            found[str(node.name)] = "its weights are computed"
        elif node.op_type in RECURRENT and node.attributes.get_int("layout", 0) == 1:
            found[str(node.name)] = "onnxruntime has no integers for its layout"
    return found


def _weights(node: ir.Node) -> int:
    return 2 if node.op_type == "Conv" else 3


def recurrent_without_integers(model: ir.Model, able: Collection[str]) -> dict[str, str]:
    """LSTM, GRU and RNN that onnxruntime has no integers for: they stay float, though most of a model may be theirs."""
    return {
        str(n.name): "onnxruntime has no integers for it"
        for n in model.graph.all_nodes()
        if n.op_type in RECURRENT and n.domain == "" and n.op_type not in able
    }


def list_float(model: ir.Model, reasons: Mapping[str, str], most: int = 8) -> list[str]:
    """One line for each reason, with the names of its nodes."""
    kinds = {str(n.name): n.op_type for n in model.graph.all_nodes()}
    lines = []
    for reason in dict.fromkeys(reasons.values()):
        names = [f"{name} ({kinds.get(name, '?')})" for name, why in reasons.items() if why == reason]
        more = f" and {len(names) - most} more" if len(names) > most else ""
        lines.append(f"{', '.join(names[:most])}{more} stay{'s' if len(names) == 1 else ''} float: {reason}")
    return lines


class _Known:
    """The graph and what its tensors hold."""

    def __init__(self, model: ir.Model, nodes: Sequence[ir.Node], ranges: Ranges):
        self.model, self.nodes, self.ranges = model, nodes, ranges
        self.names = {str(n.name) for n in nodes}
        self._constants: dict[ir.Value, tuple[float, float] | None] = {}

    def bounds(self, value: ir.Value | None) -> tuple[float, float] | None:
        """Least and greatest value; None where that is not known."""
        if value is None:
            return None
        if value.is_initializer():
            if value not in self._constants:
                array = constant_of(value) if value.dtype is ir.DataType.FLOAT else None
                empty = array is None or array.size == 0
                self._constants[value] = None if empty else (float(np.min(array)), float(np.max(array)))  # type: ignore[arg-type]
            return self._constants[value]
        return self.ranges.values.get(str(value.name))

    def width(self, value: ir.Value | None) -> float | None:
        """Of a grid that holds the tensor; 0 is always one of its values."""
        bounds = self.bounds(value)
        return None if bounds is None else max(bounds[1], 0.0) - min(bounds[0], 0.0)

    def touching(self, values: Collection[ir.Value], reason: str, *, weights: bool = True) -> dict[str, str]:
        """The nodes that read or write one of these; without `weights`, those that have none."""
        return {
            str(n.name): reason
            for n in self.nodes
            if (weights or not has_weight(n)) and any(v in values for v in (*n.inputs, *n.outputs) if v is not None)
        }

    def tensors(self) -> Iterator[ir.Value]:
        """All values of the graph and its bodies but constants."""
        for graph in (self.model.graph, *self.model.graph.subgraphs()):
            yield from graph.inputs
            for node in graph:
                yield from node.outputs


def tensors_without_range(known: _Known) -> dict[str, str]:
    """Nodes with a tensor that was not finite, or that no sample gave a value."""
    found: dict[str, str] = {}
    for reason in dict.fromkeys(known.ranges.without.values()):
        values = {v for v in known.tensors() if known.ranges.without.get(str(v.name)) == reason}
        found = known.touching(values, f"a tensor of it is {reason}") | found
    return found


def constants_without_values(known: _Known) -> dict[str, str]:
    """Nodes that read a constant of size 0."""
    values = {
        v
        for n in known.nodes
        for v in n.inputs
        if v is not None and v.const_value is not None and not v.const_value.size
    }
    return known.touching({v for v in values if v.dtype is ir.DataType.FLOAT}, "a constant of it is empty")


def endless_tensors(known: _Known) -> dict[str, str]:
    """Nodes with a tensor that reaches to infinity, or all but."""
    values = set()
    for value in {v for n in known.nodes for v in (*n.inputs, *n.outputs) if v is not None}:
        bounds = known.bounds(value)
        if bounds is not None and not max(abs(bounds[0]), abs(bounds[1])) < _ENDLESS:
            values.add(value)
    return known.touching(values, "it holds a mask, or values beyond 1e9")


def masked_tensors(known: _Known) -> dict[str, str]:
    """Nodes that a mask goes through: one scale for -10000 and 5 rounds 5 to 0.

    Masks are added to, or chosen into, the input of a Softmax; they are all but minus infinity, which says that a range
    reaches far below 0 and not far above. A linear between has values of its own.
    """
    masks: set[ir.Value] = set()
    waiting = [n.inputs[0] for n in known.model.graph.all_nodes() if n.op_type in ("Softmax", "LogSoftmax")]
    while waiting:
        value = waiting.pop()
        bounds = known.bounds(value)
        if value is None or value in masks or not _is_mask(bounds):
            continue
        masks.add(value)
        producer = value.producer()
        waiting += producer.inputs if producer is not None else ()
    return known.touching(masks, "a mask goes through", weights=False)


def _is_mask(bounds: tuple[float, float] | None) -> bool:
    return bounds is not None and bounds[0] <= _MASK and -bounds[0] >= _ONE_SIDED * bounds[1]


def mixed_tensors(known: _Known, grid: Grid) -> dict[str, str]:
    """Nodes with a tensor that was put together of parts, or falls into parts, whose ranges differ by orders."""
    share = _FEWEST_CODES / 2**grid.activation_bits
    mixed: set[ir.Value] = set()
    for node in known.model.graph.all_nodes():
        if node.op_type in _JOINS:
            places = _JOINS[node.op_type]
            parts = [known.width(v) for i, v in enumerate(node.inputs) if places is None or i in places]
            whole = known.width(node.outputs[0])
            if whole is not None and any(p is not None and 0 < p < share * whole for p in parts):
                mixed.add(node.outputs[0])
        elif node.op_type in ("Add", "Sub"):
            bounds = [known.bounds(v) for v in node.inputs]
            widths = [w for w in map(known.width, node.inputs) if w is not None]
            if any(map(_is_mask, bounds)) and len(widths) == 2 and min(widths) * _ONE_SIDED < max(widths):
                mixed.add(node.outputs[0])
        elif node.op_type in _SPLITS and node.inputs[0] is not None and not node.inputs[0].is_initializer():
            whole, parts = known.width(node.inputs[0]), [known.width(v) for v in node.outputs]
            if whole is not None and any(p is not None and 0 < p < share * whole for p in parts):
                mixed.add(node.inputs[0])
    _spread(known, mixed)
    return known.touching(mixed, "it holds parts whose ranges differ by orders", weights=False)


def _spread(known: _Known, mixed: set[ir.Value]) -> None:
    """Adds, in place, what mixed tensors are moved to and from; a piece that is much smaller is no mixture."""
    moves = [n for n in known.model.graph.all_nodes() if n.op_type in _MOVES and n.inputs[0] is not None]
    before = -1
    while len(mixed) != before:
        before = len(mixed)
        for node in moves:
            x = node.inputs[0]
            width = known.width(x)
            for output in node.outputs:
                of = known.width(output)
                if x is None or width is None or of is None or of < 0.5 * width:
                    continue
                if x in mixed or output in mixed:
                    mixed |= {x, output}


def shrinking_outputs(known: _Known, grid: Grid) -> dict[str, str]:
    """Nodes whose output takes the grid of an input that reaches much further."""
    share = _FEWEST_CODES / 2**grid.activation_bits
    found = {}
    for node in known.nodes:
        if node.op_type in _SAME_GRID:
            whole, parts = known.width(node.inputs[0]), [known.width(v) for v in node.outputs]
            if whole is not None and any(p is not None and 0 < p < share * whole for p in parts):
                found[str(node.name)] = "its output would have the scale of an input that reaches much further"
    return found


def lost_clips(known: _Known, grid: Grid) -> dict[str, str]:
    """Relu and Clip that onnxruntime takes out although the grid in front does not cut as they do."""
    found = {}
    for node in known.nodes:
        if node.op_type not in ("Relu", "Clip") or grid.symmetric:
            continue
        x = node.inputs[0]
        producer = x.producer() if x is not None else None
        if node.op_type == "Clip" and _cuts_within(node):
            found[str(node.name)] = "its limits are not those of a grid"
        elif x is not None and producer is not None:
            lost = len(x.uses()) > 1 or (producer.name in known.names and producer.op_type not in _OWN_GRID)
            if x.is_graph_output() or (lost and grid.operators):
                found[str(node.name)] = "onnxruntime would take it out, and nothing in front of it cuts as it does"
    return found


def _cuts_within(clip: ir.Node) -> bool:
    """Whether a Clip has limits that no grid with 0 in it has: a least one above 0, or one that is computed."""
    for place, sign in ((1, 1.0), (2, -1.0)):
        value = clip.inputs[place] if place < len(clip.inputs) else None
        if value is None:
            continue
        array = constant_of(value)
        if array is None or array.size != 1 or sign * array.item() > 0:
            return True
    return False


def odd_operators(known: _Known, grid: Grid) -> dict[str, str]:
    """Operators in forms that onnxruntime's integers do not take, or get wrong."""
    found = {}
    for node in known.nodes:
        if node.op_type == "MatMul" and any(
            v is not None and v.shape is not None and len(v.shape) == 1 for v in node.inputs
        ):
            found[str(node.name)] = "it multiplies by a vector"
        elif (
            node.op_type == "MatMul"
            and grid.per_channel
            and not grid.operators
            and constant_of(node.inputs[0]) is not None
        ):
            found[str(node.name)] = "its constant on the left would have scales that no product takes"
        elif node.op_type == "Resize" and grid.operators and node.attributes.get_string("mode", "nearest") == "cubic":
            found[str(node.name)] = "on integers, what a cubic curve overshoots wraps around"
        elif node.op_type == "ConvTranspose" and grid.per_channel and node.attributes.get_int("group", 1) > 1:
            found[str(node.name)] = "in groups it has no scales per channel"
    return found


def bias_span(known: _Known, node: ir.Node, grid: Grid) -> np.ndarray | str | None:
    """How far the grids of a node's weights have to reach for its bias, a reason against it, or None.

    A bias becomes int32 in steps of the scales of input and weight, so that a channel of tiny weights, or of none, has
    no code for it. With a larger scale that channel's weights lose digits that its bias hides anyway.
    """
    if not has_weight(node) or len(node.inputs) < 3:
        return None
    bias, weight, x = constant_of(node.inputs[2]), constant_of(node.inputs[1]), known.width(node.inputs[0])
    if bias is None or weight is None or x is None or bias.ndim != 1 or not weight.size:
        return None
    rows = weight_rows(node)
    others = tuple(axis for axis in range(weight.ndim) if axis != rows)
    widths = np.maximum(weight.max(others), 0).astype(np.float64) - np.minimum(weight.min(others), 0)
    if not grid.per_channel or widths.shape != bias.shape:
        widths = np.full(bias.shape, widths.max())
    codes = 2.0**grid.weight_bits - 1
    step = (x or 1.0) / (2**grid.activation_bits - 1)
    scales = widths / codes
    least = np.maximum(np.abs(bias.astype(np.float64)) / _INT32_ROOM, _LEAST_PRODUCT) / step
    alive = scales[scales > 0]
    # onnxruntime gives a channel of zeros the scale 1, of which a bias would be a few steps or none
    least = np.where(scales == 0, np.maximum(least, np.median(alive) if alive.size else 256 * least), least)
    if (scales >= least).all():
        return None
    if not grid.per_channel and scales.max() > 0 and least.max() > 4 * scales.max():
        return "its bias does not fit into int32 with one scale for all channels"
    spans = np.where(scales < least, least, 0.0) * 2.0 ** (grid.weight_bits - 1)
    return spans if grid.per_channel else np.full(weight.shape[rows], spans.max())
