"""Which classes are taken for which."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maskrcnn.runtime.evaluation.candidates import Side, candidates, sorted_side
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.match_records import FALSE, TRUE, MatchRecords, choices
from maskrcnn.runtime.evaluation.results_file import Results


@dataclass(frozen=True, eq=False)
class Confusion:
    """Counts at one threshold of overlap and of score."""

    matrix: np.ndarray  # [K + 1, K + 1] int64: rows are true classes and nothing, columns detected classes and missed
    min_overlap: float
    min_score: float

    def mistakes(self) -> list[tuple[int, int, int]]:
        """Pairs of different classes (true, detected, count), the most frequent first."""
        inner = self.matrix[:-1, :-1] * ~np.eye(len(self.matrix) - 1, dtype=bool)
        rows, columns = np.nonzero(inner)
        order = np.argsort(-inner[rows, columns], kind="stable")
        return [(int(rows[k]), int(columns[k]), int(inner[rows[k], columns[k]])) for k in order]


def confusion(truth: GroundTruth, results: Results, records: MatchRecords, min_score: float) -> Confusion:
    """The matrix at the lowest threshold of overlap, 0.5.

    The diagonal are COCO's true positives. What is left of detections then looks for what is left of objects,
    whatever their class: that is a confusion; the rest is made up or missed. Crowds are left out.

    Args:
        truth, results, records: of one scoring.
        min_score: the lowest score of a detection that is counted.
    """
    overlap = float(records.protocol.iou_thresholds[0])
    matrix = np.zeros((records.categories + 1,) * 2, np.int64)
    confident = records.score >= min_score
    true = confident & (records.outcome[:, 0, 0] == TRUE)
    np.add.at(matrix, (records.category[true], records.category[true]), 1)
    false = np.flatnonzero(confident & (records.outcome[:, 0, 0] == FALSE))
    is_left = records.is_counted[:, 0].copy()
    is_left[records.found[true, 0]] = False
    left = np.flatnonzero(is_left)
    objects = _side(left, records.object_image[left], np.zeros(len(left)))
    rows = np.searchsorted(results.place, records.place[false])  # in the results' own order
    detections = _side(rows, records.image[false], -records.score[false])
    pairs = candidates(truth, results, detections, objects, overlap)
    ones = np.ones((len(left), 1), bool)
    chosen, taken = choices(pairs, detections.group, ones, np.zeros(len(left), bool), np.array([overlap]))
    object_class = np.append(records.object_category[objects.order], records.categories)
    taken_by = np.full(len(false), len(left))
    taken_by[chosen] = taken[:, 0, 0]
    np.add.at(matrix, (object_class[taken_by], results.category[detections.order]), 1)
    is_missed = np.ones(len(left) + 1, bool)
    is_missed[taken_by] = False
    np.add.at(matrix, (object_class[:-1][is_missed[:-1]], records.categories), 1)
    return Confusion(matrix, overlap, min_score)


def _side(indices: np.ndarray, group: np.ndarray, key: np.ndarray) -> Side:
    """Some of the detections or objects, by group."""
    order, groups = sorted_side(group, key)
    return Side(indices[order], groups)
