"""Comparison of two results on the same images: the difference of the AP, and metrics of each image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from maskrcnn.runtime.evaluation.bootstrap import RESAMPLES, Interval, interval_of_difference
from maskrcnn.runtime.evaluation.matching import FALSE_POSITIVE, IGNORED, TRUE_POSITIVE, MatchRecords, rank_in_run
from maskrcnn.runtime.evaluation.results_file import Results
from maskrcnn.runtime.evaluation.scoring import Scored, average_precision
from maskrcnn.runtime.verification.compare import pair_detections

_MIN_IOU = 0.5  # between the boxes of paired detections
# Smaller shifts are rounding errors of another runtime or precision and do not count as differences.
_SCORE_SHIFT, _BOX_SHIFT_PX = 0.01, 1.0


@dataclass(frozen=True, eq=False)
class ImageScores:
    """Metrics of each image, in the order of the ground truth's `image_ids`; counts at the lowest IoU threshold."""

    ap: np.ndarray  # [I] COCO's AP of the image alone; -1 without objects
    objects: np.ndarray  # [I] int64
    found: np.ndarray  # [I] int64, true positives
    false: np.ndarray  # [I] int64, false positives

    @property
    def missed(self) -> np.ndarray:
        """Objects `[I]` int64 that are not found."""
        missed: np.ndarray = self.objects - self.found
        return missed

    def worst(self, count: int) -> list[int]:
        """Up to `count` images with objects or false positives, by ascending AP, then descending number of errors."""
        errors = self.missed + self.false
        order = np.lexsort((-errors, np.where(self.ap < 0, 0.0, self.ap)))
        return [image for image in order.tolist() if errors[image] or self.ap[image] >= 0][:count]


def image_scores(records: MatchRecords, min_score: float) -> ImageScores:
    """Metrics of each image. Counts include detections of at least `min_score`; AP includes all."""
    confident = records.score >= min_score
    outcome = records.outcome[:, 0, 0]
    objects, found, false = (
        np.bincount(images, minlength=records.images)
        for images in (
            records.object_image[records.is_counted[:, 0]],
            records.image[confident & (outcome == TRUE_POSITIVE)],
            records.image[confident & (outcome == FALSE_POSITIVE)],
        )
    )
    return ImageScores(image_ap(records), objects, found, false)


def image_ap(records: MatchRecords) -> np.ndarray:
    """COCO's AP `[I]` of each image alone, averaged over its classes and the thresholds; -1 without objects."""
    counted = records.is_counted[:, 0]
    groups, objects = np.unique(
        records.object_category[counted] * records.images + records.object_image[counted], return_counts=True
    )
    sums = np.zeros(len(groups))
    own_group = records.category * records.images + records.image
    row = np.searchsorted(groups, own_group)
    has_objects = np.append(groups, -1)[row] == own_group
    for outcome in records.outcome[has_objects, 0].T:
        sums += _group_ap(row[has_objects], outcome, objects, records.protocol.recall_thresholds)
    image = groups % records.images if len(groups) else groups
    classes = np.bincount(image, minlength=records.images)
    totals = np.bincount(image, sums, minlength=records.images)
    thresholds = len(records.protocol.iou_thresholds)
    return np.where(classes > 0, totals / np.maximum(classes * thresholds, 1), -1.0)


def _group_ap(group: np.ndarray, outcome: np.ndarray, objects: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """AP of each group from the `outcome` `[n]` of its detections, sorted by `group` `[n]` and descending score."""
    counts = outcome != IGNORED
    so_far = np.cumsum(counts)
    begins = np.searchsorted(group, np.arange(len(objects)))
    before = np.append(0, so_far)[begins]
    indices = np.flatnonzero(outcome == TRUE_POSITIVE)
    owner = group[indices]
    rank = rank_in_run(owner)
    true = np.repeat(np.bincount(owner, minlength=len(objects))[:, None], rank.max(initial=-1) + 1, axis=1)
    counted = np.full(true.shape, np.inf)
    true[owner, rank], counted[owner, rank] = rank + 1, so_far[indices] - before[owner]
    return average_precision(true, counted, objects, recalls)


@dataclass(frozen=True)
class _ImageDifference:
    """Differences on one image. Counts and shifts include detections of at least `min_score`."""

    image_id: int
    file_name: str
    ap: float  # of the image alone; -1 without objects
    other_ap: float
    lost: int  # objects that only the first result finds, at the lowest IoU threshold
    gained: int  # objects that only the other result finds
    unpaired: int  # detections of either result without a partner of the same class in the other
    score_shift: float  # maximum over the pairs
    box_shift_px: float  # maximum over the box sides of the pairs

    @property
    def is_equal(self) -> bool:
        """Whether scores differ by at most 0.01, boxes by at most 1 px, and nothing else."""
        is_near = self.score_shift <= _SCORE_SHIFT and self.box_shift_px <= _BOX_SHIFT_PX
        return is_near and not (self.lost or self.gained or self.unpaired)


@dataclass(frozen=True, eq=False)
class Difference:
    """Comparison of two results."""

    kind: str
    interval: Interval  # of the AP difference, other minus first
    metrics: dict[str, float]  # other minus first, by name, where both have a value
    images: list[_ImageDifference]  # all, by descending difference
    min_score: float

    def lines(self, max_images: int = 10) -> list[str]:
        """The comparison as text, with a table of the images that differ most."""
        differing = [image for image in self.images if not image.is_equal]
        lines = [
            f"AP difference {self.interval}",
            f"{len(differing)} of {len(self.images)} images differ in detections of score {self.min_score:g} or more: "
            f"in their number, by more than {_SCORE_SHIFT:g} in a score, or by more than {_BOX_SHIFT_PX:g} px in a box",
        ]
        if differing:
            heads = ("image id", "file", "AP", "other AP", "lost", "gained", "unpaired", "score", "box px")
            rows = [
                (
                    f"{image.image_id}",
                    image.file_name[-32:],
                    f"{image.ap:.3f}",
                    f"{image.other_ap:.3f}",
                    f"{image.lost}",
                    f"{image.gained}",
                    f"{image.unpaired}",
                    f"{image.score_shift:.2g}",
                    f"{image.box_shift_px:.2g}",
                )
                for image in differing[:max_images]
            ]
            widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
            lines += ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in (heads, *rows)]
        return lines


def difference(
    first: Scored,
    other: Scored,
    *,
    min_score: float,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[int], None] = lambda resamples: None,
) -> Difference:
    """Compares two results of the same kind on the same ground truth.

    Args:
        first: the reference.
        other: the second result.
        min_score: minimum score of the detections that are compared image by image; AP includes all.
        resamples, seed, progress: see `interval_of_difference`.

    Raises:
        UserError: for annotations without objects.
    """
    interval = interval_of_difference(first.records, other.records, resamples=resamples, seed=seed, progress=progress)
    aps = image_ap(first.records), image_ap(other.records)
    lost, gained = _found_by_one(first.records, other.records, min_score)
    shifts = _shifts(first, other, min_score)
    truth = first.truth
    images = [
        _ImageDifference(
            image_id,
            truth.file_name(image_id),
            float(aps[0][index]),
            float(aps[1][index]),
            int(lost[index]),
            int(gained[index]),
            *shifts[index],
        )
        for index, image_id in enumerate(truth.image_ids.tolist())
    ]
    images.sort(key=lambda image: (-abs(image.other_ap - image.ap), -image.lost - image.gained - image.unpaired))
    pairs = ((name, value, other.metrics[name]) for name, value in first.metrics.items())
    metrics = {name: b - a for name, a, b in pairs if a > -1 and b > -1}
    return Difference(first.kind, interval, metrics, images, min_score)


def _found_by_one(first: MatchRecords, other: MatchRecords, min_score: float) -> tuple[np.ndarray, np.ndarray]:
    """Number of objects of each image `[I]` that only the first result finds, and that only the other finds."""
    by_first, by_other = first.found_objects(min_score), other.found_objects(min_score)
    lost, gained = (
        np.bincount(first.object_image[flags], minlength=first.images)
        for flags in (by_first & ~by_other, by_other & ~by_first)
    )
    return lost, gained


def _shifts(first: Scored, other: Scored, min_score: float) -> list[tuple[int, float, float]]:
    """For each image: detections without a partner, and the maximum shift of a score and of a box side."""
    sides = [_by_image(scored.results, scored.records.images, min_score) for scored in (first, other)]
    shifts = []
    for rows, other_rows in zip(*sides, strict=True):
        boxes, other_boxes = _corners(first.results, rows), _corners(other.results, other_rows)
        labels, other_labels = first.results.category[rows], other.results.category[other_rows]
        pairs = pair_detections(boxes, labels, other_boxes, other_labels, _MIN_IOU)
        scores = first.results.score[rows][pairs.first] - other.results.score[other_rows][pairs.second]
        sides_px = boxes[pairs.first] - other_boxes[pairs.second]
        unpaired = len(pairs.unpaired_first) + len(pairs.unpaired_second)
        shifts.append((unpaired, _max_abs(scores), _max_abs(sides_px)))
    return shifts


def _max_abs(values: np.ndarray) -> float:
    return float(np.abs(values).max(initial=0))


def _by_image(results: Results, images: int, min_score: float) -> list[np.ndarray]:
    """The rows of the results of each image, by descending score."""
    rows = np.flatnonzero(results.score >= min_score)
    rows = rows[np.lexsort((-results.score[rows], results.image[rows]))]
    return np.split(rows, np.searchsorted(results.image[rows], np.arange(1, images)))


def _corners(results: Results, rows: np.ndarray) -> np.ndarray:
    """Boxes xyxy `[n, 4]` of these rows."""
    boxes = results.boxes[rows]
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
