"""Polygons and run-length encodings of COCO annotations, checked before pycocotools sees them."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.run_lengths import runs_from_strings

# Polygons as arrays (x, y, x, y, …) in pixels, where pixel 0 reaches from 0 to 1; or RLE {"size", "counts"}.
Segmentation: TypeAlias = list[np.ndarray] | dict[str, Any]


class AnnotationError(Exception):
    """An annotation that cannot be used: `reason` is the same for all its kind, `detail` says what came."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def finite_numbers(values: Any) -> np.ndarray | None:
    """A list of finite numbers as float64, or None for anything else."""
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        return None
    try:
        array = np.array(values, dtype=np.float64)
    except OverflowError:
        return None
    return array if np.isfinite(array).all() else None


def checked_segmentation(segmentation: Any, height: int, width: int) -> Segmentation:
    """COCO's segmentation in an image of this size, once pycocotools can decode it safely.

    Of run lengths that stop short of the image's end, pycocotools 2.0.11 leaves the rest of the mask
    uninitialised; longer ones it refuses only when a mask is decoded, in the middle of training.

    Raises:
        AnnotationError: for what is missing, empty or malformed.
    """
    if not segmentation:
        raise AnnotationError("no segmentation", f"segmentation {segmentation!r}")
    if isinstance(segmentation, list):
        return [_checked_polygon(polygon, height, width) for polygon in segmentation]
    malformed = "malformed segmentation"
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise AnnotationError(malformed, "neither a list of polygons nor an object with size and counts")
    if segmentation["size"] != [height, width]:
        came = f"RLE of size {segmentation['size']!r}, image [{height}, {width}]"
        raise AnnotationError("mask of another size than the image", came)
    runs = _runs_from_counts(segmentation["counts"])
    if runs is None or runs.min(initial=0) < 0 or runs.sum() != height * width:
        raise AnnotationError(malformed, f"RLE whose runs do not add up to {height}×{width} pixels")
    if not runs[1::2].any():
        raise AnnotationError("no segmentation", "RLE without object pixels")
    return {"size": segmentation["size"], "counts": segmentation["counts"]}


def compressed_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """A checked segmentation as pycocotools' compressed RLE; several polygons are merged."""
    if isinstance(segmentation, list):
        return mask_api.merge(mask_api.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_api.frPyObjects(segmentation, height, width)
    return segmentation


def _checked_polygon(polygon: Any, height: int, width: int) -> np.ndarray:
    points = finite_numbers(polygon)
    if points is None or points.size < 6 or points.size % 2:
        raise AnnotationError("malformed segmentation", "polygon that is not three or more pairs of numbers")
    # pycocotools walks the outline in steps of a fifth of a pixel: a stray 1e9 would cost gigabytes.
    x, y = points[0::2], points[1::2]
    if min(x.min() + width, y.min() + height) < 0 or x.max() > 2 * width or y.max() > 2 * height:
        raise AnnotationError("malformed segmentation", "polygon farther than one image size outside the image")
    return points


def _runs_from_counts(counts: Any) -> np.ndarray | None:
    """The run lengths of an RLE, alternating background and object, or None where they cannot be read."""
    if isinstance(counts, list):
        if not all(type(run) is int and 0 <= run < 2**32 for run in counts):
            return None
        return np.array(counts, dtype=np.int64)
    if not isinstance(counts, str):
        return None
    found, is_good = runs_from_strings([counts])
    return found.runs if is_good[0] else None
