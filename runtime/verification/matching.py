"""Which rows of two models belong together: pairs of boxes by their overlap. Needs NumPy only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_TAKEN = -1.0  # in a matrix of overlaps: this pair is not to be made


class Pairs(NamedTuple):
    """Rows `first[k]` and `second[k]` belong together; the others of either side are alone. All int64."""

    first: np.ndarray
    second: np.ndarray
    alone_first: np.ndarray
    alone_second: np.ndarray


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU `[A, B]` float32 of boxes `[A, 4]` and `[B, 4]` xyxy; zero where both areas are zero, NaN of NaN."""
    first, second = (np.asarray(boxes, np.float32).reshape(-1, 4) for boxes in (first, second))
    overlap = np.ones((len(first), len(second)), np.float32)
    for axis in (0, 1):
        low = np.maximum(first[:, None, axis], second[None, :, axis])
        overlap *= (np.minimum(first[:, None, axis + 2], second[None, :, axis + 2]) - low).clip(min=0)
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None, :] - overlap
    return overlap / np.maximum(union, np.float32(1e-9))


def of_equal_label(overlaps: np.ndarray, labels: np.ndarray, other_labels: np.ndarray) -> np.ndarray:
    """Overlaps `[A, B]` in which rows of different labels `[A]` and `[B]` make no pairs."""
    return np.where(labels[:, None] == other_labels[None, :], overlaps, _TAKEN)


def pair_in_order(overlaps: np.ndarray, min_iou: float) -> Pairs:
    """Each row of the first side in its order takes the best of those left: as COCO's evaluation does with scores.

    Args:
        overlaps: `[A, B]`; a row with NaN among those left stays alone.
        min_iou: a pair overlaps at least so much.
    """
    left = np.array(overlaps, copy=True)
    pairs = []
    for row in range(left.shape[0] if left.shape[1] else 0):
        best = int(left[row].argmax())  # of a row with NaN: its place, which is not ≥ min_iou
        if left[row, best] >= min_iou:
            pairs.append((row, best))
            left[:, best] = _TAKEN
    return _with_the_rest(pairs, overlaps.shape)


def pair_best_first(overlaps: np.ndarray, min_iou: float) -> Pairs:
    """The pair that overlaps most is made first: no row takes the partner that fits another better.

    Args:
        overlaps: `[A, B]`; NaN makes no pair.
        min_iou: a pair overlaps at least so much.
    """
    rows, columns = np.nonzero(overlaps >= min_iou)
    order = np.argsort(-overlaps[rows, columns], kind="stable")
    free_first, free_second = (np.ones(length, bool) for length in overlaps.shape)
    pairs = []
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if free_first[row] and free_second[column]:
            free_first[row] = free_second[column] = False
            pairs.append((row, column))
    return _with_the_rest(sorted(pairs), overlaps.shape)


def _with_the_rest(pairs: list[tuple[int, int]], shape: tuple[int, ...]) -> Pairs:
    made = np.array(pairs, np.int64).reshape(-1, 2)
    alone = (np.setdiff1d(np.arange(length, dtype=np.int64), made[:, k]) for k, length in enumerate(shape))
    return Pairs(made[:, 0], made[:, 1], *alone)
