"""Detections of any detector on the images of a dataset, with the time that each part takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

from maskrcnn.data.coco import CocoDataset, ImageRecord
from maskrcnn.data.images import read_image
from maskrcnn.errors import UserError
from maskrcnn.postprocess import coco_results
from maskrcnn.runtime.detector import Detector


@dataclass(frozen=True)
class Seconds:
    """Where the time of an evaluation went; of several processes, their sum."""

    data: float = 0.0  # reading and decoding files
    compute: float = 0.0  # resizing, inference, boxes in the original image
    encode: float = 0.0  # pasting masks as run lengths, COCO's results format
    score: float = 0.0  # matching, precision and recall

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def shared(self, images: int) -> Seconds:
        """The share of one of so many images."""
        return Seconds(*(value / images for value in astuple(self)))

    @property
    def detect(self) -> float:
        """All but the scoring."""
        return self.data + self.compute + self.encode

    def line(self) -> str:
        """As text."""
        return (
            f"data {self.data:.1f} s, compute {self.compute:.1f} s, results {self.encode:.1f} s, "
            f"scoring {self.score:.1f} s"
        )


def check_classes(detector: Detector, dataset: CocoDataset) -> None:
    """Refuses a model whose classes are not the dataset's, or whose keypoints are others.

    Raises:
        UserError: naming the categories that the model does not know, or both lists of keypoints.
    """
    known = set(detector.metadata.category_ids)
    unknown = [i for i in dataset.category_ids if i not in known]
    if unknown:
        raise UserError(
            f"a model of {len(known)} classes without category id(s) {unknown[:5]}",
            f"a model of the {len(dataset.category_ids)} classes of {dataset.annotation_path}",
            "evaluate on the dataset that the model was trained for, or train on this one",
        )
    names = detector.metadata.keypoint_names
    if names and dataset.keypoint_names and names != dataset.keypoint_names:
        raise UserError(
            f"a model of the keypoints {', '.join(names)}",
            f"those of {dataset.annotation_path}: {', '.join(dataset.keypoint_names)}",
            "evaluate on the dataset that the model was trained for, or train on this one",
        )


def facts_of(detector: Detector) -> dict[str, Any]:
    """What a model's detections are scored with: `runs_in`, `has_masks`, `has_keypoints` and their `sigmas`."""
    backend, metadata = detector.backend, detector.metadata
    return {
        "runs_in": f"{backend.name} {backend.precision}",
        "has_masks": metadata.has_masks,
        "has_keypoints": metadata.has_keypoints,
        "sigmas": list(metadata.keypoint_sigmas),
    }


def detect_records(
    detector: Detector,
    records: Sequence[ImageRecord],
    *,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda images: None,
) -> tuple[list[dict[str, Any]], Seconds]:
    """Runs a detector on images; several processes can each take a part of a dataset.

    Args:
        detector: any backend.
        records: the images, in any order; none give no results.
        batch_size: images per inference.
        progress: called with the number of images done in each batch.

    Returns:
        the detections in COCO's results format, with all that the model finds, and the time they took.

    Raises:
        UserError: when an image cannot be read.
    """
    results, seconds = [], Seconds()
    for batch in batches_of(records, batch_size):
        found, taken = detect_batch(detector, batch)
        results += [result for own in found for result in own]
        seconds += taken
        progress(len(batch))
    return results, seconds


def batches_of(records: Sequence[ImageRecord], batch_size: int) -> list[Sequence[ImageRecord]]:
    """The images in batches; the last may be smaller."""
    return [records[start : start + batch_size] for start in range(0, len(records), batch_size)]


def detect_batch(detector: Detector, batch: Sequence[ImageRecord]) -> tuple[list[list[dict[str, Any]]], Seconds]:
    """The results of each image of one batch, and the time they took.

    Raises:
        UserError: when an image cannot be read.
    """
    metadata = detector.metadata
    times = [time.perf_counter()]
    images = [read_image(record.path) for record in batch]
    times.append(time.perf_counter())
    detections = detector.detect(images)
    times.append(time.perf_counter())
    results = [
        coco_results(found, record.id, metadata.category_ids, with_masks=metadata.has_masks)
        for record, found in zip(batch, detections, strict=True)
    ]
    times.append(time.perf_counter())
    return results, Seconds(*(after - before for before, after in pairwise(times)))
