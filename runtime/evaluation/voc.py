"""Pascal VOC's average precision of boxes: area rule and 11-point rule.

Apart from the area under the curve, this differs from COCO's AP at an IoU of 0.5 in the matching: a detection always
belongs to the object that it overlaps most. It is a false positive if that object is already found, and is ignored if
the object is difficult. Source: VOC development kit, `VOCevaldet`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth

_MIN_OVERLAP = 0.5


def voc_metrics(truth: GroundTruth, results: list[dict[str, Any]]) -> dict[str, Any]:
    """VOC's metrics of boxes.

    Args:
        truth: annotated objects; crowd regions are difficult objects, as `maskrcnn data convert voc` writes them.
        results: COCO's results format, with `bbox`; ties keep their order.

    Returns:
        `mAP_area` (area rule, VOC 2010 and later) and `mAP_11` (11-point rule, VOC 2007), means over the classes with
        objects, -1 without objects; and `per_class`, by name: `objects`, `AP_area`, `AP_11`.

    Raises:
        UserError: for results without boxes.
    """
    if any("bbox" not in result for result in results):
        raise UserError("results without bbox", "boxes, for VOC's metrics", "add bbox to the results, or drop --voc")
    boxes = truth.boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    own: dict[tuple[int, int], list[int]] = defaultdict(list)  # (image, category) indices to objects
    for index, (image, category) in enumerate(zip(truth.image.tolist(), truth.category.tolist(), strict=True)):
        own[image, category].append(index)
    found: dict[int, list[tuple[float, int, Any]]] = defaultdict(list)  # by category: score, image, box
    for result in results:
        where, what = truth.image_index(result["image_id"]), truth.category_index(result["category_id"])
        if where is not None and what is not None:
            found[what].append((result["score"], where, result["bbox"]))
    per_class: dict[str, dict[str, float]] = {}
    for category, name in enumerate(truth.category_names):
        objects = int(np.count_nonzero((truth.category == category) & ~truth.is_crowd))
        if objects:
            hits = _hits(found[category], category, own, boxes, truth.is_crowd)
            recall = np.cumsum(hits) / objects
            precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
            per_class[name] = {"objects": objects, "AP_area": area_ap(recall, precision)}
            per_class[name]["AP_11"] = eleven_point_ap(recall, precision)
    means = {f"m{rule}": _mean([each[rule] for each in per_class.values()]) for rule in ("AP_area", "AP_11")}
    return {**means, "per_class": per_class}


def _hits(
    found: list[tuple[float, int, Any]],
    category: int,
    own: dict[tuple[int, int], list[int]],
    boxes: np.ndarray,
    is_difficult: np.ndarray,
) -> np.ndarray:
    """Returns whether each detection that is not ignored is a true positive, by descending score."""
    hits, taken = [], set()
    for _, image, (x, y, width, height) in sorted(found, key=lambda each: -each[0]):
        indices = own.get((image, category), [])
        overlap, best = 0.0, -1
        if indices:
            overlaps = _overlaps(np.array([x, y, x + width, y + height], np.float64), boxes[indices])
            overlap, best = float(overlaps.max()), indices[int(overlaps.argmax())]
        if overlap < _MIN_OVERLAP:
            hits.append(False)
        elif not is_difficult[best]:
            hits.append(best not in taken)
            taken.add(best)
    return np.array(hits, bool)


def _overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU `[G]` of a box `[4]` and others `[G, 4]`, xyxy."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    common = np.clip(sides, 0, None).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - common
    overlaps: np.ndarray = common / np.maximum(union, 1e-12)
    return overlaps


def area_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the monotonically decreasing precision: sum over the steps of the recall."""
    if not len(recall):
        return 0.0
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum())


def eleven_point_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean of the highest precision at a recall of at least 0, 0.1, …, 1."""
    # Divide, as for a recall of k / 10: np.arange(0, 1.1, 0.1) contains 0.30000000000000004.
    return float(np.mean([precision[recall >= tenths / 10].max(initial=0.0) for tenths in range(11)]))


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else -1.0


def voc_table(metrics: dict[str, Any]) -> str:
    """The metrics as text, one line per class."""
    width = max(len(name) for name in ("VOC, IoU 0.5", *metrics["per_class"]))
    lines = [f"{'VOC, IoU 0.5':{width}}{'objects':>9}{'AP (area)':>15}{'AP (11 points)':>15}"]
    for name, each in metrics["per_class"].items():
        lines.append(f"{name:{width}}{each['objects']:9}{each['AP_area']:15.4f}{each['AP_11']:15.4f}")
    lines.append(f"{'mean':{width}}{'':9}{metrics['mAP_area']:15.4f}{metrics['mAP_11']:15.4f}")
    return "\n".join(lines)
