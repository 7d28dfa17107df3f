"""The drawn dataset of shapes: circles, rectangles and triangles on textured backgrounds, in COCO's format.

It needs no download, so that training, export and their tests run anywhere. A detector reaches a high AP within
minutes, but not from colour alone: fills, backgrounds, sizes and angles are random, shapes overlap, and some images are
empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.data.drawn import background, mask_annotation, noisy, paint, pixel_centres, write_drawn_dataset
from maskrcnn.errors import UserError

CLASS_NAMES = ("circle", "rectangle", "triangle")  # label k is CLASS_NAMES[k - 1]
_EMPTY_FRACTION = 0.05  # share of images without an object
_MAX_OBJECTS = 6
_DIAMETER_PX = (14, 60)  # sizes in an image whose shorter side is 128 px
_MIN_VISIBLE = 0.35  # minimum share of a shape's area; other shapes are not drawn
_MIN_VISIBLE_PX = 40
_MIN_POLYGON_IOU = 0.92  # minimum IoU of a shape and its polygon drawn by pycocotools; otherwise it is written as RLE


def generate_shapes(
    out: str | Path,
    *,
    train_images: int = 600,
    val_images: int = 100,
    size_px: int = 128,
    seed: int = 0,
    class_shares: Sequence[float] = (),
) -> Path:
    """Writes the dataset to `out` and returns `out`, see `write_drawn_dataset`.

    Image i of split s (train 0, val 1) is `shapes_image(np.random.default_rng([seed, s, i]), (size_px, size_px))`,
    with `class_shares` (relative frequencies of the classes) an image with other classes.

    Raises:
        UserError: for arguments out of range, and if `out` contains anything else.
    """
    shares = np.array(class_shares, np.float64)
    if shares.size and not (shares.shape == (len(CLASS_NAMES),) and (shares >= 0).all() and 0 < shares.sum() < np.inf):
        raise UserError(
            f"class shares {', '.join(map(str, class_shares))}",
            f"{len(CLASS_NAMES)} numbers of at least 0, not all 0, for {', '.join(CLASS_NAMES)}",
            "for example --class-shares 100,10,1",
        )
    odds = shares / shares.sum() if shares.size else None

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, list[dict[str, Any]]]:
        image, shapes = _scene(rng, (size_px, size_px), odds)
        return image, [_annotation(shape) for shape in shapes]

    return write_drawn_dataset(
        out,
        draw,
        name="shapes",
        info={
            "description": "generated shapes: circles, rectangles and triangles",
            "generator": "maskrcnn.data.shapes, version 1",
            **({"class_shares": shares.tolist()} if shares.size else {}),
        },
        categories=[{"id": label, "name": name} for label, name in enumerate(CLASS_NAMES, start=1)],
        train_images=train_images,
        val_images=val_images,
        size_px=size_px,
        seed=seed,
    )


def shapes_image(rng: np.random.Generator, size_hw: tuple[int, int]) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """One random image: `[H, W, 3]` uint8 RGB, and for each object its label and visible mask `[H, W]` bool.

    Sizes scale with the shorter side. Masks do not overlap; the last object is in front. About one image in twenty has
    no object, as do images too small for shapes of 40 visible pixels.
    """
    image, shapes = _scene(rng, size_hw)
    return image, [(shape.label, shape.visible) for shape in shapes]


@dataclass
class _Shape:
    label: int
    coverage: np.ndarray  # [H, W] float32, 0 … 1: soft over one pixel at the edge
    area_px: float  # area of the whole shape, including covered parts
    outline: np.ndarray  # [P, 2] x, y
    visible: np.ndarray  # [H, W] bool
    is_whole: bool = True  # neither covered nor cut by the image


def _scene(
    rng: np.random.Generator, size_hw: tuple[int, int], odds: np.ndarray | None = None
) -> tuple[np.ndarray, list[_Shape]]:
    """The image and its shapes, back to front; `odds` are the probabilities of the classes (default: equal)."""
    image = background(rng, size_hw)
    count = 0 if rng.random() < _EMPTY_FRACTION else int(rng.integers(1, _MAX_OBJECTS + 1))
    shapes = _visible_shapes([_random_shape(rng, size_hw, odds) for _ in range(count)], size_hw)
    for shape in shapes:
        paint(rng, image, shape.coverage)
    return noisy(rng, image), shapes


def _random_shape(rng: np.random.Generator, size_hw: tuple[int, int], odds: np.ndarray | None) -> _Shape:
    """A shape of random class, size, place and angle; up to a quarter of it may be outside the image."""
    height, width = size_hw
    scale = min(size_hw) / 128
    smallest = max(_DIAMETER_PX[0] * scale, 12.0)  # smaller ones have less than 40 pixels
    largest = max(_DIAMETER_PX[1] * scale, smallest)
    radius = 0.5 * smallest * (largest / smallest) ** rng.random()
    margin_x, margin_y = min(radius / 2, width / 2), min(radius / 2, height / 2)
    centre = np.array([rng.uniform(margin_x, width - margin_x), rng.uniform(margin_y, height - margin_y)])
    turn = rng.uniform(0, 2 * math.pi)
    classes = len(CLASS_NAMES)
    name = CLASS_NAMES[rng.integers(classes) if odds is None else rng.choice(classes, p=odds)]
    if name == "circle":
        angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    elif name == "rectangle":
        half_angle = math.atan(rng.uniform(0.45, 1))  # sides of a ratio between 0.45 and 1
        angles = np.array([half_angle, math.pi - half_angle, math.pi + half_angle, -half_angle])
    else:
        angles = np.array([0, 2, 4]) * (math.pi / 3) + rng.uniform(-0.25, 0.25, 3)
    outline = centre + radius * np.stack([np.cos(angles + turn), np.sin(angles + turn)], axis=1)
    y, x = pixel_centres(size_hw)
    if name == "circle":
        distance = np.hypot(x - np.float32(centre[0]), y - np.float32(centre[1])) - np.float32(radius)
        area_px = math.pi * radius**2
    else:
        distance, area_px = polygon_distance(outline, y, x)
    coverage = np.clip(0.5 - distance, 0, 1)
    return _Shape(CLASS_NAMES.index(name) + 1, coverage, area_px, outline, coverage > 0.5)


def polygon_distance(outline: np.ndarray, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, float]:
    """Distance of each pixel to the nearest edge line of a convex polygon, negative inside; and the polygon's area."""
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
    """The shapes that are visible enough, back to front, with their visible masks.

    Other shapes are not drawn, so that everything drawn is annotated.
    """
    height, width = size_hw
    covered = np.zeros(size_hw, bool)
    kept = []
    for shape in reversed(shapes):  # from the front
        whole = shape.visible
        shape.visible = whole & ~covered
        pixels = int(shape.visible.sum())
        if pixels < max(_MIN_VISIBLE * shape.area_px, _MIN_VISIBLE_PX):
            continue
        inside = (shape.outline >= 0).all() and (shape.outline <= (width, height)).all()
        shape.is_whole = bool(inside) and not (whole & covered).any()
        covered |= whole
        kept.append(shape)
    return kept[::-1]


def _annotation(shape: _Shape) -> dict[str, Any]:
    """COCO's fields of a shape: a polygon if it is entirely visible and accurate, else compressed RLE."""
    values = mask_annotation(shape.label, shape.visible)
    if shape.is_whole:
        polygon = [np.round(shape.outline, 2).ravel().tolist()]
        drawn = mask_api.frPyObjects(polygon, *shape.visible.shape)
        if mask_api.iou(drawn, [values["segmentation"]], [0])[0, 0] > _MIN_POLYGON_IOU:
            values["segmentation"] = polygon
    return values
