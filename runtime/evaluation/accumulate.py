"""COCO's precision and recall from match records, equal to pycocotools' `accumulate` to the last digit.

Precision can only rise at a true positive, so it is computed at these alone.
"""

from __future__ import annotations

import numpy as np

from maskrcnn.runtime.evaluation.match_records import IGNORED, TRUE, MatchRecords
from maskrcnn.runtime.evaluation.protocol import Scores

_STEP = np.spacing(1)  # pycocotools adds it to the number of detections


def accumulate(records: MatchRecords) -> Scores:
    """Precision and recall of every class, area range, threshold and number of detections."""
    protocol = records.protocol
    recalls = protocol.recall_thresholds
    lanes = (len(protocol.area_names), len(protocol.iou_thresholds))  # A, T
    shape = (*lanes, records.categories, len(protocol.most_detections))
    precision, scores = (np.full((*shape, len(recalls)), -1.0) for _ in range(2))
    recall = np.full(shape, -1.0)
    order = records.by_score
    edges = np.searchsorted(records.category[order], np.arange(records.categories + 1))
    to_find = _objects_to_find(records)
    for category in np.flatnonzero(to_find[:, 0]).tolist():
        rows = order[edges[category] : edges[category + 1]]
        outcome = np.ascontiguousarray(records.outcome[rows].transpose(1, 2, 0)).reshape(lanes[0] * lanes[1], len(rows))
        counted = to_find[category] > 0
        each = np.repeat(to_find[category], lanes[1])
        for k, most in enumerate(protocol.most_detections):
            counts = records.rank[rows] < most
            some = outcome if counts.all() else np.ascontiguousarray(outcome[:, counts])
            curves = _curves(some, records.score[rows][counts], each, recalls)
            precise, at_score, reached = (values.reshape(*lanes, -1)[counted] for values in curves)
            precision[counted, :, category, k], scores[counted, :, category, k] = precise, at_score
            recall[counted, :, category, k] = reached[..., 0]
    axes = (1, 4, 2, 0, 3)  # A, T, K, M, R → T, R, K, A, M
    return Scores(
        protocol,
        np.ascontiguousarray(precision.transpose(axes)),
        np.ascontiguousarray(recall.transpose(1, 2, 0, 3)),
        np.ascontiguousarray(scores.transpose(axes)),
    )


def _objects_to_find(records: MatchRecords) -> np.ndarray:
    """`[K, A]` int64: objects of each class and area range."""
    found = np.zeros((records.categories, records.is_counted.shape[1]), np.int64)
    np.add.at(found, records.object_category, records.is_counted)
    return found


def _curves(
    outcome: np.ndarray, score: np.ndarray, to_find: np.ndarray, recalls: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision and score `[L, R]` at each recall, and the recall `[L, 1]` that is reached, of L lanes.

    Args:
        outcome: `[L, D]` of detections by descending score.
        score: `[D]`.
        to_find: `[L]` objects; of lanes without any the figures mean nothing.
        recalls: `[R]`, from 0 upwards.
    """
    lanes = len(outcome)
    lane, column = np.divmod(np.flatnonzero(outcome == TRUE), max(outcome.shape[1], 1))
    first = np.searchsorted(lane, np.arange(lanes + 1))
    rank, number = np.arange(len(lane)) - first[lane], np.diff(first)
    so_far = np.cumsum(outcome != IGNORED, axis=1, dtype=np.int32)[lane, column]
    precise = np.zeros((lanes, number.max(initial=0)))
    precise[lane, rank] = (rank + 1.0) / (so_far + _STEP)
    highest = np.maximum.accumulate(precise[:, ::-1], axis=1)[:, ::-1]
    found = np.maximum(to_find, 1)
    # The recalls that a true positive is the first to reach.
    reached = np.searchsorted(recalls, (rank + 1.0) / found[lane], side="right")
    before = np.where(rank > 0, np.append(0, reached)[:-1], 0)
    of = np.repeat(np.arange(len(lane)), reached - before)
    place = np.arange(len(of)) - np.repeat(np.cumsum(reached - before) - reached, reached - before)
    precision, at_score = np.zeros((lanes, len(recalls))), np.zeros((lanes, len(recalls)))
    precision[lane[of], place] = highest[lane[of], rank[of]]
    at_score[lane[of], place] = score[column[of]]
    if len(score):
        at_score[:, recalls == 0] = score[0]  # a recall of 0 is reached by whatever comes first
    return precision, at_score, (number / found)[:, None]
