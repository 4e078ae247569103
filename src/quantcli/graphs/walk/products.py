"""A graph that says which rows of which linear each of its products multiplies by: what adapters are fitted to.

Capture knows and writes it into the graph's metadata; the numbers themselves do not tell.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from quantcli.graphs.weights.matmul_nbits import Placement
from quantcli.graphs.weights.rows import RowRange
from quantcli.json_files import parse_json

__all__ = ["Product", "read_products", "record_products", "write_products"]

_KEY = "quantcli.products"


@dataclass(frozen=True)
class Product:
    """One node that multiplies by a weight, or by several joined (q, k and v)."""

    weight: str
    """Initializer of its codes or values."""
    ranges: tuple[RowRange, ...]
    """Linears of the checkpoint by module name, and which of their rows, in the order of the node's outputs."""
    width: int
    """Inputs of the linears, K."""

    @property
    def rows(self) -> int:
        """Outputs of the node, N."""
        return sum(r.stop - r.start for r in self.ranges)


@dataclass(frozen=True)
class _Entry:
    """A product as it is written."""

    weight: str
    width: int
    rows: list[tuple[str, int, int]]


def record_products(model: ir.Model, placements: Sequence[Placement], outside: Iterable[str]) -> None:
    """Writes down where the linears are, except those `outside` of the blocks (embedding and head)."""
    left_out = set(outside)
    kept = [p for p in placements if not left_out & {r.name for r in p.ranges}]
    write_products(model, [Product(p.weight, p.ranges, p.width) for p in kept])


def write_products(model: ir.Model, products: Iterable[Product]) -> None:
    """Writes down where the linears are."""
    entries = [
        {"weight": p.weight, "width": p.width, "rows": [[r.name, r.start, r.stop] for r in p.ranges]} for p in products
    ]
    model.metadata_props[_KEY] = json.dumps(entries)


def read_products(model: ir.Model) -> list[Product]:
    """What `write_products` wrote; nothing for graphs of others.

    Raises:
        InputError: it is damaged.
    """
    text = model.metadata_props.get(_KEY, "[]")
    entries = parse_json(text, list[_Entry], f"the graph's metadata {_KEY} are not ours", hint="capture it again")
    return [Product(e.weight, tuple(RowRange(*r) for r in e.rows), e.width) for e in entries]
