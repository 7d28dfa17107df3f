"""VGG Image Annotator (VIA) 2.x, and 1.x: one JSON file for many images.

A region's class is one of its attributes. Polylines count as outlines, closed from their last point to their first.
Coordinates are those of the picture on the screen; browsers apply EXIF orientations, so a photo that has one is
written upright.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from maskrcnn.data.convert.documents import BadEntry, Faults, list_at, look, object_at, read_json, text_at
from maskrcnn.data.convert.source import (
    Entry,
    Options,
    Picture,
    Source,
    SourceObject,
    are_splits,
    ellipse,
    number,
    polygon,
    polygon_fields,
    positive,
    rectangle,
    require_entries,
    split_off,
)
from maskrcnn.data.convert.vocabulary import Category, Vocabulary, collected, read_aliases, read_classes
from maskrcnn.errors import UserError

_LAYOUT = "VIA's JSON file beside its images, or folders train and val with one each"
_METADATA = "_via_img_metadata"  # of a project file; an exported file is that alone


def open_via(root: Path, options: Options, faults: Faults) -> Source:
    """A JSON file, or those of a folder and its sub-folders; images lie beside it or in `options.image_folder`.

    Sub-folders that are called train…, val… or test… are the splits.

    Raises:
        UserError: where there is no JSON file, the class's attribute is not clear, or classes clash.
    """
    files = [root] if root.is_file() else sorted(root.rglob("*.json"))
    base = root.parent if root.is_file() else root
    if options.class_name and (options.class_attribute or options.classes or options.alias):
        came = "--class with --class-attribute, --classes or --alias"
        raise UserError(came, "one class for all, or what tells them apart", "leave one out")
    has_splits = are_splits(path.relative_to(base) for path in files)
    images = options.image_folder
    entries: list[Entry] = []
    first_id = 1
    for path in files:
        metadata = _metadata(path, faults)
        read = partial(_entry, path, base, images, first_id, has_splits=has_splits)
        entries += faults.usable(metadata, read)
        first_id += len(metadata)
    require_entries(entries, root, _LAYOUT)
    name_of, vocabulary = _naming(entries, options, faults)
    return Source(
        categories=vocabulary.categories,
        entries=entries,
        read=partial(_read, name_of=name_of, vocabulary=vocabulary, faults=faults),
        has_splits=has_splits,
    )


def _metadata(path: Path, faults: Faults) -> list[tuple[str, Any]]:
    """The images of a file, sorted by their keys, which begin with the file name."""
    try:
        content = object_at(read_json(path), str(path))
        return sorted(object_at(content.get(_METADATA, content), str(path)).items())
    except BadEntry as fault:
        faults.meet(fault)
        return []


def _entry(
    path: Path, base: Path, images: str | None, first_id: int, index: int, item: tuple[str, Any], *, has_splits: bool
) -> Entry:
    where = f"{path}, image {item[0]}"
    value = object_at(item[1], where)
    file = PurePosixPath(text_at(value.get("filename"), f"{where}, filename").replace("\\", "/"))
    if file.is_absolute() or ".." in file.parts:
        raise BadEntry("image outside the folder", where, "a path below the folder of images", "correct the file")
    regions = value.get("regions", [])
    if isinstance(regions, dict):  # version 1: numbers as keys
        regions = [regions[key] for key in sorted(regions, key=lambda key: (len(key), key))]
    split, below = split_off(path.relative_to(base), has_splits=has_splits)
    return Entry(
        name=(below.parent / file).as_posix(),
        where=path,
        split=split,
        image_id=first_id + index,
        data=((base / images if images else path.parent) / file, list_at(regions, f"{where}, regions")),
    )


# --- classes -----------------------------------------------------------------------------------------


def _naming(entries: list[Entry], options: Options, faults: Faults) -> tuple[Any, Vocabulary]:
    """How a region is named, and the vocabulary."""
    if options.class_name:
        return lambda attributes, where: options.class_name, Vocabulary([Category(1, options.class_name)])
    name_of = partial(_value_of, attribute=_attribute(entries, options.class_attribute))
    aliases = read_aliases(options.alias, faults) if options.alias else {}
    if options.classes:
        categories, others = read_classes(Path(options.classes))
        return name_of, Vocabulary(categories, aliases | others, origin=options.classes)
    return name_of, collected(_names(entries, name_of), aliases)


def _attribute(entries: list[Entry], asked: str | None) -> str:
    """The attribute that is the class: what is asked for, or the only one there is."""
    found: dict[str, Path] = {}
    for entry, _, region in _regions(entries):
        for name in _attributes(region):
            found.setdefault(name, entry.where)
    if asked in found or (asked is None and len(found) == 1):
        return asked or next(iter(found))
    came = f"{entries[0].where}: regions with " + (f"the attributes {', '.join(sorted(found))}" if found else "none")
    expected = f"the attribute {asked}" if asked else "one attribute, which is the class"
    raise UserError(came, expected, "name it with --class-attribute, or one class for all regions with --class")


def _regions(entries: list[Entry]) -> Iterator[tuple[Entry, int, Any]]:
    for entry in entries:
        for index, region in enumerate(entry.data[1]):
            yield entry, index, region


def _attributes(region: Any) -> dict[str, Any]:
    values = region.get("region_attributes") if isinstance(region, dict) else None
    return values if isinstance(values, dict) else {}


def _names(entries: list[Entry], name_of: Any) -> Iterator[tuple[str, str]]:
    for entry, index, region in _regions(entries):
        where = _where(entry, index)
        try:
            yield name_of(_attributes(region), where), where
        except BadEntry:
            continue  # met again when the image is read


def _value_of(attributes: dict[str, Any], where: str, *, attribute: str) -> str:
    """The class of a region: a text, or the only box of a checkbox attribute that is ticked."""
    value = attributes.get(attribute)
    if isinstance(value, dict):
        ticked = [name for name, is_ticked in value.items() if is_ticked]
        value = ticked[0] if len(ticked) == 1 else ticked
    if isinstance(value, str) and value.strip():
        return value
    came = f"{where}: {attribute} is {value!r}"
    raise BadEntry("region without a class", came, "one class", "set the attribute in VIA")


def _where(entry: Entry, index: int) -> str:
    return f"{entry.where}, image {entry.name}, region {index + 1}"


# --- regions -----------------------------------------------------------------------------------------


def _read(entry: Entry, *, name_of: Any, vocabulary: Vocabulary, faults: Faults) -> Picture:
    file, regions = entry.data
    size_hw = look(file).upright_hw

    def found(index: int, region: Any) -> SourceObject | None:
        where = _where(entry, index)
        name = name_of(_attributes(object_at(region, where)), where)
        category_id = vocabulary.id_of(name, where, faults)
        shape = object_at(region.get("shape_attributes"), f"{where}, shape_attributes")
        outline = _outline(shape, f"{where} ({name})")
        return SourceObject(category_id, polygon_fields([outline], size_hw, f"{where} ({name})"))

    return Picture(file, size_hw, tuple(faults.usable(regions, found)), is_upright=True)


def _outline(shape: dict[str, Any], where: str) -> list[float]:
    kind = shape.get("name")
    if kind in ("polygon", "polyline"):
        xs, ys = (list_at(shape.get(f"all_points_{axis}"), f"{where}, all_points_{axis}") for axis in "xy")
        if len(xs) != len(ys) or len(xs) < 3:
            came = f"{where}: {kind} of {len(xs)} x and {len(ys)} y"
            raise BadEntry("shape that has no area", came, "three or more points", "outline the object")
        return polygon([number(x, where) for x in xs], [number(y, where) for y in ys])
    if kind == "rect":
        x, y = (number(shape.get(name), f"{where}, {name}") for name in "xy")
        width, height = (positive(shape.get(name), f"{where}, {name}") for name in ("width", "height"))
        return rectangle(x, y, x + width, y + height)
    if kind in ("circle", "ellipse"):
        cx, cy = (number(shape.get(name), f"{where}, {name}") for name in ("cx", "cy"))
        names = ("r", "r") if kind == "circle" else ("rx", "ry")
        rx, ry = (positive(shape.get(name), f"{where}, {name}") for name in names)
        return ellipse(
            cx, cy, rx, ry, number(shape.get("theta", 0), f"{where}, theta")
        )  # radian; older versions do not turn
    expected = "polygon, polyline, rect, circle or ellipse"
    raise BadEntry("shape that has no area", f"{where}: {kind!r}", expected, "outline the object")
