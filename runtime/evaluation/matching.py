"""COCO's matching of detections to objects, for all images at once. Equal to `evaluateImg` of pycocotools.

Detections of one image and class are matched in descending order of score, each to the object with the largest overlap.
The order matters only within an image and class, so the k-th detections of all groups are matched at the same time, for
every area range and threshold.

Overlaps equal those of pycocotools to the last digit. Boxes and keypoints are computed in NumPy for all pairs at once.
Masks are compared image by image with `pycocotools.mask.iou`, which reads run-length encodings in C without decoding
them to pixels; NumPy would be slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.protocol import Protocol, protocol_of
from maskrcnn.runtime.evaluation.results_file import Results

# Outcome of a detection at one threshold and area range. A detection is ignored if it matched a crowd or an object
# outside the area range, or if it matched nothing and is itself outside the range.
IGNORED, FALSE_POSITIVE, TRUE_POSITIVE = 0, 1, 2

_CLOSE_TO_ONE = 1 - 1e-10  # upper limit of the threshold in pycocotools
# Number of pairs for which overlaps are computed at once, to limit memory; keypoints have one value each per pair.
_MAX_PAIRS, _MAX_KEYPOINT_PAIRS = 1 << 18, 1 << 14


@dataclass(frozen=True, eq=False)
class MatchRecords:
    """Outcome of each detection; all metrics can be computed from it.

    Detections are sorted by class, image and descending score. Detections of an image and class beyond the last of
    `protocol.max_detections` are left out.
    """

    protocol: Protocol
    images: int
    categories: int
    row: np.ndarray  # [D] int64, index in the results
    image: np.ndarray  # [D] int64
    category: np.ndarray  # [D] int64
    score: np.ndarray  # [D] float64
    rank: np.ndarray  # [D] int64, by score in its image and class, from 0
    outcome: np.ndarray  # [D, A, T] uint8: IGNORED, FALSE_POSITIVE or TRUE_POSITIVE
    matched_object: np.ndarray  # [D, T] int64, index of the matched object, over all areas; -1: none
    object_image: np.ndarray  # [G] int64
    object_category: np.ndarray  # [G] int64
    is_counted: np.ndarray  # [G, A] bool, objects that are not ignored

    @cached_property
    def by_score(self) -> np.ndarray:
        """Rows `[D]` by class and descending score; ties by image."""
        return np.lexsort((-self.score, self.category))

    def found_objects(self, min_score: float) -> np.ndarray:
        """Objects `[G]` bool with a true positive of at least this score, at the lowest threshold."""
        true = (self.score >= min_score) & (self.outcome[:, 0, 0] == TRUE_POSITIVE)
        is_found = np.zeros(len(self.object_image), bool)
        is_found[self.matched_object[true, 0]] = True
        return is_found


class _Side(NamedTuple):
    """Detections or objects, sorted by class and image."""

    order: np.ndarray  # int64, indices in the results or in the ground truth
    group: np.ndarray  # int64, class · images + image


class _Pairs(NamedTuple):
    """Pairs of a detection and an object that overlap, as rows of their sides, by ascending detection row."""

    detection: np.ndarray  # [P] int64
    truth: np.ndarray  # [P] int64
    overlap: np.ndarray  # [P] float64


def match_records(truth: GroundTruth, results: Results, max_detections: Sequence[int] = ()) -> MatchRecords:
    """Matches results to objects by the overlap of `results.kind`.

    Args:
        truth: annotated objects.
        results: detections.
        max_detections: limits of detections per image and class, see `protocol_of`.

    Raises:
        UserError: if the annotations lack the fields of the kind.
    """
    protocol, images = protocol_of(results.kind, max_detections), len(truth.image_ids)
    is_counted = ~(_is_outside(truth.areas_px, protocol) | truth.is_ignored(protocol.kind)[:, None])
    objects = _sorted_side(truth.category * images + truth.image, np.zeros(len(truth)))
    detections = _sorted_side(results.category * images + results.image, -results.score)
    rank = rank_in_run(detections.group)
    counts = rank < protocol.max_detections[-1]
    detections = _Side(detections.order[counts], detections.group[counts])
    order = detections.order
    pairs = _overlapping_pairs(truth, results, detections, objects, float(protocol.iou_thresholds[0]))
    rows, chosen = _greedy_matches(
        pairs,
        detections.group,
        is_counted[objects.order],
        truth.is_crowd[objects.order],
        np.minimum(protocol.iou_thresholds, _CLOSE_TO_ONE),
    )
    outcome = np.repeat(
        np.where(_is_outside(results.area_px[order], protocol), IGNORED, FALSE_POSITIVE).astype(np.uint8)[:, :, None],
        len(protocol.iou_thresholds),
        axis=2,
    )
    matched_object = np.full((len(order), len(protocol.iou_thresholds)), -1)
    outcome[rows], matched_object[rows] = _outcomes(outcome[rows], chosen, is_counted[objects.order], objects.order)
    return MatchRecords(
        protocol=protocol,
        images=images,
        categories=len(truth.category_ids),
        row=order,
        image=results.image[order],
        category=results.category[order],
        score=results.score[order],
        rank=rank[counts],
        outcome=outcome,
        matched_object=matched_object,
        object_image=truth.image,
        object_category=truth.category,
        is_counted=is_counted,
    )


def confusion_matrix(
    truth: GroundTruth, results: Results, records: MatchRecords, min_score: float
) -> tuple[np.ndarray, np.ndarray]:
    """Confusion matrix at the lowest threshold: rows are true classes, columns are detected classes.

    The diagonal contains COCO's true positives. Each remaining detection is then matched to a remaining object of any
    class. The last row counts detections without an object, the last column missed objects. Crowds are left out.

    Args:
        truth, results, records: from the same scoring.
        min_score: minimum score of a detection.

    Returns:
        The indices `[C]` int64 of the classes that occur, ascending, and their matrix `[C + 1, C + 1]` int64.
    """
    classes = np.union1d(records.object_category, records.category)
    index = np.zeros(records.categories + 1, np.int64)
    index[classes], index[-1] = np.arange(len(classes)), len(classes)
    overlap = float(records.protocol.iou_thresholds[0])
    matrix = np.zeros((len(classes) + 1,) * 2, np.int64)
    confident = records.score >= min_score
    true = confident & (records.outcome[:, 0, 0] == TRUE_POSITIVE)
    np.add.at(matrix, (index[records.category[true]], index[records.category[true]]), 1)
    false = np.flatnonzero(confident & (records.outcome[:, 0, 0] == FALSE_POSITIVE))
    left = np.flatnonzero(records.is_counted[:, 0] & ~records.found_objects(min_score))
    # One group per image with all classes, as any class may be confused with any other.
    objects = _sorted_side(records.object_image[left], np.zeros(len(left)))
    objects = _Side(left[objects.order], objects.group)
    detections = _sorted_side(records.image[false], -records.score[false])
    detections = _Side(records.row[false][detections.order], detections.group)
    pairs = _overlapping_pairs(truth, results, detections, objects, overlap)
    ones = np.ones((len(left), 1), bool)
    rows, chosen = _greedy_matches(pairs, detections.group, ones, np.zeros(len(left), bool), np.array([overlap]))
    object_of = np.full(len(false), len(left))
    object_of[rows] = chosen[:, 0, 0]
    object_class = np.append(records.object_category[objects.order], records.categories)
    np.add.at(matrix, (index[object_class[object_of]], index[results.category[detections.order]]), 1)
    missed = np.setdiff1d(np.arange(len(left)), object_of)
    np.add.at(matrix, (index[object_class[missed]], len(classes)), 1)
    return classes, matrix


def rank_in_run(values: np.ndarray) -> np.ndarray:
    """The index of each element in its run of equal values, from 0."""
    begins = np.concatenate(([True], values[1:] != values[:-1]))[: len(values)]
    index = np.arange(len(values))
    return index - np.maximum.accumulate(np.where(begins, index, 0))


def _is_outside(areas_px: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Whether areas `[N]` lie outside each range, `[N, A]` bool."""
    low, high = protocol.areas_px.T
    is_outside: np.ndarray = (areas_px[:, None] < low) | (areas_px[:, None] > high)
    return is_outside


def _box_overlaps(boxes: np.ndarray, objects: np.ndarray, is_crowd: np.ndarray) -> np.ndarray:
    """IoU `[P]` float64 of boxes `[P, 4]` and objects `[P, 4]`, both (x, y, width, height).

    For a crowd region the intersection is divided by the area of the box only.

    Source: pycocotools, `bbIou`.
    """
    width, height = (
        np.minimum(boxes[:, k + 2] + boxes[:, k], objects[:, k + 2] + objects[:, k])
        - np.maximum(boxes[:, k], objects[:, k])
        for k in (0, 1)
    )
    overlap = width * height
    area = boxes[:, 2] * boxes[:, 3]
    union = np.where(is_crowd, area, area + objects[:, 2] * objects[:, 3] - overlap)
    iou = np.zeros(len(boxes))
    np.divide(overlap, union, out=iou, where=(width > 0) & (height > 0))
    return iou


def keypoint_overlaps(
    keypoints: np.ndarray, objects: np.ndarray, boxes: np.ndarray, areas_px: np.ndarray, sigmas: np.ndarray
) -> np.ndarray:
    """Object keypoint similarity (OKS) `[P]` float64.

    Args:
        keypoints: `[P, K, 3]` x, y and a third value, which is not used.
        objects: `[P, K, 3]` x, y and visibility; 0: not annotated. For an object without annotated keypoints, distances
            are measured to a box twice its size.
        boxes: `[P, 4]` (x, y, width, height) of the objects.
        areas_px: `[P]` areas of the objects.
        sigmas: `[K]` OKS sigmas, relative to the object's size.

    Source: pycocotools, `computeOks`.
    """
    is_visible = objects[:, :, 2] > 0
    visible = np.count_nonzero(is_visible, axis=1)
    distances = [keypoints[:, :, k] - objects[:, :, k] for k in (0, 1)]
    bare = np.flatnonzero(visible == 0)
    for k in (0, 1):
        low, side, position = boxes[bare, k, None], boxes[bare, k + 2, None], keypoints[bare, :, k]
        below, above = (low - side) - position, position - (low + side * 2)
        distances[k][bare] = np.maximum(0, below) + np.maximum(0, above)
    squares = distances[0] ** 2 + distances[1] ** 2
    with np.errstate(over="ignore"):
        terms = np.exp(-(squares / (sigmas * 2) ** 2 / (areas_px + np.spacing(1))[:, None] / 2))
    # Sum rows of equal length together: padding with zeros would change the order of addition.
    used = np.where(visible == 0, len(sigmas), visible)
    is_used = is_visible | (visible == 0)[:, None]
    similarity = np.empty(len(keypoints))
    for number in np.unique(used):
        rows = used == number
        similarity[rows] = np.sum(terms[rows][is_used[rows]].reshape(-1, number), axis=1) / number
    return similarity


def _sorted_side(group: np.ndarray, key: np.ndarray) -> _Side:
    """Sorts rows by group, then by ascending key; ties keep their order."""
    order = np.lexsort((key, group))
    return _Side(order, group[order])


def _run_edges(values: np.ndarray) -> list[int]:
    """Start of each run of equal values, and the number of values."""
    return [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)] if len(values) else [0]


def _overlapping_pairs(
    truth: GroundTruth, results: Results, detections: _Side, objects: _Side, min_overlap: float
) -> _Pairs:
    """All pairs in the same group with an overlap of at least `min_overlap`, which is not 0."""
    find = _mask_pairs if results.kind == "segm" else _box_or_keypoint_pairs
    parts = list(find(truth, results, detections, objects, min_overlap))
    empty = _Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    return _Pairs(*(np.concatenate(values) for values in zip(empty, *parts, strict=True)))


def _all_pairs(
    detections: _Side, objects: _Side, max_pairs: int = _MAX_PAIRS
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the rows of all pairs in the same group, a limited number at a time."""
    start = np.searchsorted(objects.group, detections.group, "left")
    number = np.searchsorted(objects.group, detections.group, "right") - start
    for begin, end in pairwise(_run_edges(np.cumsum(number) // max_pairs)):
        some = number[begin:end]
        before = np.cumsum(some) - some
        yield (
            np.repeat(np.arange(begin, end), some),
            np.arange(some.sum()) + np.repeat(start[begin:end] - before, some),
        )


def _box_or_keypoint_pairs(
    truth: GroundTruth, results: Results, detections: _Side, objects: _Side, min_overlap: float
) -> Iterator[_Pairs]:
    object_boxes = truth.boxes  # read even without a pair: an annotation without a valid box is an error
    for detection, row in _all_pairs(
        detections, objects, _MAX_KEYPOINT_PAIRS if results.kind == "keypoints" else _MAX_PAIRS
    ):
        one, other = detections.order[detection], objects.order[row]
        if results.kind == "bbox":
            overlap = _box_overlaps(results.boxes[one], object_boxes[other], truth.is_crowd[other])
        else:
            points, object_points = results.keypoints[one], truth.keypoints[other]
            overlap = keypoint_overlaps(points, object_points, object_boxes[other], truth.areas_px[other], truth.sigmas)
        near = overlap >= min_overlap
        yield _Pairs(detection[near], row[near], overlap[near])


def _mask_pairs(
    truth: GroundTruth, results: Results, detections: _Side, objects: _Side, min_overlap: float
) -> Iterator[_Pairs]:
    """Pairs of masks; pairs with areas that exclude the overlap are not compared."""
    masks, pixels = truth.masks
    is_possible = np.zeros(len(detections.order), bool)
    for detection, row in _all_pairs(detections, objects):
        one, other = results.pixels[detections.order[detection]], pixels[objects.order[row]]
        near = truth.is_crowd[objects.order[row]] | (np.minimum(one, other) >= min_overlap * np.maximum(one, other))
        is_possible[detection[near]] = True
    rows = np.flatnonzero(is_possible)
    groups = detections.group[rows]
    for begin, end in pairwise(_run_edges(groups)):
        first, last = (int(np.searchsorted(objects.group, groups[begin], side)) for side in ("left", "right"))
        own = objects.order[first:last]
        overlap = np.asarray(
            mask_api.iou(
                [results.masks[k] for k in detections.order[rows[begin:end]].tolist()],
                [masks[k] for k in own.tolist()],
                truth.is_crowd[own].astype(np.uint8).tolist(),
            )
        )
        near = np.nonzero(overlap >= min_overlap)
        yield _Pairs(rows[begin:end][near[0]], first + near[1], overlap[near])


def _greedy_matches(
    pairs: _Pairs, group: np.ndarray, is_counted: np.ndarray, is_crowd: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the object that each detection matches.

    Args:
        pairs: rows of detections and objects that overlap.
        group: `[D]` int64, group of each detection, ascending.
        is_counted: `[G, A]` bool, objects that are not ignored; a detection prefers these.
        is_crowd: `[G]` bool, crowd flags of the objects; a crowd can be matched any number of times.
        thresholds: `[T]` float64.

    Returns:
        The rows `[C]` of the detections with a pair, and the object row `[C, A, T]` int32 that each matches; G: none.
    """
    # A detection prefers the largest overlap; of equal overlaps, the last object.
    order = np.lexsort((-pairs.truth, -pairs.overlap, pairs.detection))
    candidates, overlap = pairs.truth[order].astype(np.int32), pairs.overlap[order]
    rows, first, number = np.unique(pairs.detection, return_index=True, return_counts=True)
    none, areas = is_counted.shape
    columns = areas * len(thresholds)  # one per area range and threshold
    counted = np.repeat(np.append(is_counted, np.zeros((1, areas), bool), axis=0), len(thresholds), axis=1)
    free, stays_free = np.ones((none + 1, columns), bool), np.append(is_crowd, True)
    needed = np.tile(thresholds, areas)
    matched = np.full((len(rows), columns), none, np.int32)
    turn = rank_in_run(group[rows])
    sequence = np.lexsort((-number, turn))
    for begin, end in pairwise(_run_edges(turn[sequence])):
        now = sequence[begin:end]
        best, spare = matched[now], matched[now]  # copies
        for choice in reversed(range(int(number[now[0]]))):
            some = np.count_nonzero(number[now] > choice)  # sorted by descending number
            at = first[now[:some]] + choice
            candidate = candidates[at]
            can_be = free[candidate] & (overlap[at][:, None] >= needed)
            np.copyto(best[:some], candidate[:, None], where=can_be & counted[candidate])
            np.copyto(spare[:some], candidate[:, None], where=can_be & ~counted[candidate])
        chosen = np.where(best < none, best, spare)
        free[chosen, np.arange(columns)] = stays_free[chosen]
        matched[now] = chosen
    return rows, matched.reshape(len(rows), areas, len(thresholds))


def _outcomes(
    unmatched: np.ndarray, chosen: np.ndarray, is_counted: np.ndarray, objects: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes `[C, A, T]` and objects `[C, T]` of detections that match object row `chosen` `[C, A, T]`."""
    none = len(is_counted)
    counted = np.append(is_counted, np.zeros((1, is_counted.shape[1]), bool), axis=0)
    areas = np.arange(is_counted.shape[1])[:, None]
    matched = np.where(counted[chosen, areas], TRUE_POSITIVE, IGNORED).astype(np.uint8)
    outcome = np.where(chosen < none, matched, unmatched)
    return outcome, np.append(objects, -1)[chosen[:, 0]]
