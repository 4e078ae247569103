"""Puts quantized matrices in the place of the float ones: same inputs, same outputs, nothing left over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from quantcli.graphs.rewrite.fold_weights import unfold_weights
from quantcli.graphs.walk.matrices import GraphTarget
from quantcli.graphs.weights import qdq
from quantcli.graphs.weights.blocks import container_bits
from quantcli.graphs.weights.matmul_nbits import Placement, Rewriter
from quantcli.graphs.weights.rows import NamedRows, RowRange

if TYPE_CHECKING:
    from quantcli.tensors.quantized import QuantizedTensor
    from quantcli.tensors.quantized_array import QuantizedArray

__all__ = ["BITS_KEY", "needed_opset", "note_bits", "replace_matrices"]

BITS_KEY = "quantcli.bits"
"""Metadata of a node whose codes have fewer bits than their container."""


def needed_opset(encoding: str, bits: Iterable[int]) -> int:
    """The first opset that has an encoding at all of these widths; 0 where any will do."""
    return max((qdq.LOWEST_OPSET[container_bits(b)] for b in bits), default=0) if encoding == "qdq" else 0


def replace_matrices(
    model: ir.Model,
    targets: Sequence[GraphTarget],
    read: Callable[[str], QuantizedTensor | QuantizedArray],
    encoding: str = "nbits",
    accuracy_level: int = 0,
) -> list[Placement]:
    """Rewrites a graph in place.

    Args:
        model: As `walk.prepare` left it.
        targets: The matrices.
        read: Gives the codes of a target by name, [N, K]; called again for every use.
        encoding: nbits: MatMulNBits and GatherBlockQuantized of com.microsoft; qdq: DequantizeLinear of the standard.
        accuracy_level: Attribute of every MatMulNBits.

    Returns:
        Where each matrix stands, for `verify.verify_weights`.
    """
    graph = model.graph
    if encoding == "qdq":
        placements = qdq.dequantize_in_graph(graph, targets, read)
        unfold_weights(model)
        return placements
    ledger = {t.name: NamedRows((RowRange(t.name, 0, t.rows),), t.columns, t.transposed) for t in targets}
    placements = Rewriter(graph, ledger, read, accuracy_level).run()
    unfold_weights(model)
    graph.sort()
    return placements


def note_bits(graph: ir.Graph, placements: Sequence[Placement], bits: Mapping[str, int]) -> None:
    """Notes at a node how many bits its codes have, where the container has more: what `graphs.model.inspect` reads.

    Args:
        graph: As `replace_matrices` left it.
        placements: What it returned.
        bits: Of each matrix by name.
    """
    for placement in placements:
        held = max(bits[part.name] for part in placement.ranges)
        if held == container_bits(held):
            continue
        for node, _ in graph.initializers[placement.weight].uses():
            node.metadata_props[BITS_KEY] = str(held)
