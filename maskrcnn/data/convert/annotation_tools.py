"""LabelMe and VGG Image Annotator (VIA): outlines drawn by hand, in JSON files next to the images.

Both tools apply the EXIF orientation of an image before showing it; coordinates refer to the image as shown.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from maskrcnn.data.convert.files import annotated_size, list_at, number_at, object_at, read_json, text_at
from maskrcnn.data.convert.source import (
    AnnotatedImage,
    BadEntry,
    Category,
    Entry,
    Faults,
    ObjectAnnotation,
    Options,
    Source,
    are_splits,
    checked_polygons,
    merged_rle,
    polygon_fields,
    require_entries,
    require_folder,
    rle_fields,
    split_off,
)
from maskrcnn.data.convert.vocabulary import Vocabulary, build_vocabulary
from maskrcnn.errors import UserError
from maskrcnn.files import files_below

_NO_AREA = "shape that has no area"
_MALFORMED = "malformed shape"
_SAGITTA_PX = 0.05  # maximum distance of an ellipse from its polygon
_MIN_CORNERS, _MAX_CORNERS = 16, 720  # corners of such a polygon


def _ellipse(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0) -> list[float]:
    """A polygon (x, y, x, y, …) whose corners lie on an ellipse.

    Args:
        cx, cy: centre, px.
        rx, ry: semi-axes, px, positive.
        angle: rotation of the first semi-axis from x towards y, rad.
    """
    radius = max(rx, ry)
    count = math.pi / math.acos(max(1 - _SAGITTA_PX / radius, -1)) if radius > _SAGITTA_PX else _MIN_CORNERS
    count = min(max(math.ceil(count), _MIN_CORNERS), _MAX_CORNERS)
    points = []
    for k in range(count):
        along, across = rx * math.cos(2 * math.pi * k / count), ry * math.sin(2 * math.pi * k / count)
        points.append(round(cx + along * math.cos(angle) - across * math.sin(angle), 3))
        points.append(round(cy + along * math.sin(angle) + across * math.cos(angle), 3))
    return points


def _rectangle(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    """A polygon from two opposite corners."""
    return [x1, y1, x2, y1, x2, y2, x1, y2]


# --- LabelMe -----------------------------------------------------------------------------------------

_LABELME_LAYOUT = "LabelMe's JSON files next to their images"
_IGNORED_LABELS = ("__ignore__", "_background_")  # LabelMe's labels of regions that are not objects


def open_labelme(root: Path, options: Options, faults: Faults) -> Source:
    """Opens all JSON files of a folder and its subfolders; images without one are not converted.

    Subfolders named train…, val… or test… are the splits. Shapes with the same label and `group_id` are one object, as
    in LabelMe's own exporters.

    Raises:
        UserError: if there is no JSON file, or labels clash.
    """
    files = files_below(require_folder(root, _LABELME_LAYOUT), (".json",))
    has_splits = are_splits(path.relative_to(root) for path in files)
    entries = list(faults.convert_each(files, partial(_labelme_entry, root, has_splits=has_splits)))
    require_entries(entries, root, _LABELME_LAYOUT)
    vocabulary = build_vocabulary(options, faults, (item for entry in entries for item in entry.data[1].items()))
    if not vocabulary.categories:
        raise UserError(f"{root}: no labelled shape", _LABELME_LAYOUT, "label objects, or list classes with --classes")
    read = partial(_read_labelme, vocabulary=vocabulary, faults=faults)
    return Source(vocabulary.categories, entries, read, has_splits)


def _labelme_entry(root: Path, index: int, path: Path, *, has_splits: bool) -> Entry:
    content = object_at(read_json(path), str(path))
    image = text_at(content.get("imagePath"), f"{path}, imagePath")
    # Paths may be Windows paths; like LabelMe, fall back to an image of this name next to the JSON file.
    relative = PurePosixPath(image.replace("\\", "/"))
    candidates = (path.parent / relative, path.parent / relative.name)
    file = next((candidate for candidate in candidates if candidate.is_file()), candidates[-1])
    split, name = split_off(path.parent.relative_to(root) / relative.name, has_splits=has_splits)
    labels: dict[str, str] = {}  # each label with its first place
    for number, shape in enumerate(_shapes(content, path), start=1):
        label = shape.get("label") if isinstance(shape, dict) else None
        if isinstance(label, str) and label.strip() and label not in _IGNORED_LABELS:
            labels.setdefault(label, f"{path}, shape {number}")
    return Entry(name=name.as_posix(), path=path, split=split, image_id=index + 1, data=(file, labels))


def _shapes(content: dict[str, Any], path: Path) -> list[Any]:
    return list_at(content.get("shapes"), f"{path}, shapes")


def _read_labelme(entry: Entry, *, vocabulary: Vocabulary, faults: Faults) -> AnnotatedImage:
    path, (file, _) = entry.path, entry.data
    content = object_at(read_json(path), str(path))
    image = file if file.is_file() else _embedded_image(content, path, file)
    sides: tuple[Any, Any] = (content.get("imageHeight"), content.get("imageWidth"))
    declared_hw = sides if all(type(side) is int and side > 0 for side in sides) else None
    size_hw = annotated_size(image, declared_hw, str(path), f"{path}, imageData")
    groups: dict[Any, list[tuple[str, Any]]] = defaultdict(list)  # shapes of each object, with the place of each
    for index, shape in enumerate(_shapes(content, path)):
        group = shape.get("group_id") if isinstance(shape, dict) else None
        key = index if group is None else (str(shape.get("label")), str(group))
        groups[key].append((f"{path}, shape {index + 1}", shape))

    def convert(_: int, group: list[tuple[str, Any]]) -> ObjectAnnotation | None:
        first, shape = group[0]
        label = text_at(object_at(shape, first).get("label"), f"{first}, label")
        where = f"{first} ({label})"
        if label in _IGNORED_LABELS:
            faults.leave_out(f"shape labelled {label}", where)
            return None
        category_id = vocabulary.id_of(label, where, faults)
        if category_id is None:
            return None
        # A part without an outline is left out; its object is kept.
        parts = list(faults.convert_each(group, partial(_labelme_part, label=label, size_hw=size_hw)))
        if not parts:
            return None
        if any(isinstance(part, np.ndarray) for part in parts):
            return ObjectAnnotation(category_id, rle_fields(merged_rle(parts, size_hw, where), where))
        return ObjectAnnotation(category_id, polygon_fields(parts, size_hw, where))

    objects = tuple(faults.convert_each(groups.values(), convert))
    return AnnotatedImage(image, size_hw, objects)


def _embedded_image(content: dict[str, Any], path: Path, file: Path) -> bytes:
    """The image inside the JSON file, where LabelMe stores it by default."""
    data = content.get("imageData")
    if not isinstance(data, str) or not data:
        found = f"{path}: no file {file}, and no imageData"
        raise BadEntry("missing image", found, "the image next to the JSON file", "restore the image")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        found = f"{path}, imageData: not base64 ({error})"
        raise BadEntry("missing image", found, "an image in base64", "restore the image") from error


def _labelme_part(_: int, item: tuple[str, Any], *, label: str, size_hw: tuple[int, int]) -> Any:
    place, shape = item
    where = f"{place} ({label})"
    outline = _labelme_outline(object_at(shape, place), size_hw, where)
    return outline if isinstance(outline, np.ndarray) else checked_polygons([outline], size_hw, where)[0].tolist()


def _labelme_outline(shape: dict[str, Any], size_hw: tuple[int, int], where: str) -> Any:
    """A polygon (x, y, x, y, …), or a mask bool `[H, W]`."""
    kind = shape.get("shape_type") or "polygon"  # absent in old files
    points = []
    for point in list_at(shape.get("points"), f"{where}, points"):
        if not isinstance(point, list) or len(point) != 2:
            raise BadEntry(_MALFORMED, f"{where}: point {point!r}", "[x, y]", "correct the file")
        points.append((number_at(point[0], where), number_at(point[1], where)))
    if kind == "mask":
        return _labelme_mask(shape, points, size_hw, where)
    if kind == "circle" and len(points) == 2 and points[0] != points[1]:
        (cx, cy), (x, y) = points
        radius = float(np.hypot(x - cx, y - cy))
        return _ellipse(cx, cy, radius, radius)
    if kind == "rectangle" and len(points) == 2:
        return _rectangle(*points[0], *points[1])
    # X-AnyLabeling has rectangles with four corners, rotated rectangles ("rotation") and quadrilaterals.
    if kind in ("polygon", "rectangle", "rotation", "quadrilateral") and len(points) > 2:
        return [value for point in points for value in point]
    expected = "a polygon of three or more points, a rectangle or circle of two different points, or a mask"
    raise BadEntry(_NO_AREA, f"{where}: {kind} of {len(points)} points", expected, "outline the object")


def _labelme_mask(
    shape: dict[str, Any], points: list[tuple[float, float]], size_hw: tuple[int, int], where: str
) -> np.ndarray:
    """The mask of the whole image; the shape's points are the first and last pixel of the stored part."""
    expected = "an image in base64 that fits between its two points"
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"], validate=True))) as image:
            pixels = np.array(image) != 0
        (x1, y1), (x2, y2) = (tuple(map(int, point)) for point in points)
    except Exception as error:  # Pillow's decoders raise any exception on damaged bytes
        raise BadEntry(_MALFORMED, f"{where}: mask ({error})", expected, "draw the mask again") from error
    height, width = size_hw
    if pixels.shape != (y2 - y1 + 1, x2 - x1 + 1) or min(x1, y1) < 0 or x2 >= width or y2 >= height:
        found = f"{where}: mask {pixels.shape[::-1]} from ({x1}, {y1}) to ({x2}, {y2})"
        raise BadEntry(_MALFORMED, found, f"{expected}, in the image of {width}×{height} px", "draw the mask again")
    mask = np.zeros(size_hw, bool)
    mask[y1 : y2 + 1, x1 : x2 + 1] = pixels
    return mask


# --- VIA 2.x and 1.x ---------------------------------------------------------------------------------

_VIA_LAYOUT = "VIA's JSON file next to its images, or folders train and val with one each"
_METADATA = "_via_img_metadata"  # key in a project file; an exported file has only its value

_NameOf = Callable[[dict[str, Any], str], str]  # class of a region's attributes; the second argument is its place


def open_via(root: Path, options: Options, faults: Faults) -> Source:
    """Opens a JSON file, or those of a folder and its subfolders; images are next to it or in `options.image_folder`.

    Subfolders named train…, val… or test… are the splits. The class of a region is one of its attributes. Polylines
    are outlines, closed from the last point to the first.

    Raises:
        UserError: if there is no JSON file, the class attribute is ambiguous, or classes clash.
    """
    files = [root] if root.is_file() else files_below(root, (".json",))
    base = root.parent if root.is_file() else root
    if options.class_name and (options.class_attribute or options.classes or options.alias):
        found = "--class with --class-attribute, --classes or --alias"
        raise UserError(found, "one class for all objects, or an attribute with the class", "remove one option")
    has_splits = are_splits(path.relative_to(base) for path in files)
    entries: list[Entry] = []
    first_id = 1
    for path in files:
        try:
            content = object_at(read_json(path), str(path))
            # Sorted by keys, which begin with the file name.
            metadata = sorted(object_at(content.get(_METADATA, content), str(path)).items())
        except BadEntry as fault:
            faults.handle(fault)
            continue
        folder = base / options.image_folder if options.image_folder else path.parent
        split, below = split_off(path.relative_to(base), has_splits=has_splits)
        convert = partial(_via_entry, path, folder, split, below.parent, first_id)
        entries += faults.convert_each(metadata, convert)
        first_id += len(metadata)
    require_entries(entries, root, _VIA_LAYOUT)
    if options.class_name:
        name_of: _NameOf = lambda attributes, where: options.class_name or ""  # noqa: E731
        vocabulary = Vocabulary([Category(1, options.class_name)])
    else:
        name_of = partial(_class_of, attribute=_class_attribute(entries, options.class_attribute))
        vocabulary = build_vocabulary(options, faults, _class_names(entries, name_of))
    read = partial(_read_via, name_of=name_of, vocabulary=vocabulary, faults=faults)
    return Source(vocabulary.categories, entries, read, has_splits)


def _via_entry(
    path: Path, folder: Path, split: str | None, parent: Path, first_id: int, index: int, item: tuple[str, Any]
) -> Entry:
    where = f"{path}, image {item[0]}"
    value = object_at(item[1], where)
    file = PurePosixPath(text_at(value.get("filename"), f"{where}, filename").replace("\\", "/"))
    if file.is_absolute() or ".." in file.parts:
        raise BadEntry("image outside the folder", where, "a path below the folder of images", "correct the file")
    regions = value.get("regions", [])
    if isinstance(regions, dict):  # version 1: numbers as keys
        regions = [regions[key] for key in sorted(regions, key=lambda key: (len(key), key))]
    data = (folder / file, list_at(regions, f"{where}, regions"))
    return Entry(name=(parent / file).as_posix(), path=path, split=split, image_id=first_id + index, data=data)


def _class_attribute(entries: list[Entry], requested: str | None) -> str:
    """The requested attribute, or the only one of all regions."""
    attributes = {name for entry in entries for region in entry.data[1] for name in _attributes(region)}
    if requested in attributes or (requested is None and len(attributes) == 1):
        return requested or next(iter(attributes))
    names = f"the attributes {', '.join(sorted(attributes))}" if attributes else "no attributes"
    expected = f"the attribute {requested}" if requested else "one attribute with the class"
    fix = "specify it with --class-attribute, or one class for all regions with --class"
    raise UserError(f"{entries[0].path}: regions with {names}", expected, fix)


def _attributes(region: Any) -> dict[str, Any]:
    values = region.get("region_attributes") if isinstance(region, dict) else None
    return values if isinstance(values, dict) else {}


def _class_names(entries: list[Entry], name_of: _NameOf) -> Iterator[tuple[str, str]]:
    for entry in entries:
        for index, region in enumerate(entry.data[1]):
            where = _region_name(entry, index)
            try:
                yield name_of(_attributes(region), where), where
            except BadEntry:
                continue  # handled when the image is read


def _class_of(attributes: dict[str, Any], where: str, *, attribute: str) -> str:
    """The class of a region: a text, or the only ticked box of a checkbox attribute."""
    value = attributes.get(attribute)
    if isinstance(value, dict):
        ticked = [name for name, is_ticked in value.items() if is_ticked]
        value = ticked[0] if len(ticked) == 1 else ticked
    if isinstance(value, str) and value.strip():
        return value
    found = f"{where}: {attribute} is {value!r}"
    raise BadEntry("region without a class", found, "one class", "set the attribute in VIA")


def _region_name(entry: Entry, index: int) -> str:
    return f"{entry.path}, image {entry.name}, region {index + 1}"


def _read_via(entry: Entry, *, name_of: _NameOf, vocabulary: Vocabulary, faults: Faults) -> AnnotatedImage:
    file, regions = entry.data
    size_hw = annotated_size(file)

    def convert(index: int, region: Any) -> ObjectAnnotation | None:
        where = _region_name(entry, index)
        name = name_of(_attributes(object_at(region, where)), where)
        category_id = vocabulary.id_of(name, where, faults)
        if category_id is None:
            return None
        shape = object_at(region.get("shape_attributes"), f"{where}, shape_attributes")
        where = f"{where} ({name})"
        return ObjectAnnotation(category_id, polygon_fields([_via_outline(shape, where)], size_hw, where))

    return AnnotatedImage(file, size_hw, tuple(faults.convert_each(regions, convert)))


def _via_outline(shape: dict[str, Any], where: str) -> list[float]:
    def numbers(*keys: str, positive: bool = False) -> Iterator[float]:
        return (number_at(shape.get(key), f"{where}, {key}", positive=positive) for key in keys)

    kind = shape.get("name")
    if kind in ("polygon", "polyline"):
        xs, ys = (list_at(shape.get(f"all_points_{axis}"), f"{where}, all_points_{axis}") for axis in "xy")
        if len(xs) != len(ys) or len(xs) < 3:
            found = f"{where}: {kind} of {len(xs)} x and {len(ys)} y"
            raise BadEntry(_NO_AREA, found, "three or more points", "outline the object")
        return [number_at(value, where) for point in zip(xs, ys, strict=True) for value in point]
    if kind == "rect":
        (x, y), (width, height) = numbers("x", "y"), numbers("width", "height", positive=True)
        return _rectangle(x, y, x + width, y + height)
    if kind in ("circle", "ellipse"):
        cx, cy = numbers("cx", "cy")
        rx, ry = numbers(*(("r", "r") if kind == "circle" else ("rx", "ry")), positive=True)
        angle = number_at(shape.get("theta", 0), f"{where}, theta")  # absent in older versions
        return _ellipse(cx, cy, rx, ry, angle)
    expected = "polygon, polyline, rect, circle or ellipse"
    raise BadEntry(_NO_AREA, f"{where}: {kind!r}", expected, "outline the object")
