"""Trials of a search as a picture: what each costs against how good it is, the front drawn through."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Spot", "draw_front"]


@dataclass(frozen=True)
class Spot:
    """One trial."""

    cost: float
    """Along the horizontal axis."""
    quality: float
    """Along the vertical axis."""
    label: str
    """What stands beside it."""
    on_front: bool = False
    """Whether the line goes through it."""
    best: bool = False
    """Whether it was kept."""


def draw_front(spots: Sequence[Spot], title: str, x_label: str, y_label: str, folder: Path) -> list[Path]:
    """Writes pareto.svg and pareto.png.

    Args:
        spots: At least one; figures are finite.
        title: What stands above.
        x_label: Of the costs.
        y_label: Of the qualities; drawn by their logarithm where they span more than tenfold and are above 0.
        folder: Where to write.

    Returns:
        The files.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    others = [s for s in spots if not s.on_front]
    front = sorted((s for s in spots if s.on_front), key=lambda s: s.cost)
    if others:
        axes.scatter([s.cost for s in others], [s.quality for s in others], color="#9a9a9a", s=20, label="trials")
    axes.plot([s.cost for s in front], [s.quality for s in front], "o-", color="#4878a8", label="front")
    for spot in spots:
        if spot.best:
            axes.scatter([spot.cost], [spot.quality], marker="*", s=180, color="#d1603d", zorder=3, label="kept")
    for spot in front:
        axes.annotate(spot.label, (spot.cost, spot.quality), xytext=(5, 5), textcoords="offset points", fontsize=7)
    values = [s.quality for s in spots]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    files = [folder / "pareto.svg", folder / "pareto.png"]
    figure.savefig(files[0], metadata={"Date": None})
    figure.savefig(files[1], dpi=120)
    return files
