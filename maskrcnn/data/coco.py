"""Datasets in COCO's format: `annotations/instances_<split>.json` beside the image folder `<split>/`.

COCO's own keypoints are in files of another name: the split `person_keypoints_train2017` is that of
`annotations/person_keypoints_train2017.json`, with the images in `train2017/`.

What is wrong with the file as a whole is an error. What is wrong with one annotation costs that annotation
alone, and is counted: real annotation files hold such entries by the dozen.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from maskrcnn.data.annotations import (
    LAYOUT,
    TOP_LEVEL_KEYS,
    AnnotationError,
    CategoryKeypoints,
    Segmentation,
    are_boxes_only,
    categories_of,
    checked_annotation,
    checked_keypoints,
    compressed_rle,
    images_of,
    keypoints_of,
    read_json,
    require_files,
    required,
    usable_id,
)
from maskrcnn.errors import UserError

_PREFIX = "instances_"  # of annotation files
_OTHER_PREFIX = "person_keypoints_"  # of COCO's annotation files of keypoints; part of the split's name


@dataclass(frozen=True, eq=False)
class Instance:
    """One annotated object, or one crowd region."""

    annotation_id: int  # unique in the dataset and positive
    label: int  # 1 … number of classes
    box_xyxy_px: tuple[float, float, float, float]  # cut to the image
    segmentation: Segmentation
    is_crowd: bool
    area_px: float  # as the file gives it, else counted from the mask
    # float64 [K, 3] x, y in pixels and visibility: 0 not labelled, 1 hidden, 2 visible. None: nothing is labelled.
    keypoints: np.ndarray | None = None
    stated_keypoints: int | None = None  # how many are labelled, as the file says


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
    has_masks: bool = True  # False: no annotation has a segmentation, and each object's is its box
    keypoint_names: tuple[str, ...] = ()  # of the categories that have any, see `CategoryKeypoints`
    keypoint_skeleton: tuple[tuple[int, int], ...] = ()
    keypoint_fault: UserError | None = None

    @classmethod
    def load(cls, root: str | Path, split: str, *, require_images: bool = True) -> CocoDataset:
        """Reads the annotations of `split`; image files are looked for and not opened.

        Left out and counted are annotations of an unknown image or category, with a box that is not four
        finite numbers of positive size or lies wholly outside the image, with a segmentation that is missing,
        empty or malformed, and with malformed keypoints. A file in which no annotation at all has a
        segmentation is one of boxes.

        Args:
            root: the dataset's folder.
            split: its exact name.
            require_images: whether missing image files are an error.

        Raises:
            UserError: where the annotation file is missing, is not JSON or not of COCO's structure (the
                key is named), has no images or no categories, has an id twice, names a file outside the
                image folder, or where image files are missing.
        """
        return cls.read(
            annotation_file(root, split), image_folder(root, split), require_images=require_images, split=split
        )

    @classmethod
    def read(cls, path: Path, folder: Path, *, require_images: bool = True, split: str | None = None) -> CocoDataset:
        """As `load`, for an annotation file and an image folder wherever they lie; `split` is a name for it."""
        content = read_json(path)
        lists = {key: required(path, content, "the file", key, list) for key in TOP_LEVEL_KEYS}
        categories = categories_of(path, lists["categories"])
        keypoints = keypoints_of(path, lists["categories"])
        images = images_of(path, folder, lists["images"])
        if require_images:
            require_files(path, folder, [file for file, _, _ in images.values()])
        labels = {category_id: label for label, category_id in enumerate(categories, start=1)}
        found: dict[int, list[Instance]] = defaultdict(list)
        skipped: list[SkippedAnnotation] = []
        next_id = 1 + max((usable_id(entry) or 0 for entry in lists["annotations"]), default=0)
        file_boxes: dict[int, tuple[float, ...]] = {}
        boxes_only = are_boxes_only(lists["annotations"])
        for index, entry in enumerate(lists["annotations"]):
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
            found[image_id].append(Instance(annotation_id=annotation_id, **values))
        return cls(
            root=folder.parent,
            split=split or folder.name,
            annotation_path=path,
            class_names=tuple(categories.values()),
            category_ids=tuple(categories),
            images=tuple(
                ImageRecord(image_id, file, height, width, tuple(found[image_id]))
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
        """Whether keypoints have names, and some are labelled."""
        instances = (instance for record in self.images for instance in record.instances)
        return bool(self.keypoint_names) and any(instance.keypoints is not None for instance in instances)

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
                    "file_name": record.path.relative_to(image_folder(self.root, self.split)).as_posix(),
                    "height": record.height,
                    "width": record.width,
                }
                for record in self.images
            ],
            "categories": [
                {"id": category_id, "name": name, **self._category_keypoints()}
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
            **self._coco_keypoints(instance),
        }

    def _category_keypoints(self) -> dict[str, Any]:
        """What a category of the ground truth says; all say it, as only objects with keypoints are measured."""
        if not self.keypoint_names:
            return {}
        return {"keypoints": list(self.keypoint_names), "skeleton": [list(line) for line in self.keypoint_skeleton]}

    def _coco_keypoints(self, instance: Instance) -> dict[str, Any]:
        if not self.keypoint_names:
            return {}
        nothing = np.zeros((len(self.keypoint_names), 3))
        keypoints = nothing if instance.keypoints is None else instance.keypoints
        return {"keypoints": keypoints.ravel().tolist(), "num_keypoints": int((keypoints[:, 2] > 0).sum())}


def annotation_file(root: str | Path, split: str) -> Path:
    """The annotation file of a split."""
    name = split if split.startswith(_OTHER_PREFIX) else f"{_PREFIX}{split}"
    return Path(root) / "annotations" / f"{name}.json"


def image_folder(root: str | Path, split: str) -> Path:
    """The folder of a split's images."""
    return Path(root) / split.removeprefix(_OTHER_PREFIX)


def list_splits(root: str | Path) -> list[str]:
    """The names of all splits of a dataset, sorted; those of COCO's files of keypoints where there are no others.

    Raises:
        UserError: where there is no folder `annotations`.
    """
    folder = Path(root) / "annotations"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}", LAYOUT, "point --data at the folder that holds annotations/")
    plain = sorted(path.stem[len(_PREFIX) :] for path in folder.glob(f"{_PREFIX}*.json"))
    return plain or _keypoint_splits(folder)


def _keypoint_splits(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob(f"{_OTHER_PREFIX}*.json"))


def find_split(root: str | Path, kind: str) -> str:
    """The name of the split of a kind: `kind` itself, else the only split whose name begins with it.

    Args:
        root: the dataset's folder.
        kind: "train", "val" or an exact name, such as "val2017" or "person_keypoints_val2017".

    Raises:
        UserError: listing the splits there are, where none or several fit.
    """
    folder = Path(root) / "annotations"
    splits = list_splits(root)
    if kind.startswith(_OTHER_PREFIX):
        splits = _keypoint_splits(folder)
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


def _keypoint_values(entry: dict[str, Any], keypoints: CategoryKeypoints) -> dict[str, Any]:
    """The fields of an Instance that are about keypoints.

    Raises:
        AnnotationError: for malformed ones of a category that has any.
    """
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
