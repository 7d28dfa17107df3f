"""The generated dataset: circles, rectangles and triangles on textured backgrounds, in COCO's format.

It needs no download, so that training, export and their tests run anywhere. A detector reaches a high AP on
it within minutes, but not by colour alone: fills, backgrounds, sizes and angles are random, shapes cover
each other, and some images are empty.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

from maskrcnn.errors import UserError
from maskrcnn.files import make_folder, write_json

CLASS_NAMES = ("circle", "rectangle", "triangle")  # label k is CLASS_NAMES[k - 1]
_EMPTY_FRACTION = 0.05  # images drawn without any object
_MOST_OBJECTS = 6
_DIAMETER_PX = (14, 60)  # of an image whose shorter side is 128 px
_LEAST_VISIBLE = 0.35  # of a shape's area; what shows less is not drawn at all
_LEAST_VISIBLE_PX = 40
_LEAST_CONTRAST = 70  # Euclidean distance in RGB between a fill and what it covers
_POLYGON_IOU = 0.92  # a polygon that pycocotools draws less like the shape is written as RLE
_SPLITS = ("train", "val")


def generate_shapes(
    out: str | Path, *, train_images: int = 600, val_images: int = 100, size_px: int = 128, seed: int = 0
) -> Path:
    """Writes the dataset to `out` (`train/`, `val/`, `annotations/`) and returns `out`.

    Image i of split s (train 0, val 1) is `shapes_image(np.random.default_rng([seed, s, i]), (size_px,
    size_px))`. The same arguments give the same bytes of JSON. The folder appears whole or not at all; one
    that was made with the same arguments is used as it is.

    Args:
        out: a folder that does not exist, is empty, or holds this dataset.
        train_images, val_images: images of each split, at least 1.
        size_px: side of the square images, at least 32.
        seed: non-negative.

    Raises:
        UserError: for arguments out of range, and where `out` holds anything else.
    """
    if min(train_images, val_images) < 1 or size_px < 32 or seed < 0:
        raise UserError(
            f"{train_images} training and {val_images} validation images of {size_px} px, seed {seed}",
            "at least 1 image of each, at least 32 px, a seed of 0 or more",
            "change the arguments",
        )
    out = Path(out).resolve()
    counts = dict(zip(_SPLITS, (train_images, val_images), strict=True))
    info = {
        "description": "generated shapes: circles, rectangles and triangles",
        "generator": "maskrcnn.data.shapes, version 1",
        "arguments": {
            "train_images": train_images,
            "val_images": val_images,
            "size_px": size_px,
            "seed": seed,
        },
    }
    if _is_complete(out, info, counts):
        return out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(
            f"{out} exists and is not the complete shapes dataset of {info['arguments']}",
            "a folder that is missing, empty, or made with the same arguments",
            "name another folder or remove this one",
        )
    make_folder(out.parent)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        for split_index, (split, count) in enumerate(counts.items()):
            content = _write_images(temporary / split, count, size_px, [seed, split_index])
            write_json(_annotation_path(temporary, split), {"info": info, **content}, indent=None)
        if out.exists():
            out.rmdir()  # empty; Windows does not rename onto it
        os.rename(temporary, out)
    except OSError as error:
        if _is_complete(out, info, counts):  # another process was faster
            return out
        raise UserError(
            f"the shapes dataset cannot be written to {out} ({error.strerror or error})",
            "a folder that can be written, on a disk with space",
            "name another folder, or make room",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def shapes_image(rng: np.random.Generator, size_hw: tuple[int, int]) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """One random image: `[H, W, 3]` uint8 RGB, and for each object its label and visible mask `[H, W]` bool.

    Sizes scale with the shorter side. Masks do not overlap; the last object is the frontmost. About one
    image in twenty has no object, as do images too small for shapes of 40 visible pixels.
    """
    image, shapes = _scene(rng, size_hw)
    return image, [(shape.label, shape.visible) for shape in shapes]


# --- drawing -----------------------------------------------------------------------------------------


@dataclass
class _Shape:
    label: int
    coverage: np.ndarray  # [H, W] float32, 0 … 1: soft over one pixel at the edge
    area_px: float  # of the whole shape, whatever covers or cuts it
    outline: np.ndarray  # [P, 2] x, y
    visible: np.ndarray  # [H, W] bool
    is_whole: bool = True  # nothing covers it and the image does not cut it


def _scene(rng: np.random.Generator, size_hw: tuple[int, int]) -> tuple[np.ndarray, list[_Shape]]:
    """The image and its shapes, back to front."""
    image = _background(rng, size_hw)
    count = 0 if rng.random() < _EMPTY_FRACTION else int(rng.integers(1, _MOST_OBJECTS + 1))
    shapes = _visible_shapes([_random_shape(rng, size_hw) for _ in range(count)], size_hw)
    for shape in shapes:
        _paint(rng, image, shape)
    image += rng.normal(0, rng.uniform(2, 8), image.shape).astype(np.float32)  # sensor noise
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), shapes


def _background(rng: np.random.Generator, size_hw: tuple[int, int]) -> np.ndarray:
    """A smooth colour gradient with stripes and blobs, `[H, W, 3]` float32 around 0 … 255."""
    height, width = size_hw
    scale = min(size_hw) / 128
    image = _smooth(rng.uniform(30, 225, (4, 4, 3)).astype(np.float32), size_hw)
    y, x = _pixel_centres(size_hw)
    angle, wavelength = rng.uniform(0, math.pi), rng.uniform(6, 40) * scale
    along = x * math.cos(angle) + y * math.sin(angle)
    wave = np.sin(along * (2 * math.pi / wavelength) + rng.uniform(0, 2 * math.pi))
    if rng.random() < 0.5:
        wave = np.clip(wave * 4, -1, 1)  # hard-edged stripes
    image += wave[..., None] * rng.uniform(-25, 25, 3).astype(np.float32)
    for _ in range(rng.integers(2, 6)):
        centre_x, centre_y = rng.uniform(0, width), rng.uniform(0, height)
        radius = rng.uniform(6, 30) * scale
        fall_x = np.exp(-((x - centre_x) ** 2) / (2 * radius**2))
        fall_y = np.exp(-((y - centre_y) ** 2) / (2 * radius**2))
        image += (fall_y * fall_x)[..., None] * rng.uniform(-70, 70, 3).astype(np.float32)
    return image


def _random_shape(rng: np.random.Generator, size_hw: tuple[int, int]) -> _Shape:
    """A shape of random class, size, place and angle, which may reach over the image's edge by a quarter."""
    height, width = size_hw
    scale = min(size_hw) / 128
    smallest = max(_DIAMETER_PX[0] * scale, 12.0)  # smaller ones have no 40 pixels
    largest = max(_DIAMETER_PX[1] * scale, smallest)
    radius = 0.5 * smallest * (largest / smallest) ** rng.random()
    margin_x, margin_y = min(radius / 2, width / 2), min(radius / 2, height / 2)
    centre = np.array([rng.uniform(margin_x, width - margin_x), rng.uniform(margin_y, height - margin_y)])
    turn = rng.uniform(0, 2 * math.pi)
    name = CLASS_NAMES[rng.integers(len(CLASS_NAMES))]
    if name == "circle":
        angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    elif name == "rectangle":
        half_angle = math.atan(rng.uniform(0.45, 1))  # sides of a ratio between 0.45 and 1
        angles = np.array([half_angle, math.pi - half_angle, math.pi + half_angle, -half_angle])
    else:
        angles = np.array([0, 2, 4]) * (math.pi / 3) + rng.uniform(-0.25, 0.25, 3)
    outline = centre + radius * np.stack([np.cos(angles + turn), np.sin(angles + turn)], axis=1)
    y, x = _pixel_centres(size_hw)
    if name == "circle":
        distance = np.hypot(x - np.float32(centre[0]), y - np.float32(centre[1])) - np.float32(radius)
        area_px = math.pi * radius**2
    else:
        distance, area_px = _polygon_distance(outline, y, x)
    coverage = np.clip(0.5 - distance, 0, 1)
    return _Shape(CLASS_NAMES.index(name) + 1, coverage, area_px, outline, coverage > 0.5)


def _polygon_distance(outline: np.ndarray, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, float]:
    """Distance of each pixel to the nearest edge line of a convex polygon, negative inside; and its area."""
    after = np.roll(outline, -1, axis=0)
    cross = outline[:, 0] * after[:, 1] - outline[:, 1] * after[:, 0]
    area = cross.sum() / 2
    normal = np.stack([after[:, 1] - outline[:, 1], outline[:, 0] - after[:, 0]], axis=1) * np.sign(area)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    offset = (normal * outline).sum(axis=1)
    normal, offset = normal.astype(np.float32), offset.astype(np.float32)
    sides = [x * n[0] + y * n[1] - o for n, o in zip(normal, offset, strict=True)]
    return np.max(sides, axis=0), abs(float(area))


def _visible_shapes(shapes: list[_Shape], size_hw: tuple[int, int]) -> list[_Shape]:
    """The shapes of which enough shows, back to front, with their visible masks.

    A shape that shows too little is left out of the image, so that nothing is drawn without its annotation.
    """
    height, width = size_hw
    covered = np.zeros(size_hw, bool)
    kept = []
    for shape in reversed(shapes):  # from the front
        whole = shape.visible
        shape.visible = whole & ~covered
        pixels = int(shape.visible.sum())
        if pixels < max(_LEAST_VISIBLE * shape.area_px, _LEAST_VISIBLE_PX):
            continue
        inside = (shape.outline >= 0).all() and (shape.outline <= (width, height)).all()
        shape.is_whole = bool(inside) and not (whole & covered).any()
        covered |= whole
        kept.append(shape)
    return kept[::-1]


def _paint(rng: np.random.Generator, image: np.ndarray, shape: _Shape) -> None:
    """Fills a shape with a colour that stands out from what is under it, shaded and grained."""
    rows, columns = np.flatnonzero(shape.coverage.any(axis=1)), np.flatnonzero(shape.coverage.any(axis=0))
    part = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    coverage = shape.coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, None]
    under = (part * coverage).sum(axis=(0, 1)) / coverage.sum()
    candidates = rng.uniform(10, 245, (16, 3))
    contrast = np.linalg.norm(candidates - under, axis=1)
    fill = candidates[np.argmax(contrast >= min(_LEAST_CONTRAST, contrast.max()))].astype(np.float32)
    shade = _smooth(rng.uniform(-18, 18, (2, 2, 1)).astype(np.float32), part.shape[:2])
    grain = rng.normal(0, rng.uniform(0, 7), (*part.shape[:2], 1)).astype(np.float32)
    part += coverage * (fill + shade + grain - part)


def _pixel_centres(size_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """y `[H, 1]` and x `[1, W]` of the pixels' centres; pixel 0 reaches from 0 to 1, as in COCO polygons."""
    height, width = size_hw
    y, x = (np.arange(size, dtype=np.float32) + 0.5 for size in (height, width))
    return y[:, None], x[None, :]


def _smooth(grid: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """A grid `[A, B, C]` stretched over the image by linear interpolation, `[H, W, C]` float32."""
    for axis, size in enumerate(size_hw):
        place = np.linspace(0, grid.shape[axis] - 1, size, dtype=np.float32)
        low = np.minimum(place.astype(np.int64), grid.shape[axis] - 2)
        weight = (place - low).reshape([-1 if i == axis else 1 for i in range(3)]).astype(np.float32)
        grid = np.take(grid, low, axis) * (1 - weight) + np.take(grid, low + 1, axis) * weight
    return grid


# --- the folder --------------------------------------------------------------------------------------


def _annotation_path(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _is_complete(root: Path, info: dict[str, Any], counts: dict[str, int]) -> bool:
    """Whether `root` holds both splits, made with these arguments, with all their images."""
    for split, count in counts.items():
        try:
            content = json.loads(_annotation_path(root, split).read_bytes())
            names = {entry["file_name"] for entry in content["images"]}
            if content["info"] != info or len(names) != count or names - set(os.listdir(root / split)):
                return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
    return True


def _write_images(folder: Path, count: int, size_px: int, seeds: list[int]) -> dict[str, Any]:
    """Draws a split's images into `folder`; returns its COCO lists."""
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        image, shapes = _scene(np.random.default_rng([*seeds, index]), (size_px, size_px))
        entry = {"id": index + 1, "file_name": f"{index:06d}.png", "height": size_px, "width": size_px}
        Image.fromarray(image).save(folder / entry["file_name"], compress_level=1)
        images.append(entry)
        for shape in shapes:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **_annotation(shape)})
    categories = [{"id": label, "name": name} for label, name in enumerate(CLASS_NAMES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotation(shape: _Shape) -> dict[str, Any]:
    """COCO's fields of a shape: a polygon where it is whole and drawn well, otherwise compressed RLE."""
    rle = mask_api.encode(np.asfortranarray(shape.visible, dtype=np.uint8))
    segmentation: Any = {"size": list(shape.visible.shape), "counts": rle["counts"].decode("ascii")}
    if shape.is_whole:
        polygon = [np.round(shape.outline, 2).ravel().tolist()]
        if mask_api.iou(mask_api.frPyObjects(polygon, *shape.visible.shape), [rle], [0])[0, 0] > _POLYGON_IOU:
            segmentation = polygon
    return {
        "category_id": shape.label,
        "iscrowd": 0,
        "bbox": mask_api.toBbox(rle).tolist(),
        "area": int(shape.visible.sum()),
        "segmentation": segmentation,
    }
