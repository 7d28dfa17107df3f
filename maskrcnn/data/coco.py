"""Datasets in COCO's format: `annotations/instances_<split>.json` beside the image folder `<split>/`.

What is wrong with the file as a whole is an error. What is wrong with one annotation costs that annotation
alone, and is counted: real annotation files hold such entries by the dozen.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from maskrcnn.data.segmentation import (
    AnnotationError,
    Segmentation,
    checked_segmentation,
    compressed_rle,
    finite_numbers,
)
from maskrcnn.errors import UserError

_PREFIX = "instances_"  # of annotation files
_LAYOUT = "a folder in COCO layout: annotations/instances_<split>.json beside <split>/"


@dataclass(frozen=True, eq=False)
class Instance:
    """One annotated object, or one crowd region."""

    annotation_id: int  # unique in the dataset and positive
    label: int  # 1 … number of classes
    box_xyxy_px: tuple[float, float, float, float]  # cut to the image
    segmentation: Segmentation
    is_crowd: bool
    area_px: float  # as the file gives it, else counted from the mask


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image and what is on it; an image without objects is a valid negative."""

    id: int
    path: Path
    height: int
    width: int
    instances: tuple[Instance, ...]


@dataclass(frozen=True)
class SkippedAnnotation:
    """An annotation that was left out, and why."""

    reason: str  # the same for all of its kind
    name: str  # "annotation 7"
    detail: str  # what came
    image_id: int | None  # where the image is known
    bbox: Any  # as the file has it


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """One split of a dataset.

    Label k is `class_names[k - 1]` and COCO's `category_ids[k - 1]`; label 0 is background.
    """

    root: Path
    split: str
    annotation_path: Path
    class_names: tuple[str, ...]  # in ascending order of the category id
    category_ids: tuple[int, ...]
    images: tuple[ImageRecord, ...]  # in the order of the file
    skipped_annotations: tuple[SkippedAnnotation, ...]
    file_boxes_xywh_px: dict[int, tuple[float, ...]]  # annotation id -> box uncut, for the evaluation

    @classmethod
    def load(cls, root: str | Path, split: str, *, require_images: bool = True) -> CocoDataset:
        """Reads the annotations of `split`; image files are looked for and not opened.

        Left out and counted are annotations of an unknown image or category, with a box that is not four
        finite numbers of positive size or lies wholly outside the image, and with a segmentation that is
        missing, empty or malformed.

        Args:
            root: the dataset's folder.
            split: its exact name.
            require_images: whether missing image files are an error.

        Raises:
            UserError: where the annotation file is missing, is not JSON or not of COCO's structure (the
                key is named), has no images or no categories, has an id twice, names a file outside the
                image folder, or where image files are missing.
        """
        root = Path(root)
        path = root / "annotations" / f"{_PREFIX}{split}.json"
        content = _read_json(path)
        lists = {key: _value(path, content, "the file", key, list) for key in _TOP_LEVEL_KEYS}
        categories = _categories(path, lists["categories"])
        images = _images(path, root / split, lists["images"])
        if require_images:
            _require_files(path, root / split, [file for file, _, _ in images.values()])
        labels = {category_id: label for label, category_id in enumerate(categories, start=1)}
        found: dict[int, list[Instance]] = defaultdict(list)
        skipped: list[SkippedAnnotation] = []
        next_id = 1 + max((_usable_id(entry) or 0 for entry in lists["annotations"]), default=0)
        file_boxes: dict[int, tuple[float, ...]] = {}
        for index, entry in enumerate(lists["annotations"]):
            try:
                image_id, values = _checked_annotation(entry, images, labels)
            except AnnotationError as fault:
                skipped.append(_skipped(entry, index, images, fault))
                continue
            annotation_id = _usable_id(entry)
            if annotation_id is None or annotation_id in file_boxes:
                annotation_id, next_id = next_id, next_id + 1
            file_boxes[annotation_id] = tuple(entry["bbox"])
            found[image_id].append(Instance(annotation_id=annotation_id, **values))
        return cls(
            root=root,
            split=split,
            annotation_path=path,
            class_names=tuple(categories.values()),
            category_ids=tuple(categories),
            images=tuple(
                ImageRecord(image_id, file, height, width, tuple(found[image_id]))
                for image_id, (file, height, width) in images.items()
            ),
            skipped_annotations=tuple(skipped),
            file_boxes_xywh_px=file_boxes,
        )

    @property
    def skipped(self) -> dict[str, int]:
        """How many annotations were left out for each reason."""
        return dict(Counter(annotation.reason for annotation in self.skipped_annotations))

    @property
    def skipped_examples(self) -> dict[str, str]:
        """The first annotation left out for each reason."""
        backwards = reversed(self.skipped_annotations)
        first = {annotation.reason: f"{annotation.name}: {annotation.detail}" for annotation in backwards}
        return {reason: first[reason] for reason in self.skipped}

    def skipped_lines(self) -> list[str]:
        """What was left out, a line for each reason."""
        return [
            f"{self.annotation_path}: skipped {count} annotation(s): {reason}, first: {self.skipped_examples[reason]}"
            for reason, count in self.skipped.items()
        ]

    def ground_truth(self) -> COCO:
        """The annotations that were not skipped, as pycocotools' evaluation takes them; prints nothing.

        Image ids, category ids, boxes and crowd flags are the file's, so that AP is the official number; so
        are annotation ids and areas wherever the evaluation can use them.
        """
        coco = COCO()
        coco.dataset = {
            "info": {"description": f"{self.annotation_path.name}, usable annotations"},
            "images": [
                {
                    "id": record.id,
                    "file_name": record.path.relative_to(self.root / self.split).as_posix(),
                    "height": record.height,
                    "width": record.width,
                }
                for record in self.images
            ],
            "categories": [
                {"id": category_id, "name": name}
                for category_id, name in zip(self.category_ids, self.class_names, strict=True)
            ],
            "annotations": [self._coco_annotation(r, i) for r in self.images for i in r.instances],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def _coco_annotation(self, record: ImageRecord, instance: Instance) -> dict[str, Any]:
        return {
            "id": instance.annotation_id,
            "image_id": record.id,
            "category_id": self.category_ids[instance.label - 1],
            "bbox": list(self.file_boxes_xywh_px[instance.annotation_id]),
            "segmentation": instance.segmentation,
            "area": instance.area_px,
            "iscrowd": int(instance.is_crowd),
        }


def list_splits(root: str | Path) -> list[str]:
    """The names of all splits of a dataset, sorted.

    Raises:
        UserError: where there is no folder `annotations`.
    """
    folder = Path(root) / "annotations"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}", _LAYOUT, "point --data at the folder that holds annotations/")
    return sorted(path.stem[len(_PREFIX) :] for path in folder.glob(f"{_PREFIX}*.json"))


def find_split(root: str | Path, kind: str) -> str:
    """The name of the split of a kind: `kind` itself, else the only split whose name begins with it.

    Args:
        root: the dataset's folder.
        kind: "train", "val" or an exact name, such as "val2017".

    Raises:
        UserError: listing the splits there are, where none or several fit.
    """
    folder = Path(root) / "annotations"
    splits = list_splits(root)
    fitting = [kind] if kind in splits else [name for name in splits if kind and name.startswith(kind)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        came = f"several splits for {kind!r} in {folder}: {', '.join(fitting)}"
        raise UserError(came, "one split", "name one of them exactly")
    raise UserError(
        f"no split {kind!r} in {folder}",
        f"one of: {', '.join(splits)}" if splits else f"files {_PREFIX}<split>.json",
        "name a split that exists, or add its annotation file",
    )


def instance_mask(record: ImageRecord, instance: Instance) -> np.ndarray:
    """The mask of an object of `record`, `[H, W]` bool; the polygons of one object are merged.

    A polygon thinner than a pixel can give a mask without pixels.
    """
    rle = compressed_rle(instance.segmentation, record.height, record.width)
    return np.ascontiguousarray(mask_api.decode(rle)).view(bool)


# --- the file as a whole -----------------------------------------------------------------------------

_TOP_LEVEL_KEYS = ("images", "annotations", "categories")
_TYPE_NAMES = {int: "an integer", str: "a string", list: "a list", dict: "an object"}


def _structure_error(path: Path, what: str, expected: str) -> UserError:
    return UserError(f"{path}: {what}", expected, "correct the file (format: cocodataset.org/#format-data)")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"annotation file {path} cannot be read ({error.strerror})",
            _LAYOUT,
            "point --data at such a folder and name a split that it has",
        ) from error
    except (ValueError, RecursionError) as error:
        raise _structure_error(path, f"not JSON ({error})", "a complete JSON file in COCO's format") from error


def _value(path: Path, entry: Any, where: str, key: str, kind: type) -> Any:
    """`entry[key]`, which must be there and of this type."""
    if not isinstance(entry, dict):
        raise _structure_error(path, f"{where} is of type {type(entry).__name__}", _TYPE_NAMES[dict])
    if key not in entry:
        raise _structure_error(path, f"{where} has no key {key!r}", f"{key!r}: {_TYPE_NAMES[kind]}")
    if type(entry[key]) is not kind:  # not isinstance: true and false are no integers here
        came = f"{key!r} of {where} is of type {type(entry[key]).__name__}"
        raise _structure_error(path, came, f"{key!r}: {_TYPE_NAMES[kind]}")
    return entry[key]


def _categories(path: Path, entries: list[Any]) -> dict[int, str]:
    """Category id -> name, in ascending order of the ids."""
    if not entries:
        raise _structure_error(path, "no categories", "at least one entry in 'categories'")
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        category_id = _value(path, entry, f"categories[{index}]", "id", int)
        if category_id in names:
            raise _structure_error(path, f"category id {category_id} occurs twice", "unique category ids")
        names[category_id] = _value(path, entry, f"categories[{index}]", "name", str)
    return dict(sorted(names.items()))


def _images(path: Path, folder: Path, entries: list[Any]) -> dict[int, tuple[Path, int, int]]:
    """Image id -> (file, height, width), in the order of the file."""
    if not entries:
        raise _structure_error(path, "no images", "at least one entry in 'images'")
    images: dict[int, tuple[Path, int, int]] = {}
    for index, entry in enumerate(entries):
        where = f"images[{index}]"
        image_id = _value(path, entry, where, "id", int)
        if image_id in images:
            raise _structure_error(path, f"image id {image_id} occurs twice", "unique image ids")
        name = _value(path, entry, where, "file_name", str)
        height, width = (_value(path, entry, where, key, int) for key in ("height", "width"))
        if min(height, width) < 1:
            raise _structure_error(path, f"{where} measures {width}×{height}", "positive width and height")
        inside = os.path.normpath(name)
        if os.path.isabs(inside) or os.path.splitdrive(inside)[0] or inside.split(os.sep)[0] == os.pardir:
            came = f"'file_name' of {where} is {name!r}, outside the image folder"
            raise _structure_error(path, came, f"a path relative to {folder} that stays in it")
        images[image_id] = (folder / inside, height, width)
    return images


def _require_files(path: Path, folder: Path, files: list[Path]) -> None:
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(files)} images of {path} are missing, the first is {missing[0]}",
            f"every image of the file below {folder}",
            "complete the image folder, or remove the entries from the annotation file",
        )


# --- one annotation ----------------------------------------------------------------------------------


def _usable_id(entry: Any) -> int | None:
    """The annotation's id, unless pycocotools would misread it: to its matching, 0 means unmatched."""
    value = entry.get("id") if isinstance(entry, dict) else None
    return value if type(value) is int and value > 0 else None


def _skipped(entry: Any, index: int, images: dict[int, Any], fault: AnnotationError) -> SkippedAnnotation:
    values = entry if isinstance(entry, dict) else {}
    image_id = values.get("image_id")
    return SkippedAnnotation(
        reason=fault.reason,
        name=f"annotation {values.get('id', f'number {index}')}",
        detail=fault.detail,
        image_id=image_id if type(image_id) is int and image_id in images else None,
        bbox=values.get("bbox"),
    )


def _checked_annotation(
    entry: Any, images: dict[int, tuple[Path, int, int]], labels: dict[int, int]
) -> tuple[int, dict[str, Any]]:
    """The image id and the fields of an Instance without its id; raises AnnotationError."""
    if not isinstance(entry, dict):
        raise AnnotationError("not an object", f"of type {type(entry).__name__}")
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if type(image_id) is not int or image_id not in images:
        raise AnnotationError("unknown image", f"image_id {image_id!r}")
    if type(category_id) is not int or category_id not in labels:
        raise AnnotationError("unknown category", f"category_id {category_id!r}")
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise AnnotationError("unknown crowd flag", f"iscrowd {crowd!r}")
    _, height, width = images[image_id]
    box = _checked_box(entry.get("bbox"), height, width)
    segmentation = checked_segmentation(entry.get("segmentation"), height, width)
    area = finite_numbers([entry.get("area")])
    if area is None or area[0] <= 0:
        area = mask_api.area([compressed_rle(segmentation, height, width)])
    return image_id, {
        "label": labels[category_id],
        "box_xyxy_px": box,
        "segmentation": segmentation,
        "is_crowd": bool(crowd),
        "area_px": float(area[0]),
    }


def _checked_box(bbox: Any, height: int, width: int) -> tuple[float, float, float, float]:
    """COCO's (x, y, width, height) as xyxy, cut to the image."""
    values = finite_numbers(bbox)
    if values is None or values.size != 4 or values[2] <= 0 or values[3] <= 0:
        raise AnnotationError("invalid box", f"bbox {bbox!r}")
    x, y, box_width, box_height = values.tolist()
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + box_width, float(width)), min(y + box_height, float(height))
    if right <= left or bottom <= top:
        raise AnnotationError("box outside the image", f"bbox {bbox!r}, image {width}×{height}")
    return left, top, right, bottom
