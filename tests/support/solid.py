"""A dataset with one colour for the objects of each label, so that a pixel's colour identifies the label."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from maskrcnn.data.drawn import mask_annotation

COLOURS = {1: (240, 20, 30), 2: (25, 230, 40), 3: (35, 45, 235)}  # label -> RGB
GROUND = (120, 120, 120)
SIZES_HW = ((60, 90), (90, 60), (75, 75), (44, 110), (64, 80), (100, 48))


def write_solid_dataset(root: Path) -> Path:
    """Writes split "train" of twelve images to `root`: ellipses and rectangles; the third image has no object."""
    rng = np.random.default_rng(1)
    (root / "train").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations = [], []
    for number in range(12):
        size_hw = SIZES_HW[number % len(SIZES_HW)]
        image, masks = _draw(rng, size_hw, 0 if number == 2 else int(rng.integers(1, 5)))
        name = f"{number}.png"
        Image.fromarray(image).save(root / "train" / name)
        images.append({"id": number + 10, "file_name": name, "height": size_hw[0], "width": size_hw[1]})
        for label, mask in masks:
            annotations.append({"id": len(annotations) + 1, "image_id": number + 10, **mask_annotation(label, mask)})
    categories = [{"id": label, "name": f"class {label}"} for label in COLOURS]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


def _draw(
    rng: np.random.Generator, size_hw: tuple[int, int], count: int
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    image = np.full((*size_hw, 3), GROUND, np.uint8)
    y, x = np.mgrid[: size_hw[0], : size_hw[1]] + 0.5
    taken, masks = np.zeros(size_hw, bool), []
    for _ in range(count):
        label = int(rng.integers(1, 4))
        half_y, half_x = rng.uniform(5, 18, 2)
        dy = (y - rng.uniform(0, size_hw[0])) / half_y
        dx = (x - rng.uniform(0, size_hw[1])) / half_x
        mask = (np.hypot(dy, dx) < 1 if rng.random() < 0.5 else np.maximum(abs(dy), abs(dx)) < 1) & ~taken
        if mask.sum() < 60:
            continue
        taken |= mask
        image[mask] = COLOURS[label]
        masks.append((label, mask))
    return image, masks
