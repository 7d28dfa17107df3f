"""Looks through a dataset for what training would refuse, leave out, or learn wrongly from.

An error is what `maskrcnn train` stops at: an annotation file that is none, images that are missing, cannot be
decoded or measure otherwise than their entries say, and splits with different category ids. A remark is what it goes
on with: annotations that it leaves out, and annotations and images that are probably not meant as they are.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from pycocotools import mask as mask_api

from maskrcnn.data.annotations import Segmentation, compressed_rle, finite_numbers
from maskrcnn.data.check_report import DatasetReport, Finding, Problem, SplitFigures
from maskrcnn.data.coco import (
    CocoDataset,
    ImageRecord,
    Instance,
    SkippedAnnotation,
    annotation_file,
    find_split,
    list_splits,
)
from maskrcnn.data.images import read_image
from maskrcnn.errors import UserError
from maskrcnn.metadata import sha256_of

# What can be wrong with one image of a dataset and with the objects on it.

_LEAST_MASK_PX = 4  # fewer pixels are a slip of the mouse more often than an object
_SAME_IOU = 0.95  # masks or boxes of one class that agree better are one object annotated twice
_LEAST_FIT_IOU = 0.5  # between a box and the extent of its mask
_UPRIGHT = 1  # EXIF orientation: first row at the top, first column at the left

_MISSING = Problem("missing image", is_error=True)
_UNREADABLE = Problem("unreadable image", is_error=True)
_OTHER_SIZE = Problem("image of another size than its entry says", is_error=True)
_TURNED = Problem("image with an EXIF orientation, which training does not apply")
_THIN = Problem("box with a side below one pixel")
_TINY = Problem(f"mask of fewer than {_LEAST_MASK_PX} pixels")
_MISFIT = Problem("box that does not fit its mask")
_TWICE = Problem("object annotated twice")
OUTSIDE = Problem("visible keypoint outside the image")
_MISCOUNTED = Problem("number of keypoints that is not what num_keypoints says")


def _examine(split: str, record: ImageRecord) -> tuple[list[Finding], str | None]:
    """What is wrong with an image, and the SHA-256 of its file; None for a file that is no image.

    An object has one finding at most besides its keypoints and being a duplicate: a box thinner than a pixel is not
    compared with its mask, and neither is a mask of hardly any pixels.
    """
    findings = list(_object_findings(split, record))
    if not record.path.is_file():
        return [_of_image(_MISSING, split, record, f"no file {record.path}"), *findings], None
    try:
        size_hw = read_image(record.path).shape[:2]
    except UserError as error:
        return [_of_image(_UNREADABLE, split, record, error.found), *findings], None
    orientation = _orientation(record.path)
    if size_hw != (record.height, record.width):
        detail = f"{size_hw[1]}×{size_hw[0]} pixels in the file, {record.width}×{record.height} in the JSON"
        if orientation != _UPRIGHT:
            detail += f"; annotated after EXIF orientation {orientation} was applied?"
        findings.append(_of_image(_OTHER_SIZE, split, record, detail))
    elif orientation != _UPRIGHT:
        detail = f"orientation {orientation}; annotations must fit the pixels as stored, as they are drawn here"
        findings.append(_of_image(_TURNED, split, record, detail))
    return findings, sha256_of(record.path)


def place(record: ImageRecord, *instances: Instance) -> str:
    """How a report names an image and objects on it."""
    text = f"image {record.id} ({record.path.name})"
    if not instances:
        return text
    ids = " and ".join(str(instance.annotation_id) for instance in instances)
    return f"{text}, annotation{'s' if len(instances) > 1 else ''} {ids}"


def _of_image(problem: Problem, split: str, record: ImageRecord, detail: str) -> Finding:
    return Finding(
        problem=problem,
        split=split,
        where=place(record),
        detail=detail,
        record=record,
        instances=record.instances,
    )


def _orientation(path: Path) -> int:
    """The EXIF orientation, 1 to 8; 1, which is upright, where there is none."""
    try:
        with Image.open(path) as image:
            return image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT)
    except Exception:  # pixels can be read, metadata cannot: a viewer would not turn the image either
        return _UPRIGHT


def _object_findings(split: str, record: ImageRecord) -> Iterator[Finding]:
    objects = [instance for instance in record.instances if not instance.is_crowd]
    rles = [compressed_rle(instance.segmentation, record.height, record.width) for instance in objects]
    for instance, rle in zip(objects, rles, strict=True):
        faults = (*_fault(record, instance, int(mask_api.area(rle))), *_keypoint_faults(record, instance))
        for problem, detail in faults:
            yield Finding(
                problem=problem,
                split=split,
                where=place(record, instance),
                detail=detail,
                record=record,
                instances=(instance,),
            )
    for first, second, detail in _duplicates(objects, rles):
        yield Finding(
            problem=_TWICE,
            split=split,
            where=place(record, first, second),
            detail=detail,
            record=record,
            instances=(first, second),
        )


def _fault(record: ImageRecord, instance: Instance, mask_px: int) -> Iterator[tuple[Problem, str]]:
    """At most one problem of an object by itself, with what came."""
    box = np.array(instance.box_xyxy_px)
    width, height = box[2:] - box[:2]
    if min(width, height) < 1:
        yield _THIN, f"{width:.2f}×{height:.2f} px"
    elif mask_px < _LEAST_MASK_PX:
        yield _TINY, f"{mask_px} pixel(s), box {width:.0f}×{height:.0f} px"
    else:
        extent = _extent(instance.segmentation, record.height, record.width)
        whole_px = np.concatenate([np.floor(box[:2]), np.ceil(box[2:])])  # as masks are, which counts for small ones
        iou = max(_box_iou(box, extent), _box_iou(whole_px, extent))
        if iou < _LEAST_FIT_IOU:
            yield _MISFIT, f"IoU {iou:.2f} of box {_short(box)} and mask extent {_short(extent)}, xyxy px"


def _keypoint_faults(record: ImageRecord, instance: Instance) -> Iterator[tuple[Problem, str]]:
    """What is wrong with an object's keypoints, with what came."""
    keypoints = np.zeros((0, 3)) if instance.keypoints is None else instance.keypoints
    labelled = int((keypoints[:, 2] > 0).sum())
    if instance.stated_keypoints not in (None, labelled):
        yield _MISCOUNTED, f"{labelled} labelled, num_keypoints {instance.stated_keypoints}"
    x, y = keypoints[:, 0], keypoints[:, 1]
    outside = (keypoints[:, 2] > 0) & ((x < 0) | (y < 0) | (x > record.width) | (y > record.height))
    if outside.any():
        first = int(outside.argmax())
        place = f"number {first + 1} at ({x[first]:g}, {y[first]:g}), image {record.width}×{record.height}"
        yield OUTSIDE, f"{int(outside.sum())} keypoint(s), {place}"


def _duplicates(objects: list[Instance], rles: list[dict]) -> Iterator[tuple[Instance, Instance, str]]:
    """Each object that has the box or the mask of an earlier one of its class, behind that one."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, instance in enumerate(objects):
        by_class[instance.label].append(index)
    for indices in by_class.values():
        masks = [rles[index] for index in indices]
        ious = np.asarray(mask_api.iou(masks, masks, [0] * len(masks)))
        boxes = np.array([objects[index].box_xyxy_px for index in indices])
        boxes_xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        box_ious = np.asarray(mask_api.iou(boxes_xywh, boxes_xywh, [0] * len(boxes)))
        alike = np.tri(len(indices), k=-1, dtype=bool) & (np.maximum(ious, box_ious) > _SAME_IOU)
        for later in np.flatnonzero(alike.any(axis=1)):
            first = int(alike[later].argmax())
            detail = f"mask IoU {ious[later, first]:.2f}, box IoU {box_ious[later, first]:.2f}"
            yield objects[indices[first]], objects[indices[later]], detail


def _extent(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
    """The smallest box around a mask that has pixels, xyxy px, cut to the image."""
    if isinstance(segmentation, list):
        points = np.concatenate(segmentation).reshape(-1, 2)
        corners = np.concatenate([points.min(axis=0), points.max(axis=0)])
    else:
        x, y, box_width, box_height = mask_api.toBbox(compressed_rle(segmentation, height, width))
        corners = np.array([x, y, x + box_width, y + box_height])
    return corners.clip(0, [width, height, width, height])


def _box_iou(first: np.ndarray, second: np.ndarray) -> float:
    sides = (np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])).clip(min=0)
    areas = [float(np.prod(box[2:] - box[:2])) for box in (first, second)]
    return float(sides.prod()) / max(sum(areas) - float(sides.prod()), 1e-9)


def _short(box: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:.0f}" for value in box) + "]"


_SMALL_PX, _MEDIUM_PX = 32**2, 96**2  # areas at which COCO's sizes end

_STRUCTURE = Problem("annotation file that cannot be used", is_error=True)
_CATEGORY_IDS = Problem("category ids that differ between splits", is_error=True)
CLASS_NAMES = Problem("class names that differ between splits")
_KEYPOINTS = Problem("keypoints that cannot be learnt")
_KEYPOINT_NAMES = Problem("keypoint names that differ between splits")
_UNUSED_CLASS = Problem("class without objects")
_REPEATED = Problem("the same image twice in a split")
_LEAKED = Problem("the same image in several splits")
_SKIPPED = "annotation left out of training"  # and the reason


def check_dataset(
    root: str | Path,
    splits: Sequence[str] = (),
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DatasetReport:
    """Reads every annotation and decodes every image of a dataset in COCO layout.

    Args:
        root: the dataset's folder.
        splits: names of splits, or beginnings of them; by default all.
        workers: threads that decode; by default one per core.
        progress: called with the images that are done, and with all there are.

    Raises:
        UserError: where there is no such folder or split. What is wrong inside is in the report.
    """
    root = Path(root)
    names = [find_split(root, name) for name in splits] or list_splits(root) or [find_split(root, "train")]
    datasets, findings = [], []
    for name in dict.fromkeys(names):
        try:
            datasets.append(CocoDataset.load(root, name, require_images=False))
        except UserError as error:
            detail = f"{error.found}; expected: {error.expected}"
            findings.append(
                Finding(problem=_STRUCTURE, split=name, where=annotation_file(root, name).name, detail=detail)
            )
    findings += _category_findings(datasets)
    findings += _keypoint_findings(datasets)
    for dataset in datasets:
        findings += _class_findings(dataset)
        findings += _skipped_findings(dataset)
    findings += _image_findings(datasets, workers or os.cpu_count() or 1, progress)
    return DatasetReport(
        root=root,
        datasets=tuple(datasets),
        splits=tuple(_figures(dataset) for dataset in datasets),
        findings=tuple(findings),
    )


def _figures(dataset: CocoDataset) -> SplitFigures:
    objects = {name: [0, 0, 0] for name in dataset.class_names}
    numbers = []
    for record in dataset.images:
        own = [instance for instance in record.instances if not instance.is_crowd]
        numbers.append(len(own))
        for instance in own:
            size = (instance.area_px >= _SMALL_PX) + (instance.area_px >= _MEDIUM_PX)
            objects[dataset.class_names[instance.label - 1]][size] += 1
    sizes = sorted((r.height * r.width, r.height, r.width) for r in dataset.images)
    return SplitFigures(
        split=dataset.split,
        images=len(dataset.images),
        images_without_objects=numbers.count(0),
        crowd_regions=sum(instance.is_crowd for record in dataset.images for instance in record.instances),
        skipped_annotations=len(dataset.skipped_annotations),
        smallest_image_hw=sizes[0][1:],
        largest_image_hw=sizes[-1][1:],
        objects_per_image_median=statistics.median(numbers),
        objects_per_image_max=max(numbers),
        objects={name: tuple(counts) for name, counts in objects.items()},
        has_masks=dataset.has_masks,
        objects_with_keypoints=sum(
            instance.keypoints is not None for record in dataset.images for instance in record.instances
        ),
    )


def _category_findings(datasets: Sequence[CocoDataset]) -> Iterator[Finding]:
    """What differs between the categories of the first split and those of each other one."""
    for dataset in datasets[1:]:
        first = datasets[0]
        expected, came = (dict(zip(d.category_ids, d.class_names, strict=True)) for d in (first, dataset))
        lacking, new = sorted(expected.keys() - came.keys()), sorted(came.keys() - expected.keys())
        if lacking or new:
            detail = f"only in {first.split}: {_listed(lacking)}; only in {dataset.split}: {_listed(new)}"
            yield _of_file(_CATEGORY_IDS, dataset, detail)
        renamed = [k for k in expected.keys() & came.keys() if expected[k] != came[k]]
        if renamed:
            k = min(renamed)
            detail = f"{len(renamed)} name(s); id {k} is {expected[k]!r} in {first.split}, {came[k]!r} here"
            yield _of_file(CLASS_NAMES, dataset, detail)


def _keypoint_findings(datasets: Sequence[CocoDataset]) -> Iterator[Finding]:
    """Splits whose keypoints cannot be used, and names that are not those of the first split that has any."""
    named = [dataset for dataset in datasets if dataset.keypoint_names]
    for dataset in datasets:
        if dataset.keypoint_fault is not None:
            fault = dataset.keypoint_fault
            yield _of_file(_KEYPOINTS, dataset, f"{fault.found}; expected: {fault.expected}")
        elif named and dataset.keypoint_names != named[0].keypoint_names:
            came = ", ".join(dataset.keypoint_names) or "none"
            yield _of_file(
                _KEYPOINT_NAMES, dataset, f"{came}; in {named[0].split}: {', '.join(named[0].keypoint_names)}"
            )


def _listed(ids: list[int]) -> str:
    return (", ".join(map(str, ids[:9])) + (" …" if len(ids) > 9 else "")) or "none"


def _of_file(problem: Problem, dataset: CocoDataset, detail: str) -> Finding:
    return Finding(problem=problem, split=dataset.split, where=dataset.annotation_path.name, detail=detail)


def _class_findings(dataset: CocoDataset) -> Iterator[Finding]:
    labels = (i.label for record in dataset.images for i in record.instances if not i.is_crowd)
    counts = Counter(labels)
    for label, (category_id, name) in enumerate(zip(dataset.category_ids, dataset.class_names, strict=True), start=1):
        if not counts[label]:
            detail = f"category id {category_id}"
            yield Finding(problem=_UNUSED_CLASS, split=dataset.split, where=name, detail=detail)


def _skipped_findings(dataset: CocoDataset) -> Iterator[Finding]:
    records = {record.id: record for record in dataset.images}
    for skipped in dataset.skipped_annotations:
        record = records.get(skipped.image_id)
        yield Finding(
            problem=Problem(f"{_SKIPPED}: {skipped.reason}"),
            split=dataset.split,
            where=f"{place(record)}, {skipped.name}" if record else skipped.name,
            detail=skipped.detail,
            record=record,
            boxes_xyxy_px=_drawable_box(skipped),
        )


def _drawable_box(skipped: SkippedAnnotation) -> tuple[tuple[float, float, float, float], ...]:
    values = finite_numbers(skipped.bbox)
    if values is None or values.size != 4:
        return ()
    x, y, width, height = values.tolist()
    return ((x, y, x + width, y + height),)


def _image_findings(
    datasets: Sequence[CocoDataset], workers: int, progress: Callable[[int, int], None]
) -> Iterator[Finding]:
    """What is wrong with each image, and which files are the same as earlier ones."""
    places = [(dataset.split, record) for dataset in datasets for record in dataset.images]
    seen: dict[str, list[tuple[str, ImageRecord]]] = {}
    with ThreadPoolExecutor(workers) as pool:  # Pillow decodes without holding Python's lock
        for number, (own, digest) in enumerate(pool.map(lambda at: _examine(*at), places)):
            yield from own
            if digest is not None:
                earlier = seen.setdefault(digest, [])
                yield from _repeated(*places[number], earlier)
                earlier.append(places[number])
            progress(number + 1, len(places))


def _repeated(split: str, record: ImageRecord, earlier: list[tuple[str, ImageRecord]]) -> Iterator[Finding]:
    """A finding where the file's content has been seen: in the same split if there is such a one, else elsewhere."""
    if not earlier:
        return
    same = [twin for name, twin in earlier if name == split]
    twin_split, twin = (split, same[0]) if same else earlier[0]
    yield Finding(
        problem=_REPEATED if same else _LEAKED,
        split=split,
        where=place(record),
        detail=f"the same bytes as {place(twin)} of {twin_split}",
        record=record,
        instances=record.instances,
    )
