"""What both trainers train on: the same images and objects, in the form that each takes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_api
from torch import Tensor

from maskrcnn.config import AugmentConfig, TrainConfig
from maskrcnn.data.coco import CocoDataset, ImageRecord, instance_mask
from maskrcnn.data.crops import resized_mask
from maskrcnn.data.loader import Batch, collate
from maskrcnn.data.samples import TrainingSamples
from maskrcnn.data.shapes import shapes_image
from maskrcnn.data.view import MIN_SIDE_PX, instances_of
from maskrcnn.errors import UserError
from maskrcnn.files import write_json

SPLIT = "train"
_TILES = 2  # along each side of a generated image; a tile has 3 shapes on average
AS_IT_IS = AugmentConfig(flip_probability=0.0)


@dataclass(frozen=True, eq=False)
class Work:
    """One batch."""

    batch: Batch
    images: list[Tensor]  # float32 [3, h, w] in 0–1, as torchvision's models take them
    targets: list[dict[str, Tensor]]  # boxes, labels and masks of the image's size, likewise


def generated_dataset(folder: Path, count: int, size_hw: tuple[int, int], classes: int) -> Path:
    """Writes images of drawn shapes, about a dozen each, in COCO's layout; returns `folder`.

    Args:
        folder: to write to.
        count: images.
        size_hw: of each.
        classes: the shapes' classes are drawn from so many; a benchmark learns nothing anyway.
    """
    (folder / SPLIT).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        rng = np.random.default_rng((number, *size_hw))
        pixels, masks = _drawn(rng, size_hw)
        name = f"{number:06}.png"
        Image.fromarray(pixels).save(folder / SPLIT / name, compress_level=1)
        images.append({"id": number, "file_name": name, "height": size_hw[0], "width": size_hw[1]})
        for mask in masks:
            rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(rng.integers(1, classes + 1)),
                    "bbox": mask_api.toBbox(rle).tolist(),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": list(size_hw), "counts": rle["counts"].decode("ascii")},
                }
            )
    categories = [{"id": label, "name": f"class_{label}"} for label in range(1, classes + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(folder / "annotations" / f"instances_{SPLIT}.json", content, indent=None)
    return folder


def _drawn(rng: np.random.Generator, size_hw: tuple[int, int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """An image `[H, W, 3]` of several generated ones side by side, and the masks of its objects."""
    pixels, masks = np.zeros((*size_hw, 3), np.uint8), []
    rows, columns = (np.linspace(0, side, _TILES + 1).astype(int) for side in size_hw)
    for (top, bottom), (left, right) in itertools.product(itertools.pairwise(rows), itertools.pairwise(columns)):
        tile, objects = shapes_image(rng, (bottom - top, right - left))
        pixels[top:bottom, left:right] = tile
        for _, part in objects:
            mask = np.zeros(size_hw, bool)
            mask[top:bottom, left:right] = part
            masks.append(mask)
    return pixels, masks


def make_work(config: TrainConfig, most: int, *, pinned: bool) -> list[Work]:
    """Up to `most` different batches of the configuration's dataset, at least one, without augmentation.

    Where the dataset has too few images, they occur again.

    Args:
        config: dataset, preprocessing and batch size.
        most: batches.
        pinned: whether our batches lie in page-locked memory, as our data loader leaves them for a GPU.
    """
    dataset = CocoDataset.load(config.data, config.train_split)
    samples = TrainingSamples(dataset, config.model.preprocessing, augment=AS_IT_IS, seed=config.seed)
    size, total = config.batch_size, len(dataset.images)
    batches = max(1, min(most, total // size))
    chosen = [[(k * size + j) % total for j in range(size)] for k in range(batches)]
    work = [_work(samples, indices, config.model.has_masks) for indices in chosen]
    return [replace(w, batch=w.batch.pin_memory()) for w in work] if pinned else work


def _work(samples: TrainingSamples, indices: list[int], with_masks: bool) -> Work:
    loaded = [samples[0, index] for index in indices]
    for sample in loaded:
        if isinstance(sample, UserError):
            raise sample
    batch = collate(loaded, samples.preprocessing.divisor)
    images, targets = [], []
    for n, index in enumerate(indices):
        height, width = batch.image_sizes[n].tolist()
        valid = batch.valid[n]
        masks = _full_masks(samples.dataset.images[index], (height, width))
        if len(masks) != int(valid.sum()):
            raise RuntimeError(f"{len(masks)} full-size masks for {int(valid.sum())} objects of a sample")
        images.append(batch.images[n, :, :height, :width] / 255)
        targets.append({"boxes": batch.boxes[n, valid], "labels": batch.labels[n, valid]})
        if with_masks:
            targets[-1]["masks"] = torch.from_numpy(masks)
    return Work(batch, images, targets)


def _full_masks(record: ImageRecord, size_hw: tuple[int, int]) -> np.ndarray:
    """Masks uint8 `[G, h, w]` in the resized image, of the objects that a sample keeps."""
    scale = np.array([size_hw[1] / record.width, size_hw[0] / record.height] * 2)
    masks = []
    for instance in instances_of(record):
        box = np.array(instance.box_xyxy_px) * scale
        mask = resized_mask(instance_mask(record, instance), size_hw)
        if mask.any() and min(box[2:] - box[:2]) >= MIN_SIDE_PX:
            masks.append(mask)
    return np.array(masks, np.uint8).reshape(-1, *size_hw)
