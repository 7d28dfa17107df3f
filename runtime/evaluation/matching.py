"""COCO's matching of detections and objects for all images at once, equal to pycocotools'.

Detections of one image and class choose objects in the order of their scores, each the one that it overlaps most.
That order matters only inside such a group, so the k-th detections of all groups choose at the same time, for every
area range and threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.protocol import Protocol, protocol_of
from maskrcnn.runtime.evaluation.results_file import Results

# How much detections and annotated objects overlap, pair by pair, in pycocotools' arithmetic to the last digit.
#
# Boxes and keypoints are computed here for all pairs at once; masks by pycocotools' own C code, group by group.


def _box_overlaps(boxes: np.ndarray, objects: np.ndarray, is_crowd: np.ndarray) -> np.ndarray:
    """IoU `[P]` float64 of boxes `[P, 4]` and objects `[P, 4]`, both (x, y, width, height).

    With a crowd region the overlap is divided by the area of the box alone.

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
    found = np.zeros(len(boxes))
    return np.divide(overlap, union, out=found, where=(width > 0) & (height > 0))


def _mask_overlaps(
    masks: Sequence[dict[str, Any]], objects: Sequence[dict[str, Any]], is_crowd: np.ndarray
) -> np.ndarray:
    """IoU `[D, G]` float64 of compressed run lengths of one image, all against all; neither list is empty."""
    from pycocotools import mask as mask_api

    return np.asarray(mask_api.iou(list(masks), list(objects), is_crowd.astype(np.uint8).tolist()))


def keypoint_overlaps(
    keypoints: np.ndarray, objects: np.ndarray, boxes: np.ndarray, areas_px: np.ndarray, sigmas: np.ndarray
) -> np.ndarray:
    """Object keypoint similarity `[P]` float64.

    Args:
        keypoints: `[P, K, 3]` x, y and a third value that is not read.
        objects: `[P, K, 3]` x, y, and visibility: 0 is not annotated. Of an object without any annotated keypoint
            distances are measured to a box twice its size.
        boxes: `[P, 4]` (x, y, width, height) of the objects.
        areas_px: `[P]` of the objects.
        sigmas: `[K]`, how far annotators are off, relative to the object's size.

    Source: pycocotools, `computeOks`.
    """
    is_visible = objects[:, :, 2] > 0
    visible = np.count_nonzero(is_visible, axis=1)
    distances = [keypoints[:, :, k] - objects[:, :, k] for k in (0, 1)]
    bare = np.flatnonzero(visible == 0)
    for k in (0, 1):
        low, side, place = boxes[bare, k, None], boxes[bare, k + 2, None], keypoints[bare, :, k]
        below, above = (low - side) - place, place - (low + side * 2)
        distances[k][bare] = np.maximum(0, below) + np.maximum(0, above)
    squares = distances[0] ** 2 + distances[1] ** 2
    with np.errstate(over="ignore"):
        terms = np.exp(-(squares / (sigmas * 2) ** 2 / (areas_px + np.spacing(1))[:, None] / 2))
    # Sums over equally many terms at a time: zeros between them would change the order of addition.
    used = np.where(visible == 0, len(sigmas), visible)
    is_used = is_visible | (visible == 0)[:, None]
    found = np.empty(len(keypoints))
    for number in np.unique(used):
        rows = used == number
        found[rows] = np.sum(terms[rows][is_used[rows]].reshape(-1, number), axis=1) / number
    return found


# Pairs of detections and objects of one image and class that overlap enough to be matched.

# Pairs of a portion, so that its arrays stay small; pairs of keypoints have one number for each of them, and again as
# many between.
_PAIRS_AT_ONCE, _KEYPOINT_PAIRS_AT_ONCE = 1 << 18, 1 << 14


class Side(NamedTuple):
    """Detections or objects, sorted by class and image."""

    order: np.ndarray  # int64, indices in the results or in the ground truth
    group: np.ndarray  # int64, class · images + image


class _Pairs(NamedTuple):
    """Rows of the two sides that overlap, by ascending row of the detections."""

    detection: np.ndarray  # [P] int64
    truth: np.ndarray  # [P] int64
    overlap: np.ndarray  # [P] float64


def sorted_side(group: np.ndarray, key: np.ndarray) -> Side:
    """Rows by group, inside a group by ascending key, and where keys tie as they came."""
    order = np.lexsort((key, group))
    return Side(order, group[order])


def _run_edges(values: np.ndarray) -> list[int]:
    """Where each run of equal values begins, and the length."""
    return [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)] if len(values) else [0]


def candidates(truth: GroundTruth, results: Results, detections: Side, objects: Side, least: float) -> _Pairs:
    """All pairs of a group that overlap by at least `least`, which is not 0."""
    find = _mask_pairs if results.kind == "segm" else _other_pairs
    parts = list(find(truth, results, detections, objects, least))
    empty = _Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    return _Pairs(*(np.concatenate(values) for values in zip(empty, *parts, strict=True)))


def _all_pairs(
    detections: Side, objects: Side, at_once: int = _PAIRS_AT_ONCE
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of all pairs of a group, in portions."""
    start = np.searchsorted(objects.group, detections.group, "left")
    number = np.searchsorted(objects.group, detections.group, "right") - start
    for begin, end in pairwise(_run_edges(np.cumsum(number) // at_once)):
        some = number[begin:end]
        before = np.cumsum(some) - some
        yield (
            np.repeat(np.arange(begin, end), some),
            np.arange(some.sum()) + np.repeat(start[begin:end] - before, some),
        )


def _other_pairs(
    truth: GroundTruth, results: Results, detections: Side, objects: Side, least: float
) -> Iterator[_Pairs]:
    """Pairs of boxes or of keypoints."""
    at_once = _KEYPOINT_PAIRS_AT_ONCE if results.kind == "keypoints" else _PAIRS_AT_ONCE
    for detection, row in _all_pairs(detections, objects, at_once):
        one, other = detections.order[detection], objects.order[row]
        if results.kind == "bbox":
            overlap = _box_overlaps(results.boxes[one], truth.boxes[other], truth.is_crowd[other])
        else:
            overlap = keypoint_overlaps(
                results.keypoints[one], truth.keypoints[other], truth.boxes[other], truth.areas_px[other], truth.sigmas
            )
        near = overlap >= least
        yield _Pairs(detection[near], row[near], overlap[near])


def _mask_pairs(
    truth: GroundTruth, results: Results, detections: Side, objects: Side, least: float
) -> Iterator[_Pairs]:
    """Pairs of masks; those whose sizes alone forbid such an overlap are not compared."""
    masks, pixels = truth.masks
    is_possible = np.zeros(len(detections.order), bool)
    for detection, row in _all_pairs(detections, objects):
        one, other = results.pixels[detections.order[detection]], pixels[objects.order[row]]
        near = truth.is_crowd[objects.order[row]] | (np.minimum(one, other) >= least * np.maximum(one, other))
        is_possible[detection[near]] = True
    rows = np.flatnonzero(is_possible)
    groups = detections.group[rows]
    for begin, end in pairwise(_run_edges(groups)):
        first, last = (int(np.searchsorted(objects.group, groups[begin], side)) for side in ("left", "right"))
        own = objects.order[first:last]
        overlap = _mask_overlaps(
            [results.masks[k] for k in detections.order[rows[begin:end]].tolist()],
            [masks[k] for k in own.tolist()],
            truth.is_crowd[own],
        )
        near = np.nonzero(overlap >= least)
        yield _Pairs(rows[begin:end][near[0]], first + near[1], overlap[near])


IGNORED, FALSE, TRUE = 0, 1, 2  # what a detection is at a threshold and for an area range
_CLOSE_TO_ONE = 1 - 1e-10  # pycocotools asks for no more overlap than this


@dataclass(frozen=True, eq=False)
class MatchRecords:
    """What became of each detection, from which every figure can be summed up.

    Detections are sorted by class, image and descending score. Only those that count are there: of an image and
    class, at most the last of `protocol.most_detections`.
    """

    protocol: Protocol
    images: int
    categories: int
    place: np.ndarray  # [D] int64, index in the results' entries
    image: np.ndarray  # [D] int64
    category: np.ndarray  # [D] int64
    score: np.ndarray  # [D] float64
    rank: np.ndarray  # [D] int64, in its image and class, from 0
    outcome: np.ndarray  # [D, A, T] uint8: IGNORED, FALSE or TRUE
    found: np.ndarray  # [D, T] int64, index of the object that it took, of any size; -1 for none
    object_image: np.ndarray  # [G] int64
    object_category: np.ndarray  # [G] int64
    is_counted: np.ndarray  # [G, A] bool, objects that are to be found

    @cached_property
    def by_score(self) -> np.ndarray:
        """`[D]` rows by class and descending score; where scores tie, by image."""
        return np.lexsort((-self.score, self.category))


def match_records(truth: GroundTruth, results: Results) -> MatchRecords:
    """Matches results to objects, as `results.kind` says.

    Raises:
        UserError: for annotations that lack what the kind needs.
    """
    protocol, images = protocol_of(results.kind), len(truth.image_ids)
    is_counted = ~(_is_outside(truth.areas_px, protocol) | truth.is_ignored(protocol.kind)[:, None])
    objects = sorted_side(truth.category * images + truth.image, np.zeros(len(truth)))
    detections = sorted_side(results.category * images + results.image, -results.score)
    rank = rank_in_run(detections.group)
    counts = rank < protocol.most_detections[-1]
    detections = Side(*(values[counts] for values in detections))
    order = detections.order
    pairs = candidates(truth, results, detections, objects, float(protocol.iou_thresholds[0]))
    rows, taken = choices(
        pairs,
        detections.group,
        is_counted[objects.order],
        truth.is_crowd[objects.order],
        np.minimum(protocol.iou_thresholds, _CLOSE_TO_ONE),
    )
    outcome = np.repeat(
        np.where(_is_outside(results.area_px[order], protocol), IGNORED, FALSE).astype(np.uint8)[:, :, None],
        len(protocol.iou_thresholds),
        axis=2,
    )
    found = np.full((len(order), len(protocol.iou_thresholds)), -1)
    outcome[rows], found[rows] = _outcomes(outcome[rows], taken, is_counted[objects.order], objects.order)
    return MatchRecords(
        protocol=protocol,
        images=images,
        categories=len(truth.category_ids),
        place=results.place[order],
        image=results.image[order],
        category=results.category[order],
        score=results.score[order],
        rank=rank[counts],
        outcome=outcome,
        found=found,
        object_image=truth.image,
        object_category=truth.category,
        is_counted=is_counted,
    )


def rank_in_run(values: np.ndarray) -> np.ndarray:
    """The place of each element in its run of equal values, from 0."""
    begins = np.concatenate(([True], values[1:] != values[:-1]))[: len(values)]
    place = np.arange(len(values))
    return place - np.maximum.accumulate(np.where(begins, place, 0))


def _is_outside(areas_px: np.ndarray, protocol: Protocol) -> np.ndarray:
    """`[N, A]` bool: whether areas `[N]` lie outside each range."""
    low, high = protocol.areas_px.T
    return (areas_px[:, None] < low) | (areas_px[:, None] > high)


def choices(
    pairs: _Pairs, group: np.ndarray, is_counted: np.ndarray, is_crowd: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which object each detection takes.

    Args:
        pairs: of rows of detections and objects.
        group: `[D]` int64, ascending, of the detections.
        is_counted: `[G, A]` bool of the objects; a detection takes one that counts before any that does not.
        is_crowd: `[G]` bool of the objects; such a one can be taken any number of times.
        thresholds: `[T]` float64.

    Returns:
        the rows `[C]` of the detections that are in a pair, and the rows `[C, A, T]` int32 of what they take, G for
        nothing.
    """
    # What a detection prefers: the larger overlap, and of equal ones the later object.
    order = np.lexsort((-pairs.truth, -pairs.overlap, pairs.detection))
    wishes, overlap = pairs.truth[order].astype(np.int32), pairs.overlap[order]
    rows, first, number = np.unique(pairs.detection, return_index=True, return_counts=True)
    (nothing, areas), lanes = is_counted.shape, is_counted.shape[1] * len(thresholds)
    counted = np.repeat(np.append(is_counted, np.zeros((1, areas), bool), axis=0), len(thresholds), axis=1)
    free, stays_free = np.ones((nothing + 1, lanes), bool), np.append(is_crowd, True)
    needed = np.tile(thresholds, areas)
    taken = np.full((len(rows), lanes), nothing, np.int32)
    turn = rank_in_run(group[rows])
    sequence = np.lexsort((-number, turn))
    for begin, end in pairwise(_run_edges(turn[sequence])):
        now = sequence[begin:end]
        best, spare = taken[now], taken[now]  # copies
        for wish in reversed(range(int(number[now[0]]))):
            some = np.count_nonzero(number[now] > wish)  # they come by descending number
            at = first[now[:some]] + wish
            thing = wishes[at]
            can_be = free[thing] & (overlap[at][:, None] >= needed)
            np.copyto(best[:some], thing[:, None], where=can_be & counted[thing])
            np.copyto(spare[:some], thing[:, None], where=can_be & ~counted[thing])
        chosen = np.where(best < nothing, best, spare)
        free[chosen, np.arange(lanes)] = stays_free[chosen]
        taken[now] = chosen
    return rows, taken.reshape(len(rows), areas, len(thresholds))


def _outcomes(
    unmatched: np.ndarray, taken: np.ndarray, is_counted: np.ndarray, objects: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes `[C, A, T]` and objects `[C, T]` of detections that take row `taken` `[C, A, T]`, or nothing."""
    nothing = len(is_counted)
    counted = np.append(is_counted, np.zeros((1, is_counted.shape[1]), bool), axis=0)
    areas = np.arange(is_counted.shape[1])[:, None]
    matched = np.where(counted[taken, areas], TRUE, IGNORED).astype(np.uint8)
    outcome = np.where(taken < nothing, matched, unmatched)
    return outcome, np.append(objects, -1)[taken[:, 0]]
