"""Converts COCO datasets and all layouts that training reads (new splits, copy, cleanup), and Datumaro's formats."""

from __future__ import annotations

import importlib
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskrcnn.data.annotations import BOX_ONLY, DROPPED, REPAIRED, ObjectEntry, checked_keypoints
from maskrcnn.data.coco import CocoDataset, SplitContent, divided, read_split
from maskrcnn.data.convert.files import annotated_size
from maskrcnn.data.convert.source import (
    SPLIT_PREFIXES,
    AnnotatedImage,
    BadEntry,
    Category,
    Entry,
    Faults,
    ObjectAnnotation,
    Options,
    Source,
    require_entries,
)
from maskrcnn.data.convert.vocabulary import check_categories
from maskrcnn.data.layouts import LAYOUTS, find_splits, get_split
from maskrcnn.data.segmentation import AnnotationError
from maskrcnn.errors import UserError, missing_library, reason_of

DATUMARO = "datumaro:"  # prefix of kinds, followed by Datumaro's name of the format, or "auto"


def open_coco(root: Path, options: Options, faults: Faults) -> Source:
    """Opens the splits of `options.sets` (prefixes suffice; default: all) of any layout that training reads.

    Ids, categories and all other fields are kept; repaired entries are written in repaired form. A dataset with one
    split that is not named train…, val… or test… is divided as in training.

    Raises:
        UserError: for a file in another format, and for splits whose categories clash.
    """
    names = find_splits(root, options.sets, options.image_folder)
    entries: list[Entry] = []
    categories: dict[int, Category] = {}
    annotation_ids: set[int] = set()
    for name in names:
        split = get_split(root, name, options.image_folder)
        read = read_split(split)
        for category in _categories(read):
            first = categories.setdefault(category.id, category)
            if first.name != category.name:
                names_of = f"category {category.id} is {category.name!r}, in another split {first.name!r}"
                found = f"{split.annotations}: {names_of}"
                fix = "correct the files, or convert them separately"
                raise UserError(found, "the same categories in all splits", fix)
        check_categories(categories.values(), f"{split.annotations} and the splits before it")
        _count(read, faults)
        entries += _entries(read, split.annotations, name, annotation_ids, with_crowds=options.crowd)
    require_entries(entries, root, LAYOUTS)
    if len({entry.image_id for entry in entries}) < len(entries):  # as exported by Roboflow: each split counts from 0
        faults.repair("image ids that another split has too: images are renumbered", str(root))
        entries = [replace(entry, image_id=None) for entry in entries]
    has_splits = len(names) > 1 or names[0].lower().startswith(SPLIT_PREFIXES)
    if not has_splits and len(entries) > 1:
        dataset = CocoDataset.load(root, names[0], images=options.image_folder, require_images=False)
        validation = {record.id for record in divided(dataset, "val").images}
        entries = [replace(each, split="val" if each.image_id in validation else "train") for each in entries]
    return Source(
        categories=tuple(categories.values()),
        entries=entries,
        read=_read,
        has_splits=has_splits or len(entries) > 1,
        first_annotation_id=1 + max(annotation_ids, default=0),
    )


def _categories(read: SplitContent) -> list[Category]:
    """The classes of a file, with all fields of their entries."""
    by_name: dict[str, dict[str, Any]] = {}
    for entry in read.categories:
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            by_name.setdefault(entry["name"], entry)
    return [
        Category(category_id, name, _without(by_name.get(name, {}), "id", "name"))
        for category_id, name in read.file.categories.items()
    ]


def _count(read: SplitContent, faults: Faults) -> None:
    """Counts the entries that the reader dropped, which are faults, and those that it repaired."""
    for note in read.file.notes.of(DROPPED):
        found = f"{read.file.source}, {note.name}: {note.detail}"
        faults.handle(BadEntry(note.reason, found, "an annotation in COCO's format", "correct the file"))
    for outcome in (BOX_ONLY, REPAIRED):
        first = {note.reason: f"{note.name}: {note.detail}" for note in reversed(read.file.notes.of(outcome))}
        for reason, count in read.file.notes.counts(outcome).items():
            faults.repair(f"{reason}, kept as a box" if outcome == BOX_ONLY else reason, first[reason], count)


def _entries(
    read: SplitContent, path: Path, split: str, annotation_ids: set[int], *, with_crowds: bool
) -> Sequence[Entry]:
    """The images in the order of the file.

    Args:
        read: the split.
        path: its annotation file, for errors.
        split: its name.
        annotation_ids: ids of earlier splits, extended by those of this split; a duplicate id is dropped.
        with_crowds: keep crowd regions; otherwise they become objects.
    """
    by_image: dict[int, list[ObjectAnnotation]] = defaultdict(list)
    for each in read.file.objects:
        names = read.file.keypoints.names
        fields = _fields(read.annotations[each.index], each, len(names), with_crowds=with_crowds)
        if each.annotation_id not in annotation_ids:
            annotation_ids.add(each.annotation_id)
            fields["id"] = each.annotation_id
        by_image[each.image_id].append(ObjectAnnotation(each.category_id, fields))
    entries = []
    for image_id, image in read.file.images.items():
        file = read.paths[image_id]
        name = file.relative_to(read.folder) if file.is_relative_to(read.folder) else Path(file.name)
        size_hw = (image.height, image.width)
        fields = _without(read.images[image.index], "id", "file_name", "height", "width")
        data = (file, size_hw, by_image[image_id], fields)
        entries.append(Entry(name.as_posix(), path, split, image_id, data))
    return entries


def _fields(entry: dict[str, Any], each: ObjectEntry, keypoints: int, *, with_crowds: bool) -> dict[str, Any]:
    """COCO's fields of an object as read, and all other fields of its entry.

    Args:
        entry: the annotation in the file.
        each: the object read from it.
        keypoints: number of keypoints of an object; malformed ones are left out.
        with_crowds: keep the flag of a crowd region.
    """
    fields = {
        **_without(entry, "id", "image_id", "category_id", "segmentation"),
        "bbox": list(each.bbox_xywh),
        "area": each.area,
        "iscrowd": int(each.is_crowd and with_crowds),
    }
    if each.has_mask:
        parts = each.segmentation
        fields["segmentation"] = parts if isinstance(parts, dict) else [part.tolist() for part in parts]
    try:
        checked_keypoints(entry.get("keypoints"), keypoints)
    except AnnotationError:
        fields = _without(fields, "keypoints", "num_keypoints")
    return fields


def _read(entry: Entry) -> AnnotatedImage:
    file, size_hw, objects, fields = entry.data
    annotated_size(file, size_hw, f"{entry.path}, image {entry.name}")
    return AnnotatedImage(file, size_hw, objects, fields=fields)


def _without(entry: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}


def open_datumaro(root: Path, options: Options, faults: Faults, *, format_name: str) -> Source:
    """Opens a dataset of any format that the library Datumaro imports with instances.

    Its COCO exporter writes a copy with images to a temporary folder, which is removed with the source.

    Args:
        root: the dataset.
        options: `sets` are the subsets to convert.
        faults: counts what the reader repairs.
        format_name: Datumaro's name of the format; "auto": detected.

    Raises:
        UserError: if the library is missing, or cannot read the dataset.
    """
    try:
        library: Any = importlib.import_module("datumaro.components.dataset")
    except ImportError as error:
        raise missing_library("datumaro", f"convert {DATUMARO}{format_name}", "pip install datumaro") from error
    folder = tempfile.TemporaryDirectory(prefix="datumaro-")
    try:
        dataset = library.Dataset.import_from(str(root), None if format_name == "auto" else format_name)
        dataset.export(folder.name, "coco_instances", save_media=True)
    except Exception as error:  # its importers raise exceptions from many libraries
        reasons: list[BaseException] = [error]
        while reasons[-1].__cause__ is not None:
            reasons.append(reasons[-1].__cause__)
        raise UserError(
            f"{root}: Datumaro cannot read it as {format_name}: {'; '.join(map(reason_of, reasons))}",
            "a dataset of a format that Datumaro imports",
            f"specify its format: datum detect {root} lists those that fit",
        ) from error
    source = open_coco(Path(folder.name), options, faults)
    read = source.read

    def read_while_there(entry: Any, _kept: Any = folder) -> Any:  # keeps the folder as long as the source exists
        return read(entry)

    return replace(source, read=read_while_there)
