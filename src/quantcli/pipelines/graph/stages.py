"""In which steps a graph is calibrated: which Hessians are in memory together, and what is kept between two steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantcli.graphs.calibration.moment_stages import hessian_bytes, levels_of, stages_of
from quantcli.graphs.model.files import Graph
from quantcli.graphs.walk.matrices import GraphTarget
from quantcli.graphs.walk.partition import crossing_bytes, parts_of
from quantcli.options import QuantizeOptions

__all__ = ["Room", "Stages", "plan_stages"]

_HESSIANS, _KEPT = 64 << 20, 2 << 30  # more Hessians at a time save nothing: a step costs a session


@dataclass(frozen=True)
class Room:
    """What calibration may hold in memory."""

    hessian_bytes: int = _HESSIANS
    """Hessians of one step; a single one that takes more is a step of its own."""
    kept_bytes: int = _KEPT
    """Tensors between two steps; the rest lies on disk."""

    @classmethod
    def of(cls, options: QuantizeOptions) -> "Room":
        """Half of --max-memory for Hessians, a quarter for tensors between steps."""
        if options.max_memory is None:
            return cls()
        return cls(options.max_memory // 2, options.max_memory // 4)


@dataclass(frozen=True)
class Stages:
    """The steps."""

    names: tuple[tuple[str, ...], ...]
    """Tensors whose Hessians are gathered in each."""
    widths: dict[str, int]
    """K of each tensor."""
    copies: int
    """Matrices of each: one, twice that with held-out batches, twice where cross moments are gathered too."""
    layer_wise: bool
    """Whether the graph runs twice, float and quantized."""
    kept_bytes: int | None
    """Estimate of the most that is kept between two steps for the tokens of the run, both runs together."""

    @property
    def total_bytes(self) -> int:
        """Of all Hessians, were they in memory at once."""
        return hessian_bytes(self.widths.values(), self.copies)

    @property
    def peak_bytes(self) -> int:
        """Of those of the largest step."""
        return max((hessian_bytes([self.widths[n] for n in stage], self.copies) for stage in self.names), default=0)

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "hessians": len(self.widths),
            "hessian_bytes": self.total_bytes,
            "steps": len(self.names),
            "step_hessian_bytes": self.peak_bytes,
            "kept_bytes": self.kept_bytes,
        }

    def describe(self, room: Room) -> str:
        """For people."""
        count, steps = len(self.widths), len(self.names)
        said = f"{count} Hessians, {_size(self.total_bytes)}"
        if steps > 1:
            said += f", in {steps} steps of at most {_size(self.peak_bytes)}"
        said += "; each node runs " + ("twice" if self.layer_wise and steps > 1 else "once") + " per batch"
        if self.kept_bytes is not None and steps > 1:
            where = "in memory" if self.kept_bytes <= room.kept_bytes else f"{_size(room.kept_bytes)} of it in memory"
            said += f"; about {_size(self.kept_bytes)} kept between steps, {where}"
        return said


def plan_stages(
    graph: Graph,
    found: Sequence[GraphTarget],
    room: Room,
    *,
    layer_wise: bool = False,
    held_out: bool = False,
    tokens: int | None = None,
) -> Stages:
    """Decides the steps.

    Args:
        graph: As `walk.prepare` left it.
        found: The matrices.
        room: What may be held.
        layer_wise: Whether matrices that read what others make come in later steps than those.
        held_out: Whether some batches only judge.
        tokens: Calibration tokens of all batches, where they are known.
    """
    widths = {name: t.columns for t in found for name in t.inputs}
    levels = levels_of(graph, found) if layer_wise else [list(widths)]
    copies = (2 if held_out else 1) * (2 if layer_wise else 1)
    names = tuple(
        tuple(stage)
        for level in levels
        for stage in stages_of({name: widths[name] for name in level}, room.hessian_bytes, copies)
    )
    kept = crossing_bytes(parts_of(graph, names), tokens) if tokens is not None else None
    if kept is not None and layer_wise:
        kept *= 2
    return Stages(names, widths, copies, layer_wise, kept)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"
