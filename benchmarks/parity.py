"""Whether our detector and torchvision's, with the same weights, find the same in real photos.

    python benchmarks/parity.py --data DIR --split val2017 --images 12 --size 800

Weights are random, with batch-norm statistics and heads set from photos of the split (see `random_weights`).
Boxes, scores, labels and pasted masks are compared in the pixels of the original photos: each photo alone,
and then some photos of mixed sizes as one batch. `--floor` also compares torchvision with itself in another
memory layout, where convolutions add in another order: float32 can do no better than that.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matching import Mismatch, compare_detections, merge
from peers import TorchvisionDetector
from random_weights import calibrated_state_dict, torchvision_model
from torch import Tensor

from maskrcnn.config import MODELS, model_config
from maskrcnn.errors import told_to_the_user
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.detector import Detector
from maskrcnn.weights.checkpoint import load_weights

_CALIBRATION_IMAGES = 8
_MIXED_BATCH = 3


def both_detectors(
    model_name: str, state_dict: dict[str, Tensor], *, min_size_px: int, max_size_px: int
) -> tuple[Detector, TorchvisionDetector]:
    """Our detector and torchvision's with the same weights, on the CPU."""
    classes = state_dict["roi_heads.box_predictor.cls_score.weight"].shape[0]
    config = model_config(
        model_name,
        class_names=tuple(f"class_{label}" for label in range(1, classes)),
        category_ids=tuple(range(1, classes)),
        preprocessing=Preprocessing(min_size_px=min_size_px, max_size_px=max_size_px),
    )
    ours = MaskRCNN(config)
    load_weights(ours, state_dict, "calibrated weights")
    theirs = torchvision_model(model_name, classes, min_size_px=min_size_px, max_size_px=max_size_px)
    theirs.load_state_dict(state_dict)
    detector = Detector(TorchBackend(ours))
    return detector, TorchvisionDetector(theirs, detector.metadata)


def _compare_batch(
    reference: TorchvisionDetector | Detector, other: TorchvisionDetector | Detector, images: Sequence[np.ndarray]
) -> list[Mismatch]:
    """The mismatch of each image of a batch."""
    batches = (reference.detect(list(images)), other.detect(list(images)))
    rows = other.metadata.detections
    return [compare_detections(first, second, rows=rows) for first, second in zip(*batches, strict=True)]


def _load_photos(data: Path, split: str, count: int) -> tuple[list[str], list[np.ndarray]]:
    """The first photos of a split in COCO layout, and their file names."""
    from maskrcnn.data.coco import CocoDataset, find_split
    from maskrcnn.data.images import read_image

    records = CocoDataset.load(data, find_split(data, split)).images[:count]
    return [record.path.name for record in records], [read_image(record.path) for record in records]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the mismatch of each photo and of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder in COCO layout")
    parser.add_argument("--split", default="val2017")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--size", type=int, default=800, help="shorter side of the resized photo, px")
    parser.add_argument("--model", choices=list(MODELS), default="maskrcnn_resnet50_fpn")
    parser.add_argument("--classes", type=int, default=91, help="with background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--floor", action="store_true", help="also compare torchvision with itself")
    given = parser.parse_args(arguments)

    names, photos = _load_photos(given.data, given.split, given.images)
    sizes = {"min_size_px": given.size, "max_size_px": round(given.size * 1333 / 800)}
    weights = calibrated_state_dict(given.model, given.classes, photos[:_CALIBRATION_IMAGES], given.seed, **sizes)
    ours, theirs = both_detectors(given.model, weights, **sizes)
    twin = _channels_last(theirs) if given.floor else None
    alone, floor = [], []
    for name, photo in zip(names, photos, strict=True):
        alone += _compare_batch(theirs, ours, [photo])
        print(f"{name} {photo.shape[1]}×{photo.shape[0]}: {alone[-1]}", flush=True)
        if twin:
            floor += _compare_batch(theirs, twin, [photo])
    print(f"\nbatch 1, {len(alone)} photos: {merge(alone)}")
    if twin:
        print(f"torchvision with itself, {len(floor)} photos: {merge(floor)}")
    mixed = _of_mixed_sizes(photos)
    shapes = ", ".join(f"{photo.shape[1]}×{photo.shape[0]}" for photo in mixed)
    print(f"one batch of {shapes}: {merge(_compare_batch(theirs, ours, mixed))}")


def _channels_last(detector: TorchvisionDetector) -> TorchvisionDetector:
    """The same detector with its weights, and so its features, in channels-last memory layout."""
    model = copy.deepcopy(detector.model).to(memory_format=torch.channels_last)
    return TorchvisionDetector(model, detector.metadata)


def _of_mixed_sizes(photos: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Up to `_MIXED_BATCH` photos, of different sizes where there are such."""
    by_shape = {photo.shape: photo for photo in reversed(photos)}
    chosen = list(by_shape.values())[-_MIXED_BATCH:]
    return chosen if len(chosen) == _MIXED_BATCH else list(photos[:_MIXED_BATCH])


if __name__ == "__main__":
    with told_to_the_user():
        main()
