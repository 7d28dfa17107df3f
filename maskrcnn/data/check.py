"""Checks a dataset for faults that stop training, are skipped by it, or mislead it.

An error stops `maskrcnn train`: an annotation file that cannot be used, images that are missing, cannot be decoded or
have another aspect ratio than their entries, and splits with different category ids. A remark does not: skipped
annotations, annotations and images that are probably wrong, and images that are scaled or not read completely.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.config import SMALL_MODEL, model_config
from maskrcnn.data.annotations import BOX_ONLY, REPAIRED, Note
from maskrcnn.data.check_report import DatasetReport, Finding, Problem, SplitStatistics
from maskrcnn.data.coco import CocoDataset, crowded_line
from maskrcnn.data.images import ImageNotes, fits_size, read_header, read_image
from maskrcnn.data.layouts import find_splits, get_split
from maskrcnn.data.records import ImageRecord, Instance
from maskrcnn.data.segmentation import Segmentation, compressed_rle, finite_numbers
from maskrcnn.data.survey import with_exif
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.machine import available_cpus
from maskrcnn.metadata import sha256_of

_MIN_MASK_PX = 4  # smaller masks are more often mistakes than objects
_DUPLICATE_IOU = 0.95  # IoU of masks or boxes of one class, above which they are duplicates
_MIN_FIT_IOU = 0.5  # minimum IoU of a box and the extent of its mask
_ANY_RANGE = Preprocessing(pixel_range=(0, 65535))  # for more than 8 bits, whose range training measures
_DEFAULT_DETECTIONS = model_config(SMALL_MODEL).detections
_SMALL_PX, _MEDIUM_PX = 32**2, 96**2  # areas that separate COCO's sizes

_STRUCTURE = Problem("annotation file that cannot be used", is_error=True)
_CATEGORY_IDS = Problem("category ids that differ between splits", is_error=True)
_MISSING = Problem("missing image", is_error=True)
_UNREADABLE = Problem("unreadable image", is_error=True)
_OTHER_SIZE = Problem("image of another size than its entry says", is_error=True)
_CLASS_NAMES = Problem("class names that differ between splits")
_KEYPOINTS = Problem("keypoints that cannot be learnt")
_KEYPOINT_NAMES = Problem("keypoint names that differ between splits")
_UNUSED_CLASS = Problem("class without objects")
_CROWDED = Problem("images with more objects than the default model returns")
_SCALED = Problem("image of another size than its entry says, to which it is scaled")
_LOSSY = Problem("image that is not read completely")
_THIN = Problem("box with a side below one pixel")
_TINY = Problem(f"mask of fewer than {_MIN_MASK_PX} pixels")
_MISFIT = Problem("box that does not fit its mask")
_DUPLICATE_OBJECT = Problem("object annotated twice")
_OUTSIDE = Problem("visible keypoint outside the image")
_MISCOUNTED = Problem("number of keypoints that is not what num_keypoints says")
_REPEATED = Problem("the same image twice in a split")
_LEAKED = Problem("the same image in several splits")
_NO_OBJECTS = Problem("split without an object to learn", is_error=True)
_NO_OBJECTS_TO_FIND = Problem("split without an object: AP cannot be measured")
_SKIPPED = "annotation left out of training"  # these three are followed by the reason
_BOX_ONLY = "objects with a box but without a mask"
_REPAIRED = "repaired when read"


def check_dataset(
    root: str | Path,
    splits: Sequence[str] = (),
    *,
    images: str | Path | None = None,
    exif: str = "auto",
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DatasetReport:
    """Reads every annotation and decodes every image of a dataset.

    Args:
        root: the dataset's folder, or its annotation file.
        splits: names or prefixes of splits (default: all).
        images: folder of the images (default: searched for near the annotations).
        exif: rule of EXIF orientations, one of `images.EXIF_RULES`.
        workers: number of decoding threads (default: one per core).
        progress: called with the numbers of checked images and of all images.

    Raises:
        UserError: if the folder or split does not exist; faults of the dataset are in the report.
    """
    root = Path(root)
    datasets, findings = [], []
    for name in find_splits(root, splits, images):
        try:
            dataset = CocoDataset.load(root, name, images=images, require_images=False, drop_roots=False)
            datasets.append(with_exif(dataset, exif))
        except UserError as error:
            detail = f"{error.found}; expected: {error.expected}"
            where = get_split(root, name, images).annotations.name
            findings.append(Finding(problem=_STRUCTURE, split=name, where=where, detail=detail))
    findings += _category_findings(datasets)
    findings += _keypoint_findings(datasets)
    for dataset in datasets:
        findings += _object_count_findings(dataset)
        findings += _class_findings(dataset)
        if crowded := crowded_line(dataset, _DEFAULT_DETECTIONS):
            findings.append(_of_file(_CROWDED, dataset, crowded.partition(": ")[2]))
        findings += _skipped_findings(dataset)
        findings += _repair_findings(dataset)
    findings += _image_findings(datasets, workers or available_cpus(), progress)
    return DatasetReport(
        root=root,
        datasets=tuple(datasets),
        splits=tuple(_statistics(dataset) for dataset in datasets),
        findings=tuple(findings),
    )


def _statistics(dataset: CocoDataset) -> SplitStatistics:
    images = dataset.images
    learnt = ~images.objects("is_crowd")
    size = np.digitize(images.objects("area")[learnt], (_SMALL_PX, _MEDIUM_PX))
    objects = np.zeros((len(dataset.class_names), 3), int)
    np.add.at(objects, (images.objects("label")[learnt] - 1, size), 1)
    numbers = dataset.objects_of_images().tolist()
    sizes = sorted((height * width, height, width) for height, width in images.sizes_hw.tolist())
    return SplitStatistics(
        split=dataset.split,
        images=len(images),
        images_without_objects=numbers.count(0),
        crowd_regions=int((~learnt).sum()),
        skipped_annotations=len(dataset.skipped_annotations),
        smallest_image_hw=sizes[0][1:],
        largest_image_hw=sizes[-1][1:],
        objects_per_image_median=statistics.median(numbers),
        objects_per_image_max=max(numbers),
        objects={
            name: (small, medium, large)
            for name, (small, medium, large) in zip(dataset.class_names, objects.tolist(), strict=True)
        },
        has_masks=dataset.has_masks,
        objects_with_keypoints=int((images.objects("keypoint_row") >= 0).sum()),
    )


def _category_findings(datasets: Sequence[CocoDataset]) -> Iterator[Finding]:
    """Differences between the categories of the first split and those of every other split."""
    for dataset in datasets[1:]:
        first = datasets[0]
        expected, found = (dict(zip(d.category_ids, d.class_names, strict=True)) for d in (first, dataset))
        lacking, new = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        if lacking or new:
            detail = f"only in {first.split}: {_listed(lacking)}; only in {dataset.split}: {_listed(new)}"
            yield _of_file(_CATEGORY_IDS, dataset, detail)
        renamed = [k for k in expected.keys() & found.keys() if expected[k] != found[k]]
        if renamed:
            k = min(renamed)
            detail = f"{len(renamed)} name(s); id {k} is {expected[k]!r} in {first.split}, {found[k]!r} here"
            yield _of_file(_CLASS_NAMES, dataset, detail)


def _keypoint_findings(datasets: Sequence[CocoDataset]) -> Iterator[Finding]:
    """Splits whose keypoints cannot be used, or have other names than those of the first split with keypoints."""
    named = [dataset for dataset in datasets if dataset.keypoint_names]
    for dataset in datasets:
        if dataset.keypoint_fault is not None:
            fault = dataset.keypoint_fault
            yield _of_file(_KEYPOINTS, dataset, f"{fault.found}; expected: {fault.expected}")
        elif named and dataset.keypoint_names != named[0].keypoint_names:
            found = ", ".join(dataset.keypoint_names) or "none"
            yield _of_file(
                _KEYPOINT_NAMES, dataset, f"{found}; in {named[0].split}: {', '.join(named[0].keypoint_names)}"
            )


def _listed(ids: list[int]) -> str:
    return (", ".join(map(str, ids[:9])) + (" …" if len(ids) > 9 else "")) or "none"


def _of_file(problem: Problem, dataset: CocoDataset, detail: str) -> Finding:
    return Finding(problem=problem, split=dataset.split, where=dataset.annotation_path.name, detail=detail)


def _class_findings(dataset: CocoDataset) -> Iterator[Finding]:
    counts = Counter(label for own in dataset.labels_of_images() for label in own)
    for label, (category_id, name) in enumerate(zip(dataset.category_ids, dataset.class_names, strict=True), start=1):
        if not counts[label]:
            detail = f"category id {category_id}"
            yield Finding(problem=_UNUSED_CLASS, split=dataset.split, where=name, detail=detail)


def _skipped_findings(dataset: CocoDataset) -> Iterator[Finding]:
    indices = {image_id: index for index, image_id in enumerate(dataset.images.ids.tolist())}
    for skipped in dataset.skipped_annotations:
        index = None if skipped.image_id is None else indices.get(skipped.image_id)
        record = None if index is None else dataset.images[index]
        yield Finding(
            problem=Problem(f"{_SKIPPED}: {skipped.reason}"),
            split=dataset.split,
            where=f"{_location(record)}, {skipped.name}" if record else skipped.name,
            detail=skipped.detail,
            record=record,
            boxes_xyxy_px=_drawable_box(skipped),
        )


def _object_count_findings(dataset: CocoDataset) -> Iterator[Finding]:
    """A split without objects: nothing to learn, or nothing to measure."""
    try:
        dataset.require_objects("learn" if dataset.split.lower().startswith("train") else "find")
    except UserError as fault:
        is_validation = dataset.split.lower().startswith(("val", "test"))
        yield _of_file(_NO_OBJECTS_TO_FIND if is_validation else _NO_OBJECTS, dataset, f"{fault.found}; {fault.fix}")


def _repair_findings(dataset: CocoDataset) -> Iterator[Finding]:
    """One finding for each reason for which entries were repaired, or objects lost their masks."""
    for outcome, name in ((BOX_ONLY, _BOX_ONLY), (REPAIRED, _REPAIRED)):
        notes = dataset.notes.of(outcome)
        for reason, count in dataset.notes.counts(outcome).items():
            first = next(note for note in notes if note.reason == reason)
            detail = f"{count}, first: {first.name}: {first.detail}"
            yield _of_file(Problem(f"{name}: {reason}"), dataset, detail)


def _drawable_box(skipped: Note) -> tuple[tuple[float, float, float, float], ...]:
    values = finite_numbers(skipped.bbox)
    if values is None or values.size != 4:
        return ()
    x, y, width, height = values.tolist()
    return ((x, y, x + width, y + height),)


_Place: TypeAlias = tuple[CocoDataset, int]  # an image of a dataset, by index


def _image_findings(
    datasets: Sequence[CocoDataset], workers: int, progress: Callable[[int, int], None]
) -> Iterator[Finding]:
    """Findings of each image, and files with the content of earlier ones."""
    places = [(dataset, index) for dataset in datasets for index in range(len(dataset.images))]
    seen: dict[str, list[_Place]] = {}
    with ThreadPoolExecutor(workers) as pool:  # Pillow releases the GIL while decoding
        for number, (own, digest) in enumerate(pool.map(lambda at: _examine(at[0].split, at[0].images[at[1]]), places)):
            yield from own
            if digest is not None:
                earlier = seen.setdefault(digest, [])
                yield from _repeated(places[number], earlier)
                earlier.append(places[number])
            progress(number + 1, len(places))


def _repeated(place: _Place, earlier: list[_Place]) -> Iterator[Finding]:
    """A finding if an earlier image, preferably of the same split, has the same content."""
    if not earlier:
        return
    dataset, index = place
    same = [twin for twin in earlier if twin[0] is dataset]
    twin_dataset, twin = (same or earlier)[0]
    detail = f"the same bytes as {_location(twin_dataset.images[twin])} of {twin_dataset.split}"
    yield _finding(_REPEATED if same else _LEAKED, dataset.split, dataset.images[index], detail)


def _examine(split: str, record: ImageRecord) -> tuple[list[Finding], str | None]:
    """The findings of an image and its objects, and the SHA-256 of its file; None for a file that is not an image."""
    findings = list(_object_findings(split, record))
    if not record.path.is_file():
        return [_finding(_MISSING, split, record, f"no file {record.path}"), *findings], None
    notes = ImageNotes()
    try:
        header = read_header(record.path)
        read_image(record.path, _ANY_RANGE, notes=notes)
    except UserError as error:
        return [_finding(_UNREADABLE, split, record, error.found), *findings], None
    size_hw = header.shown_hw((record.height, record.width), record.exif)
    detail = f"{size_hw[1]}×{size_hw[0]} pixels in the file, {record.width}×{record.height} in the JSON"
    if header.orientation != 1:
        detail += f"; EXIF orientation {header.orientation}"
    try:
        if not fits_size(size_hw, (record.height, record.width), record.path.name):
            findings.append(_finding(_SCALED, split, record, detail))
    except UserError:
        findings.append(_finding(_OTHER_SIZE, split, record, detail))
    findings += [_finding(_LOSSY, split, record, text) for text in notes.texts()]
    return findings, sha256_of(record.path)


def _location(record: ImageRecord, *instances: Instance) -> str:
    """The name of an image and its objects in the report."""
    text = f"image {record.id} ({record.path.name})"
    if not instances:
        return text
    ids = " and ".join(str(instance.annotation_id) for instance in instances)
    return f"{text}, annotation{'s' if len(instances) > 1 else ''} {ids}"


def _finding(problem: Problem, split: str, record: ImageRecord, detail: str, *instances: Instance) -> Finding:
    """A finding of some objects, or of the whole image."""
    return Finding(
        problem=problem,
        split=split,
        where=_location(record, *instances),
        detail=detail,
        record=record,
        instances=instances or record.instances,
    )


def _object_findings(split: str, record: ImageRecord) -> Iterator[Finding]:
    objects = [instance for instance in record.instances if not instance.is_crowd]
    rles = [compressed_rle(instance.segmentation, record.height, record.width) for instance in objects]
    for instance, rle in zip(objects, rles, strict=True):
        problems = (*_object_problems(record, instance, int(mask_api.area(rle))), *_keypoint_problems(record, instance))
        for problem, detail in problems:
            yield _finding(problem, split, record, detail, instance)
    for first, second, detail in _duplicates(objects, rles):
        yield _finding(_DUPLICATE_OBJECT, split, record, detail, first, second)


def _object_problems(record: ImageRecord, instance: Instance, mask_px: int) -> Iterator[tuple[Problem, str]]:
    """At most one problem of an object's box and mask, with its detail."""
    box = np.array(instance.box_xyxy_px)
    width, height = box[2:] - box[:2]
    if min(width, height) < 1:
        yield _THIN, f"{width:.2f}×{height:.2f} px"
    elif mask_px < _MIN_MASK_PX:
        yield _TINY, f"{mask_px} pixel(s), box {width:.0f}×{height:.0f} px"
    else:
        extent = _extent(instance.segmentation, record.height, record.width)
        whole_px = np.concatenate(
            [np.floor(box[:2]), np.ceil(box[2:])]
        )  # like the mask's extent; matters for small boxes
        iou = max(_box_iou(box, extent), _box_iou(whole_px, extent))
        if iou < _MIN_FIT_IOU:
            yield _MISFIT, f"IoU {iou:.2f} of box {_short(box)} and mask extent {_short(extent)}, xyxy px"


def _keypoint_problems(record: ImageRecord, instance: Instance) -> Iterator[tuple[Problem, str]]:
    """Problems of an object's keypoints, with their details."""
    keypoints = np.zeros((0, 3)) if instance.keypoints is None else instance.keypoints
    labelled = int((keypoints[:, 2] > 0).sum())
    if instance.stated_keypoints not in (None, labelled):
        yield _MISCOUNTED, f"{labelled} labelled, num_keypoints {instance.stated_keypoints}"
    x, y = keypoints[:, 0], keypoints[:, 1]
    outside = (keypoints[:, 2] > 0) & ((x < 0) | (y < 0) | (x > record.width) | (y > record.height))
    if outside.any():
        first = int(outside.argmax())
        place = f"number {first + 1} at ({x[first]:g}, {y[first]:g}), image {record.width}×{record.height}"
        yield _OUTSIDE, f"{int(outside.sum())} keypoint(s), {place}"


def _duplicates(objects: list[Instance], rles: list[dict[str, Any]]) -> Iterator[tuple[Instance, Instance, str]]:
    """Pairs of an object and a later object of its class with the same box or mask, and the detail."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, instance in enumerate(objects):
        by_class[instance.label].append(index)
    for indices in by_class.values():
        masks = [rles[index] for index in indices]
        ious = np.asarray(mask_api.iou(masks, masks, [0] * len(masks)))
        boxes = np.array([objects[index].box_xyxy_px for index in indices])
        boxes_xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        box_ious = np.asarray(mask_api.iou(boxes_xywh, boxes_xywh, [0] * len(boxes)))
        alike = np.tri(len(indices), k=-1, dtype=bool) & (np.maximum(ious, box_ious) > _DUPLICATE_IOU)
        for later in np.flatnonzero(alike.any(axis=1)):
            first = int(alike[later].argmax())
            detail = f"mask IoU {ious[later, first]:.2f}, box IoU {box_ious[later, first]:.2f}"
            yield objects[indices[first]], objects[indices[later]], detail


def _extent(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
    """The bounding box of a non-empty mask, xyxy px, clipped to the image."""
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
