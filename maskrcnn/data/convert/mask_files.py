"""One mask file for each object, as in the Data Science Bowl 2018: `ID/images/ID.png` beside `ID/masks/*.png`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from maskrcnn.data.convert.faults import BadEntry, Faults
from maskrcnn.data.convert.id_maps import read_ids
from maskrcnn.data.convert.objects import mask_fields
from maskrcnn.data.convert.pictures import look, require_size
from maskrcnn.data.convert.source import (
    Entry,
    Options,
    Picture,
    Source,
    SourceObject,
    are_splits,
    require_entries,
    split_off,
)
from maskrcnn.data.convert.vocabulary import Category
from maskrcnn.data.images import IMAGE_SUFFIXES

_LAYOUT = "a folder for each image, with the image in images/ and a mask of each object in masks/"


def open_mask_files(root: Path, options: Options, faults: Faults) -> Source:
    """Every pixel of a mask that is not 0 belongs to its object; masks may overlap.

    Folders may lie in others that are called train…, val… or test…, which then are the splits.

    Raises:
        UserError: where there is no such folder.
    """
    folders = sorted({path.parent for pattern in ("*/images", "*/*/images") for path in root.glob(pattern)})
    has_splits = are_splits(path.relative_to(root) for path in folders)
    entries = [_entry(root, path, has_splits=has_splits) for path in folders]
    require_entries(entries, root, _LAYOUT)
    return Source(
        categories=[Category(1, options.class_name or "object")],
        entries=entries,
        read=partial(_read, faults=faults),
        has_splits=has_splits,
    )


def _entry(root: Path, path: Path, *, has_splits: bool) -> Entry:
    images = _pictures_in(path / "images")
    split, name = split_off(path.relative_to(root), has_splits=has_splits)
    suffix = images[0].suffix if images else ""
    return Entry(name=f"{name.as_posix()}{suffix}", where=path, split=split, data=images)


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _read(entry: Entry, *, faults: Faults) -> Picture:
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
