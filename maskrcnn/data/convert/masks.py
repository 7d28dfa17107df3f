"""Masks in PNG files: instance ids (Penn-Fudan, SYNTHIA, Cityscapes and similar), or one file for each object.

An instance is the set of all pixels with its number, connected or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from maskrcnn.data.convert.files import annotated_size, read_ids, read_two_channels, require_size
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
    mask_fields,
    require_entries,
    require_folder,
    split_off,
)
from maskrcnn.data.convert.vocabulary import Vocabulary, read_classes
from maskrcnn.data.images import IMAGE_SUFFIXES, read_header
from maskrcnn.errors import UserError
from maskrcnn.files import files_below

# Ids of the classes with instances in Cityscapes' benchmark (cityscapesScripts, labels.py).
_CITYSCAPES = {24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train"}
_CITYSCAPES |= {32: "motorcycle", 33: "bicycle"}
_CITYSCAPES_DIVISOR = 1000
# Ids of the classes with instances in SYNTHIA-RAND-CITYSCAPES: the movable objects.
_SYNTHIA = {8: "car", 10: "pedestrian", 11: "bicycle", 12: "motorcycle", 17: "rider", 18: "truck"}
_SYNTHIA |= {19: "bus", 20: "train"}
_UNKNOWN = 0  # category id of an instance of an unknown class


@dataclass(frozen=True)
class _Layout:
    """Folders of images and masks; an image and its mask have the same relative path without ending and suffix."""

    images: str
    masks: str
    image_ending: str = ""  # end of the file name, before its suffix
    mask_ending: str = ""
    sets: tuple[str, ...] = ()  # first folders to convert; (): all

    def __str__(self) -> str:
        names = f"{self.images}/NAME{self.image_ending}.png and {self.masks}/NAME{self.mask_ending}.png"
        return f"a folder with {names}"


# Instances of a mask file: category id, pixels `[H, W]`, whether it is a group, and a name for errors.
_Instances = Iterator[tuple[int, np.ndarray, bool, str]]
_Decoder = Callable[[Path], tuple[tuple[int, ...], _Instances]]  # also gives the mask's (height, width)


def open_penn_fudan(root: Path, options: Options, faults: Faults) -> Source:
    """Opens Penn-Fudan: pedestrians, `PNGImages` and `PedMasks`."""
    layout = _Layout("PNGImages", "PedMasks", mask_ending="_mask")
    vocabulary = Vocabulary([Category(1, options.class_name or "person")])
    return _open(root, layout, vocabulary, partial(_decode_ids, void=None), faults)


def open_synthia(root: Path, options: Options, faults: Faults) -> Source:
    """Opens SYNTHIA: `RGB` and `GT/LABELS`, whose first channel is the class and whose second is the instance.

    Pixels of a class without an instance number are a crowd region. Classes without instances are left out.
    """
    vocabulary = _closed_vocabulary(_SYNTHIA, options)
    return _open(
        root, _Layout("RGB", "GT/LABELS"), vocabulary, partial(_decode_channels, vocabulary=vocabulary), faults
    )


def open_cityscapes(root: Path, options: Options, faults: Faults) -> Source:
    """Opens Cityscapes: `leftImg8bit` and `gtFine/…_instanceIds.png`, by default train and val; test has no labels.

    A pixel is class · 1000 + instance. A group of indistinguishable instances has only the class and becomes a crowd
    region.
    """
    layout = _Layout("leftImg8bit", "gtFine", "_leftImg8bit", "_gtFine_instanceIds", options.sets or ("train", "val"))
    vocabulary = _closed_vocabulary(_CITYSCAPES, options)
    decode = partial(_decode_divided, divisor=_CITYSCAPES_DIVISOR, void=None, vocabulary=vocabulary, faults=faults)
    return _open(root, layout, vocabulary, decode, faults)


def open_id_masks(root: Path, options: Options, faults: Faults) -> Source:
    """Opens a folder of images and one of masks: of a single class, or with `divisor` and a file of classes with ids.

    Raises:
        UserError: if options contradict each other, or there is nothing to convert.
    """
    ending = options.mask_suffix or ""
    layout = _Layout(options.image_folder or "images", options.mask_folder or "masks", mask_ending=ending)
    if (options.divisor is None) != (options.classes is None) or (options.classes and options.class_name):
        found = "--divisor without --classes, --classes without --divisor, or --class together with them"
        raise UserError(found, "--class NAME, or --divisor N with --classes FILE", "use one of the two")
    if options.divisor is None or options.classes is None:
        vocabulary = Vocabulary([Category(1, options.class_name or "object")])
        return _open(root, layout, vocabulary, partial(_decode_ids, void=options.void), faults)
    if options.divisor < 2:
        raise UserError(f"--divisor {options.divisor}", "2 or more, such as Cityscapes' 1000", "correct the option")
    vocabulary = Vocabulary(*read_classes(Path(options.classes)), origin=options.classes)
    decode = partial(_decode_divided, divisor=options.divisor, void=options.void, vocabulary=vocabulary, faults=faults)
    return _open(root, layout, vocabulary, decode, faults)


def _closed_vocabulary(names: dict[int, str], options: Options) -> Vocabulary:
    """The dataset's own classes, or those of a file, with their ids; other classes are left out."""
    if options.classes:
        categories, aliases = read_classes(Path(options.classes))
        return Vocabulary(categories, aliases, is_closed=True, origin=options.classes)
    return Vocabulary([Category(*item) for item in names.items()], is_closed=True)


def _open(root: Path, layout: _Layout, vocabulary: Vocabulary, decode: _Decoder, faults: Faults) -> Source:
    images = _files_by_key(require_folder(root / layout.images, str(layout)), layout.image_ending, layout.sets)
    masks = _files_by_key(require_folder(root / layout.masks, str(layout)), layout.mask_ending, layout.sets)
    if layout.images == layout.masks:
        files = set(masks.values())
        images = {key: path for key, path in images.items() if path not in files}
    keys = sorted(images.keys() | masks.keys(), key=lambda key: key.as_posix())
    has_splits = are_splits(keys)
    entries = []
    for key in keys:
        image, mask = images.get(key), masks.get(key)
        split, name = split_off(image.relative_to(root / layout.images) if image else key, has_splits=has_splits)
        expected = root / layout.masks / key.with_name(f"{key.name}{layout.mask_ending}.png")
        entries.append(Entry(name=name.as_posix(), path=mask or expected, split=split, data=(image, mask)))
    require_entries(entries, root, str(layout))
    return Source(vocabulary.categories, entries, partial(_read, decode=decode, faults=faults), has_splits)


def _files_by_key(folder: Path, ending: str, sets: tuple[str, ...]) -> dict[Path, Path]:
    """Path relative to the folder, without ending and suffix -> file."""
    files: dict[Path, Path] = {}
    for path in files_below(folder, IMAGE_SUFFIXES):
        relative = path.relative_to(folder)
        if not path.stem.endswith(ending):
            continue
        if sets and relative.parts[0] not in sets:
            continue
        key = relative.with_name(path.stem[: len(path.stem) - len(ending)])
        if key in files:
            found = f"{files[key]} and {path}"
            raise UserError(found, "one file for each name", "move one of them out of the folder")
        files[key] = path
    return files


def _read(entry: Entry, *, decode: _Decoder, faults: Faults) -> AnnotatedImage:
    image, mask = entry.data
    if image is None:
        raise BadEntry("mask without an image", str(mask), "an image of the same name", "add the missing image")
    if mask is None:
        raise BadEntry("image without a mask", str(image), f"its mask, {entry.path}", "add the missing mask")
    (height, width), instances = decode(mask)
    size_hw = annotated_size(image, (height, width), str(mask))

    def convert(_: int, item: tuple[int, np.ndarray, bool, str]) -> ObjectAnnotation:
        category_id, pixels, is_crowd, name = item
        if category_id == _UNKNOWN:
            raise BadEntry("unknown class", f"{mask}, {name}", "a class of --classes", "add it to the file of classes")
        return ObjectAnnotation(category_id, mask_fields(pixels, f"{mask}, {name}", is_crowd=is_crowd))

    return AnnotatedImage(image, size_hw, tuple(faults.convert_each(instances, convert)))


def _decode_ids(path: Path, *, void: int | None) -> tuple[tuple[int, ...], _Instances]:
    """Each number except 0 and `void` is an instance of the only class."""
    ids = read_ids(path)
    numbers = [int(number) for number in np.unique(ids) if number not in (0, void)]
    return ids.shape, ((1, ids == number, False, f"instance {number}") for number in numbers)


def _decode_divided(
    path: Path, *, divisor: int, void: int | None, vocabulary: Vocabulary, faults: Faults
) -> tuple[tuple[int, ...], _Instances]:
    """A number of at least `divisor` is class · divisor + instance; a smaller one is the class of a group."""
    ids = read_ids(path)

    def instances() -> _Instances:
        for number in map(int, np.unique(ids)):
            category_id, is_group = (number, True) if number < divisor else (number // divisor, False)
            name = f"pixels of {number}"
            if number == void or (is_group and category_id not in vocabulary):
                continue  # background, and classes without instances
            if category_id in vocabulary:
                yield category_id, ids == number, is_group, name
            elif vocabulary.is_closed:
                faults.leave_out("class that is not in the vocabulary", f"{path}, {name}: class {category_id}")
            else:
                yield _UNKNOWN, ids == number, False, f"{name}: class {category_id}"

    return ids.shape, instances()


def _decode_channels(path: Path, *, vocabulary: Vocabulary) -> tuple[tuple[int, ...], _Instances]:
    """The first channel is the class, the second is the instance; 0 is a group."""
    classes, numbers = read_two_channels(path)

    def instances() -> _Instances:
        for category in vocabulary.categories:
            pixels = classes == category.id
            for number in map(int, np.unique(numbers[pixels])):
                name = f"class {category.id}, instance {number}"
                yield category.id, pixels & (numbers == number), number == 0, name

    return classes.shape, instances()


# One mask file for each object, as in the Data Science Bowl 2018: `ID/images/ID.png` and `ID/masks/*.png`.

_MASK_FILES_LAYOUT = "a folder for each image, with the image in images/ and a mask of each object in masks/"


def open_mask_files(root: Path, options: Options, faults: Faults) -> Source:
    """Opens folders of one image and a mask file per object, whose nonzero pixels are the mask; masks may overlap.

    Parent folders named train…, val… or test… are the splits.

    Raises:
        UserError: if there is no such folder.
    """
    folders = sorted({path.parent for pattern in ("*/images", "*/*/images") for path in root.glob(pattern)})
    has_splits = are_splits(path.relative_to(root) for path in folders)
    entries = []
    for folder in folders:
        images = _image_files(folder / "images")
        split, name = split_off(folder.relative_to(root), has_splits=has_splits)
        suffix = images[0].suffix if images else ""
        entries.append(Entry(name=f"{name.as_posix()}{suffix}", path=folder, split=split, data=images))
    require_entries(entries, root, _MASK_FILES_LAYOUT)
    categories = [Category(1, options.class_name or "object")]
    return Source(categories, entries, partial(_read_mask_files, faults=faults), has_splits)


def _image_files(folder: Path) -> list[Path]:
    return files_below(folder, IMAGE_SUFFIXES)


def _size_of(masks: Sequence[Path]) -> tuple[int, int] | None:
    """The size of the first mask that can be read."""
    for path in masks:
        try:
            return read_header(path).size_hw
        except UserError:
            continue
    return None


def _read_mask_files(entry: Entry, *, faults: Faults) -> AnnotatedImage:
    if len(entry.data) != 1:
        found = f"{entry.path / 'images'}: {len(entry.data)} images"
        raise BadEntry("folder without one image", found, "one image", "remove the others, or restore the image")
    masks = entry.path / "masks"
    if not masks.is_dir():
        raise BadEntry("image without masks", f"no folder {masks}", _MASK_FILES_LAYOUT, "complete the dataset")
    files = _image_files(masks)
    size_hw = annotated_size(entry.data[0], _size_of(files), str(masks))

    def convert(_: int, path: Path) -> ObjectAnnotation:
        mask = read_ids(path) != 0
        require_size(mask.shape, size_hw, str(path))
        return ObjectAnnotation(1, mask_fields(mask, str(path)))

    return AnnotatedImage(entry.data[0], size_hw, tuple(faults.convert_each(files, convert)))
