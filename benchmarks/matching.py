"""How far the detections of two models on the same image lie apart, in pixels of that image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maskrcnn.imaging.postprocess import Detections
from maskrcnn.runtime.verification.compare import (
    EXACT,
    KeypointDifference,
    KeypointTolerance,
    compare_keypoints,
    merge_keypoints,
    of_equal_label,
    pair_in_order,
    pairwise_iou,
)

_MIN_IOU = 0.5  # with which detections of the same label are paired


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """The largest differences between paired detections, and what could not be paired."""

    images: int = 0
    detections: int = 0  # of the reference
    other_detections: int = 0
    labels: int = 0  # different labels in the reference, at most of one image
    unpaired: int = 0  # of both sides, those at the edge of being reported left out
    excused: int = 0  # without partner, but as near to the lowest reported score as scores differ
    reordered: int = 0  # pairs at different ranks
    box_px: float = 0.0
    score: float = 0.0
    masks: int = 0  # pairs whose masks were compared
    jumped: int = 0  # pairs of masks pasted into windows that differ, see `compare_detections`
    mask_px: int = 0  # pixels of one pair of masks that differ, at most; without those that jumped
    mask_px_sum: int = 0  # likewise, of all pairs
    mask_iou: float = 1.0  # of one pair of masks, at least; likewise
    jumped_mask_iou: float = 1.0  # the same of those that jumped
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
        """Whether the difference is inside these bounds."""
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


def merge(parts: Sequence[Mismatch]) -> Mismatch:
    """The mismatch over several images."""
    sums = ("images", "detections", "other_detections", "unpaired", "excused", "reordered", "jumped")
    sums += ("masks", "mask_px_sum")
    smallest = ("mask_iou", "jumped_mask_iou")
    largest = ("labels", "box_px", "score", "mask_px")
    return Mismatch(
        **{name: sum(getattr(part, name) for part in parts) for name in sums},
        **{name: max((getattr(part, name) for part in parts), default=0) for name in largest},
        **{name: min((getattr(part, name) for part in parts), default=1.0) for name in smallest},
        keypoints=merge_keypoints([part.keypoints for part in parts]),
    )


def compare_detections(
    reference: Detections,
    other: Detections,
    tolerance: KeypointTolerance = EXACT.keypoints,
    *,
    edge: float = 1e-3,
    rows: int = 100,
    threshold: float = 0.05,
) -> Mismatch:
    """Pairs the detections of one image by label and IoU, and measures the pairs.

    Masks are pasted into windows of whole pixels. A box side within float noise of the next pixel moves its
    window by one, and the mask is resized to another size: the pair is counted as jumped, not as differing.

    Args:
        reference, other: in pixels of the same image, by descending score.
        tolerance: for counting the keypoints that lie elsewhere.
        edge: a detection without partner is excused when its score is at most this much above the lowest
            that its side could report.
        rows: the most detections that a side reports.
        threshold: the score below which nothing is reported.
    """
    overlaps = pairwise_iou(reference.boxes_xyxy_px, other.boxes_xyxy_px)
    overlaps = of_equal_label(overlaps, reference.labels, other.labels)
    first, second, alone, other_alone = pair_in_order(overlaps, _MIN_IOU)
    unpaired = excused = 0
    for side, indices in ((reference, alone), (other, other_alone)):
        lowest = side.scores.min() if len(side) >= rows else threshold
        at_edge = int((side.scores[indices] <= lowest + edge).sum())
        unpaired, excused = unpaired + len(indices) - at_edge, excused + at_edge
    return Mismatch(
        images=1,
        detections=len(reference),
        other_detections=len(other),
        labels=len(np.unique(reference.labels)),
        unpaired=unpaired,
        excused=excused,
        reordered=int((first != second).sum()),
        box_px=_largest(np.abs(reference.boxes_xyxy_px[first] - other.boxes_xyxy_px[second])),
        score=_largest(np.abs(reference.scores[first] - other.scores[second])),
        **(_compare_masks(reference, other, first, second) if reference.has_masks or other.has_masks else {}),
        keypoints=compare_keypoints(reference.keypoints[first], other.keypoints[second], tolerance)
        if reference.has_keypoints and other.has_keypoints
        else None,
    )


def _compare_masks(reference: Detections, other: Detections, first: np.ndarray, second: np.ndarray) -> dict[str, float]:
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
    """`[D, 4]` the whole pixels of the boxes, grown by a pixel of a mask of 28 on each side."""
    corners = detections.boxes_xyxy_px.reshape(-1, 2, 2)
    half = (corners[:, 1] - corners[:, 0]) * np.float32(0.5) * np.float32(30 / 28)
    centre = (corners[:, 1] + corners[:, 0]) * np.float32(0.5)
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.int64)


def _largest(values: np.ndarray) -> float:
    return float(values.max()) if values.size else 0.0
