"""Charts: every point is where its value says."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from report import HEIGHT, WIDTH, Axis, Series, chart

SVG = "{http://www.w3.org/2000/svg}"


def circles(text: str) -> list[tuple[float, float, str]]:
    """Points with their labels, from left to right; those of the list of names have none."""
    root = ElementTree.fromstring(text)
    found = [(float(c.get("cx")), float(c.get("cy")), c.find(f"{SVG}title")) for c in root.iter(f"{SVG}circle")]
    return sorted((x, y, label.text) for x, y, label in found if label is not None)


def test_larger_values_lie_further_right_and_higher():
    text = chart("t", Axis("x"), Axis("y"), [Series("a", [(1, 10), (2, 20), (4, 15)])])
    points = circles(text)
    assert [label for *_, label in points] == ["a: 1, 10", "a: 2, 20", "a: 4, 15"]
    (x1, y1, _), (x2, y2, _), (x4, y4, _) = points
    assert x4 - x2 == pytest.approx(2 * (x2 - x1), abs=0.3)
    assert y1 - y2 == pytest.approx(2 * (y1 - y4), abs=0.3) and y2 < y4 < y1
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y, _ in points)


def test_a_logarithmic_axis_spaces_by_factor():
    points = circles(chart("t", Axis("x", logarithmic=True), Axis("y"), [Series("a", [(1, 1), (10, 1), (100, 1)])]))
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.3)


def test_what_cannot_be_shown_is_left_out_and_names_are_escaped():
    text = chart(
        "a < b",
        Axis("x", logarithmic=True),
        Axis("y"),
        [Series("<one>", [(0, 1), (1, float("nan")), (2, 3)]), Series("nowhere", [(-1, 1)])],
    )
    assert [label for *_, label in circles(text)] == ["<one>: 2, 3"]
    assert "nowhere" not in text and "a &lt; b" in text


def test_a_chart_without_points_is_refused():
    with pytest.raises(ValueError, match="without a point"):
        chart("t", Axis("x"), Axis("y"), [Series("a", [(float("inf"), 1)])])


@pytest.mark.parametrize("values", [(0.001, 0.002), (3, 1000), (0.6386, 0.6387), (5, 5), (0, 0)])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_ticks_are_round_and_inside(values, logarithmic):
    if logarithmic and values[0] <= 0:
        return
    text = chart("t", Axis("x", logarithmic=logarithmic), Axis("y"), [Series("a", [(v, 1) for v in values])])
    places = [float(x) for x in re.findall(r'<path d="M([\d.]+) \d+v5"', text)]
    assert places == sorted(places) and all(60 < x < WIDTH for x in places)
    assert len(places) <= 12
