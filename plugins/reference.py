"""NumPy reference of the custom ops: slow and short. Tests compare all other implementations with it.

Pixel model: in units of the stride, the centre of pixel (i, j) of a feature map is (j + 0.5, i + 0.5) with `aligned`
and (j, i) without.
"""

from __future__ import annotations

import math

import numpy as np


def level_of(
    roi: np.ndarray,
    num_levels: int,
    min_level: int,
    canonical_level: int,
    canonical_size: float,
    level_epsilon: float,
) -> int:
    """Returns the index of the level of one RoI `[4]` xyxy px (Lin et al. 2017, equation 1)."""
    area = np.float32(roi[2] - roi[0]) * np.float32(roi[3] - roi[1])
    if not area > 0:
        return 0
    size = np.float32(np.sqrt(area)) / np.float32(canonical_size)
    level = np.floor(canonical_level + np.log2(size) + np.float32(level_epsilon))
    return int(min(max(level, min_level), min_level + num_levels - 1)) - min_level


def bilinear(feature: np.ndarray, y: float, x: float) -> np.ndarray:
    """Samples a feature map `[C, H, W]` at a point in pixel units; returns `[C]`, zero outside [-1, size]."""
    height, width = feature.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):  # true for NaN as well
        return np.zeros(feature.shape[0], np.float32)
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    y0, x0 = math.floor(y), math.floor(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    dy, dx = np.float32(y - y0), np.float32(x - x0)
    top = feature[:, y0, x0] * (1 - dx) + feature[:, y0, x1] * dx
    bottom = feature[:, y1, x0] * (1 - dx) + feature[:, y1, x1] * dx
    return (top * (1 - dy) + bottom * dy).astype(np.float32)


def _adaptive_ratio(bin_size: float) -> int:
    """Number of samples along an axis of a bin; none if the RoI is empty or its size is not finite."""
    return max(math.ceil(bin_size), 0) if math.isfinite(bin_size) else 0


def multilevel_roi_align(
    features: list[np.ndarray],
    rois: np.ndarray,
    *,
    output_size: int,
    sampling_ratio: int,
    aligned: int,
    min_level: int = 2,
    canonical_level: int = 4,
    canonical_size: float = 224.0,
    level_epsilon: float = 1e-6,
) -> np.ndarray:
    """Computes `MultilevelRoiAlign` of the contract.

    Args:
        features: `[N, C, H_l, W_l]` per level.
        rois: `[N, R, 4]` xyxy px.

    Returns:
        float32 `[N, R, C, S, S]`.
    """
    batch, count = rois.shape[:2]
    pooled = np.zeros((batch, count, features[0].shape[1], output_size, output_size), np.float32)
    for n in range(batch):
        for r in range(count):
            roi = rois[n, r]
            level = level_of(roi, len(features), min_level, canonical_level, canonical_size, level_epsilon)
            feature = features[level][n].astype(np.float32)
            x1, y1, x2, y2 = roi.astype(np.float32) / 2.0 ** (min_level + level) - (0.5 if aligned else 0.0)
            width, height = x2 - x1, y2 - y1
            if not aligned:
                width, height = max(width, 1.0), max(height, 1.0)
            bin_width, bin_height = width / output_size, height / output_size
            ratio_y, ratio_x = (sampling_ratio or _adaptive_ratio(size) for size in (bin_height, bin_width))
            for i in range(output_size):
                for j in range(output_size):
                    total = np.zeros(feature.shape[0], np.float32)
                    for a in range(ratio_y):
                        for b in range(ratio_x):
                            y = y1 + bin_height * (i + (a + 0.5) / ratio_y)
                            x = x1 + bin_width * (j + (b + 0.5) / ratio_x)
                            total += bilinear(feature, y, x)
                    pooled[n, r, :, i, j] = total / max(ratio_y * ratio_x, 1)
    return pooled


def _bin_edges(start: float, end: float, bins: int, size: int) -> list[tuple[int, int]]:
    """Start and end pixel of each bin of RoIPool along one axis, clipped to the map."""
    first, last = (int(math.copysign(math.floor(abs(value) + 0.5), value)) for value in (start, end))
    length = np.float32(max(last - first + 1, 1)) / np.float32(bins)
    edges = [(math.floor(np.float32(k) * length), math.ceil(np.float32(k + 1) * length)) for k in range(bins)]
    return [(min(max(low + first, 0), size), min(max(high + first, 0), size)) for low, high in edges]


def multilevel_roi_pool(
    features: list[np.ndarray],
    rois: np.ndarray,
    *,
    pooled_shape: tuple[int, int],
    min_level: int = 2,
    canonical_level: int = 4,
    canonical_size: float = 224.0,
    level_epsilon: float = 1e-6,
) -> np.ndarray:
    """Computes `MultilevelRoiPool` of the contract; arguments as for `multilevel_roi_align`.

    Returns:
        float32 `[N, R, C, S, S]`; empty bins are zero.
    """
    batch, count = rois.shape[:2]
    pooled = np.zeros((batch, count, features[0].shape[1], *pooled_shape), np.float32)
    for n in range(batch):
        for r in range(count):
            level = level_of(rois[n, r], len(features), min_level, canonical_level, canonical_size, level_epsilon)
            feature = features[level][n].astype(np.float32)
            x1, y1, x2, y2 = (float(value) / 2.0 ** (min_level + level) for value in rois[n, r])
            rows = _bin_edges(y1, y2, pooled_shape[0], feature.shape[1])
            columns = _bin_edges(x1, x2, pooled_shape[1], feature.shape[2])
            for i, (top, bottom) in enumerate(rows):
                for j, (left, right) in enumerate(columns):
                    if top < bottom and left < right:
                        pooled[n, r, :, i, j] = feature[:, top:bottom, left:right].max(axis=(1, 2))
    return pooled


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the intersection over union of two boxes `[4]` xyxy; NaN if both areas are zero."""
    width = max(min(first[2], second[2]) - max(first[0], second[0]), np.float32(0))
    height = max(min(first[3], second[3]) - max(first[1], second[1]), np.float32(0))
    overlap = width * height
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (first, second)]
    union = areas[0] + areas[1] - overlap
    return float(overlap / union) if union != 0 else math.nan


def batched_nms(
    boxes: np.ndarray, groups: np.ndarray, counts: np.ndarray, *, iou_threshold: float, max_output: int
) -> tuple[np.ndarray, np.ndarray]:
    """Computes `BatchedNms` of the contract.

    Args:
        boxes: `[N, K, 4]` xyxy, by descending score.
        groups: `[N, K]`.
        counts: `[N]`, number of boxes of each image.

    Returns:
        Indices int32 `[N, M]`, zero past the end, and their number int32 `[N]`.
    """
    keep = batched_nms_keep(boxes, groups, counts, iou_threshold=iou_threshold, max_output=max_output)
    return _batched_nms_compact(keep, max_output=max_output)


def batched_nms_keep(
    boxes: np.ndarray, groups: np.ndarray, counts: np.ndarray, *, iou_threshold: float, max_output: int
) -> np.ndarray:
    """Computes `BatchedNmsKeep` of the contract; arguments as for `batched_nms`.

    Returns:
        int32 `[N, K]`: 1 for every kept box, even after the first `max_output`.
    """
    keep = np.zeros(boxes.shape[:2], np.int32)
    threshold = np.float32(iou_threshold)  # the type of an ONNX attribute
    for n in range(boxes.shape[0]):
        kept: list[int] = []
        for k in range(min(int(counts[n]), boxes.shape[1])):
            rivals = (j for j in kept if groups[n, j] == groups[n, k])
            if not any(iou(boxes[n, j], boxes[n, k]) > threshold for j in rivals):
                kept.append(k)
        keep[n, kept] = 1
    return keep


def _batched_nms_compact(keep: np.ndarray, *, max_output: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes `BatchedNmsCompact` of the contract from keep `[N, K]`; returns the same as `batched_nms`."""
    indices = np.zeros((keep.shape[0], max_output), np.int32)
    num = np.zeros(keep.shape[0], np.int32)
    for n in range(keep.shape[0]):
        kept = np.flatnonzero(keep[n])[:max_output]
        indices[n, : len(kept)] = kept
        num[n] = len(kept)
    return indices, num


def live_rows(boxes: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes `LiveRows` of the contract: boxes `[N, D, 4]`, labels `[N, D]`, counts `[N]`.

    Returns:
        Boxes `[N, L, 4]` and labels `[N, L]`.
    """
    num_rows = max(int(counts.max()), 1)
    return boxes[:, :num_rows], labels[:, :num_rows]
