"""Pascal VOC 2007 to 2012, and folders of XML boxes in its format.

What VOC means by its annotations is in its development kit's documentation: pixel (1, 1) is the first, a box holds
its last row and column, a pixel of `SegmentationObject` is the number of the object in the XML file, one of
`SegmentationClass` the number of the class, and 255 is a border that belongs to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from maskrcnn.data.convert.documents import BadEntry, Faults, look, read_ids, read_lines, read_xml, require_size
from maskrcnn.data.convert.source import (
    Entry,
    Options,
    Picture,
    Source,
    SourceObject,
    box_fields,
    folder,
    mask_fields,
    require_entries,
)
from maskrcnn.data.convert.vocabulary import Category, Vocabulary, collected, plain, read_aliases, read_classes
from maskrcnn.data.images import IMAGE_SUFFIXES
from maskrcnn.errors import UserError

# Number k of SegmentationClass is CLASS_NAMES[k - 1].
CLASS_NAMES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow")
CLASS_NAMES += ("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train")
CLASS_NAMES += ("tvmonitor",)
_VOID = 255  # borders, and objects too difficult to outline
_SETS = ("train", "val", "test")
_LEAST_AGREEMENT = 0.9  # share of an object's pixels that must have its class
_LAYOUT = "a folder such as VOC2012, with Annotations, JPEGImages and maybe ImageSets"
_DIFFICULT = ("crowd", "keep", "drop")


def open_voc(root: Path, options: Options, faults: Faults) -> Source:
    """Boxes of `ImageSets/Main`'s lists, or with `with_masks` the masks of `ImageSets/Segmentation`'s.

    Objects marked difficult become crowd regions by default, which training leaves out and evaluation does not ask
    for, as VOC's own does not. Truncated and occluded ones are ordinary objects. All marks are kept as fields.

    Raises:
        UserError: for a folder that is not VOC's, a list that is missing, an image in two lists.
    """
    if options.difficult not in _DIFFICULT:
        raise UserError(f"--difficult {options.difficult}", f"one of {', '.join(_DIFFICULT)}", "correct it")
    if not (root / "Annotations").is_dir() and (years := sorted(p.name for p in root.glob("VOC2*"))):
        raise UserError(f"{root}, which holds {', '.join(years)}", "one of them", f"convert {root / years[0]}")
    xml_folder = folder(root, "Annotations", layout=_LAYOUT)
    images = _images_in(folder(root, "JPEGImages", layout=_LAYOUT))
    splits = _splits(root, options) if (root / "ImageSets").is_dir() else dict.fromkeys(_stems(xml_folder))
    if options.with_masks and not (root / "ImageSets").is_dir():
        raise UserError(f"no folder {root / 'ImageSets'}", "lists of the images with masks", "convert without masks")
    entries = [
        Entry(
            name=images.get(stem, f"{stem}.jpg"),
            where=xml_folder / f"{stem}.xml",
            split=split,
            data=root / "JPEGImages" / images.get(stem, f"{stem}.jpg"),
        )
        for stem, split in sorted(splits.items())
    ]
    require_entries(entries, root, _LAYOUT)
    vocabulary = _vocabulary(entries, options, faults)
    read = partial(_read_masks if options.with_masks else _read_boxes, options=options, faults=faults)
    return Source(
        categories=vocabulary.categories,
        entries=entries,
        read=partial(read, vocabulary=vocabulary),
        has_splits=any(entry.split for entry in entries),
    )


# --- what there is -----------------------------------------------------------------------------------


def _images_in(images: Path) -> dict[str, str]:
    """Stem -> file name."""
    return {path.stem: path.name for path in sorted(images.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}


def _stems(xml_folder: Path) -> Iterator[str]:
    return (path.stem for path in xml_folder.glob("*.xml"))


def _splits(root: Path, options: Options) -> dict[str, str]:
    """Stem -> list."""
    lists = folder(root, "ImageSets", "Segmentation" if options.with_masks else "Main", layout=_LAYOUT)
    names = options.sets or [name for name in _SETS if (lists / f"{name}.txt").is_file()]
    if not names:
        raise UserError(f"no list in {lists}", f"{', '.join(_SETS)} (.txt)", "name lists with --sets")
    splits: dict[str, str] = {}
    for name in names:
        for number, line in read_lines(lists / f"{name}.txt"):
            stem, *flag = line.split()
            if flag == ["-1"]:  # a class's list: the image has no object of it
                continue
            other = splits.setdefault(stem, name)
            if other != name:
                came = f"{lists / name}.txt, line {number}: {stem}, which {other}.txt has too"
                raise UserError(came, "lists without common images", "name lists that do not overlap with --sets")
    return splits


def _vocabulary(entries: list[Entry], options: Options, faults: Faults) -> Vocabulary:
    aliases = read_aliases(options.alias, faults) if options.alias else {}
    if options.classes:
        categories, others = read_classes(Path(options.classes))
        return Vocabulary(categories, aliases | others, origin=options.classes)
    official = Vocabulary([Category(k, name) for k, name in enumerate(CLASS_NAMES, start=1)], aliases)
    if options.with_masks:
        return official
    found = collected(_names_used(entries, faults), aliases)
    known = {plain(name) for name in CLASS_NAMES}
    return official if all(plain(category.name) in known for category in found.categories) else found


def _names_used(entries: list[Entry], faults: Faults) -> Iterator[tuple[str, str]]:
    for entry in entries:
        try:
            root = read_xml(entry.where)
        except BadEntry:
            if not faults.keep_going:
                raise
            continue  # counted when the image is read
        for name in root.iterfind("object/name"):
            if name.text and name.text.strip():
                yield name.text, str(entry.where)


# --- boxes -------------------------------------------------------------------------------------------


def _read_boxes(entry: Entry, *, vocabulary: Vocabulary, options: Options, faults: Faults) -> Picture:
    xml = read_xml(entry.where)
    size_hw = look(entry.data).size_hw
    _require_declared_size(xml, size_hw, entry.where)

    def found(index: int, element: Element) -> SourceObject | None:
        name = _text(element, "name", f"{entry.where}, object {index + 1}")
        where = f"{entry.where}, object {index + 1} ({name})"
        marks = _marks(element, where)
        if marks["difficult"] and options.difficult == "drop":
            faults.leave_out("difficult object", where)
            return None
        category_id = vocabulary.id_of(name, where, faults)
        if category_id is None:
            return None
        box = _box(element, size_hw, where, zero_based=options.zero_based)
        is_crowd = bool(marks["difficult"]) and options.difficult == "crowd"
        return SourceObject(category_id, box_fields(box, size_hw, where, is_crowd=is_crowd) | marks)

    return Picture(entry.data, size_hw, tuple(faults.usable(xml.iterfind("object"), found)))


def _require_declared_size(xml: Element, size_hw: tuple[int, int], where: Path) -> None:
    sizes = [xml.findtext(f"size/{side}", "").strip() for side in ("height", "width")]
    if all(text.isdecimal() and int(text) > 0 for text in sizes):  # some tools write 0 or nothing
        require_size((int(sizes[0]), int(sizes[1])), size_hw, str(where))


def _text(element: Element, tag: str, where: str) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise BadEntry("malformed entry", f"{where}: no <{tag}>", f"<{tag}> with a text", "correct the file")
    return text


def _marks(element: Element, where: str) -> dict[str, int]:
    marks = {}
    for tag in ("difficult", "truncated"):
        text = (element.findtext(tag) or "0").strip() or "0"
        if text not in ("0", "1"):
            raise BadEntry("malformed entry", f"{where}: <{tag}> {text!r}", "0 or 1", "correct the file")
        marks[tag] = int(text)
    return marks


def _box(element: Element, size_hw: tuple[int, int], where: str, *, zero_based: bool) -> list[float]:
    """The box as xyxy; VOC's (first row, last row) both belong to it and are counted from 1."""
    values = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        text = _text(element, f"bndbox/{tag}", where)
        try:
            values.append(float(text))
        except ValueError as error:
            raise BadEntry("malformed entry", f"{where}: <{tag}> {text!r}", "a number", "correct the file") from error
    height, width = size_hw
    first, last = (0, 0) if zero_based else (1, 0)
    x1, y1, x2, y2 = values
    if not (first <= x1 and first <= y1 and x2 <= width + last and y2 <= height + last):
        came = f"{where}: box from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g})"
        expected = f"pixels from ({first}, {first}) to ({width}, {height})"
        do = "correct the box" if zero_based else "correct the box, or say --zero-based if all are counted from 0"
        raise BadEntry("box outside the image", came, expected, do)
    return [x1 - first, y1 - first, x2, y2]


# --- masks -------------------------------------------------------------------------------------------


def _read_masks(entry: Entry, *, vocabulary: Vocabulary, options: Options, faults: Faults) -> Picture:
    root, stem = entry.data.parents[1], entry.data.stem
    size_hw = look(entry.data).size_hw
    objects_path, classes_path = (root / f"Segmentation{kind}" / f"{stem}.png" for kind in ("Object", "Class"))
    objects, classes = read_ids(objects_path), read_ids(classes_path)
    for path, ids in ((objects_path, objects), (classes_path, classes)):
        require_size(ids.shape, size_hw, str(path))
    elements = list(read_xml(entry.where).iterfind("object")) if entry.where.is_file() else []

    def found(_: int, number: int) -> SourceObject | None:
        where = f"{objects_path}, object {number}"
        mask = objects == number
        name = _class_of(classes[mask], where)
        marks = _marks_of(elements, number, name, where)
        if marks.get("difficult") and options.difficult == "drop":
            faults.leave_out("difficult object", where)
            return None
        category_id = vocabulary.id_of(name, where, faults)
        is_crowd = bool(marks.get("difficult")) and options.difficult == "crowd"
        return category_id and SourceObject(category_id, mask_fields(mask, where, is_crowd=is_crowd) | marks)

    numbers: Iterable[Any] = (int(number) for number in np.unique(objects) if number not in (0, _VOID))
    return Picture(entry.data, size_hw, tuple(faults.usable(numbers, found)))


def _class_of(numbers: np.ndarray, where: str) -> str:
    """The class that nearly all pixels of an object have."""
    values, counts = np.unique(numbers, return_counts=True)
    number, share = int(values[counts.argmax()]), counts.max() / counts.sum()
    if share < _LEAST_AGREEMENT or not 1 <= number <= len(CLASS_NAMES):
        came = f"{where}: {share:.0%} of its pixels are of class {number} in SegmentationClass"
        raise BadEntry("object without a class", came, f"one class, 1 to {len(CLASS_NAMES)}", "restore both files")
    return CLASS_NAMES[number - 1]


def _marks_of(elements: list[Element], number: int, name: str, where: str) -> dict[str, int]:
    """The marks of the XML file's object of this number, if it is of the same class."""
    if number > len(elements) or (elements[number - 1].findtext("name") or "").strip() != name:
        return {}
    return _marks(elements[number - 1], where)
