"""LabelMe: a JSON file for each image, with polygons, rectangles, circles and masks.

Coordinates are those of the picture on the screen, which is after LabelMe applied its EXIF orientation; a photo that
has one is written upright. Shapes of one label and one `group_id` are one object, as in LabelMe's own exporters.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections import defaultdict
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from maskrcnn.data.convert.documents import BadEntry, Faults, list_at, look, object_at, read_json, require_size, text_at
from maskrcnn.data.convert.source import (
    Entry,
    Options,
    Picture,
    Source,
    SourceObject,
    are_splits,
    ellipse,
    merged_rle,
    number,
    polygon_fields,
    rectangle,
    require_entries,
    rle_fields,
    split_off,
)
from maskrcnn.data.convert.vocabulary import Vocabulary, collected, read_aliases, read_classes
from maskrcnn.errors import UserError

_LAYOUT = "LabelMe's JSON files beside their images"
_NO_CLASSES = ("__ignore__", "_background_")  # labels that LabelMe's examples use for what is no object
_MALFORMED = "malformed shape"


def open_labelme(root: Path, options: Options, faults: Faults) -> Source:
    """All JSON files of a folder and its sub-folders; images without one are not annotated and not converted.

    Sub-folders that are called train…, val… or test… are the splits.

    Raises:
        UserError: where there is no JSON file, or labels clash.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder", _LAYOUT, "point at the folder of the JSON files")
    aliases = read_aliases(options.alias, faults) if options.alias else {}
    files = sorted(root.rglob("*.json"))
    has_splits = are_splits(path.relative_to(root) for path in files)
    entries = list(faults.usable(files, partial(_entry, root, has_splits=has_splits)))
    require_entries(entries, root, _LAYOUT)
    if options.classes:
        categories, others = read_classes(Path(options.classes))
        vocabulary = Vocabulary(categories, aliases | others, origin=options.classes)
    else:
        vocabulary = collected((item for entry in entries for item in entry.data[1].items()), aliases)
    if not vocabulary.categories:
        raise UserError(f"{root}: no labelled shape", _LAYOUT, "label some objects, or name classes with --classes")
    return Source(
        categories=vocabulary.categories,
        entries=entries,
        read=partial(_read, vocabulary=vocabulary, faults=faults),
        has_splits=has_splits,
    )


def _entry(root: Path, index: int, path: Path, *, has_splits: bool) -> Entry:
    content = object_at(read_json(path), str(path))
    image = text_at(content.get("imagePath"), f"{path}, imagePath")
    # Windows' backslashes, and LabelMe's own way out: what is not where the file says is beside the JSON file.
    relative = PurePosixPath(image.replace("\\", "/"))
    places = (path.parent / relative, path.parent / relative.name)
    file = next((place for place in places if place.is_file()), places[-1])
    split, name = split_off(path.parent.relative_to(root) / relative.name, has_splits=has_splits)
    data = (file, _labels(_shapes(content, path), path))
    return Entry(name=name.as_posix(), where=path, split=split, image_id=index + 1, data=data)


def _shapes(content: dict[str, Any], path: Path) -> list[Any]:
    return list_at(content.get("shapes"), f"{path}, shapes")


def _labels(shapes: list[Any], path: Path) -> dict[str, str]:
    """Each label with the first place where it is used."""
    labels: dict[str, str] = {}
    for index, shape in enumerate(shapes):
        label = shape.get("label") if isinstance(shape, dict) else None
        if isinstance(label, str) and label.strip() and label not in _NO_CLASSES:
            labels.setdefault(label, f"{path}, shape {index + 1}")
    return labels


def _read(entry: Entry, *, vocabulary: Vocabulary, faults: Faults) -> Picture:
    content, path = object_at(read_json(entry.where), str(entry.where)), entry.where
    image = entry.data[0] if entry.data[0].is_file() else _embedded(content, path, entry.data[0])
    size_hw = look(image, f"{path}, imageData" if isinstance(image, bytes) else "").upright_hw
    declared = [content.get("imageHeight"), content.get("imageWidth")]
    if all(type(side) is int for side in declared):
        require_size(declared, size_hw, str(path))

    def found(_: int, group: list[tuple[str, Any]]) -> SourceObject | None:
        label = text_at(object_at(group[0][1], group[0][0]).get("label"), f"{group[0][0]}, label")
        where = f"{group[0][0]} ({label})"
        if label in _NO_CLASSES:
            faults.leave_out(f"shape labelled {label}", where)
            return None
        category_id = vocabulary.id_of(label, where, faults)
        outlines = [_outline(shape, size_hw, f"{place} ({label})") for place, shape in group]
        if any(isinstance(outline, np.ndarray) for outline in outlines):
            return SourceObject(category_id, rle_fields(merged_rle(outlines, size_hw, where), where))
        return SourceObject(category_id, polygon_fields(outlines, size_hw, where))

    objects = tuple(faults.usable(_groups(_shapes(content, path), path), found))
    return Picture(image, size_hw, objects, is_upright=True)


def _groups(shapes: list[Any], path: Path) -> list[list[tuple[str, Any]]]:
    """The shapes of each object, with the place of each."""
    groups: dict[Any, list[tuple[str, Any]]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        group = shape.get("group_id") if isinstance(shape, dict) else None
        key = index if group is None else (str(shape.get("label")), str(group))
        groups[key].append((f"{path}, shape {index + 1}", shape))
    return list(groups.values())


def _embedded(content: dict[str, Any], path: Path, file: Path) -> bytes:
    """The image inside of the JSON file, which LabelMe puts there unless told otherwise."""
    data = content.get("imageData")
    if not isinstance(data, str) or not data:
        came = f"{path}: no file {file}, and no imageData"
        raise BadEntry("missing image", came, "the image beside the JSON file", "restore the image")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        came = f"{path}, imageData: no base64 ({error})"
        raise BadEntry("missing image", came, "an image in base64", "restore the image") from error


def _outline(shape: dict[str, Any], size_hw: tuple[int, int], where: str) -> list[float] | np.ndarray:
    """A polygon, or the pixels of a mask, bool `[H, W]`."""
    kind = shape.get("shape_type") or "polygon"  # old files have none
    points = [_point(point, where) for point in list_at(shape.get("points"), f"{where}, points")]
    if kind == "mask":
        return _mask(shape, points, size_hw, where)
    if kind == "circle" and len(points) == 2:
        (cx, cy), (x, y) = points
        radius = float(np.hypot(x - cx, y - cy))
        if radius > 0:
            return ellipse(cx, cy, radius, radius)
    if kind == "rectangle" and len(points) == 2:
        return rectangle(*points[0], *points[1])
    if kind in ("polygon", "rectangle") and len(points) > 2:  # some relatives of LabelMe write four corners
        return [value for point in points for value in point]
    came = f"{where}: {kind} of {len(points)} points"
    expected = "a polygon of three or more, a rectangle or circle of two different ones, or a mask"
    raise BadEntry("shape that has no area", came, expected, "outline the object")


def _point(point: Any, where: str) -> tuple[float, float]:
    if not isinstance(point, list) or len(point) != 2:
        raise BadEntry(_MALFORMED, f"{where}: point {point!r}", "[x, y]", "correct the file")
    return number(point[0], where), number(point[1], where)


def _mask(shape: dict[str, Any], points: list[tuple[float, float]], size_hw: tuple[int, int], where: str) -> np.ndarray:
    """The mask in its place: the points are its first and its last pixel."""
    expected = "an image in base64 that fits between its two points"
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"], validate=True))) as image:
            pixels = np.array(image) != 0
        (x1, y1), (x2, y2) = (tuple(map(int, point)) for point in points)
    except Exception as error:  # on damaged bytes Pillow's decoders raise whatever they stumble over
        raise BadEntry(_MALFORMED, f"{where}: mask ({error})", expected, "draw the mask again") from error
    height, width = size_hw
    if pixels.shape != (y2 - y1 + 1, x2 - x1 + 1) or min(x1, y1) < 0 or x2 >= width or y2 >= height:
        came = f"{where}: mask {pixels.shape[::-1]} from ({x1}, {y1}) to ({x2}, {y2})"
        raise BadEntry(_MALFORMED, came, f"{expected}, in the image of {width}×{height} px", "draw the mask again")
    mask = np.zeros(size_hw, bool)
    mask[y1 : y2 + 1, x1 : x2 + 1] = pixels
    return mask
