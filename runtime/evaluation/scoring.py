"""COCO's metrics of results, equal to pycocotools' to the last digit.

This module computes precision and recall (`accumulate` in pycocotools); matching is in `matching.py`. Precision rises
only at true positives, so it is computed only there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.matching import IGNORED, TRUE_POSITIVE, MatchRecords, match_records
from maskrcnn.runtime.evaluation.protocol import Scores
from maskrcnn.runtime.evaluation.results_file import Results, checked_results

_STEP = np.spacing(1)  # pycocotools adds it to the number of detections


@dataclass(frozen=True, eq=False)
class Scored:
    """Results with their scores, which are computed at first access."""

    truth: GroundTruth
    results: Results
    max_detections: tuple[int, ...] = ()  # as for `protocol_of`

    @property
    def kind(self) -> str:
        """ "bbox", "segm" or "keypoints"."""
        return self.results.kind

    @cached_property
    def records(self) -> MatchRecords:
        """The outcome of each detection."""
        return match_records(self.truth, self.results, self.max_detections)

    def remarks(self) -> list[str]:
        """Lines about how these results are scored."""
        return [text for text in (self.results.remark(), self.records.protocol.remark()) if text]

    @cached_property
    def scores(self) -> Scores:
        """COCO's precision and recall."""
        return _accumulate(self.records)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """COCO's metrics by name."""
        return self.scores.metrics()

    def by_class(self) -> dict[str, dict[str, float]]:
        """Metrics by class name, with the number of `objects`; a name that occurs twice gets the id appended."""
        names = self.truth.category_names
        count = Counter(names)
        keys = [
            name if count[name] == 1 else f"{name} ({category})"
            for name, category in zip(names, self.truth.category_ids.tolist(), strict=True)
        ]
        counted = self.truth.category[~self.truth.is_ignored(self.kind)]
        numbers = np.bincount(counted, minlength=len(keys)).tolist()
        return {key: {"objects": numbers[index], **self.scores.of_class(index)} for index, key in enumerate(keys)}


def score_entries(
    truth: GroundTruth,
    entries: Sequence[dict[str, Any]],
    kind: str,
    *,
    source: str = "the results",
    measured_by: str | None = None,
    max_detections: Sequence[int] = (),
) -> Scored:
    """Scores results in COCO's format.

    Args:
        truth: annotated objects.
        entries: results; if empty, precision is 0 for each class with objects.
        kind: "bbox", "segm" or "keypoints".
        source: name of the results, for error texts.
        measured_by: field to take boxes and areas from, see `checked_results`.
        max_detections: limits of detections per image and class, see `protocol_of`.

    Raises:
        UserError: for results that are malformed or of unknown images, or annotations without the fields of the kind.
    """
    results = checked_results(truth, entries, kind, source, measured_by=measured_by)
    scored = Scored(truth, results, tuple(max_detections))
    _ = scored.scores  # raises errors in the annotations here
    return scored


class F1Curve(NamedTuple):
    """Precision, recall and F1 of all classes together, over the score threshold."""

    thresholds: np.ndarray  # [P] the scores that occur, descending
    precision: np.ndarray  # [P]
    recall: np.ndarray  # [P]

    @property
    def f1(self) -> np.ndarray:
        """F1 `[P]`: the harmonic mean of precision and recall."""
        both = self.precision + self.recall
        f1: np.ndarray = 2 * self.precision * self.recall / np.where(both > 0, both, 1)
        return f1

    def best(self) -> tuple[float, float, float, float] | None:
        """The threshold of the highest F1 with its F1, precision and recall; None without a true positive.

        The threshold is midway between the lowest score that is kept and the next lower one, rounded to three digits if
        it then still separates the two.
        """
        f1 = self.f1
        if not f1.any():
            return None
        at = int(f1.argmax())
        kept = float(self.thresholds[at])
        below = float(self.thresholds[at + 1]) if at + 1 < len(f1) else kept
        middle = round((kept + below) / 2, 3)
        threshold = middle if below < middle <= kept else kept
        return threshold, float(f1[at]), float(self.precision[at]), float(self.recall[at])


def f1_curve(records: MatchRecords) -> F1Curve:
    """Precision and recall over the score threshold, at the lowest IoU threshold; ignored detections do not count."""
    counts = records.outcome[:, 0, 0] != IGNORED
    score, is_true = records.score[counts], records.outcome[counts, 0, 0] == TRUE_POSITIVE
    order = np.argsort(-score, kind="stable")
    score, true = score[order], np.cumsum(is_true[order])
    last = np.flatnonzero(
        np.append(score[1:] != score[:-1], True)[: len(score)]
    )  # equal scores are kept or left out together
    objects = max(int(records.is_counted[:, 0].sum()), 1)
    return F1Curve(score[last], true[last] / (last + 1), true[last] / objects)


def _accumulate(records: MatchRecords) -> Scores:
    """Precision and recall of every class, area range, threshold and limit of detections."""
    protocol = records.protocol
    recalls = protocol.recall_thresholds
    columns = (len(protocol.area_names), len(protocol.iou_thresholds))  # A, T
    objects = np.zeros((records.categories, columns[0]), np.int64)  # number to find, by class and area range
    np.add.at(objects, records.object_category, records.is_counted)
    classes = np.flatnonzero(objects[:, 0])  # only these need arrays: there may be ten thousand other classes
    shape = (*columns, len(classes), len(protocol.max_detections))
    precision, scores = (np.full((*shape, len(recalls)), -1.0) for _ in range(2))
    recall = np.full(shape, -1.0)
    order = records.by_score
    edges = np.searchsorted(records.category[order], np.arange(records.categories + 1))
    for at, category in enumerate(classes.tolist()):
        rows = order[edges[category] : edges[category + 1]]
        measured = objects[category] > 0
        each = np.repeat(objects[category], columns[1])
        outcome = np.ascontiguousarray(records.outcome[rows].transpose(1, 2, 0)).reshape(len(each), len(rows))
        for k, limit in enumerate(protocol.max_detections):
            counts = records.rank[rows] < limit
            some = outcome if counts.all() else np.ascontiguousarray(outcome[:, counts])
            curves = _curves(some, records.score[rows][counts], each, recalls)
            own_precision, own_scores, own_recall = (values.reshape(*columns, -1)[measured] for values in curves)
            precision[measured, :, at, k], scores[measured, :, at, k] = own_precision, own_scores
            recall[measured, :, at, k] = own_recall[..., 0]
    axes = (1, 4, 2, 0, 3)  # A, T, C, M, R → T, R, C, A, M
    return Scores(
        protocol,
        records.categories,
        classes,
        np.ascontiguousarray(precision.transpose(axes)),
        np.ascontiguousarray(recall.transpose(1, 2, 0, 3)),
        np.ascontiguousarray(scores.transpose(axes)),
    )


def _curves(
    outcome: np.ndarray, score: np.ndarray, objects: np.ndarray, recalls: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision and score `[L, R]` at each recall, and the maximum recall `[L, 1]`, of L lists of outcomes.

    Args:
        outcome: `[L, D]` outcomes of detections, by descending score.
        score: `[D]` their scores.
        objects: `[L]` number of objects to find; the results of a list with 0 are meaningless.
        recalls: `[R]`, ascending from 0.
    """
    lists = len(outcome)
    row, column = np.divmod(np.flatnonzero(outcome == TRUE_POSITIVE), max(outcome.shape[1], 1))
    first = np.searchsorted(row, np.arange(lists + 1))
    rank, number = np.arange(len(row)) - first[row], np.diff(first)
    detections = np.cumsum(outcome != IGNORED, axis=1, dtype=np.int32)[row, column]
    precise = np.zeros((lists, number.max(initial=0)))
    precise[row, rank] = (rank + 1.0) / (detections + _STEP)
    highest = np.maximum.accumulate(precise[:, ::-1], axis=1)[:, ::-1]
    to_find = np.maximum(objects, 1)
    # The recalls that each true positive reaches and no earlier one does.
    reached = np.searchsorted(recalls, (rank + 1.0) / to_find[row], side="right")
    before = np.where(rank > 0, np.append(0, reached)[:-1], 0)
    source = np.repeat(np.arange(len(row)), reached - before)
    place = np.arange(len(source)) - np.repeat(np.cumsum(reached - before) - reached, reached - before)
    precision, at_score = np.zeros((lists, len(recalls))), np.zeros((lists, len(recalls)))
    precision[row[source], place] = highest[row[source], rank[source]]
    at_score[row[source], place] = score[column[source]]
    if len(score):
        at_score[:, recalls == 0] = score[0]  # the first detection reaches a recall of 0
    return precision, at_score, (number / to_find)[:, None]


def average_precision(true: np.ndarray, counted: np.ndarray, objects: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """Average precision `[N]` of N lists of detections at once, for resampled datasets or single images.

    This is COCO's definition: the mean over 101 recalls of the precision, made monotonically decreasing. The sum here
    is over true positives instead of recalls, which may change the last digit.

    Args:
        true: `[N, P]` true positives up to and including each true positive.
        counted: `[N, P]` detections that count up to and including it; infinity where a list has fewer than P.
        objects: `[N]` number of objects to find; with 0 the result is NaN.
        recalls: `[R]` ascending from 0 to 1 in even steps.
    """
    precision = np.divide(true, counted, out=np.zeros(true.shape), where=counted > 0)
    highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = _reached(true / np.maximum(objects, 1)[:, None], recalls)
    total = np.einsum("np,np->n", highest[:, :1], reached[:, :1])
    total += np.einsum("np,np->n", highest[:, 1:], reached[:, 1:] - reached[:, :-1])
    return np.where(objects > 0, total / len(recalls), np.nan)


def _reached(recall: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """The number of `recalls` up to each value of `recall`: a computed index, corrected by one for rounding errors."""
    beyond = np.append(recalls, np.inf)
    guess = (recall * (len(recalls) - 1)).astype(np.int32)
    guess -= np.take(recalls, guess) > recall
    guess += np.take(beyond, guess + 1) <= recall
    return guess + 1
