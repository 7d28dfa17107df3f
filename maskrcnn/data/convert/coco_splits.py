"""COCO itself, divided anew: 2014's minival and valminusminival, or any lists and shares of COCO-format splits."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from maskrcnn.data.annotations import (
    TOP_LEVEL_KEYS,
    AnnotationError,
    are_boxes_only,
    categories_of,
    checked_annotation,
    images_of,
    read_json,
    required,
    usable_id,
)
from maskrcnn.data.coco import find_split, list_splits
from maskrcnn.data.convert.documents import BadEntry, Faults, look, require_size
from maskrcnn.data.convert.source import Entry, Options, Picture, Source, SourceObject, require_entries
from maskrcnn.data.convert.vocabulary import Category, refuse_clashes
from maskrcnn.errors import UserError

_LAYOUT = "a folder in COCO layout: annotations/instances_<split>.json beside <split>/"
_CORRECT = "correct the file"
_IMAGE_FIELDS = ("id", "file_name", "height", "width")  # which the writer gives


def open_coco(root: Path, options: Options, faults: Faults) -> Source:
    """The splits named in `options.sets` (beginnings are enough), by default all.

    Ids, categories, segmentations and all further fields stay as they are.

    Raises:
        UserError: for a file that is not COCO's, and for splits whose categories or ids clash.
    """
    names = [find_split(root, name) for name in options.sets] or list_splits(root) or [find_split(root, "train")]
    entries: list[Entry] = []
    categories: dict[int, Category] = {}
    owners: dict[int, str] = {}
    annotation_ids: set[int] = set()
    for name in dict.fromkeys(names):
        split = _Split(root, name)
        _join_categories(categories, split)
        _require_new_ids(owners, split)
        entries += split.entries(annotation_ids, faults)
    require_entries(entries, root, _LAYOUT)
    return Source(
        categories=tuple(categories.values()),
        entries=entries,
        read=partial(_read, faults=faults, labels={category_id: category_id for category_id in categories}),
        has_splits=True,
        first_annotation_id=1 + max(annotation_ids, default=0),
    )


class _Split:
    """One annotation file."""

    def __init__(self, root: Path, name: str) -> None:
        self.name, self.path, self.folder = name, root / "annotations" / f"instances_{name}.json", root / name
        self.content = read_json(self.path)
        lists = {key: required(self.path, self.content, "the file", key, list) for key in TOP_LEVEL_KEYS}
        self.names = categories_of(self.path, lists["categories"])
        self.categories = [_category(entry) for entry in lists["categories"]]
        refuse_clashes(self.categories, str(self.path))
        self.images = images_of(self.path, self.folder, lists["images"])
        self.image_fields = {entry["id"]: _others(entry, _IMAGE_FIELDS) for entry in lists["images"]}
        self.annotations = lists["annotations"]
        self.boxes_only = are_boxes_only(self.annotations)

    def entries(self, annotation_ids: set[int], faults: Faults) -> list[Entry]:
        """The images in the order of the file; adds the ids of their annotations, and takes away those used twice."""
        found: dict[int, list[tuple[str, dict[str, Any]]]] = defaultdict(list)

        def placed(index: int, annotation: Any) -> int:
            entry = annotation if isinstance(annotation, dict) else {}
            image_id, name = entry.get("image_id"), f"{self.path}, annotation {entry.get('id', f'number {index}')}"
            if type(image_id) is not int or image_id not in self.images:
                raise BadEntry("unknown image", f"{name}: image_id {image_id!r}", "an image of the file", _CORRECT)
            annotation_id = usable_id(annotation)
            if annotation_id is None or annotation_id in annotation_ids:
                entry = _others(entry, ("id",))
            else:
                annotation_ids.add(annotation_id)
            found[image_id].append((name, entry))
            return image_id

        for _ in faults.usable(self.annotations, placed):
            pass
        return [
            Entry(
                name=file.relative_to(self.folder).as_posix(),
                where=self.path,
                split=self.name,
                image_id=image_id,
                data=(self, found[image_id]),
            )
            for image_id, (file, _, _) in self.images.items()
        ]


def _read(entry: Entry, *, faults: Faults, labels: dict[int, int]) -> Picture:
    split, annotations = entry.data
    file, height, width = split.images[entry.image_id]
    require_size((height, width), look(file).size_hw, f"{split.path}, image {entry.image_id}")

    def checked(_: int, item: tuple[str, dict[str, Any]]) -> SourceObject:
        name, annotation = item
        try:
            _, values = checked_annotation(annotation, split.images, labels, boxes_only=split.boxes_only)
        except AnnotationError as fault:
            came = f"{name}: {fault.detail}"
            raise BadEntry(fault.reason, came, "an annotation as COCO defines it", _CORRECT) from fault
        wanted = {"area": values["area_px"], "iscrowd": int(values["is_crowd"])}  # files may lack them
        return SourceObject(annotation["category_id"], wanted | _others(annotation, ("image_id", "category_id")))

    objects = tuple(faults.usable(annotations, checked))
    return Picture(file, (height, width), objects, fields=split.image_fields[entry.image_id])


def _category(entry: dict[str, Any]) -> Category:
    return Category(entry["id"], entry["name"], _others(entry, ("id", "name")))


def _others(entry: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in names}


def _join_categories(known: dict[int, Category], split: _Split) -> None:
    """Adds a split's categories; the splits together may not clash."""
    for category in split.categories:
        twin = known.setdefault(category.id, category)
        if twin.name != category.name:
            came = f"{split.path}: category {category.id} is {category.name!r}, in another split {twin.name!r}"
            raise UserError(came, "the same categories in all splits", "correct the files, or convert them one by one")
    refuse_clashes(known.values(), f"{split.path} and the splits before it")


def _require_new_ids(owners: dict[int, str], split: _Split) -> None:
    for image_id in split.images:
        other = owners.setdefault(image_id, split.name)
        if other != split.name:
            came = f"{split.path}: image id {image_id}, which {other} has too"
            raise UserError(came, "image ids that differ between splits", "convert the splits one by one with --sets")
