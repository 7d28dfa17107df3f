"""A dataset with a different colour for each keypoint's spot, so that a pixel's colour identifies the keypoint."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("left_corner", "tip", "right_corner")
SPOTS = ((230, 20, 20), (20, 230, 20), (20, 20, 230))  # RGB of each keypoint
BODY, GROUND = (90, 90, 90), (140, 140, 140)
RADIUS_PX = 6.0
SIZES_HW = ((110, 80), (80, 110), (96, 96))


def write_marked_dataset(root: Path) -> Path:
    """Writes split "train" of nine images with one or two plates each; the plates of every third image have no spots.

    Seen from the left corner, the right corner is clockwise of the tip in any orientation of a plate.
    """
    rng = np.random.default_rng(4)
    (root / "train").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations = [], []
    for number in range(9):
        height, width = SIZES_HW[number % len(SIZES_HW)]
        image = np.full((height, width, 3), GROUND, np.uint8)
        images.append({"id": number + 1, "file_name": f"{number}.png", "height": height, "width": width})
        for plate in range(1 + number % 2 if height != width else 1):
            side = int(rng.integers(34, 40))
            left = int(rng.integers(0, width - side)) if height >= width else plate * width // 2 + 5
            top = int(rng.integers(0, height // 2 - side)) if height > width and not plate else height // 2 - 5
            top = min(top, height - side)
            image[top : top + side, left : left + side] = BODY
            spots = [] if number % 3 == 2 else _spots(left, top, side)
            _paint(image, spots)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": 1,
                    "iscrowd": 0,
                    "bbox": [left, top, side, side],
                    "area": side * side,
                    "segmentation": [[left, top, left + side, top, left + side, top + side, left, top + side]],
                    "keypoints": [value for spot in spots for value in (*spot, 2)],
                }
            )
        Image.fromarray(image).save(root / "train" / f"{number}.png")
    categories = [{"id": 1, "name": "plate", "keypoints": list(NAMES), "skeleton": [[1, 2], [2, 3]]}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


def _spots(left: int, top: int, side: int) -> list[tuple[float, float]]:
    return [(left + 8.5, top + side - 8.5), (left + side / 2, top + 8.5), (left + side - 8.5, top + side - 8.5)]


def _paint(image: np.ndarray, spots: list[tuple[float, float]]) -> None:
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    for (spot_x, spot_y), colour in zip(spots, SPOTS, strict=False):
        image[np.hypot(x - spot_x, y - spot_y) < RADIUS_PX] = colour
