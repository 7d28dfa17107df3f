"""The HTML reports of evaluation, verification and benchmark in a real browser: wide and narrow, light and dark."""

import numpy as np
import pytest
from coco_cases import SIZE_HW, make_case
from measure import PARTS, Measurement
from PIL import Image
from report import write_report
from workloads import Workload

from maskrcnn.imaging.postprocess import Detections
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.evaluation.differences import difference
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.report import report_page
from maskrcnn.runtime.evaluation.scoring import score_entries
from maskrcnn.runtime.verification.report import Evidence, VerifyReport, html_page, judged
from maskrcnn.runtime.verification.stage_errors import StageError
from maskrcnn.runtime.verification.tolerances import Limit

LONG = "a_rather_long_name_without_any_space_in_it_as_hashes_and_runs_have_them"


def evaluation(folder):
    content, results = make_case(17, images=6, kind="segm")
    rng = np.random.default_rng(0)
    for image in content["images"]:
        Image.fromarray(rng.integers(0, 255, (*SIZE_HW, 3), dtype=np.uint8)).save(folder / image["file_name"])
    for category in content["categories"]:
        category["name"] += f"_{LONG}"
    truth = GroundTruth.of_content(content, "gt")
    scored = {"segm": score_entries(truth, results, "segm")}
    other = score_entries(truth, results[::2], "segm")
    return report_page(
        f"{LONG}.onnx",
        [f"data {folder}"],
        scored,
        differences={"segm": difference(scored["segm"], other, min_score=0.3, resamples=20)},
        image_file=lambda image_id: folder / f"{image_id}.png",
        min_score=0.1,
        resamples=5,
    )


def verification(folder):
    errors = {"images": (0.0, 0.0), "P2": (0.001, 0.002), "box_features": (0.5, 3.0), "masks": None}
    stages = [
        judged(
            stage,
            [
                None if values is None else StageError(values=np.array([value]), compared=1)
                for value in values or (0, 0)
            ],
            Limit(0.01),
            (False, values is None),
        )
        for stage, values in errors.items()
    ]
    boxes = np.array([[10, 10, 60, 50]], np.float32)
    found = Detections(boxes, np.array([0.9], np.float32), np.array([1]), None, (90, 120))
    image = np.full((90, 120, 3), 128, np.uint8)
    maps = {level: np.full((9, 12), 0.1) for level in ("P2", "P3", "P4", "P5")}
    report = VerifyReport(
        models=("ONNX Runtime fp32", "OpenVINO fp16"),
        tolerances="exact",
        images=(f"{LONG}.jpg", "b.jpg"),
        stages=tuple(stages),
        notes=(f"a note about {LONG}",),
        worst=Evidence(f"{LONG}.jpg", image, (found, found), maps),
    )
    metadata = ModelMetadata(
        model="m", class_names=("leaf",), category_ids=(1,), preprocessing=Preprocessing(), detections=10
    )
    return html_page(report, (f"{LONG}.onnx", "b.xml"), metadata)


def benchmark(folder):
    rows = [
        Measurement(
            model=f"{LONG}.onnx",
            backend="ONNX Runtime",
            precision="fp32",
            size="800×1088",
            batch=1,
            status=status,
            reason=reason,
            peer="eager" if ms == 30.0 else "",
            samples=9,
            p50_ms=ms,
            p90_ms=ms,
            images_per_s=ms and 1000 / ms,
            box_ap=ms and 0.5,
            mask_ap=ms and 0.4,
            box_ap_difference=ms and 0.0,
            split_ms=ms and dict.fromkeys(PARTS, 1.0),
            host_mb=900.0,
            file_mb=170.5,
            latencies_ms=(ms,) * 5 if ms else (),
        )
        for ms, status, reason in ((9.0, "ok", ""), (30.0, "ok", ""), (100.0, "ok", ""), (None, "failed", f"no {LONG}"))
    ]
    facts = {"versions": {"torch": "2"}, "cpu": LONG, "cores": 2, "torch_threads": 2, "memory_gb": 8, "gpu": None}
    facts |= {"system": "Linux", "python": "3.12", "commit": None, "date": "today"}
    work = Workload(name=LONG, pools={"": []}, batches=(1,), repeat=5, dataset=None)
    write_report(folder, rows, work, facts)
    return (folder / "results.html").read_text(encoding="utf-8")


# The lowest contrast of a text with what is behind it, by WCAG 2.2, and that text; charts have their own background.
CONTRAST = """(() => {
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255)
  const numbers = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a] }
  const behind = element => {
    if (!element) return [255, 255, 255]
    const [r, g, b, a] = numbers(getComputedStyle(element).backgroundColor)
    return a === 1 ? [r, g, b] : behind(element.parentElement).map((v, k) => v + a * ([r, g, b][k] - v))
  }
  let lowest = [99, ""]
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, text = texts.currentNode.textContent.trim()
    if (!text || element.closest("svg, script, style")) continue
    const [a, b] = [light(numbers(getComputedStyle(element).color)), light(behind(element))]
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
    if (contrast < lowest[0]) lowest = [contrast, text]
  }
  return lowest
})()"""
# Whether each column of each table with several rows is sorted after a click, and reversed after another.
UNSORTED = """[...document.querySelectorAll("th")].filter(head => {
  const cells = () => [...head.closest("table").rows].slice(1).map(row => row.cells[head.cellIndex].textContent.trim())
  const before = cells()
  head.click()
  const once = cells()
  head.click()
  const twice = cells()
  const numeric = before.every(text => text === "" || !isNaN(parseFloat(text)))
  const number = text => text === "" || isNaN(parseFloat(text)) ? -Infinity : parseFloat(text)
  const rises = numeric ? (a, b) => number(a) <= number(b) : (a, b) => a.localeCompare(b) <= 0
  const ordered = (list, test) => list.every((text, k) => !k || test(list[k - 1], text))
  const [up, down] = numeric ? [twice, once] : [once, twice]
  const same = [...up].sort().join() === [...before].sort().join()
  return !same || !ordered(up, rises) || !ordered(down, (a, b) => rises(b, a))
}).map(head => head.textContent)"""


@pytest.mark.parametrize("make", [evaluation, verification, benchmark])
def test_a_report_is_readable_on_every_screen(browser, tmp_path, make):
    path = tmp_path / "report.html"
    path.write_text(make(tmp_path), encoding="utf-8")
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for width in (1280, 390):
            browser.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
            )
            browser.open("about:blank")
            browser.open(path.as_uri())
            assert browser.value("document.documentElement.scrollWidth") <= width, (scheme, width)
            assert browser.value("[...document.images].filter(image => !image.naturalWidth).length") == 0
            images = (
                "Math.max(0, ...[...document.querySelectorAll('img, svg')].map(e => e.getBoundingClientRect().right))"
            )
            assert browser.value(images) <= width
            contrast, text = browser.value(CONTRAST)
            assert contrast >= 4.5, (scheme, text, contrast)  # WCAG's level AA
            assert not browser.errors
    is_dark = browser.value("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert is_dark and browser.value("document.images.length + document.querySelectorAll('svg').length") > 0
    assert browser.value("document.querySelectorAll('th').length") > 5
    assert browser.value(UNSORTED) == []
    assert not browser.errors
