"""Whether two sets of detector outputs say the same, and the tolerance that this needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from maskrcnn.errors import UserError

# Which rows of two models belong together: pairs of boxes by their overlap. Needs NumPy only.

_TAKEN = -1.0  # in a matrix of overlaps: this pair is not to be made


class _Pairs(NamedTuple):
    """Rows `first[k]` and `second[k]` belong together; the others of either side are alone. All int64."""

    first: np.ndarray
    second: np.ndarray
    alone_first: np.ndarray
    alone_second: np.ndarray


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU `[A, B]` float32 of boxes `[A, 4]` and `[B, 4]` xyxy; zero where both areas are zero, NaN of NaN."""
    first, second = (np.asarray(boxes, np.float32).reshape(-1, 4) for boxes in (first, second))
    overlap = np.ones((len(first), len(second)), np.float32)
    for axis in (0, 1):
        low = np.maximum(first[:, None, axis], second[None, :, axis])
        overlap *= (np.minimum(first[:, None, axis + 2], second[None, :, axis + 2]) - low).clip(min=0)
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None, :] - overlap
    return overlap / np.maximum(union, np.float32(1e-9))


def of_equal_label(overlaps: np.ndarray, labels: np.ndarray, other_labels: np.ndarray) -> np.ndarray:
    """Overlaps `[A, B]` in which rows of different labels `[A]` and `[B]` make no pairs."""
    return np.where(labels[:, None] == other_labels[None, :], overlaps, _TAKEN)


def pair_in_order(overlaps: np.ndarray, min_iou: float) -> _Pairs:
    """Each row of the first side in its order takes the best of those left: as COCO's evaluation does with scores.

    Args:
        overlaps: `[A, B]`; a row with NaN among those left stays alone.
        min_iou: a pair overlaps at least so much.
    """
    left = np.array(overlaps, copy=True)
    pairs = []
    for row in range(left.shape[0] if left.shape[1] else 0):
        best = int(left[row].argmax())  # of a row with NaN: its place, which is not ≥ min_iou
        if left[row, best] >= min_iou:
            pairs.append((row, best))
            left[:, best] = _TAKEN
    return _with_the_rest(pairs, overlaps.shape)


def pair_best_first(overlaps: np.ndarray, min_iou: float) -> _Pairs:
    """The pair that overlaps most is made first: no row takes the partner that fits another better.

    Args:
        overlaps: `[A, B]`; NaN makes no pair.
        min_iou: a pair overlaps at least so much.
    """
    rows, columns = np.nonzero(overlaps >= min_iou)
    order = np.argsort(-overlaps[rows, columns], kind="stable")
    free_first, free_second = (np.ones(length, bool) for length in overlaps.shape)
    pairs = []
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if free_first[row] and free_second[column]:
            free_first[row] = free_second[column] = False
            pairs.append((row, column))
    return _with_the_rest(sorted(pairs), overlaps.shape)


def _with_the_rest(pairs: list[tuple[int, int]], shape: tuple[int, ...]) -> _Pairs:
    made = np.array(pairs, np.int64).reshape(-1, 2)
    alone = (np.setdiff1d(np.arange(length, dtype=np.int64), made[:, k]) for k, length in enumerate(shape))
    return _Pairs(made[:, 0], made[:, 1], *alone)


# How far the keypoints of two models are apart. Needs NumPy only.
#
# A keypoint is the best pixel of a heat map. Where two pixels are as good as equal rounding decides between them, and
# that may be one pixel or half a person's length: no tolerance in pixels covers it. So a share of the keypoints may lie
# elsewhere, and the tolerance is for the others.


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


# Single precision needed 1e-4 px and 1e-5 of the scores with random weights, and no keypoint was elsewhere.
_EXACT_KEYPOINTS = KeypointTolerance(px=0.5, score=1e-2, share=0.05)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What counts as the same."""

    box_px: float
    score: float
    mask: float  # of any pixel
    mask_mean: float  # of a detection's mask on average
    keypoints: KeypointTolerance = _EXACT_KEYPOINTS
    min_iou: float = 0.5  # with which detections of the same label are paired
    departing_share: float = 0.0  # of the reference's detections that may lack a partner or differ by more

    def __str__(self) -> str:
        text = f"boxes within {self.box_px:g} px, scores {self.score:g}, masks {self.mask_mean:g} on average"
        single = f" and {self.mask:g} at any pixel" if self.mask < 1 else ""
        share = f", but for {self.departing_share:.0%} of the detections" if self.departing_share else ""
        return f"{text}{single}{share}; {self.keypoints} of the keypoints, where there are any"


# Single precision in another order of summation. Trained weights need a thousandth of this; random ones, whose
# fifty layers amplify rounding, were seen to need 0.14 px, 0.0012 and 0.05.
EXACT = Tolerance(box_px=0.5, score=5e-3, mask=0.1, mask_mean=1e-2)
# bfloat16 keeps 8 bits, 0.4 % of a value, and more is lost over fifty layers. A box that moves by a pixel moves
# the outline in its mask, so single pixels may change altogether.
# And where two proposals of an object score alike, either may be kept: that is another box and another mask.
HALF = Tolerance(
    box_px=16.0,
    score=0.15,
    mask=1.0,
    mask_mean=0.1,
    keypoints=KeypointTolerance(px=16.0, score=0.5, share=0.2),
    min_iou=0.7,
    departing_share=0.1,
)
# 8-bit integers. A trained detector of shapes, whose AP stayed within 0.003, needed 2.6 px, 0.24 and 0.09.
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
    """The largest differences between paired detections, and how many found no partner."""

    images: int
    detections: int  # of the reference
    box_px: float
    score: float
    mask: float | None  # of any pixel; None: models without masks
    mask_mean: float | None
    unpaired: int  # detections of either side without partner, those at a threshold's edge left out
    departing: int  # pairs that differ by more than the tolerance they were compared with
    images_without_detections: int
    keypoints: KeypointDifference | None = None  # of pairs whose boxes and scores agree; None: models without keypoints

    def within(self, tolerance: Tolerance) -> bool:
        """Whether all pairs but a share are inside the tolerance; NaN never is.

        Args:
            tolerance: the one that the outputs were compared with, or another, outside of which no pair may be.
        """
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

    def __str__(self) -> str:
        masks = "" if self.mask is None else f"masks {self.mask:.2g} (mean {self.mask_mean:.2g}), "
        keypoints = "" if self.keypoints is None else f"{self.keypoints}, "
        rest = f"{self.unpaired} unpaired, {self.departing} beyond the tolerance"
        return (
            f"{self.detections} detections on {self.images} images "
            f"({self.images_without_detections} without any): tolerance needed: boxes {self.box_px:.2g} px, "
            f"scores {self.score:.2g}, {masks}{keypoints}{rest}"
        )


def merge(parts: list[Difference]) -> Difference:
    """The difference over several batches."""
    return Difference(
        images=sum(p.images for p in parts),
        detections=sum(p.detections for p in parts),
        box_px=_largest([p.box_px for p in parts]),
        score=_largest([p.score for p in parts]),
        mask=_largest_there_is([p.mask for p in parts]),
        mask_mean=_largest_there_is([p.mask_mean for p in parts]),
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
) -> Difference:
    """Pairs the detections of two outputs of the same batch, image by image.

    Detections are paired by label and best IoU, in the reference's order. One without a partner is excused when
    its score lies within the tolerance of the score below which its side keeps nothing.

    Args:
        reference: outputs by name, as the detector contract has them.
        other: the same of the other model.
        tolerance: decides which detections are excused.
        score_threshold: the model's.

    Raises:
        UserError: when one of the two has masks or keypoints and the other has none.
    """
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
    rows: int,
) -> Difference:
    a, b, *alone = pair_detections(first, second, tolerance.min_iou)
    limits = (tolerance.score, score_threshold, rows)
    unpaired = sum(
        int((~at_edge(side["scores"], left, *limits)).sum()) for side, left in zip((first, second), alone, strict=True)
    )
    masks = np.abs(first["masks"][a] - second["masks"][b]) if "masks" in first else None
    near = _near(first, second, a, b, tolerance)
    return Difference(
        images=1,
        detections=len(first["scores"]),
        box_px=_largest(np.abs(first["boxes"][a] - second["boxes"][b])),
        score=_largest(np.abs(first["scores"][a] - second["scores"][b])),
        mask=None if masks is None else _largest(masks),
        mask_mean=None if masks is None else _largest(masks.mean(axis=(1, 2))),
        unpaired=unpaired,
        departing=_departing(near, masks, tolerance),
        images_without_detections=int(len(first["scores"]) == 0),
        keypoints=compare_keypoints(first["keypoints"][a[near]], second["keypoints"][b[near]], tolerance.keypoints)
        if "keypoints" in first
        else None,
    )


def _near(first: dict, second: dict, a: np.ndarray, b: np.ndarray, tolerance: Tolerance) -> np.ndarray:
    """Bool of the pairs (a[k], b[k]): whether box and score differ by no more than the tolerance."""
    near = (np.abs(first["boxes"][a] - second["boxes"][b]) <= tolerance.box_px).all(axis=1)
    return near & (np.abs(first["scores"][a] - second["scores"][b]) <= tolerance.score)


def _departing(near: np.ndarray, masks: np.ndarray | None, tolerance: Tolerance) -> int:
    """How many pairs differ by more than the tolerance; `masks` `[P, 28, 28]` are the differences of theirs."""
    if masks is not None:
        near = near & (masks <= tolerance.mask).all(axis=(1, 2)) & (masks.mean(axis=(1, 2)) <= tolerance.mask_mean)
    return int((~near).sum())


def pair_detections(first: dict[str, np.ndarray], second: dict[str, np.ndarray], min_iou: float) -> _Pairs:
    """Detections of the same label, the reference's in their order taking the best overlap.

    Args:
        first: `boxes` `[K, 4]` and `labels` `[K]` of one image.
        second: the same of the other model.
        min_iou: a pair overlaps at least so much.
    """
    overlaps = pairwise_iou(first["boxes"], second["boxes"])
    return pair_in_order(of_equal_label(overlaps, first["labels"], second["labels"]), min_iou)


def at_edge(scores: np.ndarray, alone: np.ndarray, margin: float, score_threshold: float, rows: int) -> np.ndarray:
    """Whether detections without a partner lie so near the edge of being reported that they are excused: bool `[A]`.

    Args:
        scores: `[K]` of all detections of a side; NaN is never excused.
        alone: `[A]` of these have no partner.
        margin: how much scores may differ.
        score_threshold: nothing below it is reported.
        rows: the most detections that are reported.
    """
    edge = scores.min() if len(scores) == rows else score_threshold
    return scores[alone] <= edge + margin


def _largest_there_is(values: list[float | None]) -> float | None:
    """The largest value of those that are not None; None when all are."""
    present = [value for value in values if value is not None]
    return _largest(present) if present else None


def _largest(values) -> float:
    """The largest value, zero of nothing, NaN where there is one."""
    values = np.asarray(values, np.float64)
    return float(values.max()) if values.size else 0.0
