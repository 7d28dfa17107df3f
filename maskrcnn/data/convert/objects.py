"""COCO's fields of an object: from a mask, from outlines, or from a box alone.

Masks that were pixels are written as run lengths (RLE), outlines that were drawn as polygons. Run lengths hold any
set of pixels: holes, parts that do not touch, objects that do. COCO's polygons cannot say "hole" (several are united),
and tracing a mask's outline and drawing it again gives other pixels along its border. Polygons stay polygons, because
that is what was annotated; what unites both kinds becomes run lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.data.convert.faults import BadEntry
from maskrcnn.data.segmentation import AnnotationError, checked_segmentation, compressed_rle

_CORRECT = "correct the annotation"


def rle_of(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask, bool `[H, W]`."""
    rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def mask_fields(mask: np.ndarray, where: str, *, is_crowd: bool = False) -> dict[str, Any]:
    """The fields of an object whose pixels are known, bool `[H, W]`.

    Raises:
        BadEntry: for a mask without a pixel.
    """
    return rle_fields(rle_of(mask), where, is_crowd=is_crowd)


def rle_fields(rle: dict[str, Any], where: str, *, is_crowd: bool = False) -> dict[str, Any]:
    """The same from compressed run lengths."""
    area = int(mask_api.area(rle))
    _require_pixels(area, where)
    return _fields(mask_api.toBbox(rle).tolist(), area, rle, is_crowd=is_crowd)


def polygon_fields(polygons: Sequence[Sequence[float]], size_hw: tuple[int, int], where: str) -> dict[str, Any]:
    """The fields of an object that one or several outlines enclose.

    Args:
        polygons: (x, y, x, y, …) in pixels each, where pixel 0 reaches from 0 to 1.
        size_hw: the image's.
        where: what errors call the object.

    Raises:
        BadEntry: for a polygon that is malformed, far outside of the image, or without a pixel in it.
    """
    points = _checked(polygons, size_hw, where)
    area = int(mask_api.area(compressed_rle(points, *size_hw)))
    _require_pixels(area, where)
    height, width = size_hw
    corners = np.concatenate(points).reshape(-1, 2).clip(0, [width, height])
    (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    segmentation = [list(polygon) for polygon in polygons]
    return _fields([left, top, right - left, bottom - top], area, segmentation, is_crowd=False)


def merged_rle(parts: Sequence[Any], size_hw: tuple[int, int], where: str) -> dict[str, Any]:
    """The pixels of polygons and masks (bool `[H, W]`) together, as compressed run lengths."""
    rles = []
    for part in parts:
        if isinstance(part, np.ndarray):
            rles.append(rle_of(part))
        else:
            rles.append(compressed_rle(_checked([part], size_hw, where), *size_hw))
    merged = mask_api.merge(rles)
    return {"size": list(size_hw), "counts": merged["counts"].decode("ascii")}


def box_fields(
    box_xyxy_px: Sequence[float], size_hw: tuple[int, int], where: str, *, is_crowd: bool = False
) -> dict[str, Any]:
    """The fields of an object of which a box is known and no mask; the box is cut to the image.

    Raises:
        BadEntry: for a box without extent, or outside of the image.
    """
    x1, y1, x2, y2 = box_xyxy_px
    if not (np.isfinite(box_xyxy_px).all() and x1 < x2 and y1 < y2):
        came = f"{where}: box from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g})"
        raise BadEntry("box without extent", came, "a box with positive width and height", _CORRECT)
    height, width = size_hw
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if left >= right or top >= bottom:
        came = f"{where}: box from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g})"
        raise BadEntry("box outside the image", came, f"a box in the image of {width}×{height} px", _CORRECT)
    wide, high = right - left, bottom - top
    return {"bbox": [left, top, wide, high], "area": wide * high, "iscrowd": int(is_crowd)}


def _fields(bbox: list[float], area: float, segmentation: Any, *, is_crowd: bool) -> dict[str, Any]:
    return {"bbox": bbox, "area": area, "iscrowd": int(is_crowd), "segmentation": segmentation}


def _checked(polygons: Sequence[Sequence[float]], size_hw: tuple[int, int], where: str) -> list[np.ndarray]:
    try:
        return checked_segmentation([list(polygon) for polygon in polygons], *size_hw)
    except AnnotationError as fault:
        expected = "outlines of three or more points in the image"
        raise BadEntry(fault.reason, f"{where}: {fault.detail}", expected, _CORRECT) from fault


def _require_pixels(area: int, where: str) -> None:
    if area == 0:
        raise BadEntry("mask without a pixel", where, "at least one pixel in the image", _CORRECT)
