"""The HTML page of an evaluation: well-formed and complete."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from coco_cases import SIZE_HW, make_case
from PIL import Image

from maskrcnn.runtime.evaluation.differences import difference
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.protocol import KINDS
from maskrcnn.runtime.evaluation.report import report_page
from maskrcnn.runtime.evaluation.scoring import f1_curve, score_entries

VOID = {"meta", "img"}
SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """The texts, cells and images of a page; fails where elements do not close in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.images, self.cells = [], "", 0, []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.images += tag == "img"
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data
        elif "style" not in self.open:
            self.text += data + "\n"


def cells_after(page, name, count):
    start = page.cells.index(name)
    return page.cells[start + 1 : start + 1 + count]


@pytest.fixture
def case(tmp_path):
    content, results = make_case(17, images=6, kind="segm")
    rng = np.random.default_rng(0)
    for image in content["images"]:
        Image.fromarray(rng.integers(0, 255, (*SIZE_HW, 3), dtype=np.uint8)).save(tmp_path / image["file_name"])
    truth = GroundTruth.of_content(content, "gt")
    return truth, results, lambda image_id: tmp_path / f"{image_id}.png"


def test_everything_is_on_the_page(case):
    truth, results, image_file = case
    scored = {"segm": score_entries(truth, results, "segm")}
    other = score_entries(truth, results[::2], "segm")
    compared = {"segm": difference(scored["segm"], other, min_score=0.3, resamples=20)}
    html = report_page(
        "a <model>",
        ["a & b"],
        scored,
        differences=compared,
        image_file=image_file,
        min_score=0.3,
        worst=4,
        resamples=20,
    )
    page = Page(html)
    assert "a <model>" in page.text and "a & b" in page.text
    assert page.images == 8
    assert "<script src" not in html and 'src="http' not in html and "@import" not in html
    for link in re.findall(r'<a href="#([^"]+)"', html):
        assert html.count(f'id="{link}"') == 1
    assert f"{truth.file_name(int(truth.image_ids[0]))} (id {truth.image_ids[0]})" in page.text or page.images == 8
    metrics = scored["segm"].metrics
    assert cells_after(page, "AP_small", 1) == [f"{metrics['AP_small']:.4f}"]
    name, values = next(iter(scored["segm"].by_class().items()))
    assert cells_after(page, name, 2) == [str(values["objects"]), f"{values['AP']:.4f}"]
    assert f"AP difference {compared['segm'].interval}" in page.text
    assert "Confusions" in page.text and "no object" in page.cells
    plots = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    legends = [[text.text for text in ElementTree.fromstring(plot).iter(f"{SVG}text")] for plot in plots]
    assert len(plots) == 3
    threshold, *_ = f1_curve(scored["segm"].records).best()
    assert f"{threshold:.2f}" in page.text and {"F1", f"recommended, {threshold:.2f}"} <= set(legends[2])
    assert {"IoU 0.5", "IoU 0.75", "IoU 0.5 to 0.95", "recall", "precision"} <= set(legends[0])
    assert set(truth.category_names) <= set(legends[1])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_page_with_images(kind, tmp_path):
    content, results = make_case(23, kind=kind)
    for image in content["images"]:
        Image.new("RGB", SIZE_HW[::-1]).save(tmp_path / image["file_name"])
    scored = score_entries(GroundTruth.of_content(content, "gt"), results, kind)
    page = Page(
        report_page("m", [], {kind: scored}, image_file=lambda i: tmp_path / f"{i}.png", min_score=0.2, resamples=5)
    )
    assert page.images >= 2
    assert "AP_medium" in page.cells and ("AP_small" in page.cells) == (kind != "keypoints")


def test_an_image_that_cannot_be_shown_has_its_reason(case, tmp_path):
    truth, results, image_file = case
    ids = truth.image_ids.tolist()
    image_file(ids[0]).unlink()
    Image.new("RGB", (9, 70)).save(image_file(ids[1]))
    scored = {"segm": score_entries(truth, results, "segm")}
    page = Page(report_page("m", [], scored, image_file=image_file, min_score=0.0, worst=99, resamples=5))
    assert f"{ids[0]}.png does not exist" in page.text
    assert "9×70 pixels" in page.text


def test_without_objects_or_detections():
    content, results = make_case(3, kind="bbox")
    for annotations, found in (([], results), ([], []), (content["annotations"], [])):
        truth = GroundTruth.of_content({**content, "annotations": annotations}, "gt")
        page = Page(report_page("m", [], {"bbox": score_entries(truth, found, "bbox")}, resamples=5))
        assert page.images == 0 and "Metrics" in page.text


def test_of_many_classes_those_with_most_errors_are_shown():
    names = [f"class {k:02}" for k in range(60)]
    content = {
        "images": [{"id": 1, "height": 120, "width": 150}],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names)],
        "annotations": [
            {"id": 1 + k, "image_id": 1, "category_id": k, "bbox": [k, 0, 40, 40], "area": 1600, "iscrowd": 0}
            for k in range(60)
        ],
    }
    # The first 30 are found, the others missed.
    results = [{"image_id": 1, "category_id": k, "bbox": [k, 0, 40, 40], "score": 0.9} for k in range(30)]
    page = Page(
        report_page(
            "m", [], {"bbox": score_entries(GroundTruth.of_content(content, "gt"), results, "bbox")}, resamples=5
        )
    )
    head = page.cells.index("annotated \\ detected")
    assert page.cells[head + 1 : head + 42] == [*names[:10], *names[30:], "missed"]
    assert "Only the 40 classes with the most errors" in page.text
