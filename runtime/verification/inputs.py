"""Inputs for comparing two models: batches of tensors, and images with each model's preprocessing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskrcnn.data.shapes import shapes_image
from maskrcnn.imaging.preprocess import Preprocessing, batch_images, channels_from_rgb
from maskrcnn.runtime.backends.base import Backend
from maskrcnn.runtime.verification.compare import Difference, Tolerance, compare_outputs, merge


def validation_batches(divisor: int, channels: int = 3, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Generates inputs of several batch sizes and shapes: drawn shapes, a grey image, and an empty slot.

    An empty slot is an image of size 0 × 0 that is all padding; it has no detections with any weights. The grey image
    has a slight gradient: on a uniform image, a barely trained model may give equal scores everywhere, and rounding
    would decide which are best.

    Args:
        divisor: number of which height and width are multiples.
        channels: channels of the images, see `channels_from_rgb`.
        seed: random seed of the drawings.
    """
    rng = np.random.default_rng(seed)
    for batch, blocks in ((1, (5, 7)), (3, (8, 6)), (2, (12, 10))):
        height, width = (max(1, round(b * 32 / divisor)) * divisor for b in blocks)
        yield _drawn(rng, [(height, width), (height - 17, width - 40), (0, 0)][:batch], (height, width), channels)
    ramp = np.linspace(-10, 10, 4 * divisor, dtype=np.float32)
    grey = np.full((1, channels, 4 * divisor, 4 * divisor), 128, np.float32) + ramp[:, None] + 0.5 * ramp
    yield {"images": grey, "image_sizes": np.array([[4 * divisor, 4 * divisor]], np.int64)}


def batches_of_shapes(
    shapes: Iterable[tuple[int, int, int]], channels: int = 3, seed: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Generates inputs of drawn shapes for an engine of fixed shapes.

    Args:
        shapes: (images, height, width) of each batch. The second image of a batch is smaller than the batch; the last
            of three or more is an empty slot.
        channels: channels of the images, see `channels_from_rgb`.
        seed: random seed of the drawings.
    """
    rng = np.random.default_rng(seed)
    for batch, height, width in shapes:
        sizes = [(height, width)] * batch
        sizes[1:2] = [(-(-3 * height // 4), -(-2 * width // 3))] * (batch > 1)
        sizes[-1:] = [(0, 0)] if batch > 2 else sizes[-1:]
        yield _drawn(rng, sizes, (height, width), channels)


def _drawn(
    rng: np.random.Generator, sizes: list[tuple[int, int]], size_hw: tuple[int, int], channels: int
) -> dict[str, np.ndarray]:
    """A batch of drawn shapes, each image of its own size padded to `size_hw`."""
    images = np.zeros((len(sizes), channels, *size_hw), np.float32)
    for image, (h, w) in zip(images, sizes, strict=True):
        if h:
            image[:, :h, :w] = channels_from_rgb(shapes_image(rng, (h, w))[0], channels).transpose(2, 0, 1)
    return {"images": images, "image_sizes": np.array(sizes, np.int64)}


def compare_backends(
    reference: Backend, other: Backend, tolerance: Tolerance, batches: Iterable[dict[str, np.ndarray]] | None = None
) -> Difference:
    """Compares two backends on `batches` (default: `validation_batches`)."""
    if batches is None:
        rule = reference.metadata.preprocessing
        batches = validation_batches(rule.divisor, rule.channels)
    classes = len(reference.metadata.class_names)
    return merge([compare_outputs(reference(feeds), other(feeds), tolerance, num_classes=classes) for feeds in batches])


@dataclass(frozen=True)
class Batch:
    """Images of one inference."""

    names: tuple[str, ...]
    images: tuple[np.ndarray, ...]  # [H, W, C], see `batch_images`; empty slots, without pixels, come last


def drawn_batches(channels: int = 3, seed: int = 0) -> list[Batch]:
    """Drawn shapes, single and in a batch with an empty slot, and a uniform grey image; of several sizes."""
    rng = np.random.default_rng(seed)
    alone, wide, tall = (
        channels_from_rgb(shapes_image(rng, size_hw)[0], channels) for size_hw in ((150, 210), (144, 256), (200, 150))
    )
    empty, grey = np.zeros((0, 0, channels), np.uint8), np.full((128, 128, channels), 128, np.uint8)
    return [
        Batch(("shapes 1",), (alone,)),
        Batch(("shapes 2", "shapes 3", "empty slot"), (wide, tall, empty)),
        Batch(("grey",), (grey,)),
    ]


@dataclass(frozen=True)
class _Feeding:
    """Preprocessing of one of two compared models."""

    own: Preprocessing  # from its metadata
    shared: Preprocessing  # with the reference's sizes, so that tensors can be compared

    def own_feeds(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """The model's usual inputs."""
        return _feeds_of(images, self.own)

    def shared_feeds(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs in the reference's sizes."""
        return _feeds_of(images, self.shared)

    @property
    def is_resized(self) -> bool:
        """Whether the two differ."""
        return self.own != self.shared


def feedings(reference: Preprocessing, other: Preprocessing, size_px: int | None = None) -> tuple[_Feeding, _Feeding]:
    """The preprocessing of two models: shared sizes are the reference's, padded to a divisor of both.

    Args:
        reference: preprocessing of the reference.
        other: preprocessing of the other model; its channel order stays.
        size_px: shorter side of the resized images of both (default: each one's own).
    """
    if size_px is not None:
        reference, other = (
            dataclasses.replace(rule, min_size_px=size_px, max_size_px=max(size_px, rule.max_size_px))
            for rule in (reference, other)
        )
    sizes: dict[str, Any] = {
        "min_size_px": reference.min_size_px,
        "max_size_px": reference.max_size_px,
        "divisor": math.lcm(reference.divisor, other.divisor),
        "resize": reference.resize,  # also decides how sides are rounded
    }
    first, second = (_Feeding(rule, dataclasses.replace(rule, **sizes)) for rule in (reference, other))
    return first, second


def _feeds_of(images: Sequence[np.ndarray], preprocessing: Preprocessing) -> dict[str, np.ndarray]:
    """Preprocesses images (`[H, W, C]`); those without pixels, which come last, become empty slots."""
    present = [image for image in images if image.size]
    pixels, sizes = batch_images(present, preprocessing)
    empty = len(images) - len(present)
    return {
        "images": np.concatenate([pixels, np.zeros((empty, *pixels.shape[1:]), np.float32)]),
        "image_sizes": np.concatenate([sizes, np.zeros((empty, 2), np.int64)]),
    }
