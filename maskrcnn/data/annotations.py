"""Polygons and run-length encodings of COCO annotations, checked before pycocotools sees them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.errors import UserError
from maskrcnn.imaging.run_lengths import runs_from_strings
from maskrcnn.keypoints import check_skeleton

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


# The entries of annotation files in COCO's format, each checked for what the rest of the package relies on.
#
# What is wrong with the file as a whole is a UserError; what is wrong with one annotation is an AnnotationError.

LAYOUT = "a folder in COCO layout: annotations/instances_<split>.json beside <split>/"
TOP_LEVEL_KEYS = ("images", "annotations", "categories")
_TYPE_NAMES = {int: "an integer", str: "a string", list: "a list", dict: "an object"}


def _structure_error(path: Path, what: str, expected: str) -> UserError:
    return UserError(f"{path}: {what}", expected, "correct the file (format: cocodataset.org/#format-data)")


def read_json(path: Path) -> Any:
    """The content of an annotation file.

    Raises:
        UserError: where it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"annotation file {path} cannot be read ({error.strerror})",
            LAYOUT,
            "point --data at such a folder and name a split that it has",
        ) from error
    except (ValueError, RecursionError) as error:
        raise _structure_error(path, f"not JSON ({error})", "a complete JSON file in COCO's format") from error


def required(path: Path, entry: Any, where: str, key: str, kind: type) -> Any:
    """`entry[key]`, which must be there and of this type."""
    if not isinstance(entry, dict):
        raise _structure_error(path, f"{where} is of type {type(entry).__name__}", _TYPE_NAMES[dict])
    if key not in entry:
        raise _structure_error(path, f"{where} has no key {key!r}", f"{key!r}: {_TYPE_NAMES[kind]}")
    if type(entry[key]) is not kind:  # not isinstance: true and false are no integers here
        came = f"{key!r} of {where} is of type {type(entry[key]).__name__}"
        raise _structure_error(path, came, f"{key!r}: {_TYPE_NAMES[kind]}")
    return entry[key]


def categories_of(path: Path, entries: list[Any]) -> dict[int, str]:
    """Category id -> name, in ascending order of the ids."""
    if not entries:
        raise _structure_error(path, "no categories", "at least one entry in 'categories'")
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        category_id = required(path, entry, f"categories[{index}]", "id", int)
        if category_id in names:
            raise _structure_error(path, f"category id {category_id} occurs twice", "unique category ids")
        names[category_id] = required(path, entry, f"categories[{index}]", "name", str)
    return dict(sorted(names.items()))


def images_of(path: Path, folder: Path, entries: list[Any]) -> dict[int, tuple[Path, int, int]]:
    """Image id -> (file, height, width), in the order of the file."""
    if not entries:
        raise _structure_error(path, "no images", "at least one entry in 'images'")
    images: dict[int, tuple[Path, int, int]] = {}
    for index, entry in enumerate(entries):
        where = f"images[{index}]"
        image_id = required(path, entry, where, "id", int)
        if image_id in images:
            raise _structure_error(path, f"image id {image_id} occurs twice", "unique image ids")
        name = required(path, entry, where, "file_name", str)
        height, width = (required(path, entry, where, key, int) for key in ("height", "width"))
        if min(height, width) < 1:
            raise _structure_error(path, f"{where} measures {width}×{height}", "positive width and height")
        inside = os.path.normpath(name)
        if os.path.isabs(inside) or os.path.splitdrive(inside)[0] or inside.split(os.sep)[0] == os.pardir:
            came = f"'file_name' of {where} is {name!r}, outside the image folder"
            raise _structure_error(path, came, f"a path relative to {folder} that stays in it")
        images[image_id] = (folder / inside, height, width)
    return images


def require_files(path: Path, folder: Path, files: list[Path]) -> None:
    """Raises a UserError where image files are missing; counts them and names the first."""
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(files)} images of {path} are missing, the first is {missing[0]}",
            f"every image of the file below {folder}",
            "complete the image folder, or remove the entries from the annotation file",
        )


def usable_id(entry: Any) -> int | None:
    """The annotation's id, unless pycocotools would misread it: to its matching, 0 means unmatched."""
    value = entry.get("id") if isinstance(entry, dict) else None
    return value if type(value) is int and value > 0 else None


def are_boxes_only(annotations: list[Any]) -> bool:
    """Whether there are annotations and none has a segmentation, as in Pascal VOC's or Visual Genome's boxes."""
    entries = [entry for entry in annotations if isinstance(entry, dict)]
    return bool(entries) and not any(entry.get("segmentation") for entry in entries)


def checked_annotation(
    entry: Any, images: dict[int, tuple[Path, int, int]], labels: dict[int, int], *, boxes_only: bool = False
) -> tuple[int, dict[str, Any]]:
    """The image id of an annotation, and the fields of an Instance without its id.

    Args:
        entry: as the file has it.
        images: see `images_of`.
        labels: category id -> label.
        boxes_only: take the box's pixels for the mask instead of reading a segmentation.

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
    if boxes_only:
        segmentation = [_pixels_of_box(box)]
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


def _pixels_of_box(box_xyxy_px: tuple[float, float, float, float]) -> np.ndarray:
    """The outline of the whole pixels that a box touches, so that no box is without a pixel."""
    left, top = (math.floor(value) for value in box_xyxy_px[:2])
    right, bottom = (math.ceil(value) for value in box_xyxy_px[2:])
    return np.array([left, top, right, top, right, bottom, left, bottom], np.float64)


def _checked_box(bbox: Any, height: int, width: int) -> tuple[float, float, float, float]:
    """COCO's (x, y, width, height) as xyxy, cut to the image."""
    values = finite_numbers(bbox)
    if values is None or values.size != 4 or values[2] <= 0 or values[3] <= 0:
        raise AnnotationError("invalid box", f"bbox {bbox!r}")
    x, y, box_width, box_height = values.tolist()
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + box_width, float(width)), min(y + box_height, float(height))
    if right <= left or bottom <= top:
        raise AnnotationError("box outside the image", f"bbox {bbox!r}, image {width}×{height}")
    return left, top, right, bottom


# Keypoints in annotation files of COCO's format: a category names them, an annotation says where they are.

_VISIBILITIES = (0, 1, 2)  # not labelled; labelled and hidden; labelled and visible


@dataclass(frozen=True)
class CategoryKeypoints:
    """What the categories of a file say of keypoints."""

    names: tuple[str, ...] = ()  # the same in all categories that have any; (): there are none that can be used
    skeleton: tuple[tuple[int, int], ...] = ()  # lines between them, which count from 1
    category_ids: frozenset[int] = frozenset()  # of the categories that have them
    fault: UserError | None = None  # why there are none that can be used, where categories have some


def keypoints_of(path: Path, entries: list[dict[str, Any]]) -> CategoryKeypoints:
    """The keypoints of a file's categories.

    A fault is no error here: boxes and masks of the file can be used all the same.

    Args:
        path: of the file, for messages.
        entries: its categories, with valid ids.
    """
    having = [entry for entry in entries if entry.get("keypoints")]
    if not having:
        return CategoryKeypoints()
    try:
        names = _names(path, having[0])
        for entry in having[1:]:
            if _names(path, entry) != names:
                raise UserError(
                    f"{path}: categories {having[0]['id']} and {entry['id']} with different keypoints",
                    "the same keypoints in all categories that have any, as a model finds one set of them",
                    "keep the keypoints of one category, or write a file for each",
                )
        skeleton = _skeleton(path, having[0], len(names))
    except UserError as fault:
        return CategoryKeypoints(fault=fault)
    return CategoryKeypoints(names, skeleton, frozenset(entry["id"] for entry in having))


def _names(path: Path, entry: dict[str, Any]) -> tuple[str, ...]:
    names = entry["keypoints"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise UserError(
            f"{path}: 'keypoints' of category {entry['id']} is {str(names)[:80]}",
            "a list of different names",
            "correct the file (format: cocodataset.org/#format-data)",
        )
    return tuple(names)


def _skeleton(path: Path, entry: dict[str, Any], count: int) -> tuple[tuple[int, int], ...]:
    where, lines = f"{path}: 'skeleton' of category {entry['id']}", entry.get("skeleton") or []
    shaped = isinstance(lines, list) and all(isinstance(line, list) for line in lines)
    if not shaped or not all(type(number) is int for line in lines for number in line):
        raise UserError(
            f"{where} is {str(lines)[:80]}", "a list of pairs of numbers", "correct the file, or leave it out"
        )
    check_skeleton(where, tuple(tuple(line) for line in lines), count)
    return tuple(tuple(line) for line in lines)


def checked_keypoints(value: Any, count: int) -> np.ndarray | None:
    """The keypoints of an annotation as float64 `[K, 3]`: x, y in pixels and visibility; zeros where unlabelled.

    Coordinates are as the file has them, distances from the image's corner; nothing is added for the middle of a
    pixel, as torchvision adds nothing.

    Args:
        value: `keypoints` of the annotation; nothing or an empty list is an object without.
        count: K, of its category.

    Returns:
        None for an object of which nothing is labelled.

    Raises:
        AnnotationError: for another number of numbers, what is no finite number, and an unknown visibility.
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
