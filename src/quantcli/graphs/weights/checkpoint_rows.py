"""A weight that is not in memory, only named: exporters cut, join and transpose it, and we see what they did.

The GenAI model builder walks a model and reshapes its weights (q, k and v joined, Phi-3's qkv cut in three). Given
`Rows` instead of numbers, every weight of the finished graph still says which rows of which tensor it holds, and the
numbers are read from the checkpoint when the file is written, one tensor at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantcli.graphs.weights.rows import RowRange

__all__ = ["Rows"]

aten = torch.ops.aten
_UNCHANGED = (
    aten.detach.default,
    aten.alias.default,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh.default,
)
_TRANSPOSED = (aten.t.default, aten.numpy_T.default)
_RESHAPED = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


class Rows(Tensor):
    """Rows [N, K] of named matrices, or their transpose [K, N]; float32 by name only."""

    ranges: tuple[RowRange, ...]
    columns: int
    transposed: bool

    @staticmethod
    def __new__(cls, ranges: Sequence[RowRange], columns: int, transposed: bool = False) -> "Rows":
        """Joined rows of matrices that have K = `columns`."""
        count = sum(r.stop - r.start for r in ranges)
        shape = (columns, count) if transposed else (count, columns)
        out = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=torch.device("cpu"))
        out.ranges, out.columns, out.transposed = tuple(ranges), columns, transposed
        return out

    def __init__(self, ranges: Sequence[RowRange], columns: int, transposed: bool = False):
        """All is done in `__new__`."""

    @classmethod
    def whole(cls, name: str, rows: int, columns: int) -> "Rows":
        """All rows of one matrix."""
        return cls([RowRange(name, 0, rows)], columns)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Rows({self.ranges}, columns={self.columns}, transposed={self.transposed})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten.cat.default:
            return _join(args[0], args[1] if len(args) > 1 else 0)
        self = args[0]
        if not isinstance(self, Rows):
            raise TypeError(f"{func} on a weight that is only named")
        if func in _UNCHANGED:
            return cls(self.ranges, self.columns, self.transposed)
        if func in _TRANSPOSED:
            return cls(self.ranges, self.columns, not self.transposed)
        if func in (aten.transpose.int, aten.permute.default):
            axes = args[1] if func is aten.permute.default else args[1:3]
            swaps = (axes[0] % 2 == 1) if func is aten.permute.default else (axes[0] % 2 != axes[1] % 2)
            return cls(self.ranges, self.columns, self.transposed != swaps)
        if func in _RESHAPED and _same_shape(self, args[1]):
            return cls(self.ranges, self.columns, self.transposed)
        if func is aten.slice.Tensor:
            return _cut(self, *args[1:])
        if func in (aten.split.Tensor, aten.split_with_sizes.default):
            return _split(self, args[1], args[2] if len(args) > 2 else 0)
        raise TypeError(f"{func} on a weight that is only named")


def _same_shape(rows: Rows, shape: Sequence[int]) -> bool:
    known = [n for n in shape if n != -1]
    return len(shape) == 2 and all(a in (-1, b) for a, b in zip(shape, rows.shape, strict=True)) and len(known) > 0


def _join(tensors: Sequence[Tensor], axis: int) -> Rows:
    parts = [t for t in tensors if isinstance(t, Rows)]
    if len(parts) != len(tensors) or len({(p.columns, p.transposed) for p in parts}) != 1:
        raise TypeError("weights that are only named can be joined with their like only")
    if (axis % 2 == 1) != parts[0].transposed:
        raise TypeError("weights that are only named can be joined along their rows only")
    return Rows([r for p in parts for r in p.ranges], parts[0].columns, parts[0].transposed)


def _cut(rows: Rows, axis: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Rows:
    begin, end, stride = slice(start, stop, step).indices(rows.shape[axis])
    if (begin, end, stride) == (0, rows.shape[axis], 1):
        return Rows(rows.ranges, rows.columns, rows.transposed)
    if (axis % 2 == 1) != rows.transposed or stride != 1:
        raise TypeError("weights that are only named can be cut along their rows only")
    kept, at = [], 0
    for part in rows.ranges:
        length = part.stop - part.start
        low, high = max(begin - at, 0), min(end - at, length)
        if low < high:
            kept.append(RowRange(part.name, part.start + low, part.start + high))
        at += length
    return Rows(kept, rows.columns, rows.transposed)


def _split(rows: Rows, sizes: int | Sequence[int], axis: int) -> tuple[Rows, ...]:
    length = rows.shape[axis]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - at) for at in range(0, length, sizes)]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(_cut(rows, axis, at, at + size) for at, size in zip(starts, sizes, strict=True))
