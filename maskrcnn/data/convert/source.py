"""What every format gives: the images there are, and a way to read one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.data.annotations import AnnotationError, checked_segmentation, compressed_rle
from maskrcnn.data.convert.documents import BadEntry
from maskrcnn.data.convert.vocabulary import Category
from maskrcnn.errors import UserError

_OWN_SPLITS = ("train", "val", "test")  # how folders are called that are splits


@dataclass(frozen=True)
class Entry:
    """An image that a dataset lists."""

    name: str  # of the image file below its split's folder, with slashes; no other image has it
    where: Path  # the file to name when it cannot be read
    split: str | None = None  # the dataset's own
    image_id: int | None = None  # the dataset's own, positive; otherwise images are numbered as they are listed
    data: Any = None  # what the format needs to read it


@dataclass(frozen=True)
class SourceObject:
    """An object as COCO describes it."""

    category_id: int
    fields: dict[str, Any]  # see `objects.py`; `id` if the dataset has one


@dataclass(frozen=True)
class Picture:
    """One image with its objects."""

    content: Path | bytes  # the image file, or what is to be its content
    size_hw: tuple[int, int]  # of the pixels that the objects refer to
    objects: Sequence[SourceObject] = ()
    is_upright: bool = False  # whether they refer to the picture after its EXIF orientation is applied
    fields: dict[str, Any] = field(default_factory=dict)  # further ones of COCO's image entry


@dataclass(frozen=True)
class Source:
    """A dataset in its own format."""

    categories: Sequence[Category]
    entries: Sequence[Entry]  # in the order of their ids
    read: Callable[[Entry], Picture]  # raises BadEntry for an image that cannot be read
    has_splits: bool = False  # whether entries have the dataset's own splits
    first_annotation_id: int = 1  # of objects without one


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user can say about a format. Each converter takes some of them."""

    classes: str | None = None  # a file of classes, or how many of the most frequent
    alias: Path | None = None  # a file of names that mean the same
    class_name: str | None = None  # of all objects
    sets: tuple[str, ...] = ()  # which of the dataset's own splits or lists
    with_masks: bool = False  # VOC: the masks of its segmentation lists instead of all boxes
    difficult: str = "crowd"  # VOC: what its difficult objects become: crowd, keep or drop
    zero_based: bool = False  # VOC: boxes are counted from 0
    class_attribute: str | None = None  # VIA: which attribute is the class
    image_folder: str | None = None
    mask_folder: str | None = None
    mask_suffix: str | None = None  # what a mask's name has after the image's
    divisor: int | None = None  # id masks: a pixel is class · divisor + instance
    void: int | None = None  # id masks: the value of pixels that are no object


def are_splits(paths: Iterable[Path]) -> bool:
    """Whether the first folders of all paths (below the dataset's) are called like splits."""
    firsts = [path.parts[0] if len(path.parts) > 1 else "" for path in paths]
    return bool(firsts) and all(first.lower().startswith(_OWN_SPLITS) for first in firsts)


def split_off(path: Path, *, has_splits: bool) -> tuple[str | None, Path]:
    """The split of a path below the dataset's folder, and the rest of the path."""
    return (path.parts[0], Path(*path.parts[1:])) if has_splits else (None, path)


def folder(root: Path, *parts: str, layout: str) -> Path:
    """A folder of the dataset.

    Raises:
        UserError: where it does not exist; `layout` says what the format wants.
    """
    path = root.joinpath(*parts)
    if not path.is_dir():
        raise UserError(f"no folder {path}", layout, "point at the folder that holds the dataset")
    return path


def require_entries(entries: Sequence[Entry], root: Path, layout: str) -> None:
    """Raises a UserError where a dataset has no image, two of one name, or one that would lie outside of its split."""
    if not entries:
        raise UserError(f"{root}: nothing to convert in it", layout, "point at the folder that holds the dataset")
    seen: dict[tuple[str | None, str], Entry] = {}
    for entry in entries:
        parts = PurePosixPath(entry.name).parts
        if not parts or parts[0] == "/" or ".." in parts:
            came = f"{entry.where}: image {entry.name!r}"
            raise UserError(came, "a path inside of the dataset's folder", "correct the name")
        twin = seen.setdefault((entry.split, entry.name), entry)
        if twin is not entry:
            came = f"{twin.where} and {entry.where}: both images would be {entry.name}"
            raise UserError(came, "one image for each name", "rename one, or convert the folders one by one")


# COCO's fields of an object: from a mask, from outlines, or from a box alone.
#
# Masks that were pixels are written as run lengths (RLE), outlines that were drawn as polygons. Run lengths hold any
# set of pixels: holes, parts that do not touch, objects that do. COCO's polygons cannot say "hole" (several are
# united), and tracing a mask's outline and drawing it again gives other pixels along its border. Polygons stay
# polygons, because that is what was annotated; what unites both kinds becomes run lengths.

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


# Shapes of annotation tools as polygons (x, y, x, y, …) in pixels, where pixel 0 reaches from 0 to 1.

_SAGITTA_PX = 0.05  # most that a chord of a circle's polygon lies inside the circle
_FEWEST, _MOST = 16, 720  # corners of such a polygon


def polygon(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """A polygon of the x and the y of its corners."""
    return [value for point in zip(xs, ys, strict=True) for value in point]


def rectangle(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    """The rectangle between two opposite corners."""
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def ellipse(cx: float, cy: float, rx: float, ry: float, turn: float = 0.0) -> list[float]:
    """A polygon around an ellipse's centre with corners on it, 0.05 px at most off.

    Args:
        cx, cy: centre.
        rx, ry: half axes, positive.
        turn: of the first half axis from x towards y, radian.
    """
    radius = max(rx, ry)
    count = math.pi / math.acos(max(1 - _SAGITTA_PX / radius, -1)) if radius > _SAGITTA_PX else _FEWEST
    count = min(max(math.ceil(count), _FEWEST), _MOST)
    points = []
    for k in range(count):
        along, across = rx * math.cos(2 * math.pi * k / count), ry * math.sin(2 * math.pi * k / count)
        points.append(round(cx + along * math.cos(turn) - across * math.sin(turn), 3))
        points.append(round(cy + along * math.sin(turn) + across * math.cos(turn), 3))
    return points


def number(value: Any, where: str) -> float:
    """The value, which must be a finite number.

    Raises:
        BadEntry: otherwise.
    """
    if type(value) in (int, float) and math.isfinite(value):
        return value
    raise BadEntry("malformed shape", f"{where}: {value!r}", "a number", "correct the file")


def positive(value: Any, where: str) -> float:
    """The value, which must be a positive number."""
    if number(value, where) > 0:
        return value
    raise BadEntry("malformed shape", f"{where}: {value!r}", "a positive number", "correct the file")
