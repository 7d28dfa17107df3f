"""What single images contribute: their own AP, and what was found, missed and made up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maskrcnn.runtime.evaluation.average_precision import average_precision
from maskrcnn.runtime.evaluation.match_records import FALSE, IGNORED, TRUE, MatchRecords, rank_in_run


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
