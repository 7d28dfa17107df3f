"""Pairing and comparing the detections of two models, and the tolerances of correct models by precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from maskrcnn.errors import UserError

_TAKEN = -1.0  # marks pairs in an overlap matrix that are no longer allowed


class Pairs(NamedTuple):
    """Rows `first[k]` and `second[k]` are paired; all other rows are unpaired. All int64."""

    first: np.ndarray
    second: np.ndarray
    unpaired_first: np.ndarray
    unpaired_second: np.ndarray


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU `[A, B]` float32 of boxes `[A, 4]` and `[B, 4]` xyxy; 0 if both areas are 0, NaN for NaN."""
    first, second = (np.asarray(boxes, np.float32).reshape(-1, 4) for boxes in (first, second))
    overlap = np.ones((len(first), len(second)), np.float32)
    for axis in (0, 1):
        low = np.maximum(first[:, None, axis], second[None, :, axis])
        overlap *= (np.minimum(first[:, None, axis + 2], second[None, :, axis + 2]) - low).clip(min=0)
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None, :] - overlap
    return overlap / np.maximum(union, np.float32(1e-9))


def pair_detections(
    boxes: np.ndarray, labels: np.ndarray, other_boxes: np.ndarray, other_labels: np.ndarray, min_iou: float
) -> Pairs:
    """Pairs detections of the same label: in the order of the first side, each takes the best remaining overlap.

    COCO's evaluation matches detections in the same way, by descending score.

    Args:
        boxes: `[A, 4]` xyxy of one image; a row whose overlaps are NaN stays unpaired.
        labels: `[A]`.
        other_boxes: `[B, 4]` xyxy of the other model.
        other_labels: `[B]`.
        min_iou: minimum overlap of a pair.
    """
    overlaps = np.where(labels[:, None] == other_labels[None, :], pairwise_iou(boxes, other_boxes), _TAKEN)
    pairs = []
    for row in range(overlaps.shape[0] if overlaps.shape[1] else 0):
        best = int(overlaps[row].argmax())  # in a row with NaN: the NaN, which is not ≥ min_iou
        if overlaps[row, best] >= min_iou:
            pairs.append((row, best))
            overlaps[:, best] = _TAKEN
    return _with_unpaired(pairs, overlaps.shape)


def pair_boxes(boxes: np.ndarray, other_boxes: np.ndarray, min_iou: float) -> Pairs:
    """Pairs boxes in descending order of overlap: no box takes a partner that another box overlaps more.

    Args:
        boxes: `[A, 4]` xyxy; boxes with NaN stay unpaired.
        other_boxes: `[B, 4]` xyxy.
        min_iou: minimum overlap of a pair.
    """
    overlaps = pairwise_iou(boxes, other_boxes)
    rows, columns = np.nonzero(overlaps >= min_iou)
    order = np.argsort(-overlaps[rows, columns], kind="stable")
    free, other_free = (np.ones(length, bool) for length in overlaps.shape)
    pairs = []
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if free[row] and other_free[column]:
            free[row] = other_free[column] = False
            pairs.append((row, column))
    return _with_unpaired(sorted(pairs), overlaps.shape)


def _with_unpaired(pairs: list[tuple[int, int]], shape: tuple[int, ...]) -> Pairs:
    made = np.array(pairs, np.int64).reshape(-1, 2)
    unpaired = (np.setdiff1d(np.arange(length, dtype=np.int64), made[:, k]) for k, length in enumerate(shape))
    return Pairs(made[:, 0], made[:, 1], *unpaired)


def at_edge(scores: np.ndarray, rows: np.ndarray, margin: float, score_threshold: float, max_rows: int) -> np.ndarray:
    """Whether detections without a partner are excused, bool `[A]`: the other model may have missed them narrowly.

    Args:
        scores: `[K]` of all detections of a side; NaN is never excused.
        rows: `[A]` detections without a partner.
        margin: maximum distance of an excused score from the lowest score that the side could report.
        score_threshold: minimum score that is reported.
        max_rows: maximum number of detections that are reported.
    """
    edge = scores.min() if len(scores) >= max_rows else score_threshold
    is_excused: np.ndarray = scores[rows] <= edge + margin
    return is_excused


# A keypoint is the best pixel of a heat map. If two pixels have nearly equal scores, rounding decides between them, and
# they may be one pixel or half a person apart, which no tolerance in pixels covers. Therefore a share of the keypoints
# may be elsewhere, and the tolerance applies to the others.


@dataclass(frozen=True, kw_only=True)
class KeypointTolerance:
    """Maximum differences of the same keypoint in two models."""

    px: float  # along either axis
    score: float  # relative difference of the logits; see `score_differences`
    share: float  # share of the keypoints that may differ by more, rounded up to whole keypoints

    def __str__(self) -> str:
        return f"keypoints within {self.px:g} px and their scores within {self.score:g}, except for {self.share:.0%}"


@dataclass(frozen=True, kw_only=True)
class KeypointDifference:
    """Differences between the keypoints of paired detections."""

    compared: int  # keypoints
    beyond: int  # keypoints outside the tolerance that they were compared with
    px: float  # maximum difference of the others along an axis
    score: float  # maximum difference of the others
    largest_px: float  # maximum over all keypoints; NaN if any is NaN
    largest_score: float

    def within(self, tolerance: KeypointTolerance) -> bool:
        """Whether all keypoints but the allowed share are inside the tolerance; NaN never is.

        Args:
            tolerance: the tolerance used for the comparison; for any other, no keypoint may be outside.
        """
        if math.isnan(self.largest_px) or math.isnan(self.largest_score):
            return False
        if self.largest_px <= tolerance.px and self.largest_score <= tolerance.score:
            return True
        return (self.beyond or math.inf) <= math.ceil(tolerance.share * self.compared)

    def __str__(self) -> str:
        return (
            f"keypoints {self.px:.2g} px (scores {self.score:.2g}), "
            f"{self.beyond} of {self.compared} farther off (at most {self.largest_px:.2g} px)"
        )


def compare_keypoints(reference: np.ndarray, other: np.ndarray, tolerance: KeypointTolerance) -> KeypointDifference:
    """Compares the keypoints `[P, K, 3]` (x, y, score) of paired detections."""
    distances, scores = keypoint_distances(reference, other).ravel(), score_differences(reference, other).ravel()
    near = (distances <= tolerance.px) & (scores <= tolerance.score)
    return KeypointDifference(
        compared=len(distances),
        beyond=int((~near).sum()),
        px=float(distances[near].max(initial=0.0)),
        score=float(scores[near].max(initial=0.0)),
        largest_px=float(distances.max(initial=0.0)),
        largest_score=float(scores.max(initial=0.0)),
    )


def keypoint_distances(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Distances `[P, K]` px of keypoints `[P, K, 3]`: the larger of the distances along x and y."""
    distances: np.ndarray = np.abs(reference[..., :2] - other[..., :2]).max(axis=-1, initial=0.0)
    return distances


def score_differences(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Score differences `[P, K]` of keypoints `[P, K, 3]`, relative to the reference score or to 1, if larger."""
    size = np.maximum(np.abs(reference[..., 2]), 1.0)
    differences: np.ndarray = np.abs(reference[..., 2] - other[..., 2]) / size
    return differences


def merge_keypoints(parts: Sequence[KeypointDifference | None]) -> KeypointDifference | None:
    """Merges the differences of several batches; None without keypoints."""
    present = [part for part in parts if part is not None]
    largest = ("px", "score", "largest_px", "largest_score")
    return KeypointDifference(**_merged(present, ("compared", "beyond"), largest)) if present else None


def _merged(parts: Sequence[Any], sums: Sequence[str], largest: Sequence[str]) -> dict[str, Any]:
    """Fields of several differences: sums, and maxima of the values that are not None; None if all are None."""
    values = {name: [value for part in parts if (value := getattr(part, name)) is not None] for name in largest}
    maxima = {name: largest_of(np.array(found)) if found else None for name, found in values.items()}
    return {name: sum(getattr(part, name) for part in parts) for name in sums} | maxima


# Measured in single precision with random weights: 1e-4 px, scores 1e-5, no displaced keypoint.
_EXACT_KEYPOINTS = KeypointTolerance(px=0.5, score=1e-2, share=0.05)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Maximum differences of the same detection in two models."""

    box_px: float
    score: float
    mask: float  # for any pixel
    mask_mean: float  # average over a mask
    keypoints: KeypointTolerance = _EXACT_KEYPOINTS
    min_iou: float = 0.5  # for a pair of detections of the same label
    departing_share: float = 0.0  # share of the reference's detections that may lack a partner or differ by more

    def __str__(self) -> str:
        text = f"boxes within {self.box_px:g} px, scores {self.score:g}, masks {self.mask_mean:g} on average"
        single = f" and {self.mask:g} at any pixel" if self.mask < 1 else ""
        share = f", except for {self.departing_share:.0%} of the detections" if self.departing_share else ""
        return f"{text}{single}{share}; {self.keypoints} of the keypoints, if any"


# Single precision with another summation order. Measured: a thousandth of this for trained weights; for random weights,
# whose fifty layers amplify rounding, 0.14 px, 0.0012 and 0.05.
EXACT = Tolerance(box_px=0.5, score=5e-3, mask=0.1, mask_mean=1e-2)
# bfloat16 keeps 8 bits, 0.4 % of a value, and more is lost over fifty layers. A box that moves by a pixel moves the
# outline in its mask, so a single pixel may change from 0 to 1. If two proposals of an object have similar scores,
# either may be kept, which gives another box and another mask.
HALF = Tolerance(
    box_px=16.0,
    score=0.15,
    mask=1.0,
    mask_mean=0.1,
    keypoints=KeypointTolerance(px=16.0, score=0.5, share=0.2),
    min_iou=0.7,
    departing_share=0.1,
)
# 8-bit integers. Measured with a trained detector of shapes, whose AP stayed within 0.003: 2.6 px, 0.24 and 0.09.
INT8 = Tolerance(
    box_px=24.0,
    score=0.5,
    mask=1.0,
    mask_mean=0.2,
    keypoints=KeypointTolerance(px=24.0, score=1.0, share=0.3),
    min_iou=0.6,
    departing_share=0.2,
)
# By precision of a model or an engine; TF32 has ten mantissa bits like FP16.
TOLERANCES = {"fp32": EXACT, "tf32": HALF, "fp16": HALF, "bf16": HALF, "int8": INT8}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Maximum differences between the paired detections of two models' outputs."""

    images: int
    detections: int  # number in the reference
    box_px: float
    score: float
    mask: float | None  # maximum over all pixels; None: models without masks
    mask_mean: float | None
    unpaired: int  # detections of either side without a partner, without excused ones (see `at_edge`)
    departing: int  # pairs outside the tolerance used for the comparison
    images_without_detections: int
    keypoints: KeypointDifference | None = None  # of pairs whose boxes and scores agree; None: models without keypoints
    stages: str = ""  # without any detection: the preceding stages that were compared
    departure: str = ""  # the first of these stages that differs

    @property
    def unmatched_share(self) -> float:
        """Share of the reference's detections that have no partner or are beyond the tolerance."""
        return (self.unpaired + self.departing) / max(self.detections, 1)

    def within(self, tolerance: Tolerance) -> bool:
        """Whether all pairs but the allowed share are inside the tolerance; NaN never is.

        Args:
            tolerance: the tolerance used for the comparison; for any other, no pair may be outside.
        """
        if self.departure:
            return False
        if self.keypoints is not None and not self.keypoints.within(tolerance.keypoints):
            return False
        pairs = (
            (self.box_px, tolerance.box_px),
            (self.score, tolerance.score),
            (self.mask or 0.0, tolerance.mask),
            (self.mask_mean or 0.0, tolerance.mask_mean),
        )
        if any(math.isnan(found) for found, _ in pairs):
            return False
        all_inside = all(found <= limit for found, limit in pairs)
        departing = 0 if all_inside else self.departing or math.inf
        return self.unpaired + departing <= tolerance.departing_share * self.detections

    def summary(self, than: str) -> str:
        """One line for a difference within its tolerance: the distance of the detections from those of `than`."""
        if not self.detections:
            return str(self)
        matched = max(self.detections - self.departing - self.unpaired, 0)
        points = "" if self.keypoints is None else f", keypoints ≤ {self.keypoints.px:.2g} px"
        return (
            f"boxes differ from {than}'s by ≤ {self.box_px:.2g} px, scores ≤ {self.score:.2g}{points}; "
            f"{matched} of {self.detections} detections match"
        )

    def __str__(self) -> str:
        if not self.detections and not self.unpaired:
            instead = "; ".join(part for part in (self.stages, self.departure) if part) or "nothing was compared"
            return f"no detections on {self.images} images, so boxes and masks were not compared; {instead}"
        masks = "" if self.mask is None else f"masks {self.mask:.2g} (mean {self.mask_mean:.2g}), "
        keypoints = "" if self.keypoints is None else f"{self.keypoints}, "
        rest = f"{self.unpaired} unpaired, {self.departing} beyond the tolerance"
        return (
            f"{self.detections} detections on {self.images} images "
            f"({self.images_without_detections} without any): tolerance needed: boxes {self.box_px:.2g} px, "
            f"scores {self.score:.2g}, {masks}{keypoints}{rest}"
        )


def merge(parts: list[Difference]) -> Difference:
    """Merges the differences of several batches."""
    sums = ("images", "detections", "unpaired", "departing", "images_without_detections")
    merged = _merged(parts, sums, ("box_px", "score", "mask", "mask_mean"))
    return Difference(**merged, keypoints=merge_keypoints([part.keypoints for part in parts]))


def compare_outputs(
    reference: dict[str, np.ndarray],
    other: dict[str, np.ndarray],
    tolerance: Tolerance,
    *,
    score_threshold: float = 0.05,
    num_classes: int | None = None,
) -> Difference:
    """Compares two models' outputs for the same batch: detections are paired image by image, see `pair_detections`.

    Args:
        reference: outputs by name, as in the detector contract.
        other: outputs of the other model.
        tolerance: decides which detections without a partner are excused, see `at_edge`.
        score_threshold: the models' score threshold.
        num_classes: labels of `other` must be within 1 and this number (default: not checked).

    Raises:
        UserError: if only one of the models has masks or keypoints, or for impossible labels.
    """
    if num_classes is not None:
        live = np.arange(other["labels"].shape[1]) < other["num_detections"].reshape(-1, 1)
        labels = other["labels"][live]
        if (wrong := labels[(labels < 1) | (labels > num_classes)]).size:
            raise UserError(
                f"{wrong.size} of {labels.size} detections with impossible labels, such as {wrong[0]}",
                f"labels from 1 to {num_classes}",
                "build again with another version of the runtime, or on a GPU; the file computes wrong indices there",
            )
    if set(reference) != set(other):
        raise UserError(f"outputs {sorted(other)}", f"{sorted(reference)}", "compare models of one architecture")
    rows = reference["scores"].shape[1]
    names = sorted(set(reference) - {"num_detections"})
    parts = []
    for n in range(len(reference["num_detections"])):
        first, second = (
            {name: side[name][n, : side["num_detections"][n]] for name in names} for side in (reference, other)
        )
        parts.append(_compare_image(first, second, tolerance, score_threshold, rows))
    return merge(parts)


def _compare_image(
    first: dict[str, np.ndarray],
    second: dict[str, np.ndarray],
    tolerance: Tolerance,
    score_threshold: float,
    max_rows: int,
) -> Difference:
    a, b, *unpaired = pair_detections(
        first["boxes"], first["labels"], second["boxes"], second["labels"], tolerance.min_iou
    )
    limits = (tolerance.score, score_threshold, max_rows)
    not_excused = (
        ~at_edge(side["scores"], rows, *limits) for side, rows in zip((first, second), unpaired, strict=True)
    )
    boxes, scores = np.abs(first["boxes"][a] - second["boxes"][b]), np.abs(first["scores"][a] - second["scores"][b])
    near = (boxes <= tolerance.box_px).all(axis=1) & (scores <= tolerance.score)
    is_inside, mask, mask_mean, keypoints = near, None, None, None
    if "masks" in first:
        masks = np.abs(first["masks"][a] - second["masks"][b])
        means = masks.mean(axis=(1, 2))
        is_inside = near & (masks <= tolerance.mask).all(axis=(1, 2)) & (means <= tolerance.mask_mean)
        mask, mask_mean = largest_of(masks), largest_of(means)
    if "keypoints" in first:
        keypoints = compare_keypoints(first["keypoints"][a[near]], second["keypoints"][b[near]], tolerance.keypoints)
    return Difference(
        images=1,
        detections=len(first["scores"]),
        box_px=largest_of(boxes),
        score=largest_of(scores),
        mask=mask,
        mask_mean=mask_mean,
        unpaired=sum(int(rows.sum()) for rows in not_excused),
        departing=int((~is_inside).sum()),
        images_without_detections=int(len(first["scores"]) == 0),
        keypoints=keypoints,
    )


def largest_of(values: np.ndarray) -> float:
    """The maximum of an array; 0 if it is empty, NaN if any value is NaN."""
    return float(np.asarray(values, np.float64).max()) if values.size else 0.0
