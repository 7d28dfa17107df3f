"""Common parts of the drawn datasets: backgrounds, paint, and atomic writing of the dataset folder."""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

from maskrcnn.errors import UserError, require_memory
from maskrcnn.files import make_folder, read_json, write_json

# Draws an image from a random generator: uint8 [H, W, 3], and COCO's annotations without ids.
_Draw = Callable[[np.random.Generator], tuple[np.ndarray, list[dict[str, Any]]]]

_SPLITS = ("train", "val")
_MIN_SIZE_PX = 32
_BYTES_PER_PIXEL = 3 + 8  # RGB, and distances in float64
_MIN_CONTRAST = 70  # Euclidean distance in RGB between a fill and what it covers


def write_drawn_dataset(
    out: str | Path,
    draw: _Draw,
    *,
    name: str,
    info: dict[str, Any],
    categories: list[dict[str, Any]],
    train_images: int,
    val_images: int,
    size_px: int,
    seed: int,
) -> Path:
    """Writes a dataset to `out` (`train/`, `val/`, `annotations/`) and returns `out`.

    Image i of split s (train 0, val 1) is drawn with `np.random.default_rng([seed, s, i])`. The same arguments give
    the same bytes of JSON. The folder is written completely or not at all; an existing folder with the same arguments
    is kept.

    Args:
        out: folder that is new, empty, or contains this dataset.
        draw: draws square images of `size_px`.
        name: name of the dataset, for messages.
        info: `info` of the annotation files, to which the arguments are added.
        categories: COCO's, from id 1.
        train_images, val_images: number of images, at least 1.
        size_px: side of the images, at least 32.
        seed: random seed, non-negative.

    Raises:
        UserError: for arguments out of range, and if `out` contains anything else.
    """
    if min(train_images, val_images) < 1 or size_px < _MIN_SIZE_PX or seed < 0:
        raise UserError(
            f"{train_images} training and {val_images} validation images of {size_px} px, seed {seed}",
            f"at least 1 image of each, at least {_MIN_SIZE_PX} px, a seed of 0 or more",
            "change the arguments",
        )
    require_memory(
        _BYTES_PER_PIXEL * float(size_px) ** 2, f"an image of {size_px}×{size_px} px", "draw smaller images: --size"
    )
    out = Path(os.path.realpath(out))
    counts = dict(zip(_SPLITS, (train_images, val_images), strict=True))
    arguments = {"train_images": train_images, "val_images": val_images, "size_px": size_px, "seed": seed}
    info = {**info, "arguments": arguments}
    if _is_complete(out, info, counts):
        return out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(
            f"{out} exists and is not the complete {name} dataset of {arguments}",
            "a folder that is new, empty, or has the same dataset",
            "choose another folder, or remove this one",
        )
    make_folder(out.parent)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        for split_index, (split, count) in enumerate(counts.items()):
            content = _write_images(temporary / split, draw, count, size_px, [seed, split_index])
            content = {"info": info, **content, "categories": categories}
            write_json(_annotation_path(temporary, split), content, indent=None)
        if out.exists():
            out.rmdir()  # empty; Windows does not rename onto it
        os.rename(temporary, out)
    except OSError as error:
        if _is_complete(out, info, counts):  # another process has written it
            return out
        raise UserError(
            f"the {name} dataset cannot be written to {out} ({error.strerror or error})",
            "a writable folder, on a disk with space",
            "choose another folder, or free space",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _annotation_path(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _is_complete(root: Path, info: dict[str, Any], counts: dict[str, int]) -> bool:
    """Whether `root` contains both splits with these arguments, and all their images."""
    for split, count in counts.items():
        try:
            content = read_json(_annotation_path(root, split), "an annotation file")
            names = {entry["file_name"] for entry in content["images"]}
            if content["info"] != info or len(names) != count or names - set(os.listdir(root / split)):
                return False
        except (UserError, OSError, KeyError, TypeError):
            return False
    return True


def _write_images(folder: Path, draw: _Draw, count: int, size_px: int, seeds: list[int]) -> dict[str, Any]:
    """Draws a split's images into `folder`; returns its COCO lists."""
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        image, objects = draw(np.random.default_rng([*seeds, index]))
        name = f"{index:06d}.png"
        Image.fromarray(image).save(folder / name, compress_level=1)
        images.append({"id": index + 1, "file_name": name, "height": size_px, "width": size_px})
        for values in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **values})
    return {"images": images, "annotations": annotations}


def mask_annotation(label: int, visible: np.ndarray) -> dict[str, Any]:
    """COCO's fields of an object from its visible pixels, bool `[H, W]`: box, area and compressed run lengths."""
    rle = mask_api.encode(np.asfortranarray(visible, dtype=np.uint8))
    return {
        "category_id": label,
        "iscrowd": 0,
        "bbox": mask_api.toBbox(rle).tolist(),
        "area": int(visible.sum()),
        "segmentation": {"size": list(visible.shape), "counts": rle["counts"].decode("ascii")},
    }


def background(rng: np.random.Generator, size_hw: tuple[int, int]) -> np.ndarray:
    """A smooth colour gradient with stripes and blobs, `[H, W, 3]` float32 around 0 … 255."""
    height, width = size_hw
    scale = min(size_hw) / 128
    image = _smooth(rng.uniform(30, 225, (4, 4, 3)).astype(np.float32), size_hw)
    y, x = pixel_centres(size_hw)
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


def noisy(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Adds sensor noise to an image, float32 `[H, W, 3]`, and returns it as uint8."""
    image += rng.normal(0, rng.uniform(2, 8), image.shape).astype(np.float32)
    pixels: np.ndarray = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return pixels


def contrasting_colour(rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """A random colour, float32 `[3]`, with contrast to the colour `under` `[3]`."""
    candidates = rng.uniform(10, 245, (16, 3))
    contrast = np.linalg.norm(candidates - under, axis=1)
    colour: np.ndarray = candidates[np.argmax(contrast >= min(_MIN_CONTRAST, contrast.max()))]
    return colour.astype(np.float32)


def paint(rng: np.random.Generator, image: np.ndarray, coverage: np.ndarray, colour: np.ndarray | None = None) -> None:
    """Fills a region with a colour, with shade and grain.

    Args:
        image: float32 `[H, W, 3]`, changed in place.
        coverage: float32 `[H, W]`, 0 … 1, not all 0.
        colour: `[3]` (default: random, with contrast to the pixels under it).
    """
    rows, columns = np.flatnonzero(coverage.any(axis=1)), np.flatnonzero(coverage.any(axis=0))
    part = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    coverage = coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, None]
    if colour is None:
        colour = contrasting_colour(rng, (part * coverage).sum(axis=(0, 1)) / coverage.sum())
    shade = _smooth(rng.uniform(-18, 18, (2, 2, 1)).astype(np.float32), part.shape[:2])
    grain = rng.normal(0, rng.uniform(0, 7), (*part.shape[:2], 1)).astype(np.float32)
    part += coverage * (colour + shade + grain - part)


def pixel_centres(size_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """y `[H, 1]` and x `[1, W]` of the pixels' centres; pixel 0 spans 0 to 1, as in COCO polygons."""
    height, width = size_hw
    y, x = (np.arange(size, dtype=np.float32) + 0.5 for size in (height, width))
    return y[:, None], x[None, :]


def _smooth(grid: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Interpolates a grid `[A, B, C]` linearly to the image's size, float32 `[H, W, C]`."""
    for axis, size in enumerate(size_hw):
        place = np.linspace(0, grid.shape[axis] - 1, size, dtype=np.float32)
        low = np.minimum(place.astype(np.int64), grid.shape[axis] - 2)
        weight = (place - low).reshape([-1 if i == axis else 1 for i in range(3)]).astype(np.float32)
        grid = np.take(grid, low, axis) * (1 - weight) + np.take(grid, low + 1, axis) * weight
    return grid
