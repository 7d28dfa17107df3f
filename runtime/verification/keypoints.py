"""How far the keypoints of two models are apart. Needs NumPy only.

A keypoint is the best pixel of a heat map. Where two pixels are as good as equal rounding decides between them, and
that may be one pixel or half a person's length: no tolerance in pixels covers it. So a share of the keypoints may lie
elsewhere, and the tolerance is for the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class KeypointTolerance:
    """What counts as the same keypoint."""

    px: float  # along either axis
    score: float  # of the two scores, which are logits; relative, as `score_differences`
    share: float  # of the keypoints that may differ by more; any part of one counts as one

    def __str__(self) -> str:
        return f"keypoints within {self.px:g} px and their scores within {self.score:g}, but for {self.share:.0%}"


@dataclass(frozen=True, kw_only=True)
class KeypointDifference:
    """The differences between the keypoints of paired detections."""

    compared: int  # keypoints
    beyond: int  # of them, those that differ by more than the tolerance they were compared with
    px: float  # the largest difference of the others along an axis
    score: float  # likewise
    largest_px: float  # of all; NaN where there is one
    largest_score: float

    def within(self, tolerance: KeypointTolerance) -> bool:
        """Whether all keypoints but a share are inside the tolerance; NaN never is.

        Args:
            tolerance: the one that they were compared with, or another, outside of which no keypoint may be.
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
    """The difference of keypoints `[P, K, 3]` of paired detections: x, y, score."""
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
    """How far apart keypoints `[P, K, 3]` are along the axis on which they are farther apart, `[P, K]` px."""
    return np.abs(reference[..., :2] - other[..., :2]).max(axis=-1, initial=0.0)


def score_differences(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How much the scores of keypoints `[P, K, 3]` differ, relative to the reference's, or to 1 where that is less."""
    size = np.maximum(np.abs(reference[..., 2]), 1.0)
    return np.abs(reference[..., 2] - other[..., 2]) / size


def merge_keypoints(parts: Sequence[KeypointDifference | None]) -> KeypointDifference | None:
    """The difference over several batches; None where there are no keypoints."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    counts = {name: sum(getattr(part, name) for part in present) for name in ("compared", "beyond")}
    names = ("px", "score", "largest_px", "largest_score")
    return KeypointDifference(
        **counts, **{name: float(np.max([getattr(part, name) for part in present])) for name in names}
    )
