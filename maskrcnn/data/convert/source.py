"""What every format gives: the images there are, and a way to read one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from maskrcnn.data.convert.vocabulary import Category
from maskrcnn.errors import UserError

OWN_SPLITS = ("train", "val", "test")  # how folders are called that are splits


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
    return bool(firsts) and all(first.lower().startswith(OWN_SPLITS) for first in firsts)


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
