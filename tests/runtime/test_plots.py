"""Charts: every point is where its value says, and the SVG holds the texts."""

import re
import sys
from xml.etree import ElementTree

import pytest

from maskrcnn.errors import UserError
from maskrcnn.runtime.plots import line_chart

SVG = "{http://www.w3.org/2000/svg}"


def markers(svg: str) -> list[tuple[float, float]]:
    """Pixels of the points of the first series."""
    root = ElementTree.fromstring(svg)
    series = next(group for group in root.iter(f"{SVG}g") if group.find(f"{SVG}title") is not None)
    return [(float(use.get("x")), float(use.get("y"))) for use in series.iter(f"{SVG}use")]


def texts(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_larger_values_lie_further_right_and_higher():
    (x1, y1), (x2, y2), (x4, y4) = markers(line_chart("t", "x", "y", {"a": [(1, 10), (2, 20), (4, 15)]}))
    assert x4 - x2 == pytest.approx(2 * (x2 - x1), abs=0.01)
    assert y1 - y2 == pytest.approx(2 * (y1 - y4), abs=0.01) and y2 < y4 < y1


def test_a_logarithmic_axis_spaces_by_factor_and_has_plain_numbers():
    svg = line_chart("t", "x", "y", {"a": [(1, 1), (10, 1), (100, 1)]}, log_x=True)
    (x1, _), (x10, _), (x100, _) = markers(svg)
    assert x10 - x1 == pytest.approx(x100 - x10, abs=0.01)
    assert {"1", "2", "5", "10", "20", "50", "100"} <= set(texts(svg))


def test_names_at_points_do_not_overlap_and_a_small_range_does_not_fill_the_axis():
    series = {f"contender {k}": [(10 + 0.01 * k, 0.5 + 0.0001 * k)] for k in range(6)}
    svg = line_chart("t", "x", "y", series, y_span=0.02, labels_at_points=True)
    labels = [e for e in ElementTree.fromstring(svg).iter(f"{SVG}text") if (e.text or "").startswith("contender")]
    assert len(labels) == 6
    numbers = (re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", e.get("transform", "")) or e for e in labels)
    places = [
        (float(n.get("x")), float(n.get("y"))) if isinstance(n, ElementTree.Element) else tuple(map(float, n.groups()))
        for n in numbers
    ]
    assert all(abs(a[1] - b[1]) > 7 or abs(a[0] - b[0]) > 40 for k, a in enumerate(places) for b in places[:k])
    ticks = [float(t) for t in texts(svg) if t and re.fullmatch(r"0\.\d+", t)]
    assert max(ticks) - min(ticks) >= 0.015


def test_points_that_cannot_be_drawn_are_left_out_and_names_are_escaped():
    series = {"<one> $x$": [(0, 1), (1, float("nan")), (2, 3)], "nowhere": [(-1, 1)]}
    svg = line_chart("a < b", "x", "y", series, log_x=True)
    assert len(markers(svg)) == 1
    assert {"a < b", "x", "y", "<one> $x$"} <= set(texts(svg)) and "nowhere" not in svg
    (tooltip,) = (title.text for title in ElementTree.fromstring(svg).iter(f"{SVG}title"))
    assert tooltip == "<one> $x$\n2, 3"
    with pytest.raises(ValueError, match="without a point"):
        line_chart("t", "x", "y", {"a": [(float("inf"), 1)]})


def test_an_svg_is_reproducible_and_can_stand_in_a_page():
    first, second = (line_chart("t", "x", "y", {"a": [(1, 2), (3, 4)]}, markers=False) for _ in range(2))
    assert first == second and first.startswith("<svg") and "http" not in re.sub(r"http://www\.w3\.org\S+", "", first)


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="no Python package matplotlib"):
        line_chart("t", "x", "y", {"a": [(1, 2)]})
