"""Cost of the training data pipeline.

    python benchmarks/data.py DATASET [--split train] [--min-size 800] [--images 200] [--workers 2]

prints, for one core, the stages of a plain sample and whole samples with each augmentation alone, and the rate of the
loader with its workers. DATASET is a COCO-format folder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import environment

from maskrcnn.config import AugmentConfig
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.images import read_image
from maskrcnn.data.layouts import find_split
from maskrcnn.errors import UserError, report_errors
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.training.augmentation import Augmentation
from maskrcnn.training.loader import collate, training_loader
from maskrcnn.training.samples import Sample, TrainingSamples
from maskrcnn.training.view import objects_in_view

_BATCH_SIZE = 8
AUGMENTATIONS = {
    "flip": {},
    "colours": {"colour_probability": 1.0},
    "large-scale jitter": {"jitter_probability": 1.0},
    "perspective": {"perspective_probability": 1.0},
    "mosaic": {"mosaic_probability": 1.0},
    "mixup": {"mixup_probability": 1.0},
    "copy-paste": {"copy_paste_probability": 1.0},
}


def _stage_seconds(dataset: CocoDataset, preprocessing: Preprocessing, images: int) -> dict[str, float]:
    """Seconds per image in each stage of a sample that is flipped and resized; flipping copies nothing."""
    config = AugmentConfig()
    augmentation, rng = Augmentation(config, preprocessing), np.random.default_rng(0)
    seconds = dict.fromkeys(("decode", "flip and resize", "masks", "collate"), 0.0)

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        seconds[stage] += (time.perf_counter() - start) / images
        return result

    waiting: list[Sample] = []
    for number in range(images):
        record = dataset.images[number % len(dataset.images)]
        view = augmentation.view((record.height, record.width), rng)
        decoded = timed("decode", lambda record=record: read_image(record.path))
        image = timed("flip and resize", lambda decoded=decoded, view=view: augmentation.image(decoded, view, rng))
        objects = timed("masks", lambda record=record, view=view: objects_in_view(record, view, config.least_visible))
        waiting.append(Sample(record.id, image, objects, 0))
        if len(waiting) == _BATCH_SIZE:
            timed("collate", lambda waiting=waiting: collate(waiting, preprocessing.divisor))
            waiting = []
    return seconds


def sample_seconds(dataset: CocoDataset, preprocessing: Preprocessing, augment: AugmentConfig, images: int) -> float:
    """Measure seconds per sample, without collating.

    Raises:
        UserError: if a file cannot be used.
    """
    samples = TrainingSamples(dataset, preprocessing, augment=augment, seed=0)
    start = time.perf_counter()
    for number in range(images):
        found = samples[number // len(samples), number % len(samples)]
        if isinstance(found, UserError):
            raise found
    return (time.perf_counter() - start) / images


def loader_rate(dataset: CocoDataset, preprocessing: Preprocessing, workers: int, images: int) -> float:
    """Measure images per second of the loader, with its workers started and warm.

    Raises:
        UserError: if a file cannot be used.
    """
    samples = TrainingSamples(dataset, preprocessing, seed=0)
    loader, sampler = training_loader(samples, batch_size=_BATCH_SIZE, workers=workers, pin_memory=False)
    count, start, batches = 0, None, -(-images // _BATCH_SIZE)
    while count < batches:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            if start is None:
                start = time.perf_counter()  # after the first batch, which waited for the workers
                continue
            count += 1
            if count == batches:
                break
        sampler.epoch += 1
    return count * _BATCH_SIZE / (time.perf_counter() - start)


def main() -> None:
    """Measure and print three tables and the machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path, help="COCO-format folder")
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument(
        "--min-size", type=int, default=800, help="shorter side of the resized images, px; default: 800"
    )
    parser.add_argument("--images", type=int, default=200, help="images per measurement; default: 200")
    parser.add_argument("--workers", type=int, default=2, help="processes of the loader; default: 2")
    given = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker
    with report_errors():
        dataset = CocoDataset.load(given.dataset, find_split(given.dataset, given.split))
        preprocessing = Preprocessing(min_size_px=given.min_size, max_size_px=round(given.min_size * 1333 / 800))
        seconds = _stage_seconds(dataset, preprocessing, given.images)
        print(f"{'stage':22}{'ms per image':>14}{'images/s':>12}")
        for stage, value in {**seconds, "all stages": sum(seconds.values())}.items():
            print(_line(stage, value))
        print(f"\n{'sample with':22}{'ms per image':>14}{'images/s':>12}")
        for name, values in AUGMENTATIONS.items():
            print(_line(name, sample_seconds(dataset, preprocessing, AugmentConfig(**values), given.images)))
        rate = loader_rate(dataset, preprocessing, given.workers, given.images)
        print(f"\nloader, {given.workers} worker(s): {rate:.1f} images/s")
    print(json.dumps(environment()))


def _line(name: str, seconds: float) -> str:
    return f"{name:22}{1000 * seconds:14.2f}{1 / max(seconds, 1e-9):12.1f}"


if __name__ == "__main__":
    main()
