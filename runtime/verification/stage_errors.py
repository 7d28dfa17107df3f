"""Error metrics of each stage of one image between two models.

A dense stage (pixels, feature maps, RPN outputs per anchor) has one error: the RMS of the difference relative to the
RMS of the reference. A row stage has one error per row. Rows of the two models are paired by their boxes, and the
stages of a row are compared only if the two boxes agree, so that errors are attributed to the stage that causes them
and not to a different order of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from maskrcnn.runtime.verification.compare import (
    Pairs,
    at_edge,
    keypoint_distances,
    largest_of,
    pair_boxes,
    pair_detections,
    score_differences,
)
from maskrcnn.runtime.verification.tolerances import PEAK, StageTolerances
from maskrcnn.stages import LEVELS

_OF_ANCHORS = tuple(f"{kind}_{level}" for kind in ("objectness", "anchor_deltas") for level in LEVELS)
_DENSE = ("normalised", *LEVELS, *_OF_ANCHORS)
_OF_PROPOSALS = ("box_features", "class_logits", "box_deltas")
_OF_DETECTIONS = ("mask_features", "mask_logits", "keypoint_features", "keypoint_logits")
_SMALLEST_PX = 16.0  # shifts of smaller boxes are measured relative to this size
_TINY = 1e-12  # replaces an RMS of 0: any difference from zeros exceeds every tolerance


@dataclass(frozen=True, kw_only=True)
class StageError:
    """The difference of one stage of one image between two models."""

    values: np.ndarray  # [K] error of the image, or of each row or keypoint; infinite for rows without a partner
    largest: float = 0.0  # maximum absolute difference, in the stage's unit
    compared: int = 0  # elements of a dense stage, rows of other stages
    alone: int = 0  # rows of either side without a partner, without excused ones (see `compare.at_edge`)
    note: str = ""  # why nothing was compared


class Side(NamedTuple):
    """Inputs, outputs and stages of one model for a batch."""

    feeds: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]  # outputs of the unmodified model
    stages: dict[str, np.ndarray]  # stages of its instrumented copy, including outputs


def image_errors(
    reference: Side, other: Side, index: int, tolerances: StageTolerances, threshold: float = 0.05
) -> dict[str, StageError]:
    """Returns the errors of one image by stage, for the stages of both models.

    Args:
        reference: the reference model.
        other: the other model, on the same images in the same sizes.
        index: image index in the batch.
        tolerances: decide which rows are paired and which detections are excused.
        threshold: minimum score of a reported detection.
    """
    errors = {}
    for stage in _DENSE:
        if stage in reference.stages and stage in other.stages:
            first, second = (valid_part(side, stage, index) for side in (reference, other))
            errors[stage] = dense_error(first, second)
    if "proposals" in reference.stages and "proposals" in other.stages:
        errors |= _proposal_errors(reference, other, index, tolerances)
    errors |= _detection_errors(reference, other, index, tolerances, threshold)
    return errors | _head_errors(reference, other, index, tolerances)


def dense_error(reference: np.ndarray, other: np.ndarray) -> StageError:
    """The error of two arrays.

    It is the RMS of the difference or, if larger, a twentieth of the largest difference, relative to the RMS of the
    reference; NaN if any value is, infinite if the shapes differ.
    """
    if reference.shape != other.shape:
        return StageError(
            values=np.array([np.inf]), largest=np.inf, note=f"{_shape(other)} instead of {_shape(reference)}"
        )
    if reference.size == 0:
        return StageError(values=np.zeros(0), note="an empty image")
    values, largest = _relative_rms(reference[None], other[None])
    return StageError(values=values, largest=largest, compared=reference.size)


def valid_part(side: Side, stage: str, index: int) -> np.ndarray:
    """A dense stage of one image without its padding; `normalised` includes the padding, which must be zero."""
    value = _float(side.stages[stage][index])
    if stage == "normalised":
        return value
    level = stage.rpartition("_")[2]
    if stage != level:
        if level not in side.stages:
            return value
        # [H · W · A, …] → [A, …, H, W]
        height, width = side.stages[level].shape[2:]
        value = np.moveaxis(value.reshape(height, width, -1), -1, 0)
    rows, columns = (
        -(-int(size) * length // padded)
        for size, length, padded in zip(
            side.feeds["image_sizes"][index], value.shape[-2:], side.feeds["images"].shape[2:], strict=True
        )
    )
    return value[..., :rows, :columns]


def _relative_shifts(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Maximum shift of a side relative to the box size, `[K]`, of pairs of boxes `[K, 4]`."""
    shifts: np.ndarray = np.abs(reference - other).max(axis=1, initial=0.0) / _sizes_px(reference)
    return shifts


def _sizes_px(boxes: np.ndarray) -> np.ndarray:
    """Square root of the area `[K]` of boxes `[K, 4]`; at least `_SMALLEST_PX`."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    sides: np.ndarray = np.maximum(np.sqrt(areas.clip(min=0)), _SMALLEST_PX)
    return sides


def _proposal_errors(first: Side, second: Side, index: int, tolerances: StageTolerances) -> dict[str, StageError]:
    boxes = [_float(side.stages["proposals"][index]) for side in (first, second)]
    rows = [np.flatnonzero(~(box == 0).all(axis=1)) for box in boxes]  # unused rows are zero
    boxes = [box[used] for box, used in zip(boxes, rows, strict=True)]
    pairs = pair_boxes(boxes[0], boxes[1], tolerances.min_iou)
    alone = len(pairs.unpaired_first) + len(pairs.unpaired_second)
    errors = {"proposals": _box_error(boxes[0][pairs.first], boxes[1][pairs.second], alone)}
    agree = _relative_shifts(boxes[0][pairs.first], boxes[1][pairs.second]) <= tolerances.agreement
    chosen = rows[0][pairs.first[agree]], rows[1][pairs.second[agree]]
    return errors | _rows_on_boxes(_OF_PROPOSALS, first, second, index, chosen)


def _detection_errors(
    first: Side, second: Side, index: int, tolerances: StageTolerances, threshold: float
) -> dict[str, StageError]:
    """Errors of `boxes`, `scores`, `labels`, `masks` and `keypoints` of the unmodified models."""
    sides = [_used_rows(side.outputs, index) for side in (first, second)]
    a, b, *alone = _pairs(sides, tolerances.min_iou)
    limits = [(tolerances.score, threshold, side.outputs["scores"].shape[1]) for side in (first, second)]
    alone = [
        left[~at_edge(side["scores"], left, *limit)] for side, left, limit in zip(sides, alone, limits, strict=True)
    ]
    # A detection may have a partner only with another label: then the label is wrong, not the box.
    mislabelled = pair_boxes(sides[0]["boxes"][alone[0]], sides[1]["boxes"][alone[1]], tolerances.min_iou)
    labels = np.concatenate([np.zeros(len(a)), np.full(len(mislabelled.first), np.inf)])
    a = np.concatenate([a, alone[0][mislabelled.first]])
    b = np.concatenate([b, alone[1][mislabelled.second]])
    unpaired = len(mislabelled.unpaired_first) + len(mislabelled.unpaired_second)
    scores = np.abs(sides[0]["scores"][a] - sides[1]["scores"][b])
    errors = {
        "boxes": _box_error(sides[0]["boxes"][a], sides[1]["boxes"][b], unpaired),
        "scores": StageError(values=scores, largest=largest_of(scores), compared=len(a)),
        "labels": StageError(values=labels, largest=float(np.isinf(labels).any()), compared=len(a)),
    }
    agree = (_relative_shifts(sides[0]["boxes"][a], sides[1]["boxes"][b]) <= tolerances.agreement) & (labels == 0)
    a, b = a[agree], b[agree]
    if "masks" in sides[0]:
        errors["masks"] = _row_error(sides[0]["masks"][a], sides[1]["masks"][b], is_relative=False)
    if "keypoints" in sides[0]:
        points, other_points = sides[0]["keypoints"][a], sides[1]["keypoints"][b]
        errors["keypoints"] = _keypoint_error(points, other_points, sides[0]["boxes"][a])
    return errors


def _head_errors(first: Side, second: Side, index: int, tolerances: StageTolerances) -> dict[str, StageError]:
    """Errors of the stages that belong to the detections of the instrumented copies."""
    if any(not {"boxes", "labels", "num_detections"} <= side.stages.keys() for side in (first, second)):
        return {}
    sides = [_used_rows(side.stages, index) for side in (first, second)]
    a, b, *_ = _pairs(sides, tolerances.min_iou)
    agree = _relative_shifts(sides[0]["boxes"][a], sides[1]["boxes"][b]) <= tolerances.agreement
    return _rows_on_boxes(_OF_DETECTIONS, first, second, index, (a[agree], b[agree]))


def _pairs(sides: list[dict[str, np.ndarray]], min_iou: float) -> Pairs:
    first, second = sides
    return pair_detections(first["boxes"], first["labels"], second["boxes"], second["labels"], min_iou)


def _used_rows(outputs: dict[str, np.ndarray], index: int) -> dict[str, np.ndarray]:
    """The detections of one image in the detector's outputs."""
    count = int(outputs["num_detections"][index])
    names = ("boxes", "scores", "labels", "masks", "keypoints")
    return {name: outputs[name][index, :count] for name in names if name in outputs}


def _rows_on_boxes(
    stages: tuple[str, ...], first: Side, second: Side, index: int, rows: tuple[np.ndarray, np.ndarray]
) -> dict[str, StageError]:
    return {
        stage: _row_error(first.stages[stage][index][rows[0]], second.stages[stage][index][rows[1]])
        for stage in stages
        if stage in first.stages and stage in second.stages
    }


def _row_error(reference: np.ndarray, other: np.ndarray, *, is_relative: bool = True) -> StageError:
    if reference.shape != other.shape:
        values = np.full(max(len(reference), 1), np.inf)
        return StageError(values=values, largest=np.inf, note=f"{_shape(other)} instead of {_shape(reference)}")
    if len(reference) == 0:
        return StageError(values=np.zeros(0), note="no rows whose boxes agree")
    values, largest = _relative_rms(_float(reference), _float(other), is_relative=is_relative)
    return StageError(values=values, largest=largest, compared=len(reference))


def _keypoint_error(reference: np.ndarray, other: np.ndarray, boxes: np.ndarray) -> StageError:
    """Errors of keypoints `[P, K, 3]` in boxes `[P, 4]`: the maximum of relative shift and score difference."""
    if len(reference) == 0:
        return StageError(values=np.zeros(0), note="no rows whose boxes agree")
    distances = keypoint_distances(reference, other)
    values = np.maximum(distances / _sizes_px(boxes)[:, None], score_differences(reference, other))
    return StageError(values=values.ravel(), largest=largest_of(distances), compared=distances.size)


def _relative_rms(reference: np.ndarray, other: np.ndarray, *, is_relative: bool = True) -> tuple[np.ndarray, float]:
    """Errors `[K]` of arrays `[K, …]` relative to the RMS of the whole reference, and the largest difference."""
    difference = np.abs(reference - other).reshape(len(reference), -1)
    rms = np.sqrt(np.square(difference, dtype=np.float64).mean(axis=1))
    spread = np.sqrt(np.square(reference, dtype=np.float64).mean()) if is_relative else 1.0
    largest = difference.max(axis=1)
    return np.maximum(rms, largest / PEAK) / np.maximum(spread, _TINY), largest_of(largest)


def _box_error(reference: np.ndarray, other: np.ndarray, alone: int) -> StageError:
    values = _relative_shifts(reference, other)
    return StageError(
        values=np.concatenate([values, np.full(alone, np.inf)]),
        largest=largest_of(np.abs(reference - other)),
        compared=len(reference),
        alone=alone,
    )


def _float(value: np.ndarray) -> np.ndarray:
    return np.asarray(value, np.float32)


def _shape(value: np.ndarray) -> str:
    return "×".join(map(str, value.shape))
