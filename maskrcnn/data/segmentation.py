"""Segmentations in the forms that tools write: polygons and run lengths, checked before pycocotools uses them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.imaging.run_lengths import runs_from_strings

# Polygons as arrays (x, y, x, y, …) in pixels, where pixel 0 spans 0 to 1; or RLE {"size", "counts"}.
Segmentation: TypeAlias = list[np.ndarray] | dict[str, Any]


_MALFORMED, NOTHING = "malformed segmentation", "no segmentation"


class AnnotationError(Exception):
    """An annotation that cannot be used.

    Args:
        reason: the kind of fault; faults are counted by it.
        detail: what was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def finite_numbers(values: Any) -> np.ndarray | None:
    """A list of finite numbers, possibly written as text, as float64 `[N]`; None for anything else."""
    if not isinstance(values, (list, tuple)):
        return None
    if not all(type(value) in (int, float) for value in values):
        if not all(type(value) in (int, float, str) for value in values):
            return None
        try:
            values = [float(value) for value in values]
        except (ValueError, OverflowError):
            return None
    try:
        array = np.array(values, dtype=np.float64)
    except OverflowError:
        return None
    return array if np.isfinite(array).all() else None


@dataclass(frozen=True, eq=False)
class ParsedSegmentation:
    """A segmentation in normalized form, and its state."""

    segmentation: Segmentation | None  # None: not usable
    reason: str = ""  # why it is not usable, or what was repaired
    detail: str = ""


def parse_segmentation(value: Any, height: int, width: int) -> ParsedSegmentation:
    """Reads a segmentation for an image of this size, in any of the forms that tools write.

    Polygons may be lists of lists, one flat list, lists of points `[x, y]`, or objects with `x` and `y`; parts with
    fewer than three points or far outside the image are left out. Run lengths (RLE) may be lists or COCO's strings,
    also as Python prints bytes (`b'…'`); any form may be JSON in a string.

    pycocotools 2.0.11 leaves the rest of a mask uninitialised if run lengths end before the image, and rejects longer
    ones only when the mask is decoded.
    """
    if isinstance(value, str) and value[:1] in "[{":  # as in tables; run lengths begin with neither
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and "counts" in value[0]:
        value = value[0]
    if isinstance(value, str) and value:
        value = {"size": [height, width], "counts": value}
    if not value or (isinstance(value, list) and not any(value)):
        return ParsedSegmentation(None, NOTHING, f"segmentation {value!r}")
    if isinstance(value, dict):
        return _parsed_rle(value, height, width)
    if not isinstance(value, list):
        return ParsedSegmentation(None, _MALFORMED, "neither a list of polygons nor an object with size and counts")
    is_flat = all(type(part) in (int, float, str) for part in value)
    is_points = len(value) >= 3 and all(_is_point(part) for part in value)
    parts = [value] if is_flat or is_points else value
    polygons, faults = [], []
    for part in parts:
        polygon, fault = _parsed_polygon(part, height, width)
        if polygon is None:
            faults.append(fault)
        else:
            polygons.append(polygon)
    if not polygons:
        return ParsedSegmentation(None, _MALFORMED, faults[0])
    if faults:
        return ParsedSegmentation(polygons, "part of a segmentation left out", faults[0])
    if is_flat:
        return ParsedSegmentation(polygons, "segmentation that is one flat list", f"{len(value)} numbers")
    return ParsedSegmentation(polygons)


def _is_point(value: Any) -> bool:
    if isinstance(value, dict):
        return {"x", "y"} <= value.keys()
    return isinstance(value, list) and len(value) == 2 and all(type(each) in (int, float, str) for each in value)


def _parsed_polygon(part: Any, height: int, width: int) -> tuple[np.ndarray | None, str]:
    """The polygon (x, y, x, y, …), or None and a description of what was found."""
    if isinstance(part, list) and part and all(_is_point(point) for point in part):
        pairs = [(point["x"], point["y"]) if isinstance(point, dict) else point for point in part]
        part = [number for pair in pairs for number in pair]
    points = finite_numbers(part)
    if points is None or points.size < 6 or points.size % 2:
        return None, "polygon that is not three or more pairs of numbers"
    # pycocotools samples the outline at a fifth of a pixel: a stray 1e9 would need gigabytes.
    x, y = points[0::2], points[1::2]
    if min(x.min() + width, y.min() + height) < 0 or x.max() > 2 * width or y.max() > 2 * height:
        return None, "polygon more than one image size outside the image"
    return points, ""


def _parsed_rle(value: dict[str, Any], height: int, width: int) -> ParsedSegmentation:
    if "counts" not in value:
        return ParsedSegmentation(None, _MALFORMED, "neither a list of polygons nor an object with size and counts")
    size = finite_numbers(value.get("size", [height, width]))
    if size is None or size.tolist() != [height, width]:
        found = f"RLE of size {value.get('size')!r}, image [{height}, {width}]"
        return ParsedSegmentation(None, "mask of another size than the image", found)
    counts = value["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("latin-1")
    if isinstance(counts, str) and counts[:2] in ("b'", 'b"') and counts[-1:] == counts[1]:  # str() of bytes
        counts = counts[2:-1].replace("\\\\", "\\")
    runs = _runs_from_counts(counts)
    if runs is None or runs.min(initial=0) < 0 or runs.sum() != height * width:
        return ParsedSegmentation(None, _MALFORMED, f"RLE whose runs do not add up to {height}×{width} pixels")
    if not runs[1::2].any():
        return ParsedSegmentation(None, NOTHING, "RLE without object pixels")
    if isinstance(counts, list):
        counts = runs.tolist()
    return ParsedSegmentation({"size": [height, width], "counts": counts})


def checked_segmentation(segmentation: Any, height: int, width: int) -> Segmentation:
    """A segmentation from which nothing had to be left out.

    Raises:
        AnnotationError: for a missing, empty or malformed segmentation.
    """
    parsed = parse_segmentation(segmentation, height, width)
    if parsed.segmentation is None:
        raise AnnotationError(parsed.reason, parsed.detail)
    if parsed.reason.startswith("part"):
        raise AnnotationError(_MALFORMED, parsed.detail)
    return parsed.segmentation


def compressed_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """A checked segmentation as pycocotools' compressed RLE; several polygons are merged."""
    rle: dict[str, Any]
    if isinstance(segmentation, list):
        rle = mask_api.merge(mask_api.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = mask_api.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    return rle


def _runs_from_counts(counts: Any) -> np.ndarray | None:
    """The run lengths of an RLE, alternately background and object; None for malformed counts."""
    if isinstance(counts, list):
        runs = finite_numbers(counts)
        valid = runs is not None and runs.size and runs.min() >= 0 and runs.max() < 2**32 and not (runs % 1).any()
        return runs.astype(np.int64) if valid and runs is not None else None
    if not isinstance(counts, str):
        return None
    decoded, is_good = runs_from_strings([counts])
    return decoded.runs if is_good[0] else None


def box_polygon(box_xyxy: Sequence[float]) -> list[np.ndarray]:
    """A polygon of all pixels that a box touches, so that every box has at least one pixel."""
    (left, top), (right, bottom) = map(math.floor, box_xyxy[:2]), map(math.ceil, box_xyxy[2:])
    return [np.array([left, top, right, top, right, bottom, left, bottom], np.float64)]
