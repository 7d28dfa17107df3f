"""RoIAlign in double precision with one matrix per axis, and error bounds for single precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EPSILON = 2.0**-23  # of float32
_ROUNDINGS = 3  # rounding errors of a position, each an epsilon of its summands


@dataclass(frozen=True)
class Truth:
    """Expected result and where it is certain."""

    pooled: np.ndarray  # [N, R, C, S, S] float64
    tolerance: np.ndarray  # [N, R]: error bound of float32 positions and sums
    is_sure: np.ndarray  # [N, R]: level, number of samples and borders do not depend on rounding


@dataclass(frozen=True)
class _Axis:
    weights: np.ndarray  # [S, pixels]
    shift: float  # position error of a sample in float32, in pixels
    is_sure: bool


def multilevel_roi_align(
    features: Sequence[np.ndarray],
    rois: np.ndarray,
    *,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    min_level: int = 2,
    canonical_level: int = 4,
    canonical_size: float = 224.0,
    level_epsilon: float = 1e-6,
) -> Truth:
    """`MultilevelRoiAlign` of the contract: features `[N, C, H_l, W_l]` of any float type, rois `[N, R, 4]`."""
    shape = (*rois.shape[:2], features[0].shape[1], output_size, output_size)
    truth = Truth(np.zeros(shape), np.zeros(shape[:2]), np.ones(shape[:2], bool))
    features = [f.astype(np.float64) for f in features]
    for n, r in np.ndindex(shape[:2]):
        x1, y1, x2, y2 = (float(v) for v in rois[n, r])
        exact = _level((x2 - x1) * (y2 - y1), canonical_level, canonical_size, level_epsilon)
        level = int(min(max(math.floor(exact), min_level), min_level + len(features) - 1)) if exact > -99 else min_level
        feature = features[level - min_level][n]
        given = {"bins": output_size, "ratio": sampling_ratio, "aligned": aligned}
        rows = _axis(y1 / 2.0**level, y2 / 2.0**level, feature.shape[1], **given)
        columns = _axis(x1 / 2.0**level, x2 / 2.0**level, feature.shape[2], **given)
        truth.pooled[n, r] = rows.weights @ feature @ columns.weights.T
        largest = np.abs(feature).max(initial=0)
        truth.tolerance[n, r] = largest * (2 * rows.shift + 2 * columns.shift + 16 * EPSILON)
        is_between = min_level < exact < min_level + len(features) and abs(exact - round(exact)) < 1e-5  # two levels
        truth.is_sure[n, r] = not is_between and rows.is_sure and columns.is_sure
    return truth


def _level(area: float, canonical_level: int, canonical_size: float, epsilon: float) -> float:
    """Equation 1 before rounding down; -inf for a box without area."""
    if not area > 0:
        return -math.inf
    return canonical_level + math.log2(math.sqrt(area) / canonical_size) + epsilon if area < math.inf else 99.0


def _axis(low: float, high: float, size: int, *, bins: int, ratio: int, aligned: bool) -> _Axis:
    """`low` and `high` in pixels of the map."""
    offset = 0.5 if aligned else 0.0
    length = high - low
    if not aligned:
        length = 1.0 if length < 1 else length
    width = length / bins
    weights = np.zeros((bins, size))
    shift = _ROUNDINGS * EPSILON * (abs(low) + abs(length) + 1)
    samples = ratio or (max(math.ceil(width), 0) if math.isfinite(width) else 0)
    is_sure = bool(ratio) or length == 0 or not math.isfinite(width) or abs(width - round(width)) > shift
    if not samples or not math.isfinite(low - offset + width):
        return _Axis(weights, 0.0, is_sure)
    position = low - offset + width * (np.arange(bins)[:, None] + (np.arange(samples) + 0.5) / samples)
    edges = np.abs(position - np.array([-1.0, size])[:, None, None])
    is_sure = is_sure and bool(edges.min() > shift)
    is_inside = (position >= -1) & (position <= size)
    position = position.clip(0, size - 1)
    below = np.floor(position).astype(int)
    fraction = position - below
    for pixel, weight in ((below, 1 - fraction), (np.minimum(below + 1, size - 1), fraction)):
        np.add.at(weights, (np.arange(bins)[:, None], pixel), weight * is_inside / samples)
    return _Axis(weights, shift, is_sure)
