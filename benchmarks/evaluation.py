"""Speed of an evaluation's parts compared with torchvision and pycocotools: pasting, scoring and resampling.

    python benchmarks/evaluation.py [--images 200] [--detections 100] [--dataset 250,1000,5000] [--output FOLDER]

- Pasting: masks are pasted and encoded by us and by torchvision's `paste_masks_in_image` with pycocotools' encoder,
  interleaved image by image. The masks and their metrics are compared first. Peak memory is measured in separate
  processes.
- Scoring: simulated results, from a list of dictionaries to COCO's metrics, with pycocotools as in its own demo and
  with our scorer. All arrays of both are compared first. A chart shows the growth with the dataset.
- Resampling: the confidence interval of the difference of two results.

On a machine with other load, run it with OMP_NUM_THREADS=1: torchvision's pasting uses all cores, ours one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.metadata
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from resources import call_in_new_process, memory_growth_mb
from session import Progress, aligned, numbers
from timing import environment, machine, time_in_turns

from maskrcnn.files import atomic_path, write_json
from maskrcnn.imaging.paste import pasted_runs
from maskrcnn.imaging.postprocess import Detections, coco_results
from maskrcnn.imaging.run_lengths import strings_from_runs
from maskrcnn.runtime.evaluation.bootstrap import RESAMPLES, interval_of_difference
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.matching import match_records
from maskrcnn.runtime.evaluation.protocol import KINDS
from maskrcnn.runtime.evaluation.results_file import checked_results
from maskrcnn.runtime.evaluation.scoring import score_entries
from maskrcnn.runtime.plots import line_chart

_OBJECTS = 7.3  # per image on average, as in COCO's val2017
CLASSES, _CLASSES_PER_IMAGE = 80, 3
_NEAR = 0.4  # share of the detections near an object
_MIN_SIDE_PX = 8
_KEYPOINTS = 17
_SHAPES = 64
_SCHEMA = 1
SIZE_HW = (480, 640)
_METRIC_TOLERANCE = 1e-6
_PEAK_LIMIT_S = 900


def _blobs(rng: np.random.Generator, count: int) -> np.ndarray:
    """Masks `[count, 28, 28]` float32 like a mask head's: one smooth shape with a soft border each."""
    y, x = np.mgrid[0:28, 0:28] / 27 - 0.5
    angle, radius = np.arctan2(y, x), np.hypot(y, x)
    lobes, phase, size = rng.integers(2, 6, count), rng.uniform(0, 2 * np.pi, count), rng.uniform(0.3, 0.5, count)
    wave = 1 + 0.25 * np.sin(lobes[:, None, None] * angle + phase[:, None, None])
    return (1 / (1 + np.exp(40 * (radius - size[:, None, None] * wave)))).astype(np.float32)


def _boxes(rng: np.random.Generator, count: int, size_hw: tuple[int, int]) -> np.ndarray:
    """Boxes xyxy `[count, 4]` inside the image, with log-uniform sides."""
    sides = _MIN_SIDE_PX * np.exp(rng.random((count, 2)) * np.log(min(size_hw) / _MIN_SIDE_PX))
    corners = rng.random((count, 2)) * (np.array(size_hw[::-1]) - sides)
    return np.concatenate([corners, corners + sides], axis=1)


def detections(seed: int, count: int, size_hw: tuple[int, int]) -> Detections:
    """Draw random detections of one image."""
    rng = np.random.default_rng(seed)
    return Detections(
        _boxes(rng, count, size_hw).astype(np.float32),
        np.sort(rng.random(count, np.float32))[::-1].copy(),
        rng.integers(1, CLASSES + 1, count),
        _blobs(rng, count),
        size_hw,
    )


def simulated(
    images: int, detections_per_image: int, kind: str, size_hw: tuple[int, int], seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draw a dataset and results of one kind (bbox, segm or keypoints) that resemble COCO's.

    Returns:
        Content of an annotation file, and of a results file.
    """
    rng = np.random.default_rng((seed, images, detections_per_image))
    shapes = _blobs(rng, _SHAPES)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id in range(1, images + 1):
        objects, found = _image(rng, detections_per_image, kind, size_hw, shapes)
        annotations += [
            {**entry, "image_id": image_id, "id": len(annotations) + k} for k, entry in enumerate(objects, 1)
        ]
        results += [{**entry, "image_id": image_id} for entry in found]
    height, width = size_hw
    content = {
        "images": [{"id": k, "height": height, "width": width} for k in range(1, images + 1)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, _classes(kind) + 1)],
        "annotations": annotations,
    }
    return content, results


def _classes(kind: str) -> int:
    return 1 if kind == "keypoints" else CLASSES


def _image(
    rng: np.random.Generator, count: int, kind: str, size_hw: tuple[int, int], shapes: np.ndarray
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    number = int(rng.poisson(_OBJECTS))
    own = rng.integers(1, _classes(kind) + 1, _CLASSES_PER_IMAGE)
    true, classes, shape = _boxes(rng, number, size_hw), rng.choice(own, number), rng.integers(0, _SHAPES, number)
    found, found_classes = _boxes(rng, count, size_hw), rng.integers(1, _classes(kind) + 1, count)
    found_shape, score = rng.integers(0, _SHAPES, count), rng.random(count) ** 2
    near = np.flatnonzero(rng.random(count) < _NEAR) if number else np.zeros(0, int)
    at = rng.integers(0, max(number, 1), len(near))
    if number:
        sides = np.tile(true[at, 2:] - true[at, :2], 2)
        found[near] = true[at] + rng.normal(0, 0.06, (len(near), 4)) * sides
        found_classes[near], found_shape[near], score[near] = classes[at], shape[at], rng.random(len(near)) ** 0.5
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    everything = np.concatenate([true, found])
    fields = _fields(rng, everything, shapes[np.append(shape, found_shape)], kind, size_hw, number, np.append(at, near))
    crowds = (rng.random(number) < 0.01).astype(int)
    objects = [
        {
            **fields[k],
            "category_id": int(classes[k]),
            "bbox": _xywh(true[k]),
            "area": float(np.prod(true[k, 2:] - true[k, :2])),
            "iscrowd": int(crowds[k]),
        }
        for k in range(number)
    ]
    made = [
        {**fields[number + k], "category_id": int(found_classes[k]), "score": float(score[k])} for k in range(count)
    ]
    return objects, made


def _fields(
    rng: np.random.Generator,
    everything: np.ndarray,
    masks: np.ndarray,
    kind: str,
    size_hw: tuple[int, int],
    number: int,
    pairs: np.ndarray,
) -> list[dict[str, Any]]:
    """The fields of the kind, for objects and detections together."""
    if kind == "segm":
        runs = pasted_runs(masks, everything.astype(np.float32), size_hw, 0.5)
        return [{"segmentation": {"size": list(size_hw), "counts": text}} for text in strings_from_runs(runs)]
    if kind == "bbox":
        return [{"bbox": _xywh(box)} for box in everything]
    inside = rng.random((len(everything), _KEYPOINTS, 2))
    half = len(pairs) // 2
    inside[number + pairs[half:]] = inside[pairs[:half]] + rng.normal(0, 0.03, (half, _KEYPOINTS, 2))
    points = everything[:, None, :2] + inside * (everything[:, None, 2:] - everything[:, None, :2])
    visible = rng.integers(0, 3, (len(everything), _KEYPOINTS, 1))
    lists = np.concatenate([points.round(2), visible], axis=2).reshape(len(everything), -1).tolist()
    counts = np.count_nonzero(visible, axis=1)[:, 0].tolist()
    return [
        {"keypoints": values} | ({"num_keypoints": seen} if k < number else {})
        for k, (values, seen) in enumerate(zip(lists, counts, strict=True))
    ]


def _xywh(box: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = box.tolist()
    return [x0, y0, x1 - x0, y1 - y0]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One task, done by us and by another library."""

    work: str
    items: str
    ours_ms: float
    theirs_ms: float | None  # None: no other library does it
    times: float | None  # theirs / ours
    theirs: str
    check: str  # what was compared before timing
    ours_peak_mb: float | None = None
    theirs_peak_mb: float | None = None


def _pasted_by_torchvision(found: Detections) -> list[dict[str, Any]]:
    """Paste and encode as torchvision's reference evaluation does."""
    import torch
    from pycocotools import mask as mask_api
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    masks, boxes = torch.from_numpy(found.masks)[:, None], torch.from_numpy(found.boxes_xyxy_px)
    full = (paste_masks_in_image(masks, boxes, found.size_hw) > 0.5).numpy()
    encoded = [mask_api.encode(np.array(mask[0, :, :, np.newaxis], order="F", dtype=np.uint8))[0] for mask in full]
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in encoded]


PASTERS: dict[str, Callable[[Detections], list[dict[str, Any]]]] = {
    "ours": Detections.rles,
    "torchvision": _pasted_by_torchvision,
}


def _paste_row(images: int, count: int, size_hw: tuple[int, int], progress: Progress) -> Row:
    """Measure pasting and encoding."""
    found = [detections(seed, count, size_hw) for seed in range(images)]
    check = paste_check(found)
    calls = {name: lambda turn, paste=paste: paste(found[turn]) for name, paste in PASTERS.items()}
    with progress.steps(f"pasting {images} images with {count} detections", len(calls) * (images + 1)) as stepper:
        samples = time_in_turns(calls, repeat=images, rest_s=0.0, progress=lambda name: stepper.advance())
    ours, theirs = (sum(samples[name].latencies_ms) for name in PASTERS)
    task = {"images": min(images, 20), "count": count, "size_hw": size_hw}
    peaks = [
        call_in_new_process("evaluation:pasting_peak_mb", {**task, "paster": name}, _PEAK_LIMIT_S) for name in PASTERS
    ]
    return Row(
        work=f"paste and encode, {size_hw[0]}×{size_hw[1]}",
        items=f"{images} images × {count}",
        ours_ms=ours,
        theirs_ms=theirs,
        times=theirs / ours,
        theirs="torchvision, pycocotools",
        check=check,
        ours_peak_mb=peaks[0],
        theirs_peak_mb=peaks[1],
    )


def paste_check(found: list[Detections]) -> str:
    """Compare the pasters' masks, and the metrics of these masks on annotations near them.

    Raises:
        AssertionError: if a metric differs by more than 1e-6.
    """
    from pycocotools import mask as mask_api

    results: dict[str, list[dict[str, Any]]] = {name: [] for name in PASTERS}
    differing = pixels = 0
    for image_id, own in enumerate(found, start=1):
        plain = coco_results(dataclasses.replace(own, masks=None), image_id, range(1, 81), with_masks=False)
        masks = {name: paste(own) for name, paste in PASTERS.items()}
        for name, rles in masks.items():
            results[name] += [{**entry, "segmentation": rle} for entry, rle in zip(plain, rles, strict=True)]
        for ours, theirs in zip(*masks.values(), strict=True):
            if ours["counts"] != theirs["counts"]:
                differing += 1
                pixels += int(np.count_nonzero(mask_api.decode(ours) != mask_api.decode(theirs)))
    truth = GroundTruth.of_content(_truth_near(found), "simulated")
    scored = [score_entries(truth, entries, "segm", measured_by="segmentation") for entries in results.values()]
    metrics = [each.metrics for each in scored]
    largest = max(abs(metrics[0][name] - metrics[1][name]) for name in metrics[0])
    assert largest <= _METRIC_TOLERANCE, f"a metric differs by {largest:.2g}"
    total = sum(map(len, found))
    return (
        f"{differing} of {total} masks differ, {pixels} px in all; metrics by {largest:.1g}, AP {metrics[0]['AP']:.3f}"
    )


def _truth_near(found: list[Detections]) -> dict[str, Any]:
    """Annotations: every third detection, slightly moved."""
    height, width = found[0].size_hw
    annotations = []
    for image_id, own in enumerate(found, start=1):
        sides = own.boxes_xyxy_px[::3, 2:] - own.boxes_xyxy_px[::3, :2]
        moved = own.boxes_xyxy_px[::3] + 0.05 * np.concatenate([sides, sides], axis=1)
        some = Detections(moved, own.scores[::3], own.labels[::3], own.masks[::3], own.size_hw)
        for entry in coco_results(some, image_id, range(1, 81), with_masks=True):
            area = entry["bbox"][2] * entry["bbox"][3]
            annotations.append({**entry, "id": len(annotations) + 1, "area": area, "iscrowd": 0})
    return {
        "images": [{"id": k, "height": height, "width": width} for k in range(1, len(found) + 1)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, 81)],
        "annotations": annotations,
    }


def scored_by_pycocotools(content: dict[str, Any], results: list[dict[str, Any]], kind: str) -> Any:
    """Run all steps of pycocotools and return its evaluation object; the arguments are modified."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        scorer = COCOeval(truth, truth.loadRes(results), kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer


def score_row(images: int, count: int, kind: str, repeat: int, progress: Progress) -> Row:
    """Measure scoring, after comparing all arrays of the scores."""
    content, results = simulated(images, count, kind, SIZE_HW)

    def ours(turn: int) -> Any:
        scored = score_entries(GroundTruth.of_content(content, "simulated"), results, kind)
        return scored, scored.metrics

    prepared: list[Any] = []

    def theirs(turn: int) -> Any:
        return scored_by_pycocotools(*prepared.pop(), kind)

    def prepare() -> None:  # copying is not part of the measured time
        prepared.append((copy.deepcopy(content), copy.deepcopy(results)))

    latencies: dict[str, list[float]] = {"ours": [], "theirs": []}
    with progress.steps(f"scoring {kind} of {images} images with {count} detections", 2 * repeat) as stepper:
        for turn in range(repeat):
            answers = {}
            for name, call in (("ours", ours), ("theirs", theirs))[:: 1 if turn % 2 else -1]:
                prepare()
                start = time.perf_counter()
                answers[name] = call(turn)
                latencies[name].append(1000 * (time.perf_counter() - start))
                prepared.clear()
                stepper.advance()
            _check_scores(answers["ours"][0].scores, answers["theirs"])
            metrics = answers["ours"][1]
    mine, other = (float(np.median(latencies[name])) for name in ("ours", "theirs"))
    return Row(
        work=f"score {kind}",
        items=f"{images} images × {count}",
        ours_ms=mine,
        theirs_ms=other,
        times=other / mine,
        theirs="pycocotools",
        check=f"all arrays equal, AP {metrics['AP']:.3f}",
    )


def _check_scores(ours: Any, theirs: Any) -> None:
    for name in ("precision", "recall", "scores"):
        assert np.array_equal(ours.of_all_classes(name), theirs.eval[name]), f"{name} differs from pycocotools'"


def _resample_row(images: int, count: int) -> Row:
    """Measure the confidence interval of an AP difference, matching included."""
    content, results = simulated(images, count, "bbox", SIZE_HW)
    truth, rng = GroundTruth.of_content(content, "simulated"), np.random.default_rng(1)
    other = [{**entry, "score": entry["score"] * float(rng.uniform(0.9, 1.1))} for entry in results]
    start = time.perf_counter()
    records = [match_records(truth, checked_results(truth, each, "bbox", "simulated")) for each in (results, other)]
    found = interval_of_difference(*records)
    taken = 1000 * (time.perf_counter() - start)
    return Row(
        work=f"AP difference, {RESAMPLES} resamples",
        items=f"{images} images × {count}",
        ours_ms=taken,
        theirs_ms=None,
        times=None,
        theirs="",
        check=f"{found.value:+.4f}, {found.low:+.4f} to {found.high:+.4f}",
    )


def pasting_peak_mb(images: int, count: int, size_hw: Sequence[int], paster: str) -> float | None:
    """Measure the growth of this process's memory while it pastes, MB; None where the system does not report it."""
    found = [detections(seed, count, tuple(size_hw)) for seed in range(images)]
    paste = PASTERS[paster]
    paste(detections(0, 2, (32, 32)))  # imports and one-time allocations

    def paste_all() -> None:
        for own in found:
            paste(own)

    return memory_growth_mb(paste_all)


def table(rows: list[Row]) -> str:
    """Format the rows as a Markdown table."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    heads = ["work", "items", "ours ms", "theirs ms", "× faster", "peak MB", "theirs MB", "compared with", "check"]
    return aligned(
        heads,
        [
            [
                row.work,
                row.items,
                cell(row.ours_ms, ".0f"),
                cell(row.theirs_ms, ".0f"),
                cell(row.times, ".1f"),
                cell(row.ours_peak_mb, ".0f"),
                cell(row.theirs_peak_mb, ".0f"),
                row.theirs,
                row.check,
            ]
            for row in rows
        ],
    )


def _growth_chart(rows: list[Row]) -> str:
    """SVG chart of the seconds of scoring against the number of images."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in (row for row in rows if row.work.startswith("score")):
        images = float(row.items.split()[0])
        for name, value in ((f"{row.work[6:]}, fast", row.ours_ms), (f"{row.work[6:]}, pycocotools", row.theirs_ms)):
            lines.setdefault(name, []).append((images, value / 1000))
    return line_chart("Scoring simulated results", "images", "seconds", lines, log_x=True, log_y=True)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure, print the table and the machine, and write both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200, help="images for pasting; default: 200")
    parser.add_argument("--detections", type=int, default=100, help="detections per image; default: 100")
    parser.add_argument("--dataset", type=numbers, default=(250, 1000, 5000), help="numbers of images to score")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of results; default: all")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of scoring; default: 3")
    parser.add_argument("--output", type=Path, help="folder for evaluation.json, .md and .svg")
    given = parser.parse_args(arguments)
    progress = Progress()
    rows = [_paste_row(given.images, given.detections, SIZE_HW, progress)]
    for kind in given.kinds.split(","):
        count = min(given.detections, 20) if kind == "keypoints" else given.detections
        rows += [score_row(images, count, kind, given.repeat, progress) for images in given.dataset]
    rows.append(_resample_row(max(given.dataset), given.detections))
    facts = environment()
    facts["versions"] |= {name: importlib.metadata.version(name) for name in ("numpy", "pycocotools")}
    page = "\n".join(["# Evaluation", "", table(rows), "", *machine(facts), ""])
    print(page)
    if given.output:
        content = {"schema": _SCHEMA, "environment": facts, "rows": [dataclasses.asdict(row) for row in rows]}
        write_json(given.output / "evaluation.json", content)
        for name, text in (("evaluation.md", page), ("evaluation.svg", _growth_chart(rows))):
            with atomic_path(given.output / name) as draft:
                draft.write_text(text, encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
