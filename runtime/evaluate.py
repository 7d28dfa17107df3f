"""COCO evaluation of any detector."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.images import read_image
from maskrcnn.errors import UserError
from maskrcnn.postprocess import coco_results
from maskrcnn.runtime.detector import Detector

# The 12 COCO metrics in pycocotools' order; values are in [0, 1], or -1 where nothing can be measured.
METRICS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_small",
    "AR_medium",
    "AR_large",
)


@dataclass(frozen=True)
class Evaluation:
    """Metrics of boxes and of masks, the detections behind them, and the time they took."""

    box: dict[str, float]
    mask: dict[str, float]
    results: list[dict[str, Any]]  # COCO results format
    images: int
    detect_seconds: float  # decoding, preprocessing, inference, postprocessing

    def summary(self) -> dict[str, float]:
        """Box and mask AP."""
        return {"box_ap": self.box["AP"], "mask_ap": self.mask["AP"]}

    def table(self) -> str:
        """All metrics as text."""
        lines = [f"{'':10}{'box':>8}{'mask':>8}"]
        lines += [f"{name:10}{self.box[name]:8.4f}{self.mask[name]:8.4f}" for name in METRICS]
        return "\n".join(lines)


def evaluate(
    detector: Detector,
    dataset: CocoDataset,
    *,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Runs a detector on a dataset and scores it with pycocotools.

    Args:
        detector: any backend.
        dataset: images and ground truth; its category ids must be the model's.
        batch_size: images per inference.
        progress: called with the number of images done in each batch.

    Raises:
        UserError: when the model was trained on other classes, or an image cannot be read.
    """
    check_classes(detector, dataset)
    results, began = [], time.perf_counter()
    for records in _batches(dataset.images, batch_size):
        detections = detector.detect([read_image(record.path) for record in records])
        for record, found in zip(records, detections, strict=True):
            results += coco_results(found, record.id, detector.metadata.category_ids, with_masks=True)
        progress(len(records))
    seconds = time.perf_counter() - began
    truth = dataset.ground_truth()
    return Evaluation(
        box=_score(truth, results, "bbox"),
        mask=_score(truth, results, "segm"),
        results=results,
        images=len(dataset.images),
        detect_seconds=seconds,
    )


def check_classes(detector: Detector, dataset: CocoDataset) -> None:
    """Refuses a model whose classes are not the dataset's.

    Raises:
        UserError: naming the categories that the model does not know.
    """
    known = set(detector.metadata.category_ids)
    unknown = [i for i in dataset.category_ids if i not in known]
    if unknown:
        raise UserError(
            f"a model of {len(known)} classes without category id(s) {unknown[:5]}",
            f"a model of the {len(dataset.category_ids)} classes of {dataset.annotation_path}",
            "evaluate on the dataset that the model was trained for, or train on this one",
        )


def _batches(items: tuple, size: int) -> Iterator[tuple]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _score(truth, results: list[dict[str, Any]], kind: str) -> dict[str, float]:
    if not results:
        return {name: 0.0 for name in METRICS}
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(truth, truth.loadRes([dict(result) for result in results]), kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return {name: float(value) for name, value in zip(METRICS, np.asarray(scorer.stats), strict=True)}
