"""Scores of results by pycocotools or by our own, faster implementation, whose figures are the same."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np

from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.matching import IGNORED, TRUE, MatchRecords, match_records
from maskrcnn.runtime.evaluation.protocol import Scores, protocol_of
from maskrcnn.runtime.evaluation.results_file import Results, checked_results

# COCO's precision and recall from match records, equal to pycocotools' `accumulate` to the last digit.
#
# Precision can only rise at a true positive, so it is computed at these alone.

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


class Scorer(str, Enum):
    """Who computes the figures."""

    PYCOCOTOOLS = "pycocotools"
    FAST = "fast"


@dataclass(frozen=True, eq=False)
class Scored:
    """Results with their scores. What is not asked for is not computed."""

    truth: GroundTruth
    results: Results
    scorer: Scorer

    @property
    def kind(self) -> str:
        """ "bbox", "segm" or "keypoints"."""
        return self.results.kind

    @cached_property
    def scores(self) -> Scores:
        """COCO's precision and recall, by the scorer that was asked for."""
        if self.scorer is Scorer.FAST:
            return accumulate(self.records)
        return _official(self.truth, self.results)

    @cached_property
    def records(self) -> MatchRecords:
        """What became of each detection, by our own matching."""
        return match_records(self.truth, self.results)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """COCO's metrics by name."""
        return self.scores.metrics()

    def by_class(self) -> dict[str, dict[str, float]]:
        """The metrics of each class and its number of objects, `objects`; by name, a name that occurs twice with id."""
        names = self.truth.category_names
        keys = [
            name if names.count(name) == 1 else f"{name} ({category})"
            for name, category in zip(names, self.truth.category_ids.tolist(), strict=True)
        ]
        counted = self.truth.category[~self.truth.is_ignored(self.kind)]
        numbers = np.bincount(counted, minlength=len(keys)).tolist()
        return {key: {"objects": numbers[index], **self.scores.of_class(index)} for index, key in enumerate(keys)}


def score(truth: GroundTruth, results: Results, scorer: Scorer = Scorer.PYCOCOTOOLS) -> Scored:
    """COCO's scores of checked results.

    Args:
        truth: what there is to be found.
        results: see `checked_results`; without any, precision is 0 wherever there is something to be found.
        scorer: who computes them.

    Raises:
        UserError: for annotations that lack what the kind of results needs.
    """
    scored = Scored(truth, results, scorer)
    _ = scored.scores  # now, so that what is wrong shows here
    return scored


def score_entries(
    truth: GroundTruth,
    entries: Sequence[dict[str, Any]],
    kind: str,
    *,
    source: str = "the results",
    scorer: Scorer = Scorer.PYCOCOTOOLS,
) -> Scored:
    """The same of results as a file has them: "bbox", "segm" or "keypoints".

    Raises:
        UserError: for results that are malformed or of unknown images.
    """
    return score(truth, checked_results(truth, entries, kind, source), scorer)


def _official(truth: GroundTruth, results: Results) -> Scores:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    protocol = protocol_of(results.kind)
    objects = truth.coco(results.kind)
    # What the rest asks of the objects, asked here too, so that both scorers refuse the same files.
    _ = truth.areas_px, truth.boxes if results.kind != "segm" else None
    with contextlib.redirect_stdout(io.StringIO()):
        if len(results):
            detections = objects.loadRes(results.coco_entries())
        else:  # loadRes looks at the first result
            detections = COCO()
            detections.dataset = {**objects.dataset, "annotations": []}
            detections.createIndex()
        scorer = COCOeval(objects, detections, results.kind)
        if results.kind == "keypoints":
            scorer.params.kpt_oks_sigmas = truth.sigmas
        scorer.evaluate()
        scorer.accumulate()
    found = scorer.eval
    return Scores(protocol, found["precision"], found["recall"], found["scores"])


# Average precision of many detection lists at once: of resampled data, or of each image by itself.
#
# The figure is COCO's: precision, made to fall with recall, averaged over 101 recalls. `accumulate` has the same for
# one list with every digit of pycocotools; here the sum is over true positives instead of recalls, which may change the
# last.


def average_precision(true: np.ndarray, counted: np.ndarray, to_find: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """Average precision `[N]` of N lists of detections, of which only the true positives are looked at.

    Args:
        true: `[N, P]` true positives up to and including each one.
        counted: `[N, P]` detections that count up to and including it; infinity where a list has fewer than P.
        to_find: `[N]` objects; without any the result is NaN.
        recalls: `[R]` ascending from 0 to 1 in even steps.
    """
    precision = np.divide(true, counted, out=np.zeros(true.shape), where=counted > 0)
    highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = _reached(true / np.maximum(to_find, 1)[:, None], recalls)
    found = np.einsum("np,np->n", highest[:, :1], reached[:, :1])
    found += np.einsum("np,np->n", highest[:, 1:], reached[:, 1:] - reached[:, :-1])
    return np.where(to_find > 0, found / len(recalls), np.nan)


def _reached(recall: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """How many of the recalls are at most each value of `recall`: a look-up, and a step where rounding was wrong."""
    beyond = np.append(recalls, np.inf)
    guess = (recall * (len(recalls) - 1)).astype(np.int32)
    guess -= np.take(recalls, guess) > recall
    guess += np.take(beyond, guess + 1) <= recall
    return guess + 1
