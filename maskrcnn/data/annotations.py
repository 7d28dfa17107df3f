"""Annotation files in COCO's format: the file as a whole, and each annotation.

A fault of the file is a UserError; a fault of one annotation is an AnnotationError. Segmentations are checked before
pycocotools sees them.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.errors import UserError
from maskrcnn.files import read_json
from maskrcnn.imaging.run_lengths import runs_from_strings
from maskrcnn.keypoints import check_skeleton

# Polygons as arrays (x, y, x, y, …) in pixels, where pixel 0 spans 0 to 1; or RLE {"size", "counts"}.
Segmentation: TypeAlias = list[np.ndarray] | dict[str, Any]

LAYOUT = "a folder in COCO layout: annotations/instances_<split>.json beside <split>/"
_FIX = "correct the file (format: cocodataset.org/#format-data)"
_TYPE_NAMES = {int: "an integer", str: "a string", list: "a list", dict: "an object"}
_VISIBILITIES = (0, 1, 2)  # of keypoints: not labelled; labelled and hidden; labelled and visible


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
    """A list of finite numbers as float64 `[N]`; None for anything else."""
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        return None
    try:
        array = np.array(values, dtype=np.float64)
    except OverflowError:
        return None
    return array if np.isfinite(array).all() else None


# --- segmentations -----------------------------------------------------------------------------------


def checked_segmentation(segmentation: Any, height: int, width: int) -> Segmentation:
    """Checks COCO's segmentation in an image of this size, so that pycocotools can decode it safely.

    pycocotools 2.0.11 leaves the rest of the mask uninitialised where run lengths end before the image, and rejects
    longer ones only when the mask is decoded.

    Raises:
        AnnotationError: for a missing, empty or malformed segmentation.
    """
    if not segmentation:
        raise AnnotationError("no segmentation", f"segmentation {segmentation!r}")
    if isinstance(segmentation, list):
        return [_checked_polygon(polygon, height, width) for polygon in segmentation]
    malformed = "malformed segmentation"
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise AnnotationError(malformed, "neither a list of polygons nor an object with size and counts")
    if segmentation["size"] != [height, width]:
        found = f"RLE of size {segmentation['size']!r}, image [{height}, {width}]"
        raise AnnotationError("mask of another size than the image", found)
    runs = _runs_from_counts(segmentation["counts"])
    if runs is None or runs.min(initial=0) < 0 or runs.sum() != height * width:
        raise AnnotationError(malformed, f"RLE whose runs do not add up to {height}×{width} pixels")
    if not runs[1::2].any():
        raise AnnotationError("no segmentation", "RLE without object pixels")
    return {"size": segmentation["size"], "counts": segmentation["counts"]}


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


def _checked_polygon(polygon: Any, height: int, width: int) -> np.ndarray:
    points = finite_numbers(polygon)
    if points is None or points.size < 6 or points.size % 2:
        raise AnnotationError("malformed segmentation", "polygon that is not three or more pairs of numbers")
    # pycocotools samples the outline at a fifth of a pixel: a stray 1e9 would need gigabytes.
    x, y = points[0::2], points[1::2]
    if min(x.min() + width, y.min() + height) < 0 or x.max() > 2 * width or y.max() > 2 * height:
        raise AnnotationError("malformed segmentation", "polygon more than one image size outside the image")
    return points


def _runs_from_counts(counts: Any) -> np.ndarray | None:
    """The run lengths of an RLE, alternately background and object; None for malformed counts."""
    if isinstance(counts, list):
        valid = all(type(run) is int and 0 <= run < 2**32 for run in counts)
        return np.array(counts, dtype=np.int64) if valid else None
    if not isinstance(counts, str):
        return None
    decoded, is_good = runs_from_strings([counts])
    return decoded.runs if is_good[0] else None


# --- annotation files --------------------------------------------------------------------------------


def read_annotation_lists(path: Path) -> tuple[list[Any], list[Any], list[Any]]:
    """Reads the lists `images`, `annotations` and `categories` of an annotation file.

    Raises:
        UserError: where the file cannot be read, is not JSON, or has no such lists.
    """
    if not path.exists():
        fix = "point --data at such a folder and name one of its splits"
        raise UserError(f"annotation file {path} does not exist", LAYOUT, fix)
    content = read_json(path, "a complete JSON file in COCO's format")
    images, annotations, categories = (
        _required(path, content, "the file", key, list) for key in ("images", "annotations", "categories")
    )
    return images, annotations, categories


def _required(path: Path, entry: Any, where: str, key: str, kind: type) -> Any:
    """`entry[key]`, which must exist and be of this type."""
    if not isinstance(entry, dict):
        raise UserError(f"{path}: {where} is of type {type(entry).__name__}", _TYPE_NAMES[dict], _FIX)
    if key not in entry:
        raise UserError(f"{path}: {where} has no key {key!r}", f"{key!r}: {_TYPE_NAMES[kind]}", _FIX)
    if type(entry[key]) is not kind:  # not isinstance: bool is a subclass of int
        found = f"{path}: {key!r} of {where} is of type {type(entry[key]).__name__}"
        raise UserError(found, f"{key!r}: {_TYPE_NAMES[kind]}", _FIX)
    return entry[key]


def read_categories(path: Path, entries: list[Any]) -> dict[int, str]:
    """Category id -> name, in ascending order of the ids; `path` names the file in errors."""
    if not entries:
        raise UserError(f"{path}: no categories", "at least one entry in 'categories'", _FIX)
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        category_id = _required(path, entry, f"categories[{index}]", "id", int)
        if category_id in names:
            raise UserError(f"{path}: category id {category_id} occurs twice", "unique category ids", _FIX)
        names[category_id] = _required(path, entry, f"categories[{index}]", "name", str)
    return dict(sorted(names.items()))


def read_images(path: Path, folder: Path, entries: list[Any]) -> dict[int, tuple[Path, int, int]]:
    """Image id -> (file, height, width), in the order of the annotation file `path`; `folder` holds the images."""
    if not entries:
        raise UserError(f"{path}: no images", "at least one entry in 'images'", _FIX)
    images: dict[int, tuple[Path, int, int]] = {}
    for index, entry in enumerate(entries):
        where = f"images[{index}]"
        image_id = _required(path, entry, where, "id", int)
        if image_id in images:
            raise UserError(f"{path}: image id {image_id} occurs twice", "unique image ids", _FIX)
        name = _required(path, entry, where, "file_name", str)
        height, width = (_required(path, entry, where, key, int) for key in ("height", "width"))
        if min(height, width) < 1:
            raise UserError(f"{path}: {where} measures {width}×{height}", "positive width and height", _FIX)
        inside = os.path.normpath(name)
        if os.path.isabs(inside) or os.path.splitdrive(inside)[0] or inside.split(os.sep)[0] == os.pardir:
            found = f"{path}: 'file_name' of {where} is {name!r}, outside the image folder"
            raise UserError(found, f"a path relative to {folder} that stays in it", _FIX)
        images[image_id] = (folder / inside, height, width)
    return images


# --- annotations -------------------------------------------------------------------------------------


def usable_id(entry: Any) -> int | None:
    """The id of an annotation; None for one that pycocotools misreads: in its matching, 0 means unmatched."""
    value = entry.get("id") if isinstance(entry, dict) else None
    return value if type(value) is int and value > 0 else None


def are_boxes_only(annotations: list[Any]) -> bool:
    """Whether there are annotations and none has a segmentation, as in Pascal VOC's or Visual Genome's boxes."""
    entries = [entry for entry in annotations if isinstance(entry, dict)]
    return bool(entries) and not any(entry.get("segmentation") for entry in entries)


def checked_annotation(
    entry: Any, images: dict[int, tuple[Path, int, int]], labels: dict[int, int], *, boxes_only: bool = False
) -> tuple[int, dict[str, Any]]:
    """The image id of an annotation, and the fields of an `Instance` without its id.

    Args:
        entry: annotation of the file.
        images: see `read_images`.
        labels: category id -> label.
        boxes_only: use the pixels of the box as the mask instead of reading a segmentation.

    Raises:
        AnnotationError: for an annotation that cannot be used.
    """
    if not isinstance(entry, dict):
        raise AnnotationError("not an object", f"of type {type(entry).__name__}")
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if type(image_id) is not int or image_id not in images:
        raise AnnotationError("unknown image", f"image_id {image_id!r}")
    if type(category_id) is not int or category_id not in labels:
        raise AnnotationError("unknown category", f"category_id {category_id!r}")
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise AnnotationError("unknown crowd flag", f"iscrowd {crowd!r}")
    _, height, width = images[image_id]
    box = _checked_box(entry.get("bbox"), height, width)
    segmentation: Segmentation
    if boxes_only:  # the whole pixels that the box touches, so that no box is without a pixel
        (left, top), (right, bottom) = map(math.floor, box[:2]), map(math.ceil, box[2:])
        segmentation = [np.array([left, top, right, top, right, bottom, left, bottom], np.float64)]
    else:
        segmentation = checked_segmentation(entry.get("segmentation"), height, width)
    area = finite_numbers([entry.get("area")])
    if area is None or area[0] <= 0:
        area = mask_api.area([compressed_rle(segmentation, height, width)])
    return image_id, {
        "label": labels[category_id],
        "box_xyxy_px": box,
        "segmentation": segmentation,
        "is_crowd": bool(crowd),
        "area_px": float(area[0]),
    }


def _checked_box(bbox: Any, height: int, width: int) -> tuple[float, float, float, float]:
    """COCO's (x, y, width, height) as xyxy, clipped to the image."""
    values = finite_numbers(bbox)
    if values is None or values.size != 4 or values[2] <= 0 or values[3] <= 0:
        raise AnnotationError("invalid box", f"bbox {bbox!r}")
    x, y, box_width, box_height = values.tolist()
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + box_width, float(width)), min(y + box_height, float(height))
    if right <= left or bottom <= top:
        raise AnnotationError("box outside the image", f"bbox {bbox!r}, image {width}×{height}")
    return left, top, right, bottom


# --- keypoints ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CategoryKeypoints:
    """The keypoints of a file's categories."""

    names: tuple[str, ...] = ()  # the same in all categories with keypoints; (): no usable keypoints
    skeleton: tuple[tuple[int, int], ...] = ()  # pairs of keypoint numbers, which start at 1
    category_ids: frozenset[int] = frozenset()  # of the categories with keypoints
    fault: UserError | None = None  # why the keypoints of the file cannot be used


def read_keypoints(path: Path, entries: list[dict[str, Any]]) -> CategoryKeypoints:
    """Reads the keypoints of a file's categories. A fault is returned, as boxes and masks of the file can be used.

    Args:
        path: annotation file, for errors.
        entries: its categories, with valid ids.
    """
    with_keypoints = [entry for entry in entries if entry.get("keypoints")]
    if not with_keypoints:
        return CategoryKeypoints()
    first = with_keypoints[0]
    try:
        names = _keypoint_names(path, first)
        for entry in with_keypoints[1:]:
            if _keypoint_names(path, entry) != names:
                raise UserError(
                    f"{path}: categories {first['id']} and {entry['id']} with different keypoints",
                    "the same keypoints in all categories that have any, as a model predicts one set of them",
                    "keep the keypoints of one category, or write a file for each",
                )
        skeleton = _skeleton(path, first, len(names))
    except UserError as fault:
        return CategoryKeypoints(fault=fault)
    return CategoryKeypoints(names, skeleton, frozenset(entry["id"] for entry in with_keypoints))


def _keypoint_names(path: Path, entry: dict[str, Any]) -> tuple[str, ...]:
    names = entry["keypoints"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        found = f"{path}: 'keypoints' of category {entry['id']} is {str(names)[:80]}"
        raise UserError(found, "a list of unique names", _FIX)
    return tuple(names)


def _skeleton(path: Path, entry: dict[str, Any], count: int) -> tuple[tuple[int, int], ...]:
    where, lines = f"{path}: 'skeleton' of category {entry['id']}", entry.get("skeleton") or []
    valid = isinstance(lines, list) and all(isinstance(line, list) for line in lines)
    if not valid or not all(type(number) is int for line in lines for number in line):
        raise UserError(f"{where} is {str(lines)[:80]}", "a list of pairs of numbers", "correct the file, or remove it")
    skeleton = tuple(tuple(line) for line in lines)
    check_skeleton(where, skeleton, count)
    return skeleton


def checked_keypoints(value: Any, count: int) -> np.ndarray | None:
    """The keypoints of an annotation, float64 `[K, 3]`: x, y, px, and visibility; zeros where not labelled.

    Coordinates are the file's, measured from the image's corner; as in torchvision, no half pixel is added.

    Args:
        value: `keypoints` of the annotation; None or an empty list is an object without keypoints.
        count: K, the number of keypoints of its category.

    Returns:
        None for an object without a labelled keypoint.

    Raises:
        AnnotationError: for another number of values, a value that is not finite, or an unknown visibility.
    """
    if not value:
        return None
    numbers = finite_numbers(value)
    if numbers is None:
        raise AnnotationError("malformed keypoints", "not a list of finite numbers")
    if numbers.size != 3 * count:
        raise AnnotationError("malformed keypoints", f"{numbers.size} numbers instead of 3 for each of {count}")
    keypoints = numbers.reshape(count, 3)
    unknown = keypoints[~np.isin(keypoints[:, 2], _VISIBILITIES), 2]
    if unknown.size:
        raise AnnotationError("malformed keypoints", f"visibility {unknown[0]:g} instead of 0, 1 or 2")
    labelled = keypoints[:, 2] > 0
    return keypoints * labelled[:, None] if labelled.any() else None
