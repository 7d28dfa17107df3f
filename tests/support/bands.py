"""Drawn datasets with four bands or 12 bits: discs of two classes that are invisible in 8-bit RGB.

python tests/support/bands.py four-bands FOLDER
python tests/support/bands.py 12-bit FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np

from maskrcnn.data.drawn import mask_annotation

SIZE_PX = 96
KINDS = ("four-bands", "12-bit")


def draw(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draws an image `[H, W, 4]` uint8 or `[H, W]` uint16; returns it with its objects (label, mask).

    With four bands, the discs are only in the fourth, bright (1) or dark (2); the other bands are noise. With 12 bits,
    the discs are 100 levels brighter or darker than the background of 300, out of 4095.
    """
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX] + 0.5
    ground = rng.normal(128, 8, (SIZE_PX, SIZE_PX))
    taken, objects = np.zeros((SIZE_PX, SIZE_PX), bool), []
    for _ in range(int(rng.integers(1, 4))):
        radius = rng.uniform(9, 18)
        mask = np.hypot(y - rng.uniform(radius, SIZE_PX - radius), x - rng.uniform(radius, SIZE_PX - radius)) < radius
        if (mask & taken).any():
            continue
        taken |= mask
        label = int(rng.integers(1, 3))
        ground[mask] += 90 if label == 1 else -90
        objects.append((label, mask))
    if kind == "12-bit":
        return (300 + (ground - 128) * (100 / 90)).round().clip(0, 4095).astype(np.uint16), objects
    rgb = rng.normal(128, 30, (SIZE_PX, SIZE_PX, 3))
    return np.dstack([rgb, ground]).round().clip(0, 255).astype(np.uint8), objects


def write_band_dataset(root: Path, kind: str, images: dict[str, int]) -> Path:
    """Writes a dataset in COCO layout with the given number of images per split: four-band TIFF, or 16-bit PNG."""
    for number, (split, count) in enumerate(images.items()):
        folder = root / split
        folder.mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        entries, annotations = [], []
        for index in range(1, count + 1):
            pixels, objects = draw(kind, np.random.default_rng([number, index]))
            name = f"{index}.{'png' if kind == '12-bit' else 'tif'}"
            _save(pixels, folder / name)
            entries.append({"id": index, "file_name": name, "height": SIZE_PX, "width": SIZE_PX})
            for label, mask in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": index, **mask_annotation(label, mask)})
        categories = [{"id": 1, "name": "bright"}, {"id": 2, "name": "dark"}]
        content = {"images": entries, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def _save(pixels: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path)  # four bands: Pillow stores the fourth as alpha, unchanged


if __name__ == "__main__":
    write_band_dataset(Path(sys.argv[2]), sys.argv[1], {"train": 200, "val": 40})
