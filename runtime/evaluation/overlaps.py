"""How much detections and annotated objects overlap, pair by pair, in pycocotools' arithmetic to the last digit.

Boxes and keypoints are computed here for all pairs at once; masks by pycocotools' own C code, group by group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def box_overlaps(boxes: np.ndarray, objects: np.ndarray, is_crowd: np.ndarray) -> np.ndarray:
    """IoU `[P]` float64 of boxes `[P, 4]` and objects `[P, 4]`, both (x, y, width, height).

    With a crowd region the overlap is divided by the area of the box alone.

    Source: pycocotools, `bbIou`.
    """
    width, height = (
        np.minimum(boxes[:, k + 2] + boxes[:, k], objects[:, k + 2] + objects[:, k])
        - np.maximum(boxes[:, k], objects[:, k])
        for k in (0, 1)
    )
    overlap = width * height
    area = boxes[:, 2] * boxes[:, 3]
    union = np.where(is_crowd, area, area + objects[:, 2] * objects[:, 3] - overlap)
    found = np.zeros(len(boxes))
    return np.divide(overlap, union, out=found, where=(width > 0) & (height > 0))


def mask_overlaps(
    masks: Sequence[dict[str, Any]], objects: Sequence[dict[str, Any]], is_crowd: np.ndarray
) -> np.ndarray:
    """IoU `[D, G]` float64 of compressed run lengths of one image, all against all; neither list is empty."""
    from pycocotools import mask as mask_api

    return np.asarray(mask_api.iou(list(masks), list(objects), is_crowd.astype(np.uint8).tolist()))


def keypoint_overlaps(
    keypoints: np.ndarray, objects: np.ndarray, boxes: np.ndarray, areas_px: np.ndarray, sigmas: np.ndarray
) -> np.ndarray:
    """Object keypoint similarity `[P]` float64.

    Args:
        keypoints: `[P, K, 3]` x, y and a third value that is not read.
        objects: `[P, K, 3]` x, y, and visibility: 0 is not annotated. Of an object without any annotated keypoint
            distances are measured to a box twice its size.
        boxes: `[P, 4]` (x, y, width, height) of the objects.
        areas_px: `[P]` of the objects.
        sigmas: `[K]`, how far annotators are off, relative to the object's size.

    Source: pycocotools, `computeOks`.
    """
    is_visible = objects[:, :, 2] > 0
    visible = np.count_nonzero(is_visible, axis=1)
    distances = [keypoints[:, :, k] - objects[:, :, k] for k in (0, 1)]
    bare = np.flatnonzero(visible == 0)
    for k in (0, 1):
        low, side, place = boxes[bare, k, None], boxes[bare, k + 2, None], keypoints[bare, :, k]
        below, above = (low - side) - place, place - (low + side * 2)
        distances[k][bare] = np.maximum(0, below) + np.maximum(0, above)
    squares = distances[0] ** 2 + distances[1] ** 2
    with np.errstate(over="ignore"):
        terms = np.exp(-(squares / (sigmas * 2) ** 2 / (areas_px + np.spacing(1))[:, None] / 2))
    # Sums over equally many terms at a time: zeros between them would change the order of addition.
    used = np.where(visible == 0, len(sigmas), visible)
    is_used = is_visible | (visible == 0)[:, None]
    found = np.empty(len(keypoints))
    for number in np.unique(used):
        rows = used == number
        found[rows] = np.sum(terms[rows][is_used[rows]].reshape(-1, number), axis=1) / number
    return found
