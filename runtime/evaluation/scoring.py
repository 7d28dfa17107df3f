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

from maskrcnn.runtime.evaluation.accumulate import accumulate
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.match_records import MatchRecords, match_records
from maskrcnn.runtime.evaluation.protocol import Scores, protocol_of
from maskrcnn.runtime.evaluation.results_file import Results, checked_results


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
