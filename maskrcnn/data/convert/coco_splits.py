"""COCO-format datasets with new splits: 2014's minival and valminusminival, or any lists and shares of images."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from maskrcnn.data.annotations import (
    LAYOUT,
    AnnotationError,
    are_boxes_only,
    checked_annotation,
    read_annotation_lists,
    read_categories,
    read_images,
    usable_id,
)
from maskrcnn.data.coco import find_splits
from maskrcnn.data.convert.files import annotated_size
from maskrcnn.data.convert.source import (
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
from maskrcnn.errors import UserError

_CORRECT = "correct the file"


def open_coco(root: Path, options: Options, faults: Faults) -> Source:
    """Opens the splits of `options.sets` (prefixes suffice), by default all.

    Ids, categories, segmentations and all further fields are kept.

    Raises:
        UserError: for a file in another format, and for splits whose categories or image ids clash.
    """
    entries: list[Entry] = []
    categories: dict[int, Category] = {}
    owners: dict[int, str] = {}  # image id -> split
    annotation_ids: set[int] = set()
    for name in find_splits(root, options.sets):
        split = _Split(root, name)
        for category in split.categories:
            first = categories.setdefault(category.id, category)
            if first.name != category.name:
                found = f"{split.path}: category {category.id} is {category.name!r}, in another split {first.name!r}"
                fix = "correct the files, or convert them one by one"
                raise UserError(found, "the same categories in all splits", fix)
        check_categories(categories.values(), f"{split.path} and the splits before it")
        for image_id in split.images:
            owner = owners.setdefault(image_id, name)
            if owner != name:
                found = f"{split.path}: image id {image_id}, also in {owner}"
                fix = "convert the splits one by one with --sets"
                raise UserError(found, "image ids that are unique in all splits", fix)
        entries += split.entries(annotation_ids, faults)
    require_entries(entries, root, LAYOUT)
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
        images, self.annotations, categories = read_annotation_lists(self.path)
        read_categories(self.path, categories)  # checks them
        self.categories = [Category(entry["id"], entry["name"], _without(entry, "id", "name")) for entry in categories]
        check_categories(self.categories, str(self.path))
        self.images = read_images(self.path, self.folder, images)
        self.image_fields = {entry["id"]: _without(entry, "id", "file_name", "height", "width") for entry in images}
        self.boxes_only = are_boxes_only(self.annotations)

    def entries(self, annotation_ids: set[int], faults: Faults) -> list[Entry]:
        """The images in the order of the file.

        Args:
            annotation_ids: ids of earlier splits, extended by those of this split; a duplicate id is dropped.
            faults: counts annotations of unknown images.
        """
        by_image: dict[int, list[tuple[str, dict[str, Any]]]] = defaultdict(list)

        def assign(index: int, annotation: Any) -> None:
            entry = annotation if isinstance(annotation, dict) else {}
            image_id, name = entry.get("image_id"), f"{self.path}, annotation {entry.get('id', f'number {index}')}"
            if type(image_id) is not int or image_id not in self.images:
                raise BadEntry("unknown image", f"{name}: image_id {image_id!r}", "an image of the file", _CORRECT)
            annotation_id = usable_id(annotation)
            if annotation_id is None or annotation_id in annotation_ids:
                entry = _without(entry, "id")
            else:
                annotation_ids.add(annotation_id)
            by_image[image_id].append((name, entry))

        list(faults.convert_each(self.annotations, assign))
        return [
            Entry(
                name=file.relative_to(self.folder).as_posix(),
                path=self.path,
                split=self.name,
                image_id=image_id,
                data=(self, by_image[image_id]),
            )
            for image_id, (file, _, _) in self.images.items()
        ]


def _read(entry: Entry, *, faults: Faults, labels: dict[int, int]) -> AnnotatedImage:
    split, annotations = entry.data
    file, height, width = split.images[entry.image_id]
    annotated_size(file, (height, width), f"{split.path}, image {entry.image_id}")

    def convert(_: int, item: tuple[str, dict[str, Any]]) -> ObjectAnnotation:
        name, annotation = item
        try:
            _, values = checked_annotation(annotation, split.images, labels, boxes_only=split.boxes_only)
        except AnnotationError as fault:
            found = f"{name}: {fault.detail}"
            raise BadEntry(fault.reason, found, "an annotation in COCO's format", _CORRECT) from fault
        defaults = {"area": values["area_px"], "iscrowd": int(values["is_crowd"])}  # files may lack them
        return ObjectAnnotation(annotation["category_id"], defaults | _without(annotation, "image_id", "category_id"))

    objects = tuple(faults.convert_each(annotations, convert))
    return AnnotatedImage(file, (height, width), objects, fields=split.image_fields[entry.image_id])


def _without(entry: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}
