"""COCO's matching of detections and objects for all images at once, equal to pycocotools'.

Detections of one image and class choose objects in the order of their scores, each the one that it overlaps most.
That order matters only inside such a group, so the k-th detections of all groups choose at the same time, for every
area range and threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from maskrcnn.runtime.evaluation.candidates import Pairs, Side, candidates, run_edges, sorted_side
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.protocol import Protocol, protocol_of
from maskrcnn.runtime.evaluation.results_file import Results

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
    pairs: Pairs, group: np.ndarray, is_counted: np.ndarray, is_crowd: np.ndarray, thresholds: np.ndarray
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
    for begin, end in pairwise(run_edges(turn[sequence])):
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
