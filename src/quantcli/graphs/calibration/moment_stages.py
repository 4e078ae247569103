"""Which second moments are gathered together: as many as memory takes, none before what it is made of is settled."""

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from quantcli.graphs.walk.matrices import GraphTarget
from quantcli.graphs.walk.partition import reads_of

__all__ = ["hessian_bytes", "levels_of", "stages_of"]


def stages_of(widths: Mapping[str, int], memory_bytes: int, copies: int = 2) -> list[list[str]]:
    """Cuts tensors into runs whose Hessians fit into memory together, in the order given.

    Args:
        widths: K of each tensor.
        memory_bytes: What Hessians may take; one that alone takes more is a run of its own.
        copies: Matrices of each tensor: one, twice that where some batches are held out, twice where there are cross
            moments.
    """
    stages: list[list[str]] = []
    left = 0
    for name, width in widths.items():
        needed = hessian_bytes([width], copies)
        if not stages or needed > left:
            stages.append([])
            left = memory_bytes
        stages[-1].append(name)
        left -= needed
    return stages


def hessian_bytes(widths: Iterable[int], copies: int = 2) -> int:
    """What Hessians of tensors with K columns take, float32."""
    return sum(4 * copies * width * width for width in widths)


def levels_of(graph: ir.Graph, targets: Sequence[GraphTarget]) -> list[list[str]]:
    """The tensors that targets are multiplied with, by how many targets the longest way to them goes through."""
    products = {use.node for target in targets for use in target.uses}
    behind: dict[ir.Value, int] = {}
    for node in graph:
        most = max((behind.get(value, 0) for value in reads_of(node)), default=0)
        for value in node.outputs:
            behind[value] = most + (node in products)
    names: dict[int, list[str]] = {}
    for node in (n for n in graph if n in products and n.op_type in ("MatMul", "Gemm")):
        read = node.inputs[0]
        assert read is not None
        known = names.setdefault(behind.get(read, 0), [])
        if str(read.name) not in known:
            known.append(str(read.name))
    return [names[level] for level in sorted(names)]
