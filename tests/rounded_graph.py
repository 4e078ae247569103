"""A graph with its tensors rounded by the letter: the least that any method has to reach.

A grid spans a tensor's range on the calibration inputs; of weights alone, the range of each group of a product's
weight, with a scale in float16. It has one bit less than the method's, and lies in two ways, the worse of which counts:
a Softmax, or a product of products, makes much of how each number happens to fall.
"""

import numpy as np

from graph_scope import Step
from graph_strategy import Case, sqnr_db

__all__ = ["reached_db"]

SHIFTS = (0.0, 0.5)
"""Of the grid, in steps."""
WEIGHTS = ("MatMul", "Gemm")


def reached_db(case: Case, bits: int, group: int | None) -> dict[str, float]:
    """The SQNR that each output keeps.

    Args:
        case: A graph whose steps are known.
        bits: Of a code.
        group: Rows of a weight that share a grid; None where whole tensors do, activations too.
    """
    ranges = _ranges(case)
    found: dict[str, float] = {}
    for shift in SHIFTS:
        rounding = _Rounding(ranges, bits - 1, group, shift)
        outputs: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
        for feed in case.judged:
            exact, near = case.trace(feed, lambda _step, _name, array: array), case.trace(feed, rounding.read)
            for output in case.session.get_outputs():
                both = outputs.setdefault(output.name, ([], []))
                both[0].append(exact[output.name].ravel())
                both[1].append(rounding.read(None, output.name, near[output.name]).ravel())
        for name, (wanted, got) in outputs.items():
            a, b = np.concatenate(wanted), np.concatenate(got)
            db = sqnr_db(a, b) if a.shape == b.shape and np.isfinite(b).all() else -np.inf
            found[name] = min(db, found.get(name, np.inf))
    return found


def _ranges(case: Case) -> dict[str, tuple[float, float]]:
    ranges: dict[str, tuple[float, float]] = {}
    for feed in case.calibration:
        for name, array in case.trace(feed, lambda _step, _name, array: array).items():
            if array.dtype.kind == "f" and array.size:
                low, high = ranges.get(name, (0.0, 0.0))
                ranges[name] = min(low, float(array.min())), max(high, float(array.max()))
    return ranges


class _Rounding:
    """What a node reads instead."""

    def __init__(self, ranges: dict[str, tuple[float, float]], bits: int, group: int | None, shift: float):
        self.ranges, self.bits, self.group, self.shift = ranges, bits, group, shift

    def read(self, step: Step | None, name: str, array: np.ndarray) -> np.ndarray:
        is_size = step is not None and step.node.op_type in ("Resize", "Upsample") and step.reads[0] != name
        if array.dtype.kind != "f" or name not in self.ranges or is_size:
            return array
        if self.group is None:
            low, high = self.ranges[name]
            size = (high - low) / (2**self.bits - 1)
            mask = not 0 < size < 1e30  # or nothing but zeros
            return array if mask else self._on_grid(np.clip(array.astype(np.float64), low, high), size, array.dtype)
        is_weight = step is not None and step.node.op_type in WEIGHTS and step.node.inputs[1].name == name
        return self._in_groups(step, array, self.group) if is_weight and array.ndim == 2 else array

    def _on_grid(self, array: np.ndarray, size: float, dtype: np.dtype) -> np.ndarray:
        return np.asarray((np.round(array / size + self.shift) - self.shift) * size, dtype)

    def _in_groups(self, step: Step, array: np.ndarray, group: int) -> np.ndarray:
        across = "transB" in step.node.attributes and step.node.attributes["transB"].as_int()
        rows = array.T.copy() if across else array.copy()
        for start in range(0, len(rows), group):
            for column in range(rows.shape[1]):
                part = rows[start : start + group, column]
                low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
                scale = float(np.float16((high - low) / (2 ** (self.bits + 1) - 1)))  # as the file holds it
                if high > low and np.isfinite(scale):
                    part[...] = self._on_grid(part.astype(np.float64), 2 * max(scale, 2.0**-24), part.dtype)
        return rows.T if across else rows
