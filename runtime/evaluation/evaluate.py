"""COCO evaluation of any detector: one preprocessing and one scoring, whatever runs the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from maskrcnn.data.coco import CocoDataset, ImageRecord
from maskrcnn.data.images import read_image
from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import coco_results
from maskrcnn.runtime.detector import Detector
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.protocol import KIND_NAMES, table
from maskrcnn.runtime.evaluation.results_file import FIELDS, checked_results, kinds_of, of_kind, read_results
from maskrcnn.runtime.evaluation.scoring import Scored, Scorer, score

# Detections of any detector on the images of a dataset, with the time that each part takes.


@dataclass(frozen=True)
class Seconds:
    """Where the time of an evaluation went; of several processes, their sum."""

    data: float = 0.0  # reading and decoding files
    compute: float = 0.0  # resizing, inference, boxes in the original image
    encode: float = 0.0  # pasting masks as run lengths, COCO's results format
    score: float = 0.0  # matching, precision and recall

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def shared(self, images: int) -> Seconds:
        """The share of one of so many images."""
        return Seconds(*(value / images for value in astuple(self)))

    @property
    def detect(self) -> float:
        """All but the scoring."""
        return self.data + self.compute + self.encode

    def line(self) -> str:
        """As text."""
        return (
            f"data {self.data:.1f} s, compute {self.compute:.1f} s, results {self.encode:.1f} s, "
            f"scoring {self.score:.1f} s"
        )


def check_classes(detector: Detector, dataset: CocoDataset) -> None:
    """Refuses a model whose classes are not the dataset's, or whose keypoints are others.

    Raises:
        UserError: naming the categories that the model does not know, or both lists of keypoints.
    """
    known = set(detector.metadata.category_ids)
    unknown = [i for i in dataset.category_ids if i not in known]
    if unknown:
        raise UserError(
            f"a model of {len(known)} classes without category id(s) {unknown[:5]}",
            f"a model of the {len(dataset.category_ids)} classes of {dataset.annotation_path}",
            "evaluate on the dataset that the model was trained for, or train on this one",
        )
    names = detector.metadata.keypoint_names
    if names and dataset.keypoint_names and names != dataset.keypoint_names:
        raise UserError(
            f"a model of the keypoints {', '.join(names)}",
            f"those of {dataset.annotation_path}: {', '.join(dataset.keypoint_names)}",
            "evaluate on the dataset that the model was trained for, or train on this one",
        )


def facts_of(detector: Detector) -> dict[str, Any]:
    """What a model's detections are scored with: `runs_in`, `has_masks`, `has_keypoints` and their `sigmas`."""
    backend, metadata = detector.backend, detector.metadata
    return {
        "runs_in": f"{backend.name} {backend.precision}",
        "has_masks": metadata.has_masks,
        "has_keypoints": metadata.has_keypoints,
        "sigmas": list(metadata.keypoint_sigmas),
    }


def detect_records(
    detector: Detector,
    records: Sequence[ImageRecord],
    *,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda images: None,
) -> tuple[list[dict[str, Any]], Seconds]:
    """Runs a detector on images; several processes can each take a part of a dataset.

    Args:
        detector: any backend.
        records: the images, in any order; none give no results.
        batch_size: images per inference.
        progress: called with the number of images done in each batch.

    Returns:
        the detections in COCO's results format, with all that the model finds, and the time they took.

    Raises:
        UserError: when an image cannot be read.
    """
    results, seconds = [], Seconds()
    for batch in batches_of(records, batch_size):
        found, taken = detect_batch(detector, batch)
        results += [result for own in found for result in own]
        seconds += taken
        progress(len(batch))
    return results, seconds


def batches_of(records: Sequence[ImageRecord], batch_size: int) -> list[Sequence[ImageRecord]]:
    """The images in batches; the last may be smaller."""
    return [records[start : start + batch_size] for start in range(0, len(records), batch_size)]


def detect_batch(detector: Detector, batch: Sequence[ImageRecord]) -> tuple[list[list[dict[str, Any]]], Seconds]:
    """The results of each image of one batch, and the time they took.

    Raises:
        UserError: when an image cannot be read.
    """
    metadata = detector.metadata
    times = [time.perf_counter()]
    images = [read_image(record.path) for record in batch]
    times.append(time.perf_counter())
    detections = detector.detect(images)
    times.append(time.perf_counter())
    results = [
        coco_results(found, record.id, metadata.category_ids, with_masks=metadata.has_masks)
        for record, found in zip(batch, detections, strict=True)
    ]
    times.append(time.perf_counter())
    return results, Seconds(*(after - before for before, after in pairwise(times)))


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
