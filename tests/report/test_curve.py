"""The picture of a training: well-formed SVG whose points stand where their values say."""

from xml.etree import ElementTree

import pytest

from quantcli.report.curve import Series, draw_curves

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*series):
    return ElementTree.fromstring(draw_curves("a < b & c", "step", series))


def places(root, number=0):
    line = root.findall(f"{SVG}polyline")[number]
    return [tuple(map(float, p.split(","))) for p in line.get("points").split()]


def test_points_stand_where_their_values_say():
    root = drawn(Series("loss", [(1, 4.0), (2, 3.0), (3, 0.0)]), Series("eval loss", [(2, 2.0)], marked=True))
    (x1, y1), (x2, y2), (x3, y3) = places(root)
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert (y3 - y2) == pytest.approx(3 * (y2 - y1), abs=0.3)  # downwards is less
    assert y1 < y2 < y3
    assert places(root, 1) == [(x2, pytest.approx((y1 + y3) / 2, abs=0.2))]
    assert len(root.findall(f"{SVG}circle")) == 1
    box = [float(v) for v in root.get("viewBox").split()]
    assert all(0 < x < box[2] and 0 < y < box[3] for x, y in places(root))


def test_words_are_escaped_and_all_series_named():
    root = drawn(Series("training", [(1, 1.0), (2, 2.0)]), Series("held out", [(1, 1.5), (2, 1.5)]), Series("none", []))
    words = [t.text for t in root.iter(f"{SVG}text")]
    assert {"a < b & c", "step", "training", "held out"} <= {*words}
    assert "none" not in words


@pytest.mark.parametrize("values", [[0.7], [0.7, 0.7, 0.7], [1e-9, 2e-9], [-3e6, 5e6]])
def test_any_range_has_ticks_within_it(values):
    root = drawn(Series("loss", list(enumerate(values))))
    ticks = [float(t.text) for t in root.iter(f"{SVG}text") if t.get("text-anchor") == "end"]
    assert len(ticks) >= 2
    assert ticks == sorted(ticks)


@pytest.mark.parametrize("series", [[], [Series("loss", [])], [Series("loss", [(1, float("nan"))])]])
def test_nothing_to_draw(series):
    with pytest.raises(ValueError, match="finite points"):
        draw_curves("t", "step", series)
