"""Datasets in COCO's format: `annotations/instances_<split>.json` beside the image folder `<split>/`.

COCO's own keypoints are in files of another name: the split `person_keypoints_train2017` is
`annotations/person_keypoints_train2017.json`, with the images in `train2017/`.

A fault of the file as a whole is an error. An annotation with a fault is skipped and counted: real annotation files
have dozens of them.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.data.annotations import (
    LAYOUT,
    AnnotationError,
    CategoryKeypoints,
    Segmentation,
    are_boxes_only,
    checked_annotation,
    checked_keypoints,
    compressed_rle,
    read_annotation_lists,
    read_categories,
    read_images,
    read_keypoints,
    usable_id,
)
from maskrcnn.errors import UserError

_PREFIX = "instances_"  # of annotation files
_KEYPOINTS_PREFIX = "person_keypoints_"  # of COCO's annotation files of keypoints; part of the split's name


@dataclass(frozen=True, eq=False)
class Instance:
    """One annotated object, or one crowd region."""

    annotation_id: int  # unique in the dataset and positive
    label: int  # 1 … number of classes
    box_xyxy_px: tuple[float, float, float, float]  # clipped to the image
    segmentation: Segmentation
    is_crowd: bool
    area_px: float  # the file's, else the pixels of the mask
    # float64 [K, 3] x, y in pixels and visibility: 0 not labelled, 1 hidden, 2 visible. None: none is labelled.
    keypoints: np.ndarray | None = None
    stated_keypoints: int | None = None  # the file's `num_keypoints`


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image and its objects; an image without objects is a valid negative."""

    id: int
    path: Path
    height: int
    width: int
    instances: tuple[Instance, ...]


@dataclass(frozen=True)
class SkippedAnnotation:
    """An annotation with a fault."""

    reason: str  # kind of fault
    name: str  # "annotation 7"
    detail: str
    image_id: int | None  # None: unknown image
    bbox: Any  # the file's


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
    file_boxes_xywh_px: dict[int, tuple[float, ...]]  # annotation id -> box of the file, for the evaluation
    has_masks: bool = True  # False: no annotation has a segmentation; each object's mask is its box
    keypoint_names: tuple[str, ...] = ()  # of the categories with keypoints, see `CategoryKeypoints`
    keypoint_skeleton: tuple[tuple[int, int], ...] = ()
    keypoint_fault: UserError | None = None

    @classmethod
    def load(cls, root: str | Path, split: str, *, require_images: bool = True) -> CocoDataset:
        """Reads the annotations of `split`; image files must exist but are not opened.

        Skipped and counted are annotations of an unknown image or category, with a box that is not four finite
        numbers of positive size or lies outside the image, with a missing, empty or malformed segmentation, and with
        malformed keypoints. A file without any segmentation is one of boxes.

        Args:
            root: the dataset's folder.
            split: its exact name.
            require_images: whether missing image files are an error.

        Raises:
            UserError: where the annotation file is missing, not JSON or not in COCO's structure (the error names the
                key), has no images or no categories, a duplicate id, or a file name outside the image folder, and
                where image files are missing.
        """
        path, folder = annotation_file(root, split), image_folder(root, split)
        return cls.read(path, folder, require_images=require_images, split=split)

    @classmethod
    def read(cls, path: Path, folder: Path, *, require_images: bool = True, split: str | None = None) -> CocoDataset:
        """As `load`, for any annotation file and image folder; `split` is a name for them."""
        image_entries, annotations, category_entries = read_annotation_lists(path)
        categories = read_categories(path, category_entries)
        keypoints = read_keypoints(path, category_entries)
        images = read_images(path, folder, image_entries)
        missing = [file for file, _, _ in images.values() if not os.path.isfile(file)] if require_images else []
        if missing:
            raise UserError(
                f"{len(missing)} of {len(images)} images of {path} are missing, the first is {missing[0]}",
                f"every image of the file below {folder}",
                "complete the image folder, or remove the entries from the annotation file",
            )
        labels = {category_id: label for label, category_id in enumerate(categories, start=1)}
        instances: dict[int, list[Instance]] = defaultdict(list)  # by image id
        skipped: list[SkippedAnnotation] = []
        next_id = 1 + max((usable_id(entry) or 0 for entry in annotations), default=0)
        file_boxes: dict[int, tuple[float, ...]] = {}
        boxes_only = are_boxes_only(annotations)
        for index, entry in enumerate(annotations):
            try:
                image_id, values = checked_annotation(entry, images, labels, boxes_only=boxes_only)
                values |= _keypoint_values(entry, keypoints)
            except AnnotationError as fault:
                skipped.append(_skipped(entry, index, images, fault))
                continue
            annotation_id = usable_id(entry)
            if annotation_id is None or annotation_id in file_boxes:
                annotation_id, next_id = next_id, next_id + 1
            file_boxes[annotation_id] = tuple(entry["bbox"])
            instances[image_id].append(Instance(annotation_id=annotation_id, **values))
        return cls(
            root=folder.parent,
            split=split or folder.name,
            annotation_path=path,
            class_names=tuple(categories.values()),
            category_ids=tuple(categories),
            images=tuple(
                ImageRecord(image_id, file, height, width, tuple(instances[image_id]))
                for image_id, (file, height, width) in images.items()
            ),
            skipped_annotations=tuple(skipped),
            file_boxes_xywh_px=file_boxes,
            has_masks=not boxes_only,
            keypoint_names=keypoints.names,
            keypoint_skeleton=keypoints.skeleton,
            keypoint_fault=keypoints.fault,
        )

    @property
    def has_keypoints(self) -> bool:
        """Whether the dataset has keypoint names and labelled keypoints."""
        instances = (instance for record in self.images for instance in record.instances)
        return bool(self.keypoint_names) and any(instance.keypoints is not None for instance in instances)

    @property
    def skipped(self) -> dict[str, int]:
        """Number of skipped annotations by reason."""
        return dict(Counter(annotation.reason for annotation in self.skipped_annotations))

    @property
    def skipped_examples(self) -> dict[str, str]:
        """The first skipped annotation by reason."""
        backwards = reversed(self.skipped_annotations)
        first = {annotation.reason: f"{annotation.name}: {annotation.detail}" for annotation in backwards}
        return {reason: first[reason] for reason in self.skipped}

    def skipped_lines(self) -> list[str]:
        """One line of text for each reason."""
        examples = self.skipped_examples
        return [
            f"{self.annotation_path}: skipped {count} annotation(s): {reason}, first: {examples[reason]}"
            for reason, count in self.skipped.items()
        ]


def annotation_file(root: str | Path, split: str) -> Path:
    """The annotation file of a split."""
    name = split if split.startswith(_KEYPOINTS_PREFIX) else f"{_PREFIX}{split}"
    return Path(root) / "annotations" / f"{name}.json"


def image_folder(root: str | Path, split: str) -> Path:
    """The folder of a split's images."""
    return Path(root) / split.removeprefix(_KEYPOINTS_PREFIX)


def list_splits(root: str | Path) -> list[str]:
    """The names of all splits of a dataset, sorted; those of COCO's keypoint files where there are no others.

    Raises:
        UserError: where there is no folder `annotations`.
    """
    folder = Path(root) / "annotations"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}", LAYOUT, "point --data at the folder that holds annotations/")
    return sorted(path.stem[len(_PREFIX) :] for path in folder.glob(f"{_PREFIX}*.json")) or _keypoint_splits(folder)


def _keypoint_splits(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob(f"{_KEYPOINTS_PREFIX}*.json"))


def find_split(root: str | Path, kind: str) -> str:
    """The split of this name, else the only split whose name begins with it.

    Args:
        root: the dataset's folder.
        kind: "train", "val" or an exact name, such as "val2017" or "person_keypoints_val2017".

    Raises:
        UserError: where no split or several match; lists the dataset's splits.
    """
    folder = Path(root) / "annotations"
    splits = list_splits(root)
    if kind.startswith(_KEYPOINTS_PREFIX):
        splits = _keypoint_splits(folder)
    matching = [kind] if kind in splits else [name for name in splits if kind and name.startswith(kind)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        found = f"several splits for {kind!r} in {folder}: {', '.join(matching)}"
        raise UserError(found, "one split", "name one of them exactly")
    raise UserError(
        f"no split {kind!r} in {folder}",
        f"one of: {', '.join(splits)}" if splits else f"files {_PREFIX}<split>.json",
        "name a split that exists, or add its annotation file",
    )


def find_splits(root: str | Path, names: Sequence[str]) -> list[str]:
    """The splits of these names or prefixes without duplicates, see `find_split`; all splits for no names."""
    found = [find_split(root, name) for name in names] or list_splits(root) or [find_split(root, "train")]
    return list(dict.fromkeys(found))


def instance_mask(record: ImageRecord, instance: Instance) -> np.ndarray:
    """The mask of an object of `record`, `[H, W]` bool; the polygons of one object are merged.

    A polygon thinner than a pixel can give a mask without pixels.
    """
    rle = compressed_rle(instance.segmentation, record.height, record.width)
    return np.ascontiguousarray(mask_api.decode(rle)).view(bool)


def _keypoint_values(entry: dict[str, Any], keypoints: CategoryKeypoints) -> dict[str, Any]:
    """The keypoint fields of an `Instance`; raises an AnnotationError for malformed keypoints."""
    if entry["category_id"] not in keypoints.category_ids:
        return {}
    stated = entry.get("num_keypoints")
    return {
        "keypoints": checked_keypoints(entry.get("keypoints"), len(keypoints.names)),
        "stated_keypoints": stated if type(stated) is int else None,
    }


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


def crowded_line(dataset: CocoDataset, detections: int) -> str | None:
    """A line about images with more objects than a model returns; None if there are none.

    Args:
        dataset: images and annotations.
        detections: rows of the model's output, `model.detections`.
    """
    counts = [sum(not instance.is_crowd for instance in record.instances) for record in dataset.images]
    crowded = [count for count in counts if count > detections]
    if not crowded:
        return None
    most = max(crowded)
    lost = sum(crowded) - detections * len(crowded)
    return (
        f"{dataset.annotation_path}: {len(crowded)} of {len(counts)} images have more objects than the {detections} "
        f"detections of the model, up to {most} ({dataset.images[counts.index(most)].path.name}): at least {lost} of "
        f"{sum(counts)} objects cannot be found; train with --set model.detections={most} "
        "(and no fewer model.proposals and model.candidates)"
        + (f", and evaluate with --max-detections 1,10,{most}" if most > 100 else "")
    )
