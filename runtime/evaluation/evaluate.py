"""COCO evaluation of any detector on a dataset, or of a results file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.records import ImageRecord, Records
from maskrcnn.data.scenes import open_scene
from maskrcnn.data.survey import read_record
from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Detections, coco_results
from maskrcnn.imaging.preprocess import Preprocessing, padded_size
from maskrcnn.runtime.detector import Detector
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.protocol import KIND_NAMES, table
from maskrcnn.runtime.evaluation.results_file import FIELDS, kinds_of, read_results
from maskrcnn.runtime.evaluation.scoring import Scored, score_entries
from maskrcnn.runtime.tiles import Tiles, detect_tiles


@dataclass(frozen=True)
class Seconds:
    """Duration of each part of an evaluation, summed over the processes."""

    data: float = 0.0  # reading and decoding image files
    compute: float = 0.0  # preprocessing, inference, boxes in pixels of the original image
    encode: float = 0.0  # encoding masks as run lengths; COCO's results format
    score: float = 0.0  # matching, precision and recall

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def detect(self) -> float:
        """Sum of all parts except scoring."""
        return self.data + self.compute + self.encode

    def line(self) -> str:
        """The parts as text."""
        return (
            f"data {self.data:.1f} s, compute {self.compute:.1f} s, results {self.encode:.1f} s, "
            f"scoring {self.score:.1f} s"
        )


def check_classes(detector: Detector, dataset: CocoDataset) -> None:
    """Checks that a model has the classes and keypoints of a dataset.

    Raises:
        UserError: if it does not; names the missing categories, or both lists of keypoints.
    """
    known = set(detector.metadata.category_ids)
    unknown = [category_id for category_id in dataset.category_ids if category_id not in known]
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


def names_line(detector: Detector, dataset: CocoDataset) -> str | None:
    """Returns a warning if category ids have other class names in the model than in the dataset, else None."""
    names = dict(zip(detector.metadata.category_ids, detector.metadata.class_names, strict=True))
    pairs = [
        (key, names.get(key, name), name) for key, name in zip(dataset.category_ids, dataset.class_names, strict=True)
    ]
    other = [each for each in pairs if each[1].strip().lower() != each[2].strip().lower()]
    if not other:
        return None
    key, own, name = other[0]
    return (
        f"warning: {len(other)} of {len(pairs)} classes have other names in the model than in "
        f"{dataset.annotation_path} (category id {key}: {own!r}, {name!r}): objects are matched by category id"
    )


def facts_of(detector: Detector) -> dict[str, Any]:
    """Facts about a model that scoring needs: `runs_in`, `has_masks`, `has_keypoints`, `sigmas`."""
    backend, metadata = detector.backend, detector.metadata
    return {
        "runs_in": f"{backend.name} {backend.precision}",
        "has_masks": metadata.has_masks,
        "has_keypoints": metadata.has_keypoints,
        "sigmas": list(metadata.keypoint_sigmas),
    }


def detect_records(
    detector: Detector,
    records: Records,
    *,
    batch_size: int = 1,
    tiles: Tiles | None = None,
    progress: Callable[[int], None] = lambda images: None,
    keep: Callable[[list[int], list[list[dict[str, Any]]], Seconds], None] = lambda ids, results, seconds: None,
) -> tuple[list[dict[str, Any]], Seconds]:
    """Runs a detector on images of a dataset.

    Args:
        detector: detector of any backend.
        records: the images, in any order; may be empty.
        batch_size: images, or tiles, per inference.
        tiles: if given, detect tile by tile.
        progress: called with the number of images done in each batch.
        keep: called with the image ids, results and time of each batch, to save them in case a later batch fails.

    Returns:
        Boxes and, if the model has them, masks and keypoints in COCO's results format, and the time they took.

    Raises:
        UserError: if an image cannot be read.
    """
    found: dict[int, list[dict[str, Any]]] = {}
    seconds = Seconds()
    for batch in batches_of(records, 1 if tiles else batch_size, detector.metadata.preprocessing):
        by_image, batch_seconds = detect_batch(detector, batch, tiles, batch_size)
        ids = batch.ids.tolist()
        found |= dict(zip(ids, by_image, strict=True))
        seconds += batch_seconds
        keep(ids, by_image, batch_seconds)
        progress(len(batch))
    return [result for image_id in records.ids.tolist() for result in found[image_id]], seconds


def batches_of(records: Records, batch_size: int, preprocessing: Preprocessing) -> list[Records]:
    """Splits images into batches of one padded size each; some batches are smaller than `batch_size`.

    Padding changes the features of an image slightly near its border. In these batches each image is padded as it would
    be alone: only rounding makes metrics depend on the batch size, and no additional pixels are computed.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(records.sizes_hw.tolist()):
        groups.setdefault(padded_size((height, width), preprocessing), []).append(index)
    starts = ((own, start) for own in groups.values() for start in range(0, len(own), batch_size))
    return [records.take(own[start : start + batch_size]) for own, start in starts]


def detect_batch(
    detector: Detector, batch: Sequence[ImageRecord], tiles: Tiles | None = None, batch_size: int = 1
) -> tuple[list[list[dict[str, Any]]], Seconds]:
    """Returns the results of each image of one batch, and the time they took.

    With `tiles`, calls `detect_tiles` for each image with `batch_size` tiles at a time; the time for reading is then in
    `compute`.

    Raises:
        UserError: if an image cannot be read.
    """
    metadata = detector.metadata
    times = [time.perf_counter()]
    if tiles is None:
        images = [read_record(record, detector.preprocessing, detector.notes) for record in batch]
        times.append(time.perf_counter())
        detections = detector.detect(images)
    else:
        times.append(time.perf_counter())
        detections = [_detect_tiles(detector, record, tiles, batch_size) for record in batch]
    times.append(time.perf_counter())
    results = [
        coco_results(own, record.id, metadata.category_ids, with_masks=metadata.has_masks)
        for record, own in zip(batch, detections, strict=True)
    ]
    times.append(time.perf_counter())
    return results, Seconds(*(after - before for before, after in pairwise(times)))


def _detect_tiles(detector: Detector, record: ImageRecord, tiles: Tiles, batch_size: int) -> Detections:
    size = record.height, record.width
    options: dict[str, Any] = {"annotated_hw": size, "exif": record.exif, "notes": detector.notes}
    with open_scene(record.path, detector.preprocessing, **options) as scene:
        return detect_tiles(detector, scene, tiles, batch_size=batch_size)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of boxes, masks and keypoints, the scored results, and the time of each part."""

    scored: dict[str, Scored]  # by kind: "bbox", "segm", "keypoints"
    results: list[dict[str, Any]]  # COCO's results format
    images: int
    seconds: Seconds

    @property
    def box(self) -> dict[str, float] | None:
        """COCO's metrics of boxes; None if they were not scored."""
        return self._metrics("bbox")

    @property
    def mask(self) -> dict[str, float] | None:
        """COCO's metrics of masks; None if they were not scored."""
        return self._metrics("segm")

    @property
    def keypoint(self) -> dict[str, float] | None:
        """COCO's metrics of keypoints; None if they were not scored."""
        return self._metrics("keypoints")

    def _metrics(self, kind: str) -> dict[str, float] | None:
        return self.scored[kind].metrics if kind in self.scored else None

    def summary(self) -> dict[str, float]:
        """The AP of each scored kind: `box_ap`, `mask_ap`, `keypoint_ap`."""
        return {f"{KIND_NAMES[kind]}_ap": scored.metrics["AP"] for kind, scored in self.scored.items()}

    def table(self) -> str:
        """All metrics as text, one column per kind."""
        return table({KIND_NAMES[kind]: scored.metrics for kind, scored in self.scored.items()})


def evaluate(
    detector: Detector,
    dataset: CocoDataset,
    *,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Runs a detector on a dataset and scores boxes, and masks and keypoints if both have them.

    Args:
        detector: detector of any backend.
        dataset: images and annotations of the model's categories.
        batch_size: images per inference.
        progress: called with the number of images done in each batch.

    Raises:
        UserError: if the model has other classes or keypoints, or an image cannot be read.
    """
    check_classes(detector, dataset)
    results, seconds = detect_records(detector, dataset.images, batch_size=batch_size, progress=progress)
    metadata = detector.metadata
    kinds = kinds_found(
        with_masks=metadata.has_masks and dataset.has_masks,
        with_keypoints=metadata.has_keypoints and dataset.has_keypoints,
    )
    return score_kinds(dataset, results, kinds, sigmas=metadata.keypoint_sigmas, seconds=seconds)


def kinds_found(*, with_masks: bool, with_keypoints: bool) -> tuple[str, ...]:
    """The kinds to score for a model; boxes are always included."""
    return ("bbox", *(("segm",) if with_masks else ()), *(("keypoints",) if with_keypoints else ()))


def score_kinds(
    dataset: CocoDataset,
    results: list[dict[str, Any]],
    kinds: Sequence[str],
    *,
    sigmas: Sequence[float] = (),
    max_detections: Sequence[int] = (),
    seconds: Seconds | None = None,
) -> Evaluation:
    """Scores a detector's results on a whole dataset, each kind as in a results file with only that kind.

    Args:
        dataset: the annotations; an image without results counts as one without detections.
        results: results in COCO's format, in any order.
        kinds: "bbox", "segm", "keypoints".
        sigmas: the model's OKS sigmas (default: see `GroundTruth.sigmas`).
        max_detections: limits of detections per image and class, see `protocol_of`.
        seconds: time of the detection.

    Raises:
        UserError: for results without the fields of a kind, or a dataset without masks or keypoints.
    """
    if "segm" in kinds and not dataset.has_masks:
        found = f"masks to be scored on {dataset.annotation_path}, which has only boxes"
        raise UserError(found, "annotations with segmentation", "score --iou-type bbox")
    if "keypoints" in kinds and not dataset.has_keypoints:
        found = f"keypoints to be scored on {dataset.annotation_path}, whose categories name none"
        raise UserError(found, "a category with keypoints, and objects that have them", "score --iou-type bbox")
    for kind in kinds:
        if results and FIELDS[kind] not in results[0]:
            found = f"--iou-type {kind} and detections without {FIELDS[kind]}"
            raise UserError(found, f"a model that predicts {FIELDS[kind]}", "score only kinds that the model predicts")
    began = time.perf_counter()
    truth = GroundTruth(dataset, sigmas)
    scored = {
        kind: score_entries(
            truth,
            results,
            kind,
            source="the detections",
            measured_by=FIELDS[kind],
            max_detections=max_detections,
        )
        for kind in kinds
    }
    seconds = replace(seconds or Seconds(), score=time.perf_counter() - began)
    return Evaluation(scored=scored, results=results, images=len(dataset.images), seconds=seconds)


def score_file(
    truth: GroundTruth, path: Path, kinds: Sequence[str] = (), max_detections: Sequence[int] = ()
) -> Evaluation:
    """Scores a results file from any source. The metrics equal those of pycocotools for the same file.

    Args:
        truth: the annotations.
        path: a JSON list in COCO's results format; may be empty.
        kinds: kinds to score (default: those of the first result).
        max_detections: limits of detections per image and class, see `protocol_of`.

    Raises:
        UserError: for a file that cannot be read or is malformed, and for results of unknown images.
    """
    entries = read_results(path)
    began = time.perf_counter()
    scored = {
        kind: score_entries(truth, entries, kind, source=str(path), max_detections=max_detections)
        for kind in kinds or kinds_of(entries)
    }
    seconds = Seconds(score=time.perf_counter() - began)
    return Evaluation(scored=scored, results=entries, images=len(truth.image_ids), seconds=seconds)
