"""Brings a float graph to a later opset and shows that it still computes the same.

onnx's own converter does it, on the structure alone: weights stay where they are, whatever their size, and are put back
by name. Operators of other domains, and onnxruntime's own in the standard's domain, stay as they are. What the
converter drops (metadata, weights' places) is put back.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from quantcli.errors import InputError, first_line
from quantcli.graphs.checking.equivalence import largest_difference

__all__ = ["Conversion", "convert_opset", "prove_conversion", "raise_ir_version", "with_known_opset"]

_SMALL_BYTES = 1024
"""Tensors up to here go through the converter: axes, shapes and scales that adapters of operators read."""
_OLDEST_KNOWN = 7
"""From here on, Add and Gemm broadcast as numpy does."""
_IR_VERSIONS = {25: 13, 24: 12, 23: 11, 21: 10, 19: 9, 15: 8}
"""The version of the file format that came with an opset, the latest first."""
_OLDEST_IR_VERSION = 8
_ASIDE = "quantcli.aside"
"""Domain of operators that the standard does not have, while the converter is at work."""
_TOLERANCE = {ir.DataType.FLOAT16: 1e-2, ir.DataType.BFLOAT16: 1e-1}
_FLOAT32_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Conversion:
    """What became of a graph's opset."""

    before: int
    """Opset of the source."""
    after: int
    """Opset of the float graph that is quantized."""
    difference: float | None = None
    """Largest difference of an output on inputs made up from the inputs' shapes, relative to its largest value."""
    unproven: str = ""
    """Why the two graphs could not be compared."""

    def __str__(self) -> str:
        """For people."""
        said = f"the graph was converted from opset {self.before} to {self.after}"
        if self.difference is None:
            return f"{said}; its outputs were not compared: {self.unproven}"
        far = f"differ by at most {self.difference:.1e} of the largest" if self.difference else "are the same"
        return f"{said}; its outputs {far}"


def convert_opset(model: ir.Model, wanted: int, hint: str | None = None) -> ir.Model:
    """The graph in a later opset, with the same names; its weights are those of `model`, read from where they lie.

    Args:
        model: Float graph; functions are inlined and Constant nodes lifted in place, else it stays as it is.
        wanted: Opset to reach.
        hint: What to do where it cannot be; default: export again.

    Raises:
        InputError: an operator that the converter cannot bring along.
    """
    before = model.opset_imports.get("")
    refused = f"opset {before} cannot be converted to {wanted}"
    hint = hint or f"export the model with opset {wanted} or later"
    if model.functions:
        InlinePass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=False)(model)
    bare = _structure(model)
    try:
        found: ir.Model = ir.from_proto(onnx.version_converter.convert_version(bare, wanted))
    except Exception as error:  # the converter raises RuntimeError and its own types
        reason = first_line(error).rpartition("failed: ")[2]  # behind its own source line
        raise InputError(f"{refused}: {_culprit(bare, wanted)}{reason}", hint=hint) from error
    if found.opset_imports.get("") != wanted:
        raise InputError(refused, hint=hint)
    _restore(found, model)
    raise_ir_version(found)
    return found


def with_known_opset(model: ir.Model, wanted: int = 13) -> tuple[ir.Model, ir.Model | None]:
    """The graph in an opset whose operators are known here: one older than 7 is brought to `wanted`.

    Returns:
        The graph, and what it was where that is another.

    Raises:
        InputError: an operator that the converter cannot bring along.
    """
    if model.opset_imports.get("", _OLDEST_KNOWN) >= _OLDEST_KNOWN:
        return model, None
    return convert_opset(model, wanted), model


def prove_conversion(
    older: ir.Model, newer: ir.Model, folder: Path, axes: Mapping[str, int] | None = None, hint: str | None = None
) -> Conversion:
    """Runs both graphs, one after the other, on inputs made up from their shapes.

    Args:
        older: The graph as it was.
        newer: What `convert_opset` made of it.
        folder: Where their external data lies.
        axes: Lengths of axes that the graph only names.
        hint: What to do where they differ; default: export again.

    Raises:
        InputError: they compute different things, or the converted one does not run where the other does.
    """
    before, after = older.opset_imports[""], newer.opset_imports[""]
    hint = hint or f"export the model with opset {after} or later"
    try:
        found = largest_difference(older, newer, folder, axes or {})
    except InputError as error:
        raise InputError(f"opset {before} cannot be converted to {after}: {error.message}", hint=hint) from error
    if isinstance(found, str):
        return Conversion(before, after, unproven=found)
    types = {value.dtype for value in (*older.graph.initializers.values(), *older.graph.outputs)}
    allowed = max((_TOLERANCE[t] for t in types if t in _TOLERANCE), default=_FLOAT32_TOLERANCE)
    if not found <= allowed:
        raise InputError(
            f"opset {after} computes something else than the graph's {before}: an output is off by {found:.1e}",
            hint=hint,
        )
    return Conversion(before, after, found)


def raise_ir_version(model: ir.Model) -> None:
    """The version of the file format that the graph's opset came with, where the file says an older one."""
    opset = model.opset_imports.get("", 0)
    needed = next((version for first, version in _IR_VERSIONS.items() if opset >= first), _OLDEST_IR_VERSION)
    model.ir_version = max(model.ir_version, needed)


def _structure(model: ir.Model) -> onnx.ModelProto:
    """The graph with places instead of weights: nothing of any size goes through the converter."""
    bare = model.clone()
    # before version 4 weights had to be inputs too, which the converter relies on
    bare.ir_version = max(bare.ir_version, _OLDEST_IR_VERSION)
    if bare.opset_imports.get("", 0) < _OLDEST_KNOWN:
        for value in bare.graph.inputs:  # the converter asks old Add and Gemm for lengths: `_restore` puts names back
            if value.shape is not None:
                value.shape = ir.Shape([n if isinstance(n, int) else 1 for n in value.shape])
    for node in bare.graph.all_nodes():
        if node.domain == "" and not onnx.defs.has(node.op_type):
            node.domain = _ASIDE
            bare.opset_imports[_ASIDE] = 1
    for name, value in bare.graph.initializers.items():
        stored = value.const_value
        if stored is not None and stored.nbytes > _SMALL_BYTES:
            place = (0, math.ceil(stored.nbytes), stored.dtype)
            value.const_value = ir.ExternalTensor("weights", *place, shape=ir.Shape(stored.shape.numpy()), name=name)
    return ir.to_proto(bare)


def _culprit(bare: onnx.ModelProto, wanted: int) -> str:
    """The first node without which everything in front of it can be converted, in words; empty where there is none."""

    def fails(count: int) -> bool:
        part = onnx.ModelProto()
        part.CopyFrom(bare)
        del part.graph.node[count:], part.graph.output[:]
        try:
            onnx.version_converter.convert_version(part, wanted)
        except Exception:  # the converter raises RuntimeError and its own types
            return True
        return False

    count = bisect_left(range(len(bare.graph.node) + 1), True, key=fails)
    if not 0 < count <= len(bare.graph.node):
        return ""
    node = bare.graph.node[count - 1]
    return f"{node.op_type} {node.name!r}: " if node.name else f"{node.op_type}: "


def _restore(found: ir.Model, model: ir.Model) -> None:
    """What the converter does not bring along."""
    folders = {t.base_dir for t in map(_stored, model.graph.initializers.values()) if isinstance(t, ir.ExternalTensor)}
    for folder in folders:  # weights of subgraphs, of the one file that all are from
        ir.external_data.set_base_dir(found.graph, folder)
    for name, value in found.graph.initializers.items():
        if name in model.graph.initializers:
            value.const_value = model.graph.initializers[name].const_value
    known = {v.name: v for v in _values(model)}
    for value in _values(found):
        if value.name in known:
            value.metadata_props.update(known[value.name].metadata_props)
            value.type, value.shape = known[value.name].type, known[value.name].shape
        else:
            value.shape = None  # the converter says of some that they have no axes
    nodes = {(n.op_type, n.outputs[0].name): n for n in model.graph.all_nodes() if n.outputs}
    found.opset_imports.pop(_ASIDE, None)
    for node in found.graph.all_nodes():
        node.domain = "" if node.domain == _ASIDE else node.domain
        same = nodes.get((node.op_type, node.outputs[0].name)) if node.outputs else None
        if same is not None:
            node.metadata_props.update(same.metadata_props)
    found.graph.metadata_props.update(model.graph.metadata_props)
    found.metadata_props.update(model.metadata_props)
    found.producer_name, found.producer_version = model.producer_name, model.producer_version
    found.domain, found.model_version, found.doc_string = model.domain, model.model_version, model.doc_string


def _stored(value: ir.Value) -> ir.TensorProtocol | None:
    return value.const_value


def _values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *(v for node in model.graph.all_nodes() for v in node.outputs)]
