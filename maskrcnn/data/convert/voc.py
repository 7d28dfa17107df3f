"""Pascal VOC 2007 to 2012, and folders of XML boxes in its format.

Conventions of VOC's development kit: pixel (1, 1) is the first, and a box includes its last row and column. Pixels of
`SegmentationObject` are numbers of objects in the XML file, pixels of `SegmentationClass` numbers of classes, and 255
marks an unlabelled border.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from maskrcnn.data.convert.files import annotated_size, read_ids, read_lines, read_xml, require_size
from maskrcnn.data.convert.source import (
    AnnotatedImage,
    BadEntry,
    Category,
    Entry,
    Faults,
    ObjectAnnotation,
    Options,
    Source,
    box_fields,
    mask_fields,
    require_entries,
    require_folder,
)
from maskrcnn.data.convert.vocabulary import Vocabulary, build_vocabulary, normalized
from maskrcnn.data.images import IMAGE_SUFFIXES
from maskrcnn.errors import UserError
from maskrcnn.files import files_below

# Number k of SegmentationClass is CLASS_NAMES[k - 1].
CLASS_NAMES: tuple[str, ...]
CLASS_NAMES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow")
CLASS_NAMES += ("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train")
CLASS_NAMES += ("tvmonitor",)
_VOID = 255  # borders, and objects too difficult to outline
_SETS = ("train", "val", "test")
_MIN_AGREEMENT = 0.9  # minimum share of an object's pixels that have its class
_FLAGGED = re.compile(r"(.+?)\s+(-?\d)")  # a line of a class list: stem, and 1, 0 or -1
_LAYOUT = "a folder such as VOC2012, with Annotations, JPEGImages and optional ImageSets"
_DIFFICULT = ("crowd", "keep", "drop")
_CORRECT = "correct the file"


def open_voc(root: Path, options: Options, faults: Faults) -> Source:
    """Opens the boxes of the lists in `ImageSets/Main`, or with `with_masks` the masks of `ImageSets/Segmentation`.

    By default, difficult objects become crowd regions, which training leaves out and evaluation ignores, as VOC's own
    evaluation does. Truncated and occluded objects are ordinary ones. The flags are kept as fields.

    A folder with several years (VOCdevkit with VOC2007 and VOC2012) becomes one dataset: lists of the same name are
    joined, and a list may be missing in some years, such as VOC2012's test.

    Raises:
        UserError: for a folder in another layout, a missing list, or an image in two lists.
    """
    if options.difficult not in _DIFFICULT:
        raise UserError(f"--difficult {options.difficult}", f"one of {', '.join(_DIFFICULT)}", "correct the option")
    years = sorted(path for path in root.glob("VOC2*") if path.is_dir())
    folders = [root] if (root / "Annotations").is_dir() or not years else years
    sets = _sets(folders, options)
    entries = [entry for folder in folders for entry in _entries(folder, sets, options)]
    require_entries(entries, root, _LAYOUT)
    vocabulary = _vocabulary(entries, options, faults)
    read = _read_masks if options.with_masks else _read_boxes
    return Source(
        categories=vocabulary.categories,
        entries=entries,
        read=partial(read, vocabulary=vocabulary, options=options, faults=faults),
        has_splits=any(entry.split for entry in entries),
    )


def _lists(folder: Path, options: Options) -> Path:
    """The folder with the lists of a year."""
    return folder / "ImageSets" / ("Segmentation" if options.with_masks else "Main")


def _sets(folders: list[Path], options: Options) -> list[str]:
    """The lists to read, each from some of the folders: the requested lists, else those of `_SETS`."""
    present = {path.stem for folder in folders for path in _lists(folder, options).glob("*.txt")}
    if missing := [name for name in options.sets if name not in present]:
        places = ", ".join(str(_lists(folder, options)) for folder in folders)
        raise UserError(
            f"no list {', '.join(missing)} (.txt) in {places}",
            f"lists such as {', '.join(sorted(present)[:9])}" if present else "lists of images",
            "correct --sets",
        )
    return list(options.sets) or [name for name in _SETS if name in present]


def _entries(folder: Path, sets: list[str], options: Options) -> Iterator[Entry]:
    """The images of one year, by name."""
    xml_folder = require_folder(folder / "Annotations", _LAYOUT)
    files = sorted(require_folder(folder / "JPEGImages", _LAYOUT).iterdir())
    images = {path.stem: path.name for path in files if path.suffix.lower() in IMAGE_SUFFIXES}
    splits: dict[str, str | None]
    if (folder / "ImageSets").is_dir():
        splits = _read_splits(require_folder(_lists(folder, options), _LAYOUT), sets, images)
    elif options.with_masks:
        raise UserError(f"no folder {folder / 'ImageSets'}", "lists of the images with masks", "convert without masks")
    else:
        splits = dict.fromkeys(path.stem for path in files_below(xml_folder, (".xml",)))
    for stem, split in sorted(splits.items()):
        name = images.get(stem, f"{stem}.jpg")
        yield Entry(name=name, path=xml_folder / f"{stem}.xml", split=split, data=folder / "JPEGImages" / name)


def _read_splits(lists: Path, sets: list[str], images: Container[str]) -> dict[str, str | None]:
    """Image stem -> name of its list; lines may have a flag, and stems of `images` may contain spaces."""
    names = [name for name in sets if (lists / f"{name}.txt").is_file()]
    if not names:
        raise UserError(f"no list in {lists}", f"{', '.join(sets or _SETS)} (.txt)", "choose lists with --sets")
    splits: dict[str, str | None] = {}
    for name in names:
        for number, line in read_lines(lists / f"{name}.txt"):
            flagged = None if line in images else _FLAGGED.fullmatch(line)
            stem, flag = flagged.groups() if flagged else (line, "")
            if flag == "-1":  # a class list: the image has no object of the class
                continue
            first = splits.setdefault(stem, name)
            if first != name:
                found = f"{lists / name}.txt, line {number}: {stem}, also in {first}.txt"
                raise UserError(found, "lists without common images", "choose disjoint lists with --sets")
    return splits


def _vocabulary(entries: list[Entry], options: Options, faults: Faults) -> Vocabulary:
    """The requested classes; else VOC's, unless boxes have other names."""
    vocabulary = build_vocabulary(options, faults, () if options.with_masks else _class_names(entries, faults))
    known = {normalized(name) for name in CLASS_NAMES}
    if options.classes or not all(normalized(category.name) in known for category in vocabulary.categories):
        return vocabulary
    return Vocabulary([Category(k, name) for k, name in enumerate(CLASS_NAMES, start=1)], vocabulary.aliases)


def _class_names(entries: list[Entry], faults: Faults) -> Iterator[tuple[str, str]]:
    for entry in entries:
        try:
            root = read_xml(entry.path)
        except BadEntry:
            if not faults.keep_going:
                raise
            continue  # counted when the image is read
        for name in root.iterfind("object/name"):
            if name.text and name.text.strip():
                yield name.text, str(entry.path)


def _read_boxes(entry: Entry, *, vocabulary: Vocabulary, options: Options, faults: Faults) -> AnnotatedImage:
    xml = read_xml(entry.path)
    sides = [xml.findtext(f"size/{side}", "").strip() for side in ("height", "width")]
    declared_hw = None
    if all(text.isdecimal() and int(text) > 0 for text in sides):  # some tools write 0 or nothing
        declared_hw = (int(sides[0]), int(sides[1]))
    size_hw = annotated_size(entry.data, declared_hw, str(entry.path))

    def convert(index: int, element: Element) -> ObjectAnnotation | None:
        where = f"{entry.path}, object {index + 1}"
        name = _text(element, "name", where)
        where = f"{where} ({name})"
        flags = _flags(element, where)
        category_id = _category_of(name, flags, where, vocabulary, options, faults)
        if category_id is None:
            return None
        box = _box(element, size_hw, where, faults, zero_based=options.zero_based)
        is_crowd = bool(flags["difficult"]) and options.difficult == "crowd"
        return ObjectAnnotation(category_id, box_fields(box, size_hw, where, is_crowd=is_crowd) | flags)

    return AnnotatedImage(entry.data, size_hw, tuple(faults.convert_each(xml.iterfind("object"), convert)))


def _category_of(
    name: str, flags: dict[str, int], where: str, vocabulary: Vocabulary, options: Options, faults: Faults
) -> int | None:
    """The category id of an object; None if it is left out and counted."""
    if flags.get("difficult") and options.difficult == "drop":
        faults.leave_out("difficult object", where)
        return None
    return vocabulary.id_of(name, where, faults)


def _text(element: Element, tag: str, where: str) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise BadEntry("malformed entry", f"{where}: no <{tag}>", f"<{tag}> with a text", _CORRECT)
    return text


def _flags(element: Element, where: str) -> dict[str, int]:
    flags = {}
    for tag in ("difficult", "truncated"):
        text = (element.findtext(tag) or "0").strip() or "0"
        if text not in ("0", "1"):
            raise BadEntry("malformed entry", f"{where}: <{tag}> {text!r}", "0 or 1", _CORRECT)
        flags[tag] = int(text)
    return flags


def _box(element: Element, size_hw: tuple[int, int], where: str, faults: Faults, *, zero_based: bool) -> list[float]:
    """The box as xyxy, px, from inclusive pixel numbers that start at 1 (or 0); corners may be in either order."""
    values = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        text = _text(element, f"bndbox/{tag}", where)
        try:
            values.append(float(text))
        except ValueError as error:
            raise BadEntry("malformed entry", f"{where}: <{tag}> {text!r}", "a number", _CORRECT) from error
    height, width = size_hw
    first, last = (0, 0) if zero_based else (1, 0)
    (x1, x2), (y1, y2) = sorted(values[0::2]), sorted(values[1::2])
    if [x1, y1, x2, y2] != values:
        faults.repair("box with its corners in another order", where)
    if not (first <= x1 and first <= y1 and x2 <= width + last and y2 <= height + last):
        found = f"{where}: box from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g})"
        expected = f"pixels from ({first}, {first}) to ({width}, {height})"
        fix = "correct the box" if zero_based else "correct the box, or add --zero-based if coordinates start at 0"
        raise BadEntry("box outside the image", found, expected, fix)
    return [x1 - first, y1 - first, x2, y2]


def _read_masks(entry: Entry, *, vocabulary: Vocabulary, options: Options, faults: Faults) -> AnnotatedImage:
    root, stem = entry.data.parents[1], entry.data.stem
    objects_path, classes_path = (root / f"Segmentation{kind}" / f"{stem}.png" for kind in ("Object", "Class"))
    objects, classes = read_ids(objects_path), read_ids(classes_path)
    size_hw = annotated_size(entry.data, (objects.shape[0], objects.shape[1]), str(objects_path))
    require_size(classes.shape, size_hw, str(classes_path))
    elements = list(read_xml(entry.path).iterfind("object")) if entry.path.is_file() else []

    def convert(_: int, number: int) -> ObjectAnnotation | None:
        where = f"{objects_path}, object {number}"
        mask = objects == number
        name = _class_of(classes[mask], where)
        flags: dict[str, int] = {}  # of the XML file's object of this number, if it has the same class
        if number <= len(elements) and (elements[number - 1].findtext("name") or "").strip() == name:
            flags = _flags(elements[number - 1], where)
        category_id = _category_of(name, flags, where, vocabulary, options, faults)
        if category_id is None:
            return None
        is_crowd = bool(flags.get("difficult")) and options.difficult == "crowd"
        return ObjectAnnotation(category_id, mask_fields(mask, where, is_crowd=is_crowd) | flags)

    numbers = [int(number) for number in np.unique(objects) if number not in (0, _VOID)]
    return AnnotatedImage(entry.data, size_hw, tuple(faults.convert_each(numbers, convert)))


def _class_of(numbers: np.ndarray, where: str) -> str:
    """The class of nearly all pixels of an object."""
    values, counts = np.unique(numbers, return_counts=True)
    number, share = int(values[counts.argmax()]), counts.max() / counts.sum()
    if share < _MIN_AGREEMENT or not 1 <= number <= len(CLASS_NAMES):
        found = f"{where}: {share:.0%} of its pixels are of class {number} in SegmentationClass"
        raise BadEntry("object without a class", found, f"one class, 1 to {len(CLASS_NAMES)}", "restore both files")
    return CLASS_NAMES[number - 1]
