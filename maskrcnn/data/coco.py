"""Datasets of annotated images: COCO's format, in any layout that `maskrcnn.data.layouts` recognises.

COCO's own keypoints are in files of another name: the split `person_keypoints_train2017` is
`annotations/person_keypoints_train2017.json`, with the images in `train2017/`.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.data.annotations import (
    DROPPED,
    AnnotationFile,
    Note,
    Notes,
    ObjectEntry,
    entries_of,
    load_annotations,
    read_annotations,
)
from maskrcnn.data.images import upright_size
from maskrcnn.data.layouts import ImageFinder, Split, get_split
from maskrcnn.data.segmentation import Segmentation, compressed_rle
from maskrcnn.errors import UserError
from maskrcnn.metadata import sha256_of

VAL_SHARE = 0.1  # of a dataset without a split to validate on
_MAX_SKIPPED = 9  # skipped annotations for each object, above which a file is not used: something is wrong with all


@dataclass(frozen=True, eq=False)
class Instance:
    """One annotated object, or one crowd region."""

    annotation_id: int  # unique in the dataset and positive
    label: int  # 1 … number of classes
    box_xyxy_px: tuple[float, float, float, float]  # clipped to the image
    segmentation: Segmentation  # of an object without a mask: the pixels of its box
    is_crowd: bool
    area_px: float  # the file's, else the pixels of the mask
    # float64 [K, 3] x, y in pixels and visibility: 0 not labelled, 1 hidden, 2 visible. None: none is labelled.
    keypoints: np.ndarray | None = None
    stated_keypoints: int | None = None  # the file's `num_keypoints`
    has_mask: bool = True  # False: the file has no usable mask; boxes are learnt and scored, masks are not


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image and its objects; an image without objects is a valid negative."""

    id: int
    path: Path
    height: int
    width: int
    instances: tuple[Instance, ...]
    exif: str = "auto"  # one of `images.EXIF_RULES`, see `survey.with_exif`


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """One split of a dataset.

    Label k is `class_names[k - 1]` and COCO's `category_ids[k - 1]`; label 0 is background.
    """

    root: Path  # folder of the dataset, or its annotation file
    split: str
    annotation_path: Path
    image_folder: Path
    class_names: tuple[str, ...]  # in ascending order of the category id
    category_ids: tuple[int, ...]
    images: tuple[ImageRecord, ...]  # in the order of the file
    notes: Notes  # what was not used as it is in the file
    file_boxes_xywh_px: dict[int, tuple[float, ...]]  # annotation id -> box of the file, for the evaluation
    has_masks: bool = True  # False: no annotation has a segmentation; each object's mask is its box
    keypoint_names: tuple[str, ...] = ()  # of the categories with keypoints, see `CategoryKeypoints`
    keypoint_skeleton: tuple[tuple[int, int], ...] = ()
    keypoint_fault: UserError | None = None
    image_keys: dict[str, int] = field(default_factory=dict)  # numbers of image ids that are texts in the file
    category_keys: dict[str, int] = field(default_factory=dict)
    division: str = ""  # how the split was made of a larger one

    @classmethod
    def load(
        cls,
        root: str | Path,
        split: str,
        *,
        images: str | Path | None = None,
        require_images: bool = True,
        drop_roots: bool = True,
    ) -> CocoDataset:
        """Reads the annotations of `split`; image files must exist but are not opened.

        Args:
            root: the dataset's folder, or its annotation file.
            split: its exact name, see `maskrcnn.data.layouts.find_split`.
            images: folder of the images (default: searched for near the annotation file).
            require_images: whether missing image files are an error.
            drop_roots: see `maskrcnn.data.annotations.read_annotations`.

        Raises:
            UserError: where the annotation file is missing or cannot be used as a whole, see `read_annotations`, and
                where image files are missing.
        """
        found = get_split(root, split, images)
        dataset = _dataset(found, Path(root), require_images=require_images, drop_roots=drop_roots)
        return divided(dataset, found.part) if found.part else dataset

    @classmethod
    def read(cls, path: Path, folder: Path, *, require_images: bool = True) -> CocoDataset:
        """As `load`, for any annotation file and image folder."""
        split = Split(folder.name, path, lambda: load_annotations(path), (folder,))
        return _dataset(split, folder.parent, require_images=require_images, drop_roots=True)

    @classmethod
    def from_content(cls, content: Any, source: str) -> CocoDataset:
        """As `load`, for the parsed content of an annotation file, without images."""
        split = Split(Path(source).stem, Path(source), lambda: content, ())
        return _dataset(split, Path(), require_images=False, drop_roots=False)

    @property
    def has_keypoints(self) -> bool:
        """Whether the dataset has keypoint names and labelled keypoints."""
        instances = (instance for record in self.images for instance in record.instances)
        return bool(self.keypoint_names) and any(instance.keypoints is not None for instance in instances)

    @property
    def objects(self) -> int:
        """Number of objects to learn: without crowd regions."""
        return sum(not instance.is_crowd for record in self.images for instance in record.instances)

    def labels_of_images(self) -> list[list[int]]:
        """Label of each object to learn, by image."""
        return [[each.label for each in record.instances if not each.is_crowd] for record in self.images]

    def for_training(self, *, empty_images: bool, crowd_objects: bool) -> CocoDataset:
        """The split with crowd regions as objects (`crowd_objects`) or without images that have no object to learn."""
        images = self.images
        if crowd_objects:
            images = tuple(
                replace(record, instances=tuple(replace(each, is_crowd=False) for each in record.instances))
                for record in images
            )
        if not empty_images:
            images = tuple(r for r in images if any(not each.is_crowd for each in r.instances)) or images
        return replace(self, images=images)

    @property
    def skipped_annotations(self) -> list[Note]:
        """The annotations that are not used."""
        return self.notes.of(DROPPED)

    @property
    def skipped(self) -> dict[str, int]:
        """Number of annotations that are not used, by reason."""
        return self.notes.counts(DROPPED)

    @property
    def skipped_examples(self) -> dict[str, str]:
        """The first annotation that is not used, by reason."""
        first: dict[str, str] = {}
        for note in self.skipped_annotations:
            first.setdefault(note.reason, f"{note.name}: {note.detail}")
        return first

    def note_lines(self) -> list[str]:
        """What was divided, left out or repaired: one line of text for each reason."""
        return [*([self.division] if self.division else []), *self.notes.lines(self.annotation_path)]

    def require_objects(self, purpose: str) -> None:
        """Raises a UserError, with what was found instead, where the split has (nearly) no object to `purpose`."""
        objects, skipped = self.objects, sum(self.skipped.values())
        if objects and skipped <= _MAX_SKIPPED * objects:
            return
        crowds = sum(len(record.instances) for record in self.images) - objects
        number = f"only {objects} object(s)" if objects else "no object"
        found = f"{self.annotation_path}: {number} to {purpose} in {len(self.images)} image(s)"
        parts = [f"{crowds} crowd region(s)"] * bool(crowds) + [f"{skipped} skipped annotation(s)"] * bool(skipped)
        fix = "annotate objects, or name another file"
        if crowds and not objects:
            here = "--crowd-objects, or " if purpose == "learn" else ""
            fix = (
                "take crowd regions as objects (CVAT marks brush masks with iscrowd 1): "
                f"{here}maskrcnn data convert coco {self.root} OUT --no-crowd"
            )
        elif skipped:
            reason, example = next(iter(self.skipped_examples.items()))
            fix = f"correct the annotations ({reason}, first: {example})"
        raise UserError(f"{found}{': ' if parts else ''}{', '.join(parts)}", "at least one annotated object", fix)

    def require_unchanged(self) -> None:
        """Raises a UserError where an entry of the annotation file was not used as it is."""
        lines = self.notes.lines(self.annotation_path)
        if lines:
            raise UserError("\n  ".join(lines), "with --strict, entries that are used as they are", "correct the file")

    def fingerprint(self) -> str:
        """SHA-256 of the annotations: of the file as it is, else of their content."""
        if self.annotation_path.suffix == ".json" and not self.division:
            return sha256_of(self.annotation_path)
        digest = hashlib.sha256(repr((self.split, self.class_names, self.category_ids)).encode())
        for record in self.images:
            boxes = [(instance.label, instance.box_xyxy_px) for instance in record.instances]
            digest.update(repr((record.id, record.path.name, boxes)).encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class SplitContent:
    """What the annotation file of a split holds, and where its images are."""

    file: AnnotationFile
    images: list[Any]  # the entries of the file; see `ImageEntry.index`
    annotations: list[Any]  # see `ObjectEntry.index`
    categories: list[Any]
    folder: Path  # of the images
    paths: dict[int, Path]  # by image id; an image that is missing has a path too


def read_split(split: Split, *, drop_roots: bool = True) -> SplitContent:
    """Reads a split; the images are searched for in its folders. See `read_annotations`."""
    finder = ImageFinder(split.image_folders)
    content = split.content()
    images, annotations, categories = entries_of(content, str(split.annotations))
    names = [entry.get("file_name") for entry in images if isinstance(entry, dict)]
    folder = finder.choose([name.replace("\\", "/") for name in names if isinstance(name, str)])
    file = read_annotations(
        content,
        str(split.annotations),
        size_of=lambda name: upright_size(finder.find(name)),
        drop_roots=drop_roots,
    )
    paths = {image_id: finder.find(entry.file_name) for image_id, entry in file.images.items()}
    return SplitContent(file, images, annotations, categories, folder, paths)


def _dataset(split: Split, root: Path, *, require_images: bool, drop_roots: bool) -> CocoDataset:
    read = read_split(split, drop_roots=drop_roots)
    file, paths = read.file, read.paths
    if require_images:
        _require_files(split, read.folder, file, paths)
    by_image: dict[int, list[Instance]] = defaultdict(list)
    labels = {category_id: label for label, category_id in enumerate(file.categories, start=1)}
    for each in file.objects:
        by_image[each.image_id].append(_instance(each, labels[each.category_id]))
    return CocoDataset(
        root=root,
        split=split.name,
        annotation_path=split.annotations,
        image_folder=read.folder,
        class_names=tuple(file.categories.values()),
        category_ids=tuple(file.categories),
        images=tuple(
            ImageRecord(image_id, paths[image_id], entry.height, entry.width, tuple(by_image[image_id]))
            for image_id, entry in file.images.items()
        ),
        notes=file.notes,
        file_boxes_xywh_px={each.annotation_id: each.bbox_xywh for each in file.objects},
        has_masks=file.has_masks,
        keypoint_names=file.keypoints.names,
        keypoint_skeleton=file.keypoints.skeleton,
        keypoint_fault=file.keypoints.fault,
        image_keys=file.image_keys,
        category_keys=file.category_keys,
    )


def _require_files(split: Split, folder: Path, file: AnnotationFile, paths: dict[int, Path]) -> None:
    missing = [path for path in paths.values() if not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} images of {split.annotations} are missing, the first is {missing[0]}",
            f"every image of the file below {folder}",
            "complete the image folder or name it with --images; or leave these images out: "
            "maskrcnn data convert coco … --keep-going",
        )


def _instance(entry: ObjectEntry, label: int) -> Instance:
    return Instance(
        annotation_id=entry.annotation_id,
        label=label,
        box_xyxy_px=entry.box_xyxy,
        segmentation=entry.segmentation,
        is_crowd=entry.is_crowd,
        area_px=entry.area,
        keypoints=entry.keypoints,
        stated_keypoints=entry.stated_keypoints,
        has_mask=entry.has_mask,
    )


def divided(dataset: CocoDataset, part: str, share: float = VAL_SHARE) -> CocoDataset:
    """The images of a split to train on or to validate on.

    A class in several images is in both parts: the rarest class is divided first. The order within a class is that of a
    hash of the file names, so that a part depends on the content alone.
    """
    records = sorted(dataset.images, key=lambda r: hashlib.sha256(r.path.name.encode()).digest())
    if len(records) < 2:
        found = f"{dataset.annotation_path}: 1 image, and no split to validate on"
        raise UserError(found, "two images or more, to divide them", "add images, or a split: --val-split")
    labels = {r.id: {i.label for i in r.instances if not i.is_crowd} for r in records}
    images_of = Counter(label for own in labels.values() for label in own)
    kept, chosen = images_of.copy(), set()  # images of each class that are left to train on; images to validate on
    for label, count in sorted(images_of.items(), key=lambda item: (item[1], item[0])):
        wanted = max(1, round(share * count))
        for image_id in (r.id for r in records if label in labels[r.id] and r.id not in chosen):
            if count - kept[label] < wanted and all(kept[each] > 1 for each in labels[image_id]):
                chosen.add(image_id)
                kept.subtract(labels[image_id])
    empty = [r.id for r in records if not labels[r.id]]
    chosen.update(empty[: round(share * len(empty))])
    if not chosen:
        chosen.add(records[0].id)
    train, val = len(records) - len(chosen), len(chosen)
    division = (
        f"{dataset.annotation_path} has no split to validate on: {train} of its images are to train on, {val} to "
        f"validate on, divided class by class (to choose: maskrcnn data convert coco {dataset.root} OUT --val-fraction)"
    )
    images = tuple(r for r in dataset.images if (r.id in chosen) == (part == "val"))
    return replace(dataset, images=images, division=division)


def instance_mask(record: ImageRecord, instance: Instance) -> np.ndarray:
    """The mask of an object of `record`, `[H, W]` bool; the polygons of one object are merged.

    A polygon thinner than a pixel can give a mask without pixels.
    """
    rle = compressed_rle(instance.segmentation, record.height, record.width)
    return np.ascontiguousarray(mask_api.decode(rle)).view(bool)


def crowded_line(dataset: CocoDataset, detections: int, candidates: int = 0, proposals: int = 0) -> str | None:
    """A line about images with more objects than a model returns; None if there are none.

    Args:
        dataset: images and annotations.
        detections: rows of the model's output, `model.detections`.
        candidates: `model.candidates`, which no more detections can come from; 0: not known.
        proposals: `model.proposals`, likewise.
    """
    limits = {"detections": detections, "candidates": candidates, "proposals": proposals}
    limits = {name: limit for name, limit in limits.items() if limit or name == "detections"}
    narrowest = min(limits, key=limits.__getitem__)
    limit = limits[narrowest]
    counts = [sum(not instance.is_crowd for instance in record.instances) for record in dataset.images]
    crowded = [count for count in counts if count > limit]
    if not crowded:
        return None
    most = max(crowded)
    lost = sum(crowded) - limit * len(crowded)
    fix = " ".join(f"--set model.{name}={most}" for name, each in limits.items() if each < most)
    return (
        f"{dataset.annotation_path}: {len(crowded)} of {len(counts)} images have more objects than the {limit} "
        f"{narrowest} of the model, up to {most} ({dataset.images[counts.index(most)].path.name}): at least {lost} of "
        f"{sum(counts)} objects cannot be found; train with {fix}"
        + ("" if candidates and proposals else " (and no fewer model.proposals and model.candidates)")
        + (f", and evaluate with --max-detections 1,10,{most}" if most > 100 else "")
    )
