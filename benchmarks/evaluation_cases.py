"""Detections, ground truth and results that look like COCO's, drawn at random, for measuring an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np

from maskrcnn.pasting import pasted_runs
from maskrcnn.postprocess import Detections
from maskrcnn.run_lengths import strings_from_runs

OBJECTS = 7.3  # per image on average, as in COCO's val2017
CLASSES, CLASSES_PER_IMAGE = 80, 3
NEAR = 0.4  # share of the detections that lie at an object
LEAST_SIDE_PX = 8
KEYPOINTS = 17
_SHAPES = 64


def blobs(rng: np.random.Generator, count: int) -> np.ndarray:
    """Masks `[count, 28, 28]` float32 as a mask head gives them: one smooth shape each, a soft border."""
    y, x = np.mgrid[0:28, 0:28] / 27 - 0.5
    angle, radius = np.arctan2(y, x), np.hypot(y, x)
    lobes, phase, size = rng.integers(2, 6, count), rng.uniform(0, 2 * np.pi, count), rng.uniform(0.3, 0.5, count)
    wave = 1 + 0.25 * np.sin(lobes[:, None, None] * angle + phase[:, None, None])
    return (1 / (1 + np.exp(40 * (radius - size[:, None, None] * wave)))).astype(np.float32)


def boxes(rng: np.random.Generator, count: int, size_hw: tuple[int, int]) -> np.ndarray:
    """Boxes xyxy `[count, 4]` inside the image, their sides log-uniform."""
    sides = LEAST_SIDE_PX * np.exp(rng.random((count, 2)) * np.log(min(size_hw) / LEAST_SIDE_PX))
    corners = rng.random((count, 2)) * (np.array(size_hw[::-1]) - sides)
    return np.concatenate([corners, corners + sides], axis=1)


def detections(seed: int, count: int, size_hw: tuple[int, int]) -> Detections:
    """What a detector finds in one image."""
    rng = np.random.default_rng(seed)
    return Detections(
        boxes(rng, count, size_hw).astype(np.float32),
        np.sort(rng.random(count, np.float32))[::-1].copy(),
        rng.integers(1, CLASSES + 1, count),
        blobs(rng, count),
        size_hw,
    )


def simulated(
    images: int, detections_per_image: int, kind: str, size_hw: tuple[int, int], seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An annotation file's content and results of one kind, in COCO's formats."""
    rng = np.random.default_rng((seed, images, detections_per_image))
    shapes = blobs(rng, _SHAPES)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id in range(1, images + 1):
        objects, found = _image(rng, detections_per_image, kind, size_hw, shapes)
        annotations += [
            {**entry, "image_id": image_id, "id": len(annotations) + k} for k, entry in enumerate(objects, 1)
        ]
        results += [{**entry, "image_id": image_id} for entry in found]
    height, width = size_hw
    content = {
        "images": [{"id": k, "height": height, "width": width} for k in range(1, images + 1)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, _classes(kind) + 1)],
        "annotations": annotations,
    }
    return content, results


def _classes(kind: str) -> int:
    return 1 if kind == "keypoints" else CLASSES


def _image(
    rng: np.random.Generator, count: int, kind: str, size_hw: tuple[int, int], shapes: np.ndarray
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    number = int(rng.poisson(OBJECTS))
    own = rng.integers(1, _classes(kind) + 1, CLASSES_PER_IMAGE)
    true, classes, shape = boxes(rng, number, size_hw), rng.choice(own, number), rng.integers(0, _SHAPES, number)
    found, found_classes = boxes(rng, count, size_hw), rng.integers(1, _classes(kind) + 1, count)
    found_shape, score = rng.integers(0, _SHAPES, count), rng.random(count) ** 2
    near = np.flatnonzero(rng.random(count) < NEAR) if number else np.zeros(0, int)
    at = rng.integers(0, max(number, 1), len(near))
    if number:
        sides = np.tile(true[at, 2:] - true[at, :2], 2)
        found[near] = true[at] + rng.normal(0, 0.06, (len(near), 4)) * sides
        found_classes[near], found_shape[near], score[near] = classes[at], shape[at], rng.random(len(near)) ** 0.5
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    everything = np.concatenate([true, found])
    fields = _fields(rng, everything, shapes[np.append(shape, found_shape)], kind, size_hw, number, np.append(at, near))
    crowds = (rng.random(number) < 0.01).astype(int)
    objects = [
        {
            **fields[k],
            "category_id": int(classes[k]),
            "bbox": _xywh(true[k]),
            "area": float(np.prod(true[k, 2:] - true[k, :2])),
            "iscrowd": int(crowds[k]),
        }
        for k in range(number)
    ]
    made = [
        {**fields[number + k], "category_id": int(found_classes[k]), "score": float(score[k])} for k in range(count)
    ]
    return objects, made


def _fields(
    rng: np.random.Generator,
    everything: np.ndarray,
    masks: np.ndarray,
    kind: str,
    size_hw: tuple[int, int],
    number: int,
    pairs: np.ndarray,
) -> list[dict[str, Any]]:
    """The field of the kind, of objects and detections together."""
    if kind == "segm":
        runs = pasted_runs(masks, everything.astype(np.float32), size_hw, 0.5)
        return [{"segmentation": {"size": list(size_hw), "counts": text}} for text in strings_from_runs(runs)]
    if kind == "bbox":
        return [{"bbox": _xywh(box)} for box in everything]
    inside = rng.random((len(everything), KEYPOINTS, 2))
    half = len(pairs) // 2
    inside[number + pairs[half:]] = inside[pairs[:half]] + rng.normal(0, 0.03, (half, KEYPOINTS, 2))
    points = everything[:, None, :2] + inside * (everything[:, None, 2:] - everything[:, None, :2])
    visible = rng.integers(0, 3, (len(everything), KEYPOINTS, 1))
    lists = np.concatenate([points.round(2), visible], axis=2).reshape(len(everything), -1).tolist()
    counts = np.count_nonzero(visible, axis=1)[:, 0].tolist()
    return [
        {"keypoints": values} | ({"num_keypoints": seen} if k < number else {})
        for k, (values, seen) in enumerate(zip(lists, counts, strict=True))
    ]


def _xywh(box: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = box.tolist()
    return [x0, y0, x1 - x0, y1 - y0]
