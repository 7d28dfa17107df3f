"""COCO evaluation of any detector."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from maskrcnn.data.coco import CocoDataset, ImageRecord
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
    """Metrics of boxes and, where there are, of masks, the detections behind them, and the time they took."""

    box: dict[str, float]
    mask: dict[str, float] | None  # None: a model without masks
    results: list[dict[str, Any]]  # COCO results format
    images: int
    detect_seconds: float  # decoding, preprocessing, inference, postprocessing

    def summary(self) -> dict[str, float]:
        """`box_ap` and, where there are masks, `mask_ap`."""
        return {f"{kind}_ap": metrics["AP"] for kind, metrics in self._kinds().items()}

    def table(self) -> str:
        """All metrics as text."""
        kinds = self._kinds()
        lines = [f"{'':10}" + "".join(f"{kind:>8}" for kind in kinds)]
        lines += [f"{name:10}" + "".join(f"{metrics[name]:8.4f}" for metrics in kinds.values()) for name in METRICS]
        return "\n".join(lines)

    def _kinds(self) -> dict[str, dict[str, float]]:
        return {"box": self.box} | ({"mask": self.mask} if self.mask is not None else {})


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
    results, seconds = detect_records(detector, dataset.images, batch_size=batch_size, progress=progress)
    return score_results(dataset, results, with_masks=detector.metadata.has_masks, detect_seconds=seconds)


def detect_records(
    detector: Detector,
    records: Sequence[ImageRecord],
    *,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda images: None,
) -> tuple[list[dict[str, Any]], float]:
    """Runs a detector on images; several processes can each take a part of a dataset.

    Args:
        detector: any backend.
        records: the images, in any order; none give no results.
        batch_size: images per inference.
        progress: called with the number of images done in each batch.

    Returns:
        the detections in COCO's results format, with masks where the model has them, and the seconds that
        decoding, preprocessing, inference and postprocessing took.

    Raises:
        UserError: when an image cannot be read.
    """
    metadata = detector.metadata
    results, began = [], time.perf_counter()
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        detections = detector.detect([read_image(record.path) for record in batch])
        for record, found in zip(batch, detections, strict=True):
            results += coco_results(found, record.id, metadata.category_ids, with_masks=metadata.has_masks)
        progress(len(batch))
    return results, time.perf_counter() - began


def score_results(
    dataset: CocoDataset, results: list[dict[str, Any]], *, with_masks: bool, detect_seconds: float = 0.0
) -> Evaluation:
    """The metrics of results on the whole of a dataset, by pycocotools.

    Args:
        dataset: the ground truth; an image without results counts as one in which nothing was found.
        results: in COCO's results format, in any order.
        with_masks: score `segmentation` too.
        detect_seconds: what finding them took.
    """
    truth = dataset.ground_truth()
    return Evaluation(
        box=_score(truth, results, "bbox"),
        mask=_score(truth, results, "segm") if with_masks else None,
        results=results,
        images=len(dataset.images),
        detect_seconds=detect_seconds,
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


def _score(truth, results: list[dict[str, Any]], kind: str) -> dict[str, float]:
    if not results:
        return {name: 0.0 for name in METRICS}
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(truth, truth.loadRes([dict(result) for result in results]), kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return {name: float(value) for name, value in zip(METRICS, np.asarray(scorer.stats), strict=True)}
