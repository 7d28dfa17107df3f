"""Where two results on the same images differ: the AP, and what becomes of each image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from maskrcnn.runtime.evaluation.bootstrap import RESAMPLES, Interval, interval_of_difference
from maskrcnn.runtime.evaluation.matching import FALSE, IGNORED, TRUE, MatchRecords, rank_in_run
from maskrcnn.runtime.evaluation.results_file import Results
from maskrcnn.runtime.evaluation.scoring import Scored, average_precision
from maskrcnn.runtime.verification.compare import of_equal_label, pair_in_order, pairwise_iou

# What single images contribute: their own AP, and what was found, missed and made up.


@dataclass(frozen=True, eq=False)
class ImageScores:
    """Figures of each image, in the order of the ground truth's `image_ids`; counts at the lowest IoU threshold."""

    ap: np.ndarray  # [I] COCO's AP of the image by itself; -1 where nothing is to be found
    objects: np.ndarray  # [I] int64, to be found
    found: np.ndarray  # [I] int64, of these
    false: np.ndarray  # [I] int64, detections that are none of these

    @property
    def missed(self) -> np.ndarray:
        """`[I]` int64."""
        return self.objects - self.found

    def worst(self, count: int) -> list[int]:
        """Up to so many images with something missed or made up, the lowest AP first, then the most faults."""
        faults = self.missed + self.false
        order = np.lexsort((-faults, np.where(self.ap < 0, 0.0, self.ap)))
        return [image for image in order.tolist() if faults[image] or self.ap[image] >= 0][:count]


def image_scores(records: MatchRecords, min_score: float) -> ImageScores:
    """Figures of each image; only detections of at least `min_score` are counted, AP is of all of them."""
    confident = records.score >= min_score
    outcome = records.outcome[:, 0, 0]
    objects, found, false = (
        np.bincount(images, minlength=records.images)
        for images in (
            records.object_image[records.is_counted[:, 0]],
            records.image[confident & (outcome == TRUE)],
            records.image[confident & (outcome == FALSE)],
        )
    )
    return ImageScores(image_ap(records), objects, found, false)


def image_ap(records: MatchRecords) -> np.ndarray:
    """COCO's AP `[I]` of each image by itself: the mean over its classes and the thresholds; -1 without objects."""
    counted = records.is_counted[:, 0]
    groups, to_find = np.unique(
        records.object_category[counted] * records.images + records.object_image[counted], return_counts=True
    )
    sums = np.zeros(len(groups))
    own_group = records.category * records.images + records.image
    row = np.searchsorted(groups, own_group)
    has_objects = np.append(groups, -1)[row] == own_group
    for lane in records.outcome[has_objects, 0].T:
        sums += _group_ap(row[has_objects], lane, to_find, records.protocol.recall_thresholds)
    image = groups % records.images if len(groups) else groups
    classes = np.bincount(image, minlength=records.images)
    totals = np.bincount(image, sums, minlength=records.images)
    thresholds = len(records.protocol.iou_thresholds)
    return np.where(classes > 0, totals / np.maximum(classes * thresholds, 1), -1.0)


def _group_ap(group: np.ndarray, outcome: np.ndarray, to_find: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """AP of each group from its detections' `outcome` `[n]`, `group` `[n]` ascending and scores descending in each."""
    counts = outcome != IGNORED
    so_far = np.cumsum(counts)
    begins = np.searchsorted(group, np.arange(len(to_find)))
    before = np.append(0, so_far)[begins]
    places = np.flatnonzero(outcome == TRUE)
    owner = group[places]
    rank = rank_in_run(owner)
    true = np.repeat(np.bincount(owner, minlength=len(to_find))[:, None], rank.max(initial=-1) + 1, axis=1)
    counted = np.full(true.shape, np.inf)
    true[owner, rank], counted[owner, rank] = rank + 1, so_far[places] - before[owner]
    return average_precision(true, counted, to_find, recalls)


_MIN_IOU = 0.5  # with which boxes of one class are taken for the same detection


@dataclass(frozen=True)
class _ImageDifference:
    """One image; counts and shifts are of detections with at least the given score."""

    image_id: int
    file_name: str
    ap: float  # of the image by itself; -1 where nothing is to be found
    other_ap: float
    lost: int  # objects that only the first result finds, at the lowest threshold of overlap
    gained: int  # objects that only the other result finds
    unpaired: int  # detections of either result without partner of the same class in the other
    score_shift: float  # the largest of a pair
    box_shift_px: float  # the largest of a pair's sides

    @property
    def is_equal(self) -> bool:
        """Whether nothing at all differs."""
        return not (self.lost or self.gained or self.unpaired or self.score_shift or self.box_shift_px)


@dataclass(frozen=True, eq=False)
class Difference:
    """Another result compared with a first one."""

    kind: str
    interval: Interval  # of the AP's difference, other minus first
    metrics: dict[str, float]  # other minus first, by name; those that both can measure
    images: list[_ImageDifference]  # all, those that differ most first
    min_score: float

    def lines(self, most: int = 10) -> list[str]:
        """The difference as text, with the images that differ most."""
        differing = [image for image in self.images if not image.is_equal]
        lines = [
            f"AP difference {self.interval}",
            f"{len(differing)} of {len(self.images)} images differ in detections of score {self.min_score:g} or more",
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
                for image in differing[:most]
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
    """Compares two results of one kind on one ground truth.

    Args:
        first: what `other` is measured by.
        other: the second result.
        min_score: the lowest score of detections that are compared image by image; AP is of all.
        resamples, seed, progress: see `interval_of_difference`.

    Raises:
        UserError: where nothing is to be found in the images.
    """
    interval = interval_of_difference(first.records, other.records, resamples=resamples, seed=seed, progress=progress)
    aps = image_ap(first.records), image_ap(other.records)
    only_first, only_other = _found_by_one(first.records, other.records, min_score)
    shifts = _shifts(first, other, min_score)
    truth = first.truth
    images = [
        _ImageDifference(
            image_id,
            str(truth.images[image_id].get("file_name", "")),
            float(aps[0][place]),
            float(aps[1][place]),
            int(only_first[place]),
            int(only_other[place]),
            *shifts[place],
        )
        for place, image_id in enumerate(truth.image_ids.tolist())
    ]
    images.sort(key=lambda image: (-abs(image.other_ap - image.ap), -image.lost - image.gained - image.unpaired))
    pairs = ((name, value, other.metrics[name]) for name, value in first.metrics.items())
    metrics = {name: b - a for name, a, b in pairs if a > -1 and b > -1}
    return Difference(first.kind, interval, metrics, images, min_score)


def _found_by_one(first: MatchRecords, other: MatchRecords, min_score: float) -> tuple[np.ndarray, np.ndarray]:
    """Objects of each image `[I]` that only the first, and only the other result finds."""
    is_found = []
    for records in (first, other):
        true = (records.score >= min_score) & (records.outcome[:, 0, 0] == TRUE)
        flags = np.zeros(len(records.object_image), bool)
        flags[records.found[true, 0]] = True
        is_found.append(flags)
    alone = is_found[0] & ~is_found[1], is_found[1] & ~is_found[0]
    return tuple(np.bincount(first.object_image[flags], minlength=first.images) for flags in alone)


def _shifts(first: Scored, other: Scored, min_score: float) -> list[tuple[int, float, float]]:
    """Of each image: detections without partner, and the largest shift of a score and of a box's side."""
    sides = [_by_image(scored.results, scored.records.images, min_score) for scored in (first, other)]
    found = []
    for rows, other_rows in zip(*sides, strict=True):
        boxes, other_boxes = _corners(first.results, rows), _corners(other.results, other_rows)
        overlaps = of_equal_label(
            pairwise_iou(boxes, other_boxes), first.results.category[rows], other.results.category[other_rows]
        )
        pairs = pair_in_order(overlaps, _MIN_IOU)
        scores = first.results.score[rows][pairs.first] - other.results.score[other_rows][pairs.second]
        sides_px = boxes[pairs.first] - other_boxes[pairs.second]
        unpaired = len(pairs.alone_first) + len(pairs.alone_second)
        found.append((unpaired, *(float(np.abs(values).max(initial=0)) for values in (scores, sides_px))))
    return found


def _by_image(results: Results, images: int, min_score: float) -> list[np.ndarray]:
    """Of each image the rows of its results, by descending score."""
    rows = np.flatnonzero(results.score >= min_score)
    rows = rows[np.lexsort((-results.score[rows], results.image[rows]))]
    return np.split(rows, np.searchsorted(results.image[rows], np.arange(1, images)))


def _corners(results: Results, rows: np.ndarray) -> np.ndarray:
    """Boxes xyxy `[n, 4]` of some results."""
    boxes = results.boxes[rows]
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
