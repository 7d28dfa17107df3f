"""Pairs of detections and objects of one image and class that overlap enough to be matched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.overlaps import box_overlaps, keypoint_overlaps, mask_overlaps
from maskrcnn.runtime.evaluation.results_file import Results

# Pairs of a portion, so that its arrays stay small; pairs of keypoints have one number for each of them, and again as
# many between.
_PAIRS_AT_ONCE, _KEYPOINT_PAIRS_AT_ONCE = 1 << 18, 1 << 14


class Side(NamedTuple):
    """Detections or objects, sorted by class and image."""

    order: np.ndarray  # int64, indices in the results or in the ground truth
    group: np.ndarray  # int64, class · images + image


class Pairs(NamedTuple):
    """Rows of the two sides that overlap, by ascending row of the detections."""

    detection: np.ndarray  # [P] int64
    truth: np.ndarray  # [P] int64
    overlap: np.ndarray  # [P] float64


def sorted_side(group: np.ndarray, key: np.ndarray) -> Side:
    """Rows by group, inside a group by ascending key, and where keys tie as they came."""
    order = np.lexsort((key, group))
    return Side(order, group[order])


def run_edges(values: np.ndarray) -> list[int]:
    """Where each run of equal values begins, and the length."""
    return [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)] if len(values) else [0]


def candidates(truth: GroundTruth, results: Results, detections: Side, objects: Side, least: float) -> Pairs:
    """All pairs of a group that overlap by at least `least`, which is not 0."""
    find = _mask_pairs if results.kind == "segm" else _other_pairs
    parts = list(find(truth, results, detections, objects, least))
    empty = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    return Pairs(*(np.concatenate(values) for values in zip(empty, *parts, strict=True)))


def _all_pairs(
    detections: Side, objects: Side, at_once: int = _PAIRS_AT_ONCE
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of all pairs of a group, in portions."""
    start = np.searchsorted(objects.group, detections.group, "left")
    number = np.searchsorted(objects.group, detections.group, "right") - start
    for begin, end in pairwise(run_edges(np.cumsum(number) // at_once)):
        some = number[begin:end]
        before = np.cumsum(some) - some
        yield (
            np.repeat(np.arange(begin, end), some),
            np.arange(some.sum()) + np.repeat(start[begin:end] - before, some),
        )


def _other_pairs(
    truth: GroundTruth, results: Results, detections: Side, objects: Side, least: float
) -> Iterator[Pairs]:
    """Pairs of boxes or of keypoints."""
    at_once = _KEYPOINT_PAIRS_AT_ONCE if results.kind == "keypoints" else _PAIRS_AT_ONCE
    for detection, row in _all_pairs(detections, objects, at_once):
        one, other = detections.order[detection], objects.order[row]
        if results.kind == "bbox":
            overlap = box_overlaps(results.boxes[one], truth.boxes[other], truth.is_crowd[other])
        else:
            overlap = keypoint_overlaps(
                results.keypoints[one], truth.keypoints[other], truth.boxes[other], truth.areas_px[other], truth.sigmas
            )
        near = overlap >= least
        yield Pairs(detection[near], row[near], overlap[near])


def _mask_pairs(truth: GroundTruth, results: Results, detections: Side, objects: Side, least: float) -> Iterator[Pairs]:
    """Pairs of masks; those whose sizes alone forbid such an overlap are not compared."""
    masks, pixels = truth.masks
    is_possible = np.zeros(len(detections.order), bool)
    for detection, row in _all_pairs(detections, objects):
        one, other = results.pixels[detections.order[detection]], pixels[objects.order[row]]
        near = truth.is_crowd[objects.order[row]] | (np.minimum(one, other) >= least * np.maximum(one, other))
        is_possible[detection[near]] = True
    rows = np.flatnonzero(is_possible)
    groups = detections.group[rows]
    for begin, end in pairwise(run_edges(groups)):
        first, last = (int(np.searchsorted(objects.group, groups[begin], side)) for side in ("left", "right"))
        own = objects.order[first:last]
        overlap = mask_overlaps(
            [results.masks[k] for k in detections.order[rows[begin:end]].tolist()],
            [masks[k] for k in own.tolist()],
            truth.is_crowd[own],
        )
        near = np.nonzero(overlap >= least)
        yield Pairs(rows[begin:end][near[0]], first + near[1], overlap[near])
