"""Pairing and comparing the detections of two models, and the tolerances of sound precisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Detections

_TAKEN = -1.0  # in a matrix of overlaps: this pair may not be made


class Pairs(NamedTuple):
    """Rows `first[k]` and `second[k]` are paired; the other rows of either side are not. All int64."""

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
    """Pairs detections of the same label: in the order of the first side, each takes the best overlap that is left.

    COCO's evaluation matches in the same way, by descending score.

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
    """Pairs boxes in descending order of overlap: no box takes the partner that another overlaps more.

    Args:
        boxes: `[A, 4]` xyxy; NaN makes no pair.
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
    """Whether detections without a partner are excused, bool `[A]`: the other model may just not have reported them.

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


# A keypoint is the best pixel of a heat map. Where two pixels score nearly alike, rounding decides, and the two may be
# one pixel or half a person apart, which no tolerance in pixels covers. So a share of the keypoints may
# lie elsewhere, and the tolerance is for the others.


@dataclass(frozen=True, kw_only=True)
class KeypointTolerance:
    """Maximum differences of the same keypoint in two models."""

    px: float  # along either axis
    score: float  # of the logits, relative; see `score_differences`
    share: float  # of the keypoints that may differ by more, rounded up to whole keypoints

    def __str__(self) -> str:
        return f"keypoints within {self.px:g} px and their scores within {self.score:g}, but for {self.share:.0%}"


@dataclass(frozen=True, kw_only=True)
class KeypointDifference:
    """Differences between the keypoints of paired detections."""

    compared: int  # keypoints
    beyond: int  # keypoints outside the tolerance that they were compared with
    px: float  # maximum difference of the others along an axis
    score: float  # maximum difference of the others
    largest_px: float  # of all; NaN if any is NaN
    largest_score: float

    def within(self, tolerance: KeypointTolerance) -> bool:
        """Whether all keypoints but the allowed share are inside the tolerance; NaN never is.

        Args:
            tolerance: the one that they were compared with; of any other, no keypoint may be outside.
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
    """Distances `[P, K]` px of keypoints `[P, K, 3]` along the axis on which they are farther apart."""
    distances: np.ndarray = np.abs(reference[..., :2] - other[..., :2]).max(axis=-1, initial=0.0)
    return distances


def score_differences(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Differences `[P, K]` of the scores of keypoints `[P, K, 3]`, relative to the reference's or to 1, if larger."""
    size = np.maximum(np.abs(reference[..., 2]), 1.0)
    differences: np.ndarray = np.abs(reference[..., 2] - other[..., 2]) / size
    return differences


def merge_keypoints(parts: Sequence[KeypointDifference | None]) -> KeypointDifference | None:
    """Merges the differences of several batches; None without keypoints."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    return KeypointDifference(
        compared=sum(part.compared for part in present),
        beyond=sum(part.beyond for part in present),
        px=_largest(np.array([part.px for part in present])),
        score=_largest(np.array([part.score for part in present])),
        largest_px=_largest(np.array([part.largest_px for part in present])),
        largest_score=_largest(np.array([part.largest_score for part in present])),
    )


# Measured in single precision with random weights: 1e-4 px, scores 1e-5, no keypoint elsewhere.
_EXACT_KEYPOINTS = KeypointTolerance(px=0.5, score=1e-2, share=0.05)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Maximum differences of the same detection in two models."""

    box_px: float
    score: float
    mask: float  # of any pixel
    mask_mean: float  # of a mask on average
    keypoints: KeypointTolerance = _EXACT_KEYPOINTS
    min_iou: float = 0.5  # of a pair of detections of the same label
    departing_share: float = 0.0  # of the reference's detections that may lack a partner or differ by more

    def __str__(self) -> str:
        text = f"boxes within {self.box_px:g} px, scores {self.score:g}, masks {self.mask_mean:g} on average"
        single = f" and {self.mask:g} at any pixel" if self.mask < 1 else ""
        share = f", but for {self.departing_share:.0%} of the detections" if self.departing_share else ""
        return f"{text}{single}{share}; {self.keypoints} of the keypoints, where there are any"


# Single precision in another order of summation. Measured: trained weights a thousandth of this; random weights, whose
# fifty layers amplify rounding, 0.14 px, 0.0012 and 0.05.
EXACT = Tolerance(box_px=0.5, score=5e-3, mask=0.1, mask_mean=1e-2)
# bfloat16 keeps 8 bits, 0.4 % of a value, and more is lost over fifty layers. A box that moves by a pixel moves the
# outline in its mask, so a single pixel may change from 0 to 1. Where two proposals of an object score alike, either
# may be kept, which gives another box and another mask.
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


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Maximum differences between the paired detections of two models' outputs."""

    images: int
    detections: int  # of the reference
    box_px: float
    score: float
    mask: float | None  # of any pixel; None: models without masks
    mask_mean: float | None
    unpaired: int  # detections of either side without a partner, without excused ones (see `at_edge`)
    departing: int  # pairs outside the tolerance that they were compared with
    images_without_detections: int
    keypoints: KeypointDifference | None = None  # of pairs whose boxes and scores agree; None: models without keypoints
    stages: str = ""  # without any detection: which stages before them were compared
    departure: str = ""  # the first of these stages that differs

    @property
    def unmatched_share(self) -> float:
        """Share of the reference's detections that have no partner or are beyond the tolerance."""
        return (self.unpaired + self.departing) / max(self.detections, 1)

    def within(self, tolerance: Tolerance) -> bool:
        """Whether all pairs but the allowed share are inside the tolerance; NaN never is.

        Args:
            tolerance: the one that the outputs were compared with; of any other, no pair may be outside.
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
        """One line for a difference within its tolerance: how far the detections are from those of `than`."""
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
    return Difference(
        images=sum(p.images for p in parts),
        detections=sum(p.detections for p in parts),
        box_px=_largest(np.array([p.box_px for p in parts])),
        score=_largest(np.array([p.score for p in parts])),
        mask=_largest_present([p.mask for p in parts]),
        mask_mean=_largest_present([p.mask_mean for p in parts]),
        unpaired=sum(p.unpaired for p in parts),
        departing=sum(p.departing for p in parts),
        images_without_detections=sum(p.images_without_detections for p in parts),
        keypoints=merge_keypoints([p.keypoints for p in parts]),
    )


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
        UserError: if only one of the two has masks or keypoints, and for impossible labels.
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
        mask, mask_mean = _largest(masks), _largest(means)
    if "keypoints" in first:
        keypoints = compare_keypoints(first["keypoints"][a[near]], second["keypoints"][b[near]], tolerance.keypoints)
    return Difference(
        images=1,
        detections=len(first["scores"]),
        box_px=_largest(boxes),
        score=_largest(scores),
        mask=mask,
        mask_mean=mask_mean,
        unpaired=sum(int(rows.sum()) for rows in not_excused),
        departing=int((~is_inside).sum()),
        images_without_detections=int(len(first["scores"]) == 0),
        keypoints=keypoints,
    )


_DETECTIONS_MIN_IOU = 0.5  # of a pair of detections of the same label


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Maximum differences between the paired detections of two models, in pixels of the original images."""

    images: int = 0
    detections: int = 0  # of the reference
    other_detections: int = 0
    labels: int = 0  # different labels in the reference, maximum over the images
    unpaired: int = 0  # of both sides, without excused ones
    excused: int = 0  # of both sides, see `at_edge`
    reordered: int = 0  # pairs at different ranks
    box_px: float = 0.0
    score: float = 0.0
    masks: int = 0  # pairs of masks
    jumped: int = 0  # pairs of masks in windows of different size, see `compare_detections`
    mask_px: int = 0  # differing pixels of a pair, without jumped ones
    mask_px_sum: int = 0  # differing pixels of all pairs, without jumped ones
    mask_iou: float = 1.0  # minimum over the pairs, without jumped ones
    jumped_mask_iou: float = 1.0  # minimum over the jumped pairs
    keypoints: KeypointDifference | None = None  # None: one of the two has none

    def within(
        self,
        *,
        box_px: float,
        score: float,
        mask_iou: float,
        unpaired_share: float,
        keypoints: KeypointTolerance = _EXACT_KEYPOINTS,
    ) -> bool:
        """Whether the differences are within these limits."""
        return (
            self.box_px <= box_px
            and self.score <= score
            and self.mask_iou >= mask_iou
            and (self.keypoints is None or self.keypoints.within(keypoints))
            and self.unpaired <= unpaired_share * max(self.detections, self.other_detections)
        )

    def __str__(self) -> str:
        masks = f", masks {self.mask_px} px (sum {self.mask_px_sum}, IoU ≥ {self.mask_iou:.4f})" if self.masks else ""
        return (
            f"{self.detections} and {self.other_detections} detections, {self.labels} labels, "
            f"{self.unpaired} unpaired, {self.excused} at the edge, {self.reordered} reordered; "
            f"boxes {self.box_px:.2g} px, scores {self.score:.2g}{masks}"
            + (f", {self.keypoints}" if self.keypoints is not None else "")
            + (f", {self.jumped} windows jumped (IoU ≥ {self.jumped_mask_iou:.2f})" if self.jumped else "")
        )


def merge_mismatches(parts: Sequence[Mismatch]) -> Mismatch:
    """Merges the mismatches of several images."""
    counts = ("images", "detections", "other_detections", "unpaired", "excused", "reordered")
    sums = (*counts, "masks", "jumped", "mask_px_sum")
    values: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in sums}
    for name in ("labels", "box_px", "score", "mask_px"):
        values[name] = max((getattr(part, name) for part in parts), default=0)
    for name in ("mask_iou", "jumped_mask_iou"):
        values[name] = min((getattr(part, name) for part in parts), default=1.0)
    return Mismatch(**values, keypoints=merge_keypoints([part.keypoints for part in parts]))


def compare_detections(
    reference: Detections,
    other: Detections,
    tolerance: KeypointTolerance = _EXACT_KEYPOINTS,
    *,
    edge: float = 1e-3,
    max_rows: int = 100,
    score_threshold: float = 0.05,
) -> Mismatch:
    """Compares two models' detections on the same image: pairs them, see `pair_detections`, and measures the pairs.

    Masks are pasted into windows of whole pixels. A box side within rounding of the next pixel may move its window by
    one, which resizes the mask to another size: such a pair is counted as jumped, not as differing.

    Args:
        reference: detections in pixels of the image, by descending score.
        other: detections of the other model.
        tolerance: of the keypoints.
        edge: margin of scores without a partner, see `at_edge`.
        max_rows: maximum number of detections that a side reports.
        score_threshold: minimum score that is reported.
    """
    first, second, *unpaired = pair_detections(
        reference.boxes_xyxy_px, reference.labels, other.boxes_xyxy_px, other.labels, _DETECTIONS_MIN_IOU
    )
    excused = sum(
        int(at_edge(side.scores, rows, edge, score_threshold, max_rows).sum())
        for side, rows in zip((reference, other), unpaired, strict=True)
    )
    keypoints = None
    if reference.keypoints is not None and other.keypoints is not None:
        keypoints = compare_keypoints(reference.keypoints[first], other.keypoints[second], tolerance)
    return Mismatch(
        images=1,
        detections=len(reference),
        other_detections=len(other),
        labels=len(np.unique(reference.labels)),
        unpaired=sum(map(len, unpaired)) - excused,
        excused=excused,
        reordered=int((first != second).sum()),
        box_px=_largest(np.abs(reference.boxes_xyxy_px[first] - other.boxes_xyxy_px[second])),
        score=_largest(np.abs(reference.scores[first] - other.scores[second])),
        **(_compare_masks(reference, other, first, second) if reference.has_masks or other.has_masks else {}),
        keypoints=keypoints,
    )


def _compare_masks(reference: Detections, other: Detections, first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """The fields of `Mismatch` about masks, for pairs of detections `first[k]` and `second[k]`."""
    masks, other_masks = reference.full_masks()[first], other.full_masks()[second]
    differing = (masks ^ other_masks).sum(axis=(1, 2))
    windows, other_windows = _windows(reference)[first], _windows(other)[second]
    jumped = (windows != other_windows).any(axis=1) & (np.abs(windows - other_windows) <= 1).all(axis=1)
    lost = differing / np.maximum((masks | other_masks).sum(axis=(1, 2)), 1)
    return {
        "masks": len(masks),
        "jumped": int(jumped.sum()),
        "mask_px": int(_largest(differing[~jumped])),
        "mask_px_sum": int(differing[~jumped].sum()),
        "mask_iou": 1.0 - _largest(lost[~jumped]),
        "jumped_mask_iou": 1.0 - _largest(lost[jumped]),
    }


def _windows(detections: Detections) -> np.ndarray:
    """Whole pixels `[D, 4]` of the boxes, grown by one pixel of a 28 × 28 mask on each side."""
    corners = detections.boxes_xyxy_px.reshape(-1, 2, 2)
    half = (corners[:, 1] - corners[:, 0]) * np.float32(0.5) * np.float32(30 / 28)
    centre = (corners[:, 1] + corners[:, 0]) * np.float32(0.5)
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.int64)


def _largest_present(values: list[float | None]) -> float | None:
    """The maximum of the values that are not None; None if all are."""
    present = [value for value in values if value is not None]
    return _largest(np.array(present)) if present else None


def _largest(values: np.ndarray) -> float:
    """The maximum; 0 of an empty array, NaN if any is NaN."""
    return float(np.asarray(values, np.float64).max()) if values.size else 0.0
