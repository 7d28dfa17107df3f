"""The common representation of a source dataset: categories, image entries, annotated images, faults.

A converter opens a dataset as a `Source` and reads one `AnnotatedImage` at a time. The functions at the end make
COCO's fields of one object from a mask, polygons or a box.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.data.segmentation import AnnotationError, checked_segmentation, compressed_rle
from maskrcnn.errors import UserError

SPLIT_PREFIXES = ("train", "val", "test")  # prefixes of folder names that are splits
_CORRECT = "correct the annotation"

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class BadEntry(UserError):
    """An image or object that cannot be converted.

    Args:
        reason: the kind of fault; faults are counted by it.
        found, expected, fix: see `UserError`.
    """

    def __init__(self, reason: str, found: str, expected: str, fix: str) -> None:
        self.reason = reason
        super().__init__(found, expected, fix)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.found, self.expected, self.fix)


class Faults:
    """Counts the entries that a conversion skips or leaves out.

    Args:
        keep_going: count faults and continue; otherwise the first one is raised.
    """

    def __init__(self, *, keep_going: bool = False) -> None:
        self.keep_going = keep_going
        self.skipped: Counter[str] = Counter()  # faults, by reason
        self.left_out: Counter[str] = Counter()  # entries excluded by the format or an option, by reason
        self.repaired: Counter[str] = Counter()  # entries changed on reading, by reason
        self._examples: dict[str, str] = {}

    def handle(self, fault: BadEntry) -> None:
        """Raises the fault, or counts it with `keep_going`."""
        if not self.keep_going:
            fix = f"{fault.fix}; or skip and count such entries with --keep-going"
            raise BadEntry(fault.reason, fault.found, fault.expected, fix) from fault.__cause__
        self.skipped[fault.reason] += 1
        self._examples.setdefault(fault.reason, fault.found)

    def repair(self, reason: str, example: str, count: int = 1) -> None:
        """Counts entries that were changed on reading; never raises."""
        self.repaired[reason] += count
        self._examples.setdefault(reason, example)

    def leave_out(self, reason: str, example: str) -> None:
        """Counts an entry that the format or an option excludes; never raises."""
        self.left_out[reason] += 1
        self._examples.setdefault(reason, example)

    def convert_each(
        self, items: Iterable[_Item], convert: Callable[[int, _Item], _Result | None]
    ) -> Iterator[_Result]:
        """Yields `convert(index, item)` of each item, except None and items with a fault."""
        for index, item in enumerate(items):
            try:
                result = convert(index, item)
            except BadEntry as fault:
                self.handle(fault)
                continue
            if result is not None:
                yield result

    def lines(self) -> list[str]:
        """One line of text for each reason, with the first example."""
        return [
            f"{verb} {count}: {reason}, first: {self._examples[reason]}"
            for verb, counts in (("skipped", self.skipped), ("left out", self.left_out), ("repaired", self.repaired))
            for reason, count in sorted(counts.items())
        ]


@dataclass(frozen=True)
class Category:
    """A class of the annotation file."""

    id: int  # positive
    name: str
    fields: dict[str, Any] = field(default_factory=dict)  # further fields of the source


@dataclass(frozen=True)
class Entry:
    """An image listed by a dataset."""

    name: str  # unique path of the image file below its split's folder, with slashes
    path: Path  # the annotation file or folder, for error messages
    split: str | None = None  # the dataset's own split
    image_id: int | None = None  # the dataset's own positive id; None: numbered in list order
    data: Any = None  # data of the converter


@dataclass(frozen=True)
class ObjectAnnotation:
    """An object with COCO's annotation fields; `fields` has an `id` if the dataset has one."""

    category_id: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class AnnotatedImage:
    """One image and its objects."""

    content: Path | bytes  # image file, or the content of one
    size_hw: tuple[int, int]  # size of the image that the objects refer to, see `annotated_size`
    objects: Sequence[ObjectAnnotation] = ()
    fields: dict[str, Any] = field(default_factory=dict)  # further fields of COCO's image entry


@dataclass(frozen=True)
class Source:
    """A dataset in its own format."""

    categories: Sequence[Category]
    entries: Sequence[Entry]  # in the order of their ids
    read: Callable[[Entry], AnnotatedImage]  # raises BadEntry for an image that cannot be read
    has_splits: bool = False  # whether entries have the dataset's own splits
    first_annotation_id: int = 1  # first id for objects without an id


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the formats; each format accepts some of them, see `KINDS`."""

    classes: str | None = None  # file of classes, or the number of most frequent classes
    alias: Path | None = None  # file of synonyms
    class_name: str | None = None  # class of all objects
    sets: tuple[str, ...] = ()  # the dataset's own splits or lists to convert
    with_masks: bool = False  # VOC: convert the masks of its segmentation lists instead of boxes
    difficult: str = "crowd"  # VOC: convert difficult objects as: crowd, keep or drop
    zero_based: bool = False  # VOC: box coordinates start at 0
    class_attribute: str | None = None  # VIA: region attribute that holds the class
    image_folder: str | None = None
    mask_folder: str | None = None
    mask_suffix: str | None = None  # appended to the image's name in a mask's name
    divisor: int | None = None  # id masks: pixel value = class · divisor + instance
    void: int | None = None  # id masks: value of unlabelled pixels
    crowd: bool = True  # COCO: keep crowd regions; False: convert them to objects


def are_splits(paths: Iterable[Path]) -> bool:
    """Whether the first folder of every path (relative to the dataset's) is named like a split."""
    first = [path.parts[0] if len(path.parts) > 1 else "" for path in paths]
    return bool(first) and all(name.lower().startswith(SPLIT_PREFIXES) for name in first)


def split_off(path: Path, *, has_splits: bool) -> tuple[str | None, Path]:
    """The split of a path relative to the dataset's folder, and the rest of the path."""
    return (path.parts[0], Path(*path.parts[1:])) if has_splits else (None, path)


def require_folder(path: Path, layout: str) -> Path:
    """Returns `path`; raises a UserError that expects `layout` if the folder does not exist."""
    if not path.is_dir():
        raise UserError(f"no folder {path}", layout, "give the folder that contains the dataset")
    return path


def require_entries(entries: Sequence[Entry], root: Path, layout: str) -> None:
    """Raises a UserError for a dataset without images, with a duplicate name, or a name outside its split's folder."""
    if not entries:
        raise UserError(f"{root}: nothing to convert", layout, "name the folder that holds the dataset")
    seen: dict[tuple[str | None, str], Entry] = {}
    for entry in entries:
        parts = PurePosixPath(entry.name).parts
        if not parts or parts[0] == "/" or ".." in parts:
            found = f"{entry.path}: image {entry.name!r}"
            raise UserError(found, "a path inside the dataset's folder", "correct the name")
        first = seen.setdefault((entry.split, entry.name), entry)
        if first is not entry:
            found = f"{first.path} and {entry.path}: both images would be {entry.name}"
            raise UserError(found, "unique image names", "rename one, or convert the folders separately")


# Masks given as pixels are written as run lengths (RLE), which represent holes and separate parts exactly. Polygons are
# kept, as they are what was annotated; objects that combine polygons and masks become run lengths.


def mask_fields(mask: np.ndarray, where: str, *, is_crowd: bool = False) -> dict[str, Any]:
    """COCO's fields of an object from its mask, bool `[H, W]`.

    Raises:
        BadEntry: for a mask without a pixel; `where` identifies the object.
    """
    return rle_fields(_rle(mask), where, is_crowd=is_crowd)


def rle_fields(rle: dict[str, Any], where: str, *, is_crowd: bool = False) -> dict[str, Any]:
    """As `mask_fields`, from compressed run lengths."""
    bbox = mask_api.toBbox(rle).tolist()
    return {"bbox": bbox, "area": _area(rle, where), "iscrowd": int(is_crowd), "segmentation": rle}


def polygon_fields(polygons: Sequence[Sequence[float]], size_hw: tuple[int, int], where: str) -> dict[str, Any]:
    """COCO's fields of an object from its polygons.

    Args:
        polygons: (x, y, x, y, …) in pixels each; pixel 0 spans 0 to 1.
        size_hw: size of the image.
        where: name of the object in errors.

    Raises:
        BadEntry: for a polygon that is malformed, far outside the image, or covers no pixel.
    """
    points = checked_polygons(polygons, size_hw, where)
    area = _area(compressed_rle(points, *size_hw), where)
    corners = np.concatenate(points).reshape(-1, 2).clip(0, size_hw[::-1])
    (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    bbox = [left, top, right - left, bottom - top]
    return {"bbox": bbox, "area": area, "iscrowd": 0, "segmentation": [list(polygon) for polygon in polygons]}


def merged_rle(parts: Sequence[Any], size_hw: tuple[int, int], where: str) -> dict[str, Any]:
    """The union of polygons and masks (bool `[H, W]`) as compressed run lengths."""
    rles = [
        _rle(part)
        if isinstance(part, np.ndarray)
        else compressed_rle(checked_polygons([part], size_hw, where), *size_hw)
        for part in parts
    ]
    return {"size": list(size_hw), "counts": mask_api.merge(rles)["counts"].decode("ascii")}


def box_fields(
    box_xyxy_px: Sequence[float], size_hw: tuple[int, int], where: str, *, is_crowd: bool = False
) -> dict[str, Any]:
    """COCO's fields of an object without a mask; the box is clipped to the image.

    Raises:
        BadEntry: for a box without extent, or outside the image.
    """
    x1, y1, x2, y2 = box_xyxy_px
    found = f"{where}: box from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g})"
    if not (np.isfinite(box_xyxy_px).all() and x1 < x2 and y1 < y2):
        raise BadEntry("box without extent", found, "a box with positive width and height", _CORRECT)
    height, width = size_hw
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if left >= right or top >= bottom:
        raise BadEntry("box outside the image", found, f"a box in the image of {width}×{height} px", _CORRECT)
    bbox = [left, top, right - left, bottom - top]
    return {"bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": int(is_crowd)}


def _rle(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def _area(rle: dict[str, Any], where: str) -> int:
    area = int(mask_api.area(rle))
    if area == 0:
        raise BadEntry("mask without a pixel", where, "at least one pixel in the image", _CORRECT)
    return area


def checked_polygons(polygons: Sequence[Sequence[float]], size_hw: tuple[int, int], where: str) -> list[np.ndarray]:
    """Polygons (x, y, x, y, …) as arrays; raises a BadEntry for `where` if one is malformed."""
    try:
        segmentation = checked_segmentation([list(polygon) for polygon in polygons], *size_hw)
    except AnnotationError as fault:
        expected = "polygons of three or more points in the image"
        raise BadEntry(fault.reason, f"{where}: {fault.detail}", expected, _CORRECT) from fault
    assert isinstance(segmentation, list)
    return segmentation
