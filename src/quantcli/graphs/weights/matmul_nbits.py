"""Puts quantized matrices into a graph whose weights are only named.

MatMul and Gemm become MatMulNBits (MatMulBnb4 where codes name a codebook's values), Gather becomes
GatherBlockQuantized, and what stays float is read when the file is written.

A weight that joins matrices of different bits, groups or kinds (q, k and v under overrides) becomes one node per kind
and a Concat. A head tied to the embedding reads the embedding's own table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, Union

import numpy as np
import onnx_ir as ir

from quantcli.errors import InputError
from quantcli.graphs.walk.matrices import weight_uses
from quantcli.graphs.weights.blocks import BlockLayout, plan_blocks, plan_codebook_blocks
from quantcli.graphs.weights.rows import NamedRows, RowRange
from quantcli.tensors.quantized_array import QuantizedArray, concatenate_arrays

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.graphs.weights.checkpoint_rows import Rows
    from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["BNB4_TYPES", "Placement", "ReadMatrix", "Rewriter"]

ReadMatrix: TypeAlias = Callable[[str], Union["QuantizedTensor", QuantizedArray, "Tensor"]]
"""Gives a matrix by module name: codes, or values [N, K]."""
BNB4_TYPES = ("fp4", "nf4")
"""By the number that MatMulBnb4 knows them by."""
_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Placement:
    """Where rows of the checkpoint stand in the graph; what `graphs.checking.read_back` checks."""

    weight: str
    """Initializer of the codes or values."""
    ranges: tuple[RowRange, ...]
    """The rows it holds, in order."""
    width: int
    """Columns of the matrices, K."""
    layout: BlockLayout | None
    """Where their codes go; None for float."""
    scales: str = ""
    """Initializer of the scales."""
    zeros: str = ""
    """Initializer of the zero points; empty where all are the middle."""
    transposed: bool = False
    """Whether a float initializer is [K, N]."""


class Rewriter:
    """Rewrites one graph in place."""

    def __init__(self, graph: ir.Graph, ledger: Mapping[str, Rows | NamedRows], read: ReadMatrix, accuracy_level: int):
        """Remembers what to rewrite.

        Args:
            graph: The graph as an exporter built it.
            ledger: Which rows each initializer stands for.
            read: Gives the matrices; called again for every use, so nothing is kept in memory.
            accuracy_level: Attribute of every MatMulNBits.
        """
        self.graph, self.ledger, self.read, self.accuracy_level = graph, dict(ledger), read, accuracy_level
        self.placements: list[Placement] = []
        self._gathered: dict[tuple[ir.Value, object, bytes], ir.Value] = {}
        self._indexes: dict[bytes, ir.Value] = {}
        self._dtype = ir.DataType.FLOAT  # of the weight that is being replaced, hence of its scales and products
        self._names = {node.name for node in graph.all_nodes()}

    def run(self) -> list[Placement]:
        """Rewrites every weight of the ledger; returns where all of them are."""
        gathers = [n for n in self.ledger if any(u.op_type == "Gather" for u in self.graph.initializers[n].consumers())]
        for name in [*gathers, *(n for n in self.ledger if n not in gathers)]:
            value, rows = self.graph.initializers[name], self.ledger[name]
            self._dtype = value.dtype or ir.DataType.FLOAT
            uses = weight_uses(value)
            if isinstance(uses, str) or any(u.rows_first == rows.transposed for u in uses):
                why = uses if isinstance(uses, str) else "it is read transposed"
                raise InputError(
                    f"the exporter uses the weight of {rows.ranges[0].name} in another way: {why}",
                    hint="add --exporter torch",
                )
            for node in sorted((u.node for u in uses), key=lambda n: n.op_type != "Gather"):  # tables keep their zeros
                if node.op_type == "Gather":
                    self._replace_gather(node, rows, name)
                else:
                    self._replace_product(node, rows, name)
            for node in value.consumers():
                if node.op_type == "Transpose" and not node.outputs[0].uses() and node.graph is not None:
                    node.graph.remove(node, safe=True)
            if self.graph.initializers.get(name) is value and not value.uses():
                del self.graph.initializers[name]
        return self.placements

    # -- products ------------------------------------------------------------------------------------------------

    def _replace_product(self, node: ir.Node, rows: Rows | NamedRows, name: str) -> None:
        x, base = node.inputs[0], name.removesuffix(".weight")
        assert x is not None
        parts = [(r, self._layout(r.name)) for r in rows.ranges]
        kinds: list[list[tuple[RowRange, BlockLayout | None]]] = []
        for part in parts:
            if kinds and _alike(kinds[-1][-1][1], part[1]):
                kinds[-1].append(part)
            else:
                kinds.append([part])
        outputs = []
        for number, kind in enumerate(kinds):
            ranges, layout = tuple(r for r, _ in kind), kind[0][1]
            label = base if len(kinds) == 1 else f"{base}.{number}"
            if layout is None:
                outputs.append(self._float_product(node, x, ranges, rows.columns, label))
            else:
                outputs.append(self._quantized_product(node, x, ranges, rows.columns, layout, label))
        result = outputs[0]
        if len(outputs) > 1:
            result = self._insert(node, "Concat", outputs, {"axis": -1}, name=f"{node.name}/Concat")
        if node.op_type == "Gemm":
            result = self._finish_gemm(node, result, base)
        self._take_place(node, result)

    def _finish_gemm(self, node: ir.Node, product: ir.Value, label: str) -> ir.Value:
        """Alpha * product + beta * C."""
        added = node.inputs[2] if len(node.inputs) > 2 else None
        factors = [node.attributes[n].as_float() if n in node.attributes else 1.0 for n in ("alpha", "beta")]
        parts = []
        for value, factor, part in ((product, factors[0], "alpha"), (added, factors[1], "beta")):
            if value is not None and factor != 1:
                number = self._constant(f"{label}.{part}.{node.name}", np.array(factor, self._dtype.numpy()))
                value = self._insert(node, "Mul", [value, number], {}, name=f"{node.name}/{part}")
            if value is not None:
                parts.append(value)
        return self._insert(node, "Add", parts, {}, name=f"{node.name}/Add") if len(parts) > 1 else parts[0]

    def _quantized_product(
        self, node: ir.Node, x: ir.Value, ranges: tuple[RowRange, ...], width: int, layout: BlockLayout, label: str
    ) -> ir.Value:
        codebook = self._codebook(ranges)
        if codebook is not None:
            return self._codebook_product(node, x, ranges, layout, label, codebook)
        weight, scales, zeros = self._quantized_initializers(ranges, width, layout, label, keep_zeros=False)
        inputs = [self._gather_columns(node, x, layout), weight, scales, *([zeros] if zeros is not None else [])]
        attributes = {
            "K": layout.width,
            "N": sum(r.stop - r.start for r in ranges),
            "bits": layout.bits,
            "block_size": layout.block_size,
            "accuracy_level": self.accuracy_level,
        }
        return self._insert(node, "MatMulNBits", inputs, attributes, _DOMAIN, f"/{label.replace('.', '/')}/NBits")

    def _codebook_product(
        self, node: ir.Node, x: ir.Value, ranges: tuple[RowRange, ...], layout: BlockLayout, label: str, codebook: str
    ) -> ir.Value:
        """Codes two in a byte, the first in the upper half; one scale per block of the flattened matrix."""
        found, known = self.graph.initializers, (p for p in self.placements if p.ranges == ranges)
        if next(known, None) is None:
            count = sum(r.stop - r.start for r in ranges)

            def packed() -> ir.TensorProtocol:
                codes = np.asarray(self._codes(ranges).codes).reshape(-1)
                return ir.Tensor(codes[0::2] << np.uint8(4) | codes[1::2], name=f"{label}.qweight")

            shape = ir.Shape((count * layout.width // 2,))
            self._register(ir.LazyTensor(packed, dtype=ir.DataType.UINT8, shape=shape, name=f"{label}.qweight"))
            self._constant(f"{label}.scales", layout.scales(self._codes(ranges)).reshape(-1))
            self.placements.append(Placement(f"{label}.qweight", ranges, layout.width, layout, f"{label}.scales"))
        attributes = {
            "K": layout.width,
            "N": sum(r.stop - r.start for r in ranges),
            "block_size": layout.block_size,
            "quant_type": BNB4_TYPES.index(codebook),
        }
        inputs = [x, found[f"{label}.qweight"], found[f"{label}.scales"]]
        return self._insert(node, "MatMulBnb4", inputs, attributes, _DOMAIN, f"/{label.replace('.', '/')}/Bnb4")

    def _float_product(
        self, node: ir.Node, x: ir.Value, ranges: tuple[RowRange, ...], width: int, label: str
    ) -> ir.Value:
        shared = next(
            (p for p in self.placements if p.layout is None and p.ranges == ranges and not p.transposed), None
        )
        if shared is not None:  # a head tied to the embedding: one table on disk and in memory
            table = self.graph.initializers[shared.weight]
            return self._insert(node, "FusedMatMul", [x, table], {"transB": 1}, _DOMAIN, f"/{label}/Fused")
        weight = self._float_initializer(ranges, width, f"{label}.weight", transposed=True)
        return self._insert(node, "MatMul", [x, weight], {}, name=f"/{label.replace('.', '/')}/Float")

    def _gather_columns(self, node: ir.Node, x: ir.Value, layout: BlockLayout) -> ir.Value:
        """The input in the order of the blocks; products of one input in one order share it."""
        if layout.columns is None:
            return x
        key = x, node.graph, layout.columns.tobytes()  # a body's values are its own
        if key not in self._gathered:
            index = self._index(layout.columns.clip(min=0))  # fillers multiply whatever stands there by nothing
            out = self._insert(node, "Gather", [x, index], {"axis": -1}, name=f"{x.name}/columns_{len(self._gathered)}")
            self._gathered[key] = out
        return self._gathered[key]

    # -- embeddings ----------------------------------------------------------------------------------------------

    def _replace_gather(self, node: ir.Node, rows: Rows | NamedRows, name: str) -> None:
        base, ranges = name.removesuffix(".weight"), rows.ranges
        if len(ranges) != 1:
            raise InputError(f"the exporter joins {ranges[0].name} with others in an embedding")
        layout = self._layout(ranges[0].name)
        if layout is None:
            table = self._float_initializer(ranges, rows.columns, name, transposed=False)
            node.replace_input_with(0, table)
            return
        weight, scales, zeros = self._quantized_initializers(ranges, rows.columns, layout, base, keep_zeros=True)
        length = layout.blocks * layout.block_size
        tensor_rows = ranges[0].stop - ranges[0].start
        shape = self._constant(f"{base}.shape", np.array([tensor_rows, length * layout.bits // 8], np.int64))
        flat = self._insert(node, "Reshape", [weight, shape], {}, name=f"{node.name}/Flat")
        ids = node.inputs[1]
        assert ids is not None and zeros is not None
        attributes = {"bits": layout.bits, "block_size": layout.block_size, "gather_axis": 0, "quantize_axis": 1}
        out = self._insert(
            node, "GatherBlockQuantized", [flat, ids, scales, zeros], attributes, _DOMAIN, f"{node.name}/Quantized"
        )
        if length != rows.columns or layout.columns is not None:
            index = self._index(layout.inverse(rows.columns))
            out = self._insert(node, "Gather", [out, index], {"axis": -1}, name=f"{node.name}/Columns")
        self._take_place(node, out)

    # -- initializers --------------------------------------------------------------------------------------------

    def _layout(self, name: str) -> BlockLayout | None:
        matrix = self.read(name)
        if not _is_quantized(matrix):
            return None
        if matrix.codebook is None:
            return plan_blocks(matrix.group, matrix.scheme.bits)
        layout = plan_codebook_blocks(matrix.group)
        if layout is None or matrix.nested is not None or self._dtype != ir.DataType.FLOAT:
            raise InputError(
                f"MatMulBnb4 cannot hold {name}: it has blocks that divide the columns, and plain float32 scales"
            )
        return layout

    def _codebook(self, ranges: tuple[RowRange, ...]) -> str | None:
        matrix = self.read(ranges[0].name)
        return matrix.scheme.codebook if _is_quantized(matrix) else None

    def _quantized_initializers(
        self, ranges: tuple[RowRange, ...], width: int, layout: BlockLayout, label: str, keep_zeros: bool
    ) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        known = (p for p in self.placements if p.layout is not None and p.ranges == ranges)
        shared = next((p for p in known if p.zeros or not keep_zeros), None)
        if shared is not None:  # a head tied to a quantized embedding, or one weight of several products
            found = self.graph.initializers
            return found[shared.weight], found[shared.scales], found[shared.zeros] if shared.zeros else None
        tensor = self._codes(ranges)
        rows, middle = tensor.shape[0], 1 << (layout.bits - 1)
        shape = ir.Shape((rows, layout.blocks, layout.block_size * layout.bits // 8))
        codes = ir.LazyTensor(
            lambda: ir.Tensor(layout.codes(self._codes(ranges)), name=f"{label}.qweight"),
            dtype=ir.DataType.UINT8,
            shape=shape,
            name=f"{label}.qweight",
        )
        weight = self._register(codes)
        # scales are float16 values: nothing is lost where the graph is float16
        scales = self._constant(f"{label}.scales", layout.scales(tensor).astype(self._dtype.numpy()))
        zeros = None
        if keep_zeros or (np.asarray(tensor.zero) != middle).any():
            stored = layout.zeros(tensor)
            zeros = self._constant(
                f"{label}.zeros", stored.astype(self._dtype.numpy()) if tensor.has_float_zeros else stored
            )
        placed = Placement(
            f"{label}.qweight", ranges, width, layout, f"{label}.scales", "" if zeros is None else f"{label}.zeros"
        )
        self.placements.append(placed)
        return weight, scales, zeros

    def _float_initializer(self, ranges: tuple[RowRange, ...], width: int, name: str, transposed: bool) -> ir.Value:
        count = sum(r.stop - r.start for r in ranges)

        def values() -> ir.TensorProtocol:
            parts = [self._values(r.name)[r.start : r.stop] for r in ranges]
            whole = np.concatenate(parts)
            return ir.Tensor(np.ascontiguousarray(whole.T if transposed else whole), name=name)

        shape = ir.Shape((width, count) if transposed else (count, width))
        self.graph.initializers.pop(name, None)
        self.placements.append(Placement(name, ranges, width, None, transposed=transposed))
        return self._register(ir.LazyTensor(values, dtype=ir.DataType.FLOAT, shape=shape, name=name))

    def _codes(self, ranges: tuple[RowRange, ...]) -> QuantizedTensor | QuantizedArray:
        parts = []
        for part in ranges:
            matrix = self.read(part.name)
            assert _is_quantized(matrix)
            parts.append(matrix.rows(part.start, part.stop))
        return concatenate_arrays(parts) if len(parts) > 1 else parts[0]

    def _values(self, name: str) -> np.ndarray:
        matrix: Any = self.read(name)
        assert not hasattr(matrix, "codes")
        values: np.ndarray = matrix.float().numpy()
        return values

    def _index(self, columns: np.ndarray) -> ir.Value:
        key = columns.tobytes()
        if key not in self._indexes:
            self._indexes[key] = self._constant(f"columns_{len(self._indexes)}", columns)
        return self._indexes[key]

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return self._register(ir.Tensor(array, name=name))

    def _register(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    # -- nodes ---------------------------------------------------------------------------------------------------

    def _insert(
        self,
        before: ir.Node,
        op_type: str,
        inputs: list[ir.Value],
        attributes: Mapping[str, int],
        domain: str = "",
        name: str = "",
    ) -> ir.Value:
        new = ir.node(op_type, inputs, dict(attributes), domain=domain, name=self._unused(name))
        new.outputs[0].name = f"{new.name}/output_0"
        new.outputs[0].dtype = ir.DataType.UINT8 if op_type == "Reshape" else self._dtype
        assert before.graph is not None
        before.graph.insert_before(before, new)
        self.graph.opset_imports.setdefault(_DOMAIN, 1)
        return new.outputs[0]

    def _unused(self, name: str) -> str:
        """The name, with a number behind it where several nodes read one weight."""
        number, chosen = 1, name
        while chosen in self._names:
            number, chosen = number + 1, f"{name}_{number}"
        self._names.add(chosen)
        return chosen

    def _take_place(self, node: ir.Node, result: ir.Value) -> None:
        """Lets `result` stand where the node's output stood, under the same name."""
        old = node.outputs[0]
        name, result.shape = old.name, old.shape
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        old.name, result.name = None, name


def _is_quantized(
    matrix: QuantizedTensor | QuantizedArray | Tensor,
) -> TypeGuard[QuantizedTensor | QuantizedArray]:
    return hasattr(matrix, "codes")


def _alike(one: BlockLayout | None, other: BlockLayout | None) -> bool:
    """Whether rows of both kinds can stand in one node."""
    if one is None or other is None:
        return one is other
    return one.same_as(other)
