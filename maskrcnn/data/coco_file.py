"""The entries of annotation files in COCO's format, each checked for what the rest of the package relies on.

What is wrong with the file as a whole is a UserError; what is wrong with one annotation is an AnnotationError.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.data.segmentation import AnnotationError, checked_segmentation, compressed_rle, finite_numbers
from maskrcnn.errors import UserError

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
