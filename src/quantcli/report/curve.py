"""Losses over steps as an SVG picture, which every browser shows and no package draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

__all__ = ["Series", "draw_curves"]

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 48
_GREY, _COLOURS = "#666666", ("#4878a8", "#d1603d", "#3d8a4e", "#8a5ca8")
_TICKS = 5


@dataclass(frozen=True)
class Series:
    """One line of a picture."""

    label: str
    """What the legend calls it."""
    points: Sequence[tuple[float, float]]
    """Its x and y, in order of x."""
    marked: bool = False
    """Whether each point is drawn, as for values that were measured now and then."""


def draw_curves(title: str, x_label: str, series: Sequence[Series]) -> str:
    """Draws lines over shared axes.

    Args:
        title: What stands above.
        x_label: What the horizontal axis counts.
        series: At most four; those without points are left out. Values are finite.

    Returns:
        The text of an SVG file.

    Raises:
        ValueError: no point, too many series, or a value that is not finite.
    """
    series = [s for s in series if s.points]
    values = [value for s in series for point in s.points for value in point]
    if not series or len(series) > len(_COLOURS) or not all(map(math.isfinite, values)):
        raise ValueError("a picture takes one to four series of finite points")
    xs, ys = ([point[axis] for s in series for point in s.points] for axis in (0, 1))
    across = _Axis(*_range(xs), _LEFT, _WIDTH - _RIGHT)
    up = _Axis(*_range(ys), _HEIGHT - _BOTTOM, _TOP)
    root = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {_WIDTH} {_HEIGHT}",
            "width": str(_WIDTH),
            "height": str(_HEIGHT),
            "font-family": "sans-serif",
            "font-size": "12",
        },
    )
    SubElement(root, "title").text = title
    SubElement(root, "rect", {"width": "100%", "height": "100%", "fill": "white"})
    _text(root, _WIDTH / 2, 20, title, "middle", "#222222")
    for value in _ticks(up.low, up.high):
        y = up.place(value)
        _line(root, _LEFT, y, _WIDTH - _RIGHT, y, "#dddddd")
        _text(root, _LEFT - 6, y + 4, f"{value:g}", "end")
    for value in _ticks(across.low, across.high):
        _text(root, across.place(value), _HEIGHT - _BOTTOM + 18, f"{value:g}", "middle")
    _line(root, _LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, _GREY)
    _text(root, (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, x_label, "middle")
    for number, (one, colour) in enumerate(zip(series, _COLOURS, strict=False)):
        places = [(across.place(x), up.place(y)) for x, y in one.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        SubElement(root, "polyline", {"points": path, "fill": "none", "stroke": colour, "stroke-width": "1.5"})
        if one.marked or len(places) == 1:
            for x, y in places:
                SubElement(root, "circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "3", "fill": colour})
        row = _TOP + 14 + 16 * number
        _line(root, _WIDTH - 190, row - 4, _WIDTH - 170, row - 4, colour, 2)
        _text(root, _WIDTH - 164, row, one.label, "start")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


@dataclass(frozen=True)
class _Axis:
    """From values to places on the picture."""

    low: float
    high: float
    first: float
    last: float

    def place(self, value: float) -> float:
        return self.first + (self.last - self.first) * (value - self.low) / (self.high - self.low)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value, apart where all are one."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    raw = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.ceil(low / step)
    return [round(step * i, 12) for i in range(first, math.floor(high / step) + 1)]


def _line(parent: Element, x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> None:
    ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    SubElement(parent, "line", {**ends, "stroke": colour, "stroke-width": f"{width:g}"})


def _text(parent: Element, x: float, y: float, words: str, anchor: str, colour: str = _GREY) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "fill": colour}
    SubElement(parent, "text", place).text = words
