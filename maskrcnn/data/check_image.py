"""What can be wrong with one image of a dataset and with the objects on it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from pycocotools import mask as mask_api

from maskrcnn.data.coco import ImageRecord, Instance
from maskrcnn.data.findings import Finding, Problem
from maskrcnn.data.images import read_image
from maskrcnn.data.segmentation import Segmentation, compressed_rle
from maskrcnn.errors import UserError
from maskrcnn.metadata import sha256_of

LEAST_MASK_PX = 4  # fewer pixels are a slip of the mouse more often than an object
SAME_IOU = 0.95  # masks or boxes of one class that agree better are one object annotated twice
LEAST_FIT_IOU = 0.5  # between a box and the extent of its mask
_UPRIGHT = 1  # EXIF orientation: first row at the top, first column at the left

MISSING = Problem("missing image", is_error=True)
UNREADABLE = Problem("unreadable image", is_error=True)
OTHER_SIZE = Problem("image of another size than its entry says", is_error=True)
TURNED = Problem("image with an EXIF orientation, which training does not apply")
THIN = Problem("box with a side below one pixel")
TINY = Problem(f"mask of fewer than {LEAST_MASK_PX} pixels")
MISFIT = Problem("box that does not fit its mask")
TWICE = Problem("object annotated twice")
OUTSIDE = Problem("visible keypoint outside the image")
MISCOUNTED = Problem("number of keypoints that is not what num_keypoints says")


def examine(split: str, record: ImageRecord) -> tuple[list[Finding], str | None]:
    """What is wrong with an image, and the SHA-256 of its file; None for a file that is no image.

    An object has one finding at most besides its keypoints and being a duplicate: a box thinner than a pixel is not
    compared with its mask, and neither is a mask of hardly any pixels.
    """
    findings = list(_object_findings(split, record))
    if not record.path.is_file():
        return [_of_image(MISSING, split, record, f"no file {record.path}"), *findings], None
    try:
        size_hw = read_image(record.path).shape[:2]
    except UserError as error:
        return [_of_image(UNREADABLE, split, record, error.came), *findings], None
    orientation = _orientation(record.path)
    if size_hw != (record.height, record.width):
        detail = f"{size_hw[1]}×{size_hw[0]} pixels in the file, {record.width}×{record.height} in the JSON"
        if orientation != _UPRIGHT:
            detail += f"; annotated after EXIF orientation {orientation} was applied?"
        findings.append(_of_image(OTHER_SIZE, split, record, detail))
    elif orientation != _UPRIGHT:
        detail = f"orientation {orientation}; annotations must fit the pixels as stored, as they are drawn here"
        findings.append(_of_image(TURNED, split, record, detail))
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
            problem=TWICE,
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
        yield THIN, f"{width:.2f}×{height:.2f} px"
    elif mask_px < LEAST_MASK_PX:
        yield TINY, f"{mask_px} pixel(s), box {width:.0f}×{height:.0f} px"
    else:
        extent = _extent(instance.segmentation, record.height, record.width)
        whole_px = np.concatenate([np.floor(box[:2]), np.ceil(box[2:])])  # as masks are, which counts for small ones
        iou = max(_box_iou(box, extent), _box_iou(whole_px, extent))
        if iou < LEAST_FIT_IOU:
            yield MISFIT, f"IoU {iou:.2f} of box {_short(box)} and mask extent {_short(extent)}, xyxy px"


def _keypoint_faults(record: ImageRecord, instance: Instance) -> Iterator[tuple[Problem, str]]:
    """What is wrong with an object's keypoints, with what came."""
    keypoints = np.zeros((0, 3)) if instance.keypoints is None else instance.keypoints
    labelled = int((keypoints[:, 2] > 0).sum())
    if instance.stated_keypoints not in (None, labelled):
        yield MISCOUNTED, f"{labelled} labelled, num_keypoints {instance.stated_keypoints}"
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
        alike = np.tri(len(indices), k=-1, dtype=bool) & (np.maximum(ious, box_ious) > SAME_IOU)
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
