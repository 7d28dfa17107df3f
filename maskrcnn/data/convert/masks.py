"""Folders of PNG files whose pixels number the instances: Penn-Fudan, SYNTHIA, Cityscapes and the like.

An instance is the set of all pixels of its number, whether they touch or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from maskrcnn.data.convert.documents import BadEntry, Faults, look, read_ids, read_two_channels, require_size
from maskrcnn.data.convert.source import (
    Entry,
    Options,
    Picture,
    Source,
    SourceObject,
    are_splits,
    folder,
    mask_fields,
    require_entries,
    split_off,
)
from maskrcnn.data.convert.vocabulary import Category, Vocabulary, read_classes
from maskrcnn.data.images import IMAGE_SUFFIXES
from maskrcnn.errors import UserError

# Ids of the classes with instances that Cityscapes' benchmark counts (cityscapesScripts, labels.py).
_CITYSCAPES = {24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train"}
_CITYSCAPES |= {32: "motorcycle", 33: "bicycle"}
_CITYSCAPES_DIVISOR = 1000
# Ids of the classes of SYNTHIA-RAND-CITYSCAPES that move, and so have instances.
_SYNTHIA = {8: "car", 10: "pedestrian", 11: "bicycle", 12: "motorcycle", 17: "rider", 18: "truck"}
_SYNTHIA |= {19: "bus", 20: "train"}


@dataclass(frozen=True)
class Layout:
    """Where images and their masks lie: same path below both folders, without suffix and ending."""

    images: str
    masks: str
    image_ending: str = ""  # of the name before its suffix
    mask_ending: str = ""
    sets: tuple[str, ...] = ()  # first folders to take; () for all

    def __str__(self) -> str:
        names = f"{self.images}/NAME{self.image_ending}.png beside {self.masks}/NAME{self.mask_ending}.png"
        return f"a folder with {names}"


# The instances of a mask file: category id, pixels `[H, W]`, whether it is a group, and a name for messages.
_Found = Iterator[tuple[int, np.ndarray, bool, str]]
_Decoder = Callable[[Path], tuple[tuple[int, int], _Found]]


def open_penn_fudan(root: Path, options: Options, faults: Faults) -> Source:
    """Penn-Fudan: pedestrians, `PNGImages` and `PedMasks`."""
    layout = Layout("PNGImages", "PedMasks", mask_ending="_mask")
    return _opened(root, layout, _one_class(options.class_name or "person"), partial(_plain, void=None), faults)


def open_synthia(root: Path, options: Options, faults: Faults) -> Source:
    """SYNTHIA: `RGB` and `GT/LABELS`, whose first channel is the class and second one the instance.

    Pixels of such a class without a number are a crowd region. Other classes have no instances and are left out.
    """
    vocabulary = _chosen(_SYNTHIA, options)
    decode = partial(_two_channels, vocabulary=vocabulary)
    return _opened(root, Layout("RGB", "GT/LABELS"), vocabulary, decode, faults)


def open_cityscapes(root: Path, options: Options, faults: Faults) -> Source:
    """Cityscapes: `leftImg8bit` and `gtFine/…_instanceIds.png`; sets train and val, as the test set has no labels.

    A pixel is class · 1000 + instance; groups whose members nobody could tell apart have the class alone and become
    crowd regions.
    """
    layout = Layout("leftImg8bit", "gtFine", "_leftImg8bit", "_gtFine_instanceIds", options.sets or ("train", "val"))
    vocabulary = _chosen(_CITYSCAPES, options)
    decode = partial(_divided, divisor=_CITYSCAPES_DIVISOR, void=None, vocabulary=vocabulary, faults=faults)
    return _opened(root, layout, vocabulary, decode, faults)


def open_id_masks(root: Path, options: Options, faults: Faults) -> Source:
    """Any folder of images beside one of masks: one class, or `divisor` and a file of classes with ids.

    Raises:
        UserError: where options contradict each other, or there is nothing to convert.
    """
    ending = options.mask_suffix or ""
    layout = Layout(options.image_folder or "images", options.mask_folder or "masks", mask_ending=ending)
    if (options.divisor is None) != (options.classes is None) or (options.classes and options.class_name):
        came = "--divisor without --classes, --classes without --divisor, or --class beside them"
        raise UserError(came, "--class NAME, or --divisor N with --classes FILE", "give one of both")
    if options.divisor is None:
        vocabulary = _one_class(options.class_name or "object")
        return _opened(root, layout, vocabulary, partial(_plain, void=options.void), faults)
    if options.divisor < 2:
        raise UserError(f"--divisor {options.divisor}", "2 or more, as Cityscapes' 1000", "correct it")
    vocabulary = Vocabulary(*read_classes(Path(options.classes)), origin=options.classes)
    decode = partial(_divided, divisor=options.divisor, void=options.void, vocabulary=vocabulary, faults=faults)
    return _opened(root, layout, vocabulary, decode, faults)


def _one_class(name: str) -> Vocabulary:
    return Vocabulary([Category(1, name)])


def _chosen(names: dict[int, str], options: Options) -> Vocabulary:
    """The dataset's own classes, or those of a file with their ids; what is of another one is left out."""
    if options.classes:
        categories, aliases = read_classes(Path(options.classes))
        return Vocabulary(categories, aliases, is_closed=True, origin=options.classes)
    return Vocabulary([Category(*item) for item in names.items()], is_closed=True)


# --- files -------------------------------------------------------------------------------------------


def _opened(root: Path, layout: Layout, vocabulary: Vocabulary, decode: _Decoder, faults: Faults) -> Source:
    images = _by_key(folder(root, layout.images, layout=str(layout)), layout.image_ending, layout.sets)
    masks = _by_key(folder(root, layout.masks, layout=str(layout)), layout.mask_ending, layout.sets)
    if layout.images == layout.masks:
        own = {masks[key] for key in masks}
        images = {key: path for key, path in images.items() if path not in own}
    keys = sorted(images.keys() | masks.keys(), key=lambda key: key.as_posix())
    has_splits = are_splits(keys)
    entries = [_entry(root, layout, key, images.get(key), masks.get(key), has_splits=has_splits) for key in keys]
    require_entries(entries, root, str(layout))
    read = partial(_read, decode=decode, faults=faults)
    return Source(categories=vocabulary.categories, entries=entries, read=read, has_splits=has_splits)


def _by_key(parent: Path, ending: str, sets: tuple[str, ...]) -> dict[Path, Path]:
    """Path below the folder without ending and suffix -> file."""
    found: dict[Path, Path] = {}
    for path in sorted(parent.rglob("*")):
        relative = path.relative_to(parent)
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.stem.endswith(ending):
            continue
        if sets and relative.parts[0] not in sets:
            continue
        key = relative.with_name(path.stem[: len(path.stem) - len(ending)])
        if key in found:
            came = f"{found[key]} and {path}"
            raise UserError(came, "one file for each name", "move one of them out of the folder")
        found[key] = path
    return found


def _entry(root: Path, layout: Layout, key: Path, image: Path | None, mask: Path | None, *, has_splits: bool) -> Entry:
    split, name = split_off(image.relative_to(root / layout.images) if image else key, has_splits=has_splits)
    missing = root / layout.masks / key.with_name(f"{key.name}{layout.mask_ending}.png")
    return Entry(name=name.as_posix(), where=mask or missing, split=split, data=(image, mask))


def _read(entry: Entry, *, decode: _Decoder, faults: Faults) -> Picture:
    image, mask = entry.data
    if image is None:
        raise BadEntry("mask without an image", str(mask), "an image of the same name", "complete the images")
    if mask is None:
        raise BadEntry("image without a mask", str(image), f"its mask, {entry.where}", "complete the masks")
    size_hw = look(image).size_hw
    mask_hw, found = decode(mask)
    require_size(mask_hw, size_hw, str(mask))

    def made(_: int, item: tuple[int, np.ndarray, bool, str]) -> SourceObject:
        category_id, pixels, is_crowd, name = item
        if category_id < 1:
            raise BadEntry("unknown class", f"{mask}, {name}", "a class of --classes", "complete the file of classes")
        return SourceObject(category_id, mask_fields(pixels, f"{mask}, {name}", is_crowd=is_crowd))

    return Picture(image, size_hw, tuple(faults.usable(found, made)))


# --- what pixels mean --------------------------------------------------------------------------------

_UNKNOWN = 0  # category id of an instance of an unknown class


def _plain(path: Path, *, void: int | None) -> tuple[tuple[int, int], _Found]:
    """Each number but 0 and `void` is an instance of the only class."""
    ids = read_ids(path)
    numbers = [int(number) for number in np.unique(ids) if number not in (0, void)]
    return ids.shape, ((1, ids == number, False, f"instance {number}") for number in numbers)


def _divided(
    path: Path, *, divisor: int, void: int | None, vocabulary: Vocabulary, faults: Faults
) -> tuple[tuple[int, int], _Found]:
    """Numbers from `divisor` on are class · divisor + instance; a class by itself is a group of instances."""
    ids = read_ids(path)

    def found() -> _Found:
        for number in map(int, np.unique(ids)):
            category_id, is_group = (number, True) if number < divisor else (number // divisor, False)
            name = f"pixels of {number}"
            if number == void or (is_group and category_id not in vocabulary):
                continue  # background, and classes that are no things
            if category_id in vocabulary:
                yield category_id, ids == number, is_group, name
            elif vocabulary.is_closed:
                faults.leave_out("class that is not in the vocabulary", f"{path}, {name}: class {category_id}")
            else:
                yield _UNKNOWN, ids == number, False, f"{name}: class {category_id}"

    return ids.shape, found()


def _two_channels(path: Path, *, vocabulary: Vocabulary) -> tuple[tuple[int, int], _Found]:
    classes, instances = read_two_channels(path)

    def found() -> _Found:
        for category in vocabulary.categories:
            own = classes == category.id
            for number in map(int, np.unique(instances[own])):
                name = f"class {category.id}, instance {number}"
                yield category.id, own & (instances == number), number == 0, name

    return classes.shape, found()


# One mask file for each object, as in the Data Science Bowl 2018: `ID/images/ID.png` beside `ID/masks/*.png`.

_LAYOUT = "a folder for each image, with the image in images/ and a mask of each object in masks/"


def open_mask_files(root: Path, options: Options, faults: Faults) -> Source:
    """Every pixel of a mask that is not 0 belongs to its object; masks may overlap.

    Folders may lie in others that are called train…, val… or test…, which then are the splits.

    Raises:
        UserError: where there is no such folder.
    """
    folders = sorted({path.parent for pattern in ("*/images", "*/*/images") for path in root.glob(pattern)})
    has_splits = are_splits(path.relative_to(root) for path in folders)
    entries = [_mask_file_entry(root, path, has_splits=has_splits) for path in folders]
    require_entries(entries, root, _LAYOUT)
    return Source(
        categories=[Category(1, options.class_name or "object")],
        entries=entries,
        read=partial(_read_mask_files, faults=faults),
        has_splits=has_splits,
    )


def _mask_file_entry(root: Path, path: Path, *, has_splits: bool) -> Entry:
    images = _pictures_in(path / "images")
    split, name = split_off(path.relative_to(root), has_splits=has_splits)
    suffix = images[0].suffix if images else ""
    return Entry(name=f"{name.as_posix()}{suffix}", where=path, split=split, data=images)


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _read_mask_files(entry: Entry, *, faults: Faults) -> Picture:
    if len(entry.data) != 1:
        came = f"{entry.where / 'images'}: {len(entry.data)} images"
        raise BadEntry("folder without one image", came, "one image", "take the others out, or restore it")
    masks = entry.where / "masks"
    if not masks.is_dir():
        raise BadEntry("image without masks", f"no folder {masks}", _LAYOUT, "complete the dataset")
    size_hw = look(entry.data[0]).size_hw

    def found(_: int, path: Path) -> SourceObject:
        mask = _mask(path)
        require_size(mask.shape, size_hw, str(path))
        return SourceObject(1, mask_fields(mask, str(path)))

    return Picture(entry.data[0], size_hw, tuple(faults.usable(_pictures_in(masks), found)))


def _mask(path: Path) -> np.ndarray:
    return read_ids(path) != 0
