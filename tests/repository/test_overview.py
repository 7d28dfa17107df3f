"""docs/overview: each box of the diagram is a module that exists, and no module of the model is missing."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawing():
    return ElementTree.parse(DOCS / "overview.svg").getroot()


@pytest.fixture(scope="module")
def boxes(drawing):
    """Link -> the box's element."""
    found = {link.get("href"): link for link in drawing.iter(f"{SVG}a")}
    assert len(found) == len(list(drawing.iter(f"{SVG}a"))) > 30
    return found


def test_each_box_is_a_module_that_exists(boxes):
    for href, box in boxes.items():
        assert (DOCS / href).is_file(), href
        name, text = (element.text for element in box.iter(f"{SVG}text"))
        assert Path(href).name == name and len(text) > 3


def test_no_module_of_the_model_is_missing(boxes):
    named = {(DOCS / href).resolve() for href in boxes}
    model = DOCS.parent / "maskrcnn" / "model"
    assert {path.resolve() for path in model.glob("*.py") if path.name != "__init__.py"} <= named
    for folder in ("training", "data"):
        assert any(path.parent.name == folder for path in named)


def test_the_page_has_the_same_modules_with_the_same_words(boxes):
    rows = re.findall(r"^\| \[([\w.]+)\]\(([^)]+)\) \| (.+) \|$", (DOCS / "overview.md").read_text(), re.MULTILINE)
    words = {href: tuple(element.text for element in box.iter(f"{SVG}text")) for href, box in boxes.items()}
    assert {href: (name, text) for name, href, text in rows} == words


def test_boxes_lie_in_the_picture_apart_from_each_other(drawing, boxes):
    width, height = (float(value) for value in drawing.get("viewBox").split()[2:])
    frames = []
    for box in boxes.values():
        rect = box.find(f"{SVG}rect")
        x, y, w, h = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
        assert min(x, y) >= 0 and x + w <= width and y + h <= height
        assert all(len(element.text) * 6.5 < w for element in box.iter(f"{SVG}text")), "words outside their box"
        frames.append((x, y, x + w, y + h))
    for k, (x0, y0, x1, y1) in enumerate(frames):
        for a0, b0, a1, b1 in frames[:k]:
            assert x1 <= a0 or a1 <= x0 or y1 <= b0 or b1 <= y0


def test_light_and_dark_have_a_colour_for_everything(drawing):
    style = drawing.find(f"{SVG}style").text
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    used = {name for element in drawing.iter() for name in (element.get("class") or "").split()}
    for name in used:
        assert f".{name}" in light and f".{name}" in dark, name
