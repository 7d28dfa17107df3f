"""Datasets of annotated images: COCO's format, in any layout that `maskrcnn.data.layouts` recognises.

COCO's own keypoints are in files of another name: the split `person_keypoints_train2017` is
`annotations/person_keypoints_train2017.json`, with the images in `train2017/`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
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
    entries_of,
    load_annotations,
    read_annotations,
)
from maskrcnn.data.arrays import table_of, table_of_content
from maskrcnn.data.images import upright_size
from maskrcnn.data.layouts import ImageFinder, Split, get_split
from maskrcnn.data.records import ImageRecord, Instance, Records
from maskrcnn.data.segmentation import compressed_rle
from maskrcnn.errors import UserError
from maskrcnn.metadata import hash_of_text, sha256_of

VAL_SHARE = 0.1  # validation share of a dataset without a validation split
_MAX_SKIPPED = 9  # maximum ratio of skipped annotations to objects; beyond it, the whole file is rejected


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
    images: Records  # in the order of the file
    notes: Notes  # entries left out or changed on reading
    has_masks: bool = True  # False: no annotation has a segmentation; each object's mask is its box
    keypoint_names: tuple[str, ...] = ()  # of the categories with keypoints, see `CategoryKeypoints`
    keypoint_skeleton: tuple[tuple[int, int], ...] = ()
    keypoint_fault: UserError | None = None
    image_keys: dict[str, int] = field(default_factory=dict)  # numbers of image ids that are texts in the file
    category_keys: dict[str, int] = field(default_factory=dict)
    division: str = ""  # how the split was divided from a larger one

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
            UserError: if the annotation file is missing or unusable as a whole, see `read_annotations`, or image files
                are missing.
        """
        found = get_split(root, split, images)
        dataset = _dataset(found, Path(root), require_images=require_images, drop_roots=drop_roots)
        return divided(dataset, found.part) if found.part else dataset

    @classmethod
    def read(cls, path: Path, folder: Path, *, require_images: bool = True) -> CocoDataset:
        """As `load`, for any annotation file and image folder."""
        split = Split(folder.name, path, None, (folder,))
        return _dataset(split, folder.parent, require_images=require_images, drop_roots=True)

    @classmethod
    def from_content(cls, content: Any, source: str) -> CocoDataset:
        """As `load`, without images, for the parsed content of an annotation file (None: of the file `source`)."""
        split = Split(Path(source).stem, Path(source), None if content is None else lambda: content, ())
        return _dataset(split, Path(), require_images=False, drop_roots=False)

    def __post_init__(self) -> None:
        if not isinstance(self.images, Records):
            object.__setattr__(self, "images", Records.of(self.images))

    @property
    def has_keypoints(self) -> bool:
        """Whether the dataset has keypoint names and labelled keypoints."""
        return bool(self.keypoint_names) and bool((self.images.objects("keypoint_row") >= 0).any())

    @property
    def objects(self) -> int:
        """Number of objects to learn, without crowd regions."""
        return int((~self.images.objects("is_crowd")).sum())

    def objects_of_images(self) -> np.ndarray:
        """Number of objects to learn in each image, `[N]` int64."""
        return np.bincount(self.images.image_of_object[~self.images.objects("is_crowd")], minlength=len(self.images))

    def labels_of_images(self) -> list[list[int]]:
        """Label of each object to learn, by image."""
        labels = self.images.objects("label")[~self.images.objects("is_crowd")].tolist()
        ends = np.cumsum(self.objects_of_images()).tolist()
        return [labels[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def for_training(self, *, empty_images: bool, crowd_objects: bool) -> CocoDataset:
        """The split with crowd regions as objects (`crowd_objects`), and with or without `empty_images`."""
        chosen = replace(self, images=replace(self.images, crowd_objects=crowd_objects))
        filled = np.flatnonzero(chosen.objects_of_images())
        return chosen if empty_images or not len(filled) else replace(chosen, images=chosen.images.take(filled))

    @property
    def skipped_annotations(self) -> list[Note]:
        """The skipped annotations."""
        return self.notes.of(DROPPED)

    @property
    def skipped(self) -> dict[str, int]:
        """Number of skipped annotations, by reason."""
        return self.notes.counts(DROPPED)

    @property
    def skipped_examples(self) -> dict[str, str]:
        """The first skipped annotation, by reason."""
        first: dict[str, str] = {}
        for note in self.skipped_annotations:
            first.setdefault(note.reason, f"{note.name}: {note.detail}")
        return first

    def note_lines(self) -> list[str]:
        """One line of text for each reason for which entries were divided, left out or repaired."""
        return [*([self.division] if self.division else []), *self.notes.lines(self.annotation_path)]

    def require_objects(self, purpose: str) -> None:
        """Raises a UserError, with what was found instead, if the split has (nearly) no object to `purpose`."""
        objects, skipped = self.objects, sum(self.skipped.values())
        if objects and skipped <= _MAX_SKIPPED * objects:
            return
        crowds = int(self.images.counts.sum()) - objects
        number = f"only {objects} object(s)" if objects else "no object"
        found = f"{self.annotation_path}: {number} to {purpose} in {len(self.images)} image(s)"
        parts = [f"{crowds} crowd region(s)"] * bool(crowds) + [f"{skipped} skipped annotation(s)"] * bool(skipped)
        fix = "annotate objects, or choose another file"
        if crowds and not objects:
            here = "--crowd-objects, or " if purpose == "learn" else ""
            fix = (
                "treat crowd regions as objects (CVAT marks brush masks with iscrowd 1): "
                f"{here}maskrcnn data convert coco {self.root} OUT --no-crowd"
            )
        elif skipped:
            reason, example = next(iter(self.skipped_examples.items()))
            fix = f"correct the annotations ({reason}, first: {example})"
        raise UserError(f"{found}{': ' if parts else ''}{', '.join(parts)}", "at least one annotated object", fix)

    def require_unchanged(self) -> None:
        """Raises a UserError if an entry of the annotation file was left out or changed."""
        lines = self.notes.lines(self.annotation_path)
        if lines:
            raise UserError("\n  ".join(lines), "with --strict, entries that need no repair", "correct the file")

    def fingerprint(self) -> str:
        """SHA-256 of the annotations: of the file if it is unchanged, else of their content."""
        if self.annotation_path.suffix == ".json" and not self.division:
            return sha256_of(self.annotation_path)
        digest = hashlib.sha256(repr((self.split, self.class_names, self.category_ids)).encode())
        for record in self.images:
            boxes = [(instance.label, instance.box_xyxy_px) for instance in record.instances]
            digest.update(repr((record.id, record.path.name, boxes)).encode())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class SplitContent:
    """The content of a split's annotation file, and the paths of its images."""

    file: AnnotationFile
    images: list[Any]  # the entries of the file; see `ImageEntry.index`
    annotations: list[Any]  # see `ObjectEntry.index`
    categories: list[Any]
    folder: Path  # of the images
    paths: dict[int, Path]  # by image id; missing images have a path too


def read_split(split: Split) -> SplitContent:
    """Reads a split with all fields of its entries; the images are searched for in its folders."""
    finder = ImageFinder(split.image_folders)
    content = load_annotations(split.annotations) if split.content is None else split.content()
    images, annotations, categories = entries_of(content, str(split.annotations))
    names = [entry.get("file_name") for entry in images if isinstance(entry, dict)]
    folder = finder.choose([name.replace("\\", "/") for name in names if isinstance(name, str)])
    file = read_annotations(
        content, str(split.annotations), size_of=lambda name, names: upright_size(finder.find(name))
    )
    paths = {image_id: finder.find(entry.file_name) for image_id, entry in file.images.items()}
    return SplitContent(file, images, annotations, categories, folder, paths)


def _dataset(split: Split, root: Path, *, require_images: bool, drop_roots: bool) -> CocoDataset:
    finder = ImageFinder(split.image_folders)

    is_chosen = False

    def size_of(name: str, names: Sequence[str]) -> tuple[int, int] | None:
        nonlocal is_chosen
        if not is_chosen:
            is_chosen = bool(finder.choose(names))
        return upright_size(finder.find(name))

    if split.content is None:
        table, file = table_of(split.annotations, size_of=size_of, drop_roots=drop_roots)
    else:
        content, source = split.content(), str(split.annotations)
        table, file = table_of_content(content, source, size_of=size_of, drop_roots=drop_roots)
    images = Records(table, np.arange(len(table.arrays["image_id"])), finder)
    folder = finder.choose(images.names())
    if require_images and (missing := images.missing()):
        raise UserError(
            f"{len(missing)} of {len(images)} images of {split.annotations} are missing, the first is {missing[0]}",
            f"every image of the file below {folder}",
            "complete the image folder or specify it with --images; or leave these images out: "
            "maskrcnn data convert coco … --keep-going",
        )
    return CocoDataset(
        root=root,
        split=split.name,
        annotation_path=split.annotations,
        image_folder=folder,
        class_names=tuple(file.categories.values()),
        category_ids=tuple(file.categories),
        images=images,
        notes=file.notes,
        has_masks=file.has_masks,
        keypoint_names=file.keypoints.names,
        keypoint_skeleton=file.keypoints.skeleton,
        keypoint_fault=file.keypoints.fault,
        image_keys=file.image_keys,
        category_keys=file.category_keys,
    )


def divided(dataset: CocoDataset, part: str, share: float = VAL_SHARE) -> CocoDataset:
    """The part of a split to train on or to validate on.

    A class that occurs in several images is in both parts: the rarest class is divided first. Images of a class are
    ordered by a hash of their file names, so that a part depends only on the content.
    """
    images = dataset.images
    if len(images) < 2:
        found = f"{dataset.annotation_path}: 1 image, and no split to validate on"
        raise UserError(found, "at least two images, to divide them", "add images, or a split: --val-split")
    order = sorted(range(len(images)), key=lambda index: hash_of_text(images.path(index).name))
    labels = [set(own) for own in dataset.labels_of_images()]
    images_of = Counter(label for own in labels for label in own)
    kept, chosen = images_of.copy(), set()  # remaining training images of each class; validation images
    for label, count in sorted(images_of.items(), key=lambda item: (item[1], item[0])):
        wanted = max(1, round(share * count))
        for index in (k for k in order if label in labels[k] and k not in chosen):
            if count - kept[label] < wanted and all(kept[each] > 1 for each in labels[index]):
                chosen.add(index)
                kept.subtract(labels[index])
    empty = [k for k in order if not labels[k]]
    chosen.update(empty[: round(share * len(empty))])
    if not chosen:
        chosen.add(order[0])
    train, val = len(images) - len(chosen), len(chosen)
    division = (
        f"{dataset.annotation_path} has no split to validate on: {train} of its images are to train on, {val} to "
        f"validate on, divided class by class (to choose: maskrcnn data convert coco {dataset.root} OUT --val-fraction)"
    )
    part_of = [k for k in range(len(images)) if (k in chosen) == (part == "val")]
    return replace(dataset, images=images.take(part_of), division=division)


def instance_mask(record: ImageRecord, instance: Instance) -> np.ndarray:
    """The mask of an object of `record`, `[H, W]` bool; the polygons of one object are merged.

    A polygon thinner than a pixel can give a mask without pixels.
    """
    rle = compressed_rle(instance.segmentation, record.height, record.width)
    return np.ascontiguousarray(mask_api.decode(rle)).view(bool)


def crowded_line(dataset: CocoDataset, detections: int, candidates: int = 0, proposals: int = 0) -> str | None:
    """A line about images with more objects than a model returns; None if no image has more.

    Args:
        dataset: images and annotations.
        detections: rows of the model's output, `model.detections`.
        candidates: `model.candidates`, which also limits the number of detections; 0: not known.
        proposals: `model.proposals`, likewise.
    """
    limits = {"detections": detections, "candidates": candidates, "proposals": proposals}
    limits = {name: limit for name, limit in limits.items() if limit or name == "detections"}
    narrowest = min(limits, key=limits.__getitem__)
    limit = limits[narrowest]
    counts = dataset.objects_of_images().tolist()
    crowded = [count for count in counts if count > limit]
    if not crowded:
        return None
    most = max(crowded)
    lost = sum(crowded) - limit * len(crowded)
    fix = " ".join(f"--set model.{name}={most}" for name, each in limits.items() if each < most)
    return (
        f"{dataset.annotation_path}: {len(crowded)} of {len(counts)} images have more objects than the {limit} "
        f"{narrowest} of the model, up to {most} ({dataset.images.path(counts.index(most)).name}): at least {lost} of "
        f"{sum(counts)} objects cannot be found; train with {fix}"
        + ("" if candidates and proposals else " (and no fewer model.proposals and model.candidates)")
        + (f", and evaluate with --max-detections 1,10,{most}" if most > 100 else "")
    )
