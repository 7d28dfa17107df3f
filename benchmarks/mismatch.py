"""Differences between two models' detections on the same images, in pixels of the original images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskrcnn.imaging.postprocess import Detections
from maskrcnn.runtime.verification.compare import (
    EXACT,
    KeypointDifference,
    KeypointTolerance,
    at_edge,
    compare_keypoints,
    largest_of,
    merge_keypoints,
    pair_detections,
)

_MIN_IOU = 0.5  # of a pair of detections of the same label


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
        keypoints: KeypointTolerance = EXACT.keypoints,
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
    tolerance: KeypointTolerance = EXACT.keypoints,
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
        reference.boxes_xyxy_px, reference.labels, other.boxes_xyxy_px, other.labels, _MIN_IOU
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
        box_px=largest_of(np.abs(reference.boxes_xyxy_px[first] - other.boxes_xyxy_px[second])),
        score=largest_of(np.abs(reference.scores[first] - other.scores[second])),
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
        "mask_px": int(largest_of(differing[~jumped])),
        "mask_px_sum": int(differing[~jumped].sum()),
        "mask_iou": 1.0 - largest_of(lost[~jumped]),
        "jumped_mask_iou": 1.0 - largest_of(lost[jumped]),
    }


def _windows(detections: Detections) -> np.ndarray:
    """Whole pixels `[D, 4]` of the boxes, grown by one pixel of a 28 × 28 mask on each side."""
    corners = detections.boxes_xyxy_px.reshape(-1, 2, 2)
    half = (corners[:, 1] - corners[:, 0]) * np.float32(0.5) * np.float32(30 / 28)
    centre = (corners[:, 1] + corners[:, 0]) * np.float32(0.5)
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.int64)
