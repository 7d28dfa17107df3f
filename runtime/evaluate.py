"""COCO evaluation of any detector: one preprocessing and one scoring, whatever runs the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.runtime.detector import Detector
from maskrcnn.runtime.evaluation.detecting import Seconds, check_classes, detect_records
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.protocol import KIND_NAMES, METRICS, table
from maskrcnn.runtime.evaluation.results_file import FIELDS, checked_results, kinds_of, of_kind, read_results
from maskrcnn.runtime.evaluation.scoring import Scored, Scorer, score

__all__ = ["METRICS", "Evaluation", "Seconds", "check_classes", "detect_records", "evaluate", "score_results"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of boxes and, where there are, of masks and keypoints, what was detected, and the time it took."""

    scored: dict[str, Scored]  # by kind: "bbox", "segm" or "keypoints"
    results: list[dict[str, Any]]  # COCO results format
    images: int
    seconds: Seconds

    @property
    def box(self) -> dict[str, float] | None:
        """COCO's metrics of boxes, where they were scored."""
        return self.scored["bbox"].metrics if "bbox" in self.scored else None

    @property
    def mask(self) -> dict[str, float] | None:
        """COCO's metrics of masks; None of a model without masks."""
        return self.scored["segm"].metrics if "segm" in self.scored else None

    @property
    def keypoint(self) -> dict[str, float] | None:
        """COCO's metrics of keypoints; None of a model without keypoints."""
        return self.scored["keypoints"].metrics if "keypoints" in self.scored else None

    def summary(self) -> dict[str, float]:
        """`box_ap` and, where there are masks and keypoints, `mask_ap` and `keypoint_ap`."""
        return {f"{KIND_NAMES[kind]}_ap": scored.metrics["AP"] for kind, scored in self.scored.items()}

    def table(self) -> str:
        """All metrics as text."""
        return table({KIND_NAMES[kind]: scored.metrics for kind, scored in self.scored.items()})


def evaluate(
    detector: Detector,
    dataset: CocoDataset,
    *,
    batch_size: int = 1,
    scorer: Scorer = Scorer.PYCOCOTOOLS,
    progress: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Runs a detector on a dataset and scores it: boxes, and masks and keypoints where both have them.

    Args:
        detector: any backend.
        dataset: images and ground truth; its category ids must be the model's.
        batch_size: images per inference.
        scorer: pycocotools, or our own, which gives the same figures sooner.
        progress: called with the number of images done in each batch.

    Raises:
        UserError: when the model was trained on other classes or keypoints, or an image cannot be read.
    """
    check_classes(detector, dataset)
    results, seconds = detect_records(detector, dataset.images, batch_size=batch_size, progress=progress)
    metadata = detector.metadata
    return score_results(
        dataset,
        results,
        with_masks=metadata.has_masks and dataset.has_masks,
        with_keypoints=metadata.has_keypoints and dataset.has_keypoints,
        sigmas=metadata.keypoint_sigmas,
        seconds=seconds,
        scorer=scorer,
    )


def score_results(
    dataset: CocoDataset,
    results: list[dict[str, Any]],
    *,
    with_masks: bool,
    with_keypoints: bool = False,
    sigmas: Sequence[float] = (),
    seconds: Seconds | None = None,
    scorer: Scorer = Scorer.PYCOCOTOOLS,
) -> Evaluation:
    """The metrics of a detector's results on the whole of a dataset.

    Args:
        dataset: the ground truth; an image without results counts as one in which nothing was found.
        results: in COCO's results format, in any order.
        with_masks: score `segmentation` too.
        with_keypoints: score `keypoints` too.
        sigmas: of the keypoints, as the model's configuration has them; see `GroundTruth.sigmas`.
        seconds: what finding them took.
        scorer: see `evaluate`.
    """
    kinds = kinds_found(with_masks=with_masks, with_keypoints=with_keypoints)
    return score_kinds(dataset, results, kinds, sigmas=sigmas, seconds=seconds, scorer=scorer)


def kinds_found(*, with_masks: bool, with_keypoints: bool) -> tuple[str, ...]:
    """What is scored of a model that finds these: boxes always."""
    return ("bbox", *(("segm",) if with_masks else ()), *(("keypoints",) if with_keypoints else ()))


def score_kinds(
    dataset: CocoDataset,
    results: list[dict[str, Any]],
    kinds: Sequence[str],
    *,
    sigmas: Sequence[float] = (),
    seconds: Seconds | None = None,
    scorer: Scorer = Scorer.PYCOCOTOOLS,
) -> Evaluation:
    """The same for chosen kinds: each is scored as the file that COCO's server would get.

    Raises:
        UserError: for results without what a kind needs, and for masks or keypoints where the dataset has none.
    """
    if "segm" in kinds and not dataset.has_masks:
        came = f"masks to be scored on {dataset.annotation_path}, which has boxes only"
        raise UserError(came, "annotations with segmentation", "score --iou-type bbox")
    if "keypoints" in kinds and not dataset.has_keypoints:
        came = f"keypoints to be scored on {dataset.annotation_path}, whose categories name none"
        raise UserError(came, "a category with keypoints, and objects that have them", "score --iou-type bbox")
    for kind in kinds:
        if results and FIELDS[kind] not in results[0]:
            came = f"--iou-type {kind} and detections without {FIELDS[kind]}"
            raise UserError(came, f"a model that finds {FIELDS[kind]}", "score what the model finds")
    began = time.perf_counter()
    truth = GroundTruth.of_dataset(dataset, sigmas)
    scored = {
        kind: score(truth, checked_results(truth, of_kind(results, kind), kind, "the detections"), scorer)
        for kind in kinds
    }
    taken = replace(seconds or Seconds(), score=time.perf_counter() - began)
    return Evaluation(scored=scored, results=results, images=len(dataset.images), seconds=taken)


def score_file(
    truth: GroundTruth, path: Path, kinds: Sequence[str] = (), *, scorer: Scorer = Scorer.PYCOCOTOOLS
) -> Evaluation:
    """The metrics of a results file, whoever wrote it: those of pycocotools for this file as it is.

    Args:
        truth: what there is to be found.
        path: a JSON list in COCO's results format; an empty one is fine.
        kinds: what is scored; by default what the first result has.
        scorer: see `evaluate`.

    Raises:
        UserError: for a file that cannot be read, is malformed, or has results of unknown images.
    """
    entries = read_results(path)
    began = time.perf_counter()
    kinds = kinds or kinds_of(entries)
    scored = {kind: score(truth, checked_results(truth, entries, kind, str(path)), scorer) for kind in kinds}
    taken = Seconds(score=time.perf_counter() - began)
    return Evaluation(scored=scored, results=entries, images=len(truth.image_ids), seconds=taken)
