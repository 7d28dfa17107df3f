"""Bootstrap intervals of an AP, or of the difference of two APs, over images drawn with replacement.

Detections are matched once. In a resample each image has a weight, the number of times that it was drawn, and AP is
computed from weighted sums over the match records. Both results of a difference are scored on the same resamples, so
that differences in difficulty between images do not widen the interval.

Resamples score slightly higher than the dataset: with repeated images the precision-recall curve has larger steps, and
AP uses the maximum precision. Therefore the interval is shifted so that the resamples' mean is the measured value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.runtime.evaluation.matching import IGNORED, TRUE_POSITIVE, MatchRecords
from maskrcnn.runtime.evaluation.scoring import average_precision

RESAMPLES = 1000
_LEVEL = 0.95
_MAX_ELEMENTS = 1 << 20  # maximum size of an intermediate array


@dataclass(frozen=True)
class Interval:
    """A value, and the interval that contains the fraction `level` of the resampled values."""

    value: float
    low: float
    high: float
    level: float  # 0.95: from the 2.5th to the 97.5th percentile
    resamples: int
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.value:+.4f}, {self.level:.0%} interval {self.low:+.4f} to {self.high:+.4f} "
            f"({self.resamples} resamples of the images, seed {self.seed})"
        )


class _ClassRecords(NamedTuple):
    """One class: its detections by descending score, and the images of its objects."""

    image: np.ndarray  # [n] image of each detection
    true: list[np.ndarray]  # by threshold: indices of the true positives
    ignored: list[np.ndarray]  # by threshold: indices of ignored detections
    objects: np.ndarray  # [G] image of each object


def interval_of_ap(
    records: MatchRecords, *, resamples: int = RESAMPLES, seed: int = 0, level: float = _LEVEL
) -> Interval:
    """AP over all areas with its bootstrap interval, clipped to 0 to 1; see `interval_of_difference`."""
    found = _interval([records], lambda values: values[0], resamples, seed, level)
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def interval_of_difference(
    records: MatchRecords,
    other: MatchRecords,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = _LEVEL,
    progress: Callable[[int], None] = lambda resamples: None,
) -> Interval:
    """AP of `other` minus AP of `records`, with its bootstrap interval over the images.

    Args:
        records, other: two results of one kind on the same images.
        resamples: number of resamples.
        seed: random seed of the resamples.
        level: fraction of the resampled differences inside the interval.
        progress: called with the number of resamples done since the last call.

    Raises:
        UserError: for annotations without objects, or less than one resample.
    """
    return _interval([records, other], lambda values: values[1] - values[0], resamples, seed, level, progress)


def resampled_ap(records: MatchRecords, weights: np.ndarray) -> np.ndarray:
    """AP `[B]` over all areas of B datasets with each image `weights` `[B, images]` times; NaN without objects."""
    return _resampled_ap(_by_class(records), weights, records.protocol.recall_thresholds)


def _resampled_ap(classes: list[_ClassRecords], weights: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    total, measured = np.zeros(len(weights)), np.zeros(len(weights))
    for own in classes:
        found = _class_ap(own, weights, recalls)
        is_measured = ~np.isnan(found)
        total[is_measured] += found[is_measured]
        measured += is_measured
    with np.errstate(invalid="ignore"):
        return total / np.where(measured > 0, measured, np.nan)


def _interval(
    results: list[MatchRecords],
    value_of: Callable[[list[np.ndarray]], np.ndarray],
    resamples: int,
    seed: int,
    level: float,
    progress: Callable[[int], None] = lambda resamples: None,
) -> Interval:
    images = results[0].images
    if resamples < 1:
        raise UserError(f"{resamples} resamples", "1 or more, 1000 for a stable interval", "raise --resamples")
    classes, recalls = [_by_class(records) for records in results], results[0].protocol.recall_thresholds
    value = value_of([_resampled_ap(own, np.ones((1, images), np.int32), recalls) for own in classes])[0]
    if not np.isfinite(value):
        raise UserError("annotations without objects", "at least one object", "pass other annotations")
    drawn = []
    for weights in _draws(images, resamples, seed):
        drawn.append(value_of([_resampled_ap(own, weights, recalls) for own in classes]))
        progress(len(weights))
    edge, values = (1 - level) / 2, np.concatenate(drawn)
    low, high = np.nanquantile(values, [edge, 1 - edge]) - np.nanmean(values) + value
    return Interval(float(value), float(low), float(high), level, resamples, seed)


def _draws(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields the weights of the images in each resample, `[B, images]` int32, B resamples at a time."""
    rng, at_once = np.random.default_rng(seed), max(1, _MAX_ELEMENTS // images)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = rng.integers(0, images, (count, images)) + images * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images).astype(np.int32)


def _by_class(records: MatchRecords) -> list[_ClassRecords]:
    """The records of each class with objects, over all areas."""
    order = records.by_score
    edges = np.searchsorted(records.category[order], np.arange(records.categories + 1))
    counted = np.flatnonzero(records.is_counted[:, 0])
    found = []
    for category in np.unique(records.object_category[counted]).tolist():
        rows = order[edges[category] : edges[category + 1]]
        outcome = records.outcome[rows, 0].T
        found.append(
            _ClassRecords(
                records.image[rows],
                [np.flatnonzero(own == TRUE_POSITIVE) for own in outcome],
                [np.flatnonzero(own == IGNORED) for own in outcome],
                records.object_image[counted[records.object_category[counted] == category]],
            )
        )
    return found


def _class_ap(own: _ClassRecords, weights: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """AP `[B]` of one class, averaged over the thresholds."""
    parts = []
    at_once = max(1, _MAX_ELEMENTS // max(1, len(own.image)))
    for start in range(0, len(weights), at_once):
        some = weights[start : start + at_once]
        objects = np.take(some, own.objects, axis=1).sum(axis=1)
        each = np.take(some, own.image, axis=1)
        so_far = np.cumsum(each, axis=1, dtype=np.int32)
        found = np.zeros(len(some))
        for true, ignored in zip(own.true, own.ignored, strict=True):
            counted = np.take(so_far, true, axis=1)
            if len(ignored):
                left_out = np.cumsum(np.take(each, ignored, axis=1), axis=1, dtype=np.int32)
                before = np.searchsorted(ignored, true)
                counted[:, before > 0] -= left_out[:, before[before > 0] - 1]
            found += average_precision(
                np.cumsum(np.take(each, true, axis=1), axis=1, dtype=np.int32), counted, objects, recalls
            )
        parts.append(found / len(own.true))
    return np.concatenate(parts)
