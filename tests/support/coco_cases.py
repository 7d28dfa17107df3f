"""Small random ground truths and results that cover the special cases of COCO's evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as mask_api

SIZE_HW = (120, 150)
SIDES_PX = (4, 12, 31, 32, 33, 60, 96, 97)  # below and above the limits of small, medium and large
KEYPOINTS = 17


def make_case(
    seed: int,
    *,
    images: int = 4,
    categories: int = 3,
    objects: int = 4,
    detections: int = 8,
    grid: bool = False,
    kind: str = "segm",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the content of an annotation file, and results.

    Args:
        seed: random seed.
        images, categories: numbers of images and categories; some have neither objects nor detections.
        objects: maximum per image and category; some are crowds, some have an area beyond every range.
        detections: maximum per image and category.
        grid: use few different coordinates and scores, so that overlaps and scores tie.
        kind: kind of the results: "bbox", "segm" or "keypoints".
    """
    rng = np.random.default_rng(seed)
    image_ids = rng.permutation(np.arange(10, 10 + 3 * images))[:images].tolist()
    category_ids = rng.permutation(np.arange(1, 1 + 2 * categories))[:categories].tolist()
    annotations, results = [], []
    for image_id in image_ids:
        for category_id in [*category_ids, 99]:
            made = [_object(rng, grid) for _ in range(rng.integers(0, objects + 1) * (rng.random() < 0.8))]
            if category_id != 99:
                annotations += [{**one, "image_id": image_id, "category_id": category_id} for one in made]
            for _ in range(rng.integers(0, detections + 1) * (rng.random() < 0.8)):
                near = made[rng.integers(len(made))] if made and rng.random() < 0.8 else _object(rng, grid)
                result = _detection(rng, near, grid, kind)
                results.append({**result, "image_id": image_id, "category_id": category_id})
    for number, entry in enumerate(annotations, start=1):
        entry["id"] = number
    rng.shuffle(results)
    content = {
        "images": [{"id": i, "height": SIZE_HW[0], "width": SIZE_HW[1], "file_name": f"{i}.png"} for i in image_ids],
        "categories": [{"id": i, "name": f"class {i}"} for i in category_ids],
        "annotations": annotations,
    }
    return content, results


def rle_of(box: tuple[float, float, float, float], string: bool = True) -> dict[str, Any]:
    """Compressed run lengths of a box (x, y, width, height) in an image of `SIZE_HW`."""
    mask = np.zeros(SIZE_HW, np.uint8, order="F")
    x, y, width, height = (round(value) for value in box)
    mask[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)] = 1
    rle = mask_api.encode(mask)
    return {"size": list(SIZE_HW), "counts": rle["counts"].decode() if string else rle["counts"]}


def _box(rng: np.random.Generator, grid: bool) -> tuple[float, float, float, float]:
    width, height = (int(rng.choice(SIDES_PX)) for _ in range(2))
    x, y = (int(rng.integers(0, 5)) * 10 for _ in range(2)) if grid else (rng.random(2) * 60).tolist()
    return x, y, width, height


def _object(rng: np.random.Generator, grid: bool) -> dict[str, Any]:
    x, y, width, height = box = _box(rng, grid)
    is_crowd = rng.random() < 0.2
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {
        "bbox": list(box),
        "area": float(rng.choice([width * height, width * height * 0.7, 1.0, 1e11], p=[0.8, 0.16, 0.02, 0.02])),
        "iscrowd": int(is_crowd),
        "segmentation": rle_of(box) if is_crowd or rng.random() < 0.3 else [polygon],
        **_person(rng, box),
    }


def _person(rng: np.random.Generator, box: tuple[float, float, float, float]) -> dict[str, Any]:
    points = np.zeros((KEYPOINTS, 3), int)
    points[:, 0] = box[0] + rng.integers(0, box[2] + 1, KEYPOINTS)
    points[:, 1] = box[1] + rng.integers(0, box[3] + 1, KEYPOINTS)
    points[:, 2] = rng.integers(0, 3, KEYPOINTS) * (rng.random(KEYPOINTS) < rng.choice([0, 0.3, 1]))
    return {"keypoints": points.ravel().tolist(), "num_keypoints": int(np.count_nonzero(points[:, 2]))}


def _detection(rng: np.random.Generator, near: dict[str, Any], grid: bool, kind: str) -> dict[str, Any]:
    shift = rng.integers(-1, 2, 4) * 5 if grid else rng.normal(0, 3, 4)
    x, y, width, height = np.array(near["bbox"]) + shift * (rng.random() < 0.7)
    box = [float(x), float(y), float(max(width, 0)), float(max(height, 0))]
    result: dict[str, Any] = {"score": float(rng.integers(0, 4) / 4 if grid else rng.random())}
    if kind == "bbox":
        result["bbox"] = box
    elif kind == "segm":
        result["segmentation"] = rle_of(tuple(box), bool(rng.random() < 0.9))
    else:
        points = np.array(near["keypoints"], float).reshape(-1, 3)
        points[:, :2] += rng.normal(0, rng.choice([0, 1, 5]), (KEYPOINTS, 2)) if not grid else 0
        points[:, 2] = rng.random(KEYPOINTS)
        result["keypoints"] = points.ravel().tolist()
    return result
