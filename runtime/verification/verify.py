"""Compares two models stage by stage, from pixels to masks and keypoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import unpack
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.backends.base import Backend, stages_of
from maskrcnn.runtime.verification.compare import EXACT, Difference, compare_outputs, merge
from maskrcnn.runtime.verification.inputs import Batch, drawn_batches, feedings
from maskrcnn.runtime.verification.report import Evidence, VerifyReport, judged, needed
from maskrcnn.runtime.verification.stage_errors import Side, StageError, dense_error, image_errors, valid_part
from maskrcnn.runtime.verification.tolerances import StageTolerances, tolerances_for
from maskrcnn.stages import LEVELS, OF_KEYPOINTS, OF_MASKS, STAGES

JUDGED = ("images", *(stage for stage in STAGES if stage != "num_detections"))  # the number is checked with `boxes`


def verify(
    reference: Backend,
    other: Backend,
    batches: Iterable[Batch],
    tolerances: StageTolerances | None = None,
    *,
    size_px: int | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> VerifyReport:
    """Compares two models stage by stage, and finds the first stage that differs.

    Each model preprocesses the images according to its own metadata; this is the first stage, `images`. The later
    stages of both models are computed from images in the reference's resized size, each in its own channel order, so
    that they can be compared even if the sizes differ. Detections come from the unmodified models, intermediate tensors
    from their instrumented copies.

    Args:
        reference: the reference model.
        other: a model of the same classes.
        batches: the images.
        tolerances: limits of the stages (default: those of the models' precisions).
        size_px: shorter side of the resized images (default: each model's own).
        progress: called with the name of each finished image.

    Raises:
        UserError: for models of different tasks, or without images.
    """
    check_comparable(reference.metadata, other.metadata)
    comparison = _Comparison((reference, other), tolerances, size_px)
    for batch in batches:
        comparison.add(batch)
        for name in batch.names:
            progress(name)
    return comparison.report()


def check_comparable(reference: ModelMetadata, other: ModelMetadata) -> None:
    """Checks that two models have the same numbers of classes and keypoints, and both or neither have masks.

    Raises:
        UserError: if they differ.
    """
    counts = [len(metadata.class_names) for metadata in (reference, other)]
    if counts[0] != counts[1]:
        raise UserError(
            f"models of {counts[0]} and of {counts[1]} classes",
            "the same number of classes",
            "pass two files of the same model",
        )
    if reference.has_masks != other.has_masks:
        raise UserError(
            "a model with masks and one without", "both with, or both without", "pass two files of the same model"
        )
    counts = [len(metadata.keypoint_names) for metadata in (reference, other)]
    if counts[0] != counts[1]:
        found = f"models of {counts[0]} and of {counts[1]} keypoints"
        raise UserError(found, "the same number of keypoints", "pass two files of the same model")
    reading = [(rule.channels, rule.bands, rule.pixel_range) for rule in (reference.preprocessing, other.preprocessing)]
    if reading[0] != reading[1]:
        found = "models with channels, bands and pixel range {} and {}".format(*reading)
        raise UserError(found, "equal values, so that both read the same images", "pass two files of the same model")


def with_stages(difference: Difference, reference: Backend, other: Backend) -> Difference:
    """Returns the difference between two models' detections; without detections, adds that of the preceding stages.

    The stages are compared on drawn shapes of 160 px, except those that depend on detections (masks, keypoints).
    """
    if difference.detections:
        return difference
    report = verify(reference, other, drawn_batches(), size_px=160)
    compared = [stage.stage for stage in report.stages if stage.compared]
    text = f"stages compared instead: {len(compared)}, from {compared[0]} to {compared[-1]}" if compared else ""
    departure = report.conclusion().replace("\n", "; ") if not report.ok else ""
    return dataclasses.replace(difference, stages=text, departure=departure)


class _Comparison:
    """State of a comparison."""

    def __init__(
        self, models: tuple[Backend, Backend], tolerances: StageTolerances | None, size_px: int | None
    ) -> None:
        self.models = models
        self.tolerances = tolerances or tolerances_for((model.metadata, model.precision) for model in models)
        first, second = (model.metadata.preprocessing for model in models)
        self.feedings = feedings(first, second, size_px)
        self.has_size = size_px is not None
        self.names: list[str] = []
        self.errors: list[dict[str, StageError]] = []
        self.present: tuple[set[str], set[str]] = (set(), set())  # stages of each model
        # Differences of each model's instrumented copy from the model.
        self.disturbance: tuple[list[Difference], list[Difference]] = ([], [])
        self.worst: Evidence | None = None
        self._badness = (-np.inf, -np.inf)

    def add(self, batch: Batch) -> None:
        """Runs and compares the images of one batch."""
        prepared, other_prepared = (feeding.own_feeds(batch.images) for feeding in self.feedings)
        first, second = (
            _run(model, feeding.shared_feeds(batch.images))
            for model, feeding in zip(self.models, self.feedings, strict=True)
        )
        self._note_disturbance(first, second)
        for index, (name, image) in enumerate(zip(batch.names, batch.images, strict=True)):
            found = {"images": _pixel_error(prepared, other_prepared, index)}
            found |= image_errors(first, second, index, self.tolerances)
            self.names.append(name)
            self.errors.append(found)
            badness = self._badness_of(found)
            if image.size and badness > self._badness:
                self._badness, self.worst = badness, _evidence(name, image, (first, second), index)

    def report(self) -> VerifyReport:
        """The report.

        Raises:
            UserError: if no batch was added.
        """
        if not self.names:
            raise UserError("no images", "at least one", "pass image files, or a folder with images")
        first, second = (f"{model.name} {model.precision}" for model in self.models)
        return VerifyReport(
            models=(first, second),
            tolerances=self.tolerances.name,
            images=tuple(self.names),
            stages=tuple(
                judged(
                    stage,
                    [found.get(stage) for found in self.errors],
                    self.tolerances.limit(stage),
                    [stage not in ("images", *present) for present in self.present],
                )
                for stage in self._stages()
            ),
            notes=(
                *self._notes_of_weights(),
                *self._notes_of_sizes(),
                *self._notes_of_absence(),
                *self._notes_of_disturbance(),
            ),
            worst=self.worst,
        )

    def _stages(self) -> list[str]:
        metadata = self.models[0].metadata
        without = {*(() if metadata.has_masks else OF_MASKS), *(() if metadata.has_keypoints else OF_KEYPOINTS)}
        return [stage for stage in JUDGED if stage not in without]

    def _note_disturbance(self, *sides: Side) -> None:
        for side, present, found in zip(sides, self.present, self.disturbance, strict=True):
            present |= side.stages.keys() | side.outputs.keys()
            if side.outputs.keys() <= side.stages.keys():
                instrumented = {name: side.stages[name] for name in side.outputs}
                found.append(compare_outputs(side.outputs, instrumented, EXACT))

    def _badness_of(self, found: dict[str, StageError]) -> tuple[float, float]:
        """Sort key of images: larger for an earlier differing stage, then for a larger error."""
        order, ratio = -np.inf, 0.0
        for index, stage in enumerate(self._stages()):
            limit = self.tolerances.limit(stage)
            need = needed(found[stage].values, limit.share) if stage in found else None
            if need is None:
                continue
            if not need <= limit.tolerance and order == -np.inf:
                return float(-index), np.inf if np.isnan(need) else need
            ratio = max(ratio, need / max(limit.tolerance, 1e-12))
        return order, ratio

    def _notes_of_weights(self) -> list[str]:
        return [
            f"the weights of {which} do not record {', '.join(model.metadata.assumed)}: assumed values are used"
            for which, model in zip(("the reference", "the other"), self.models, strict=True)
            if model.metadata.assumed
        ]

    def _notes_of_sizes(self) -> list[str]:
        notes = []
        if self.has_size:
            notes.append("--size replaced both models' own sizes")
        if any(feeding.is_resized for feeding in self.feedings):
            notes.append("stages after `images`: computed from images of the reference's size for both models")
        return notes

    def _notes_of_absence(self) -> list[str]:
        notes = [
            f"{which} has no stage names: export or build it again to compare all stages"
            for which, present in zip(("the reference", "the other"), self.present, strict=True)
            if not present & set(LEVELS)
        ]
        if not any(found["boxes"].values.size for found in self.errors):
            notes.append("nothing was detected on any image: boxes and their heads' stages were not compared")
        return notes

    def _notes_of_disturbance(self) -> list[str]:
        return [
            f"instrumentation changes the detections of {model.name} {model.precision} ({which}): {merge(found)}"
            for which, model, found in zip(("the reference", "the other"), self.models, self.disturbance, strict=True)
            if found and not merge(found).within(EXACT)
        ]


def _run(model: Backend, feeds: dict[str, np.ndarray]) -> Side:
    outputs = model(feeds)
    return Side(feeds, outputs, stages_of(model, feeds, STAGES))


def _pixel_error(first: dict[str, np.ndarray], second: dict[str, np.ndarray], index: int) -> StageError:
    """The error of two models' preprocessed images, without padding."""
    parts = []
    for feeds in (first, second):
        height, width = feeds["image_sizes"][index]
        parts.append(feeds["images"][index, :, :height, :width])
    return dense_error(*parts)


def _evidence(name: str, image: np.ndarray, sides: tuple[Side, Side], index: int) -> Evidence:
    """The evidence of one image of a batch."""
    detections = []
    for side in sides:
        outputs = {key: value[index : index + 1] for key, value in side.outputs.items()}
        detections += unpack(outputs, side.feeds["image_sizes"][index : index + 1], [image.shape[:2]])
    maps = {}
    for level in LEVELS:
        if all(level in side.stages for side in sides):
            first, second = (valid_part(side, level, index) for side in sides)
            if first.shape == second.shape:
                spread = np.sqrt(np.square(first, dtype=np.float64).mean())
                maps[level] = (np.abs(first - second).mean(axis=0) / max(spread, 1e-12)).astype(np.float32)
    first_found, second_found = detections
    return Evidence(name, image, (first_found, second_found), maps)
