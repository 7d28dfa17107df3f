"""The images on which two models are compared, and how each model is fed with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maskrcnn.data.shapes import shapes_image
from maskrcnn.preprocess import Preprocessing, batch_images


@dataclass(frozen=True)
class Batch:
    """Images that are run together."""

    names: tuple[str, ...]
    images: tuple[np.ndarray, ...]  # uint8 [H, W, 3] RGB; those without pixels are empty slots, and come last


def drawn_batches(seed: int = 0) -> list[Batch]:
    """Drawn shapes alone and in a batch with an empty slot, and an even grey image; of several sizes."""
    rng = np.random.default_rng(seed)
    alone, wide, tall = (shapes_image(rng, size_hw)[0] for size_hw in ((150, 210), (144, 256), (200, 150)))
    empty, grey = np.zeros((0, 0, 3), np.uint8), np.full((128, 128, 3), 128, np.uint8)
    return [
        Batch(("shapes 1",), (alone,)),
        Batch(("shapes 2", "shapes 3", "empty slot"), (wide, tall, empty)),
        Batch(("grey",), (grey,)),
    ]


@dataclass(frozen=True)
class Feeding:
    """How one of two models gets its images."""

    own: Preprocessing  # by its metadata
    shared: Preprocessing  # in the sizes of the reference, so that tensors can be compared

    def own_feeds(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """What this model would be fed with anywhere."""
        return feeds_of(images, self.own)

    def shared_feeds(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """The same images in the reference's sizes."""
        return feeds_of(images, self.shared)

    @property
    def is_resized(self) -> bool:
        """Whether the two differ."""
        return self.own != self.shared


def feedings(reference: Preprocessing, other: Preprocessing, size_px: int | None = None) -> tuple[Feeding, Feeding]:
    """How two models are fed: the shared sizes are the reference's, padded to what both can take.

    Args:
        reference: of the model that the other is measured by.
        other: of the other; its channel order stays.
        size_px: shorter side of the resized images for both, instead of each one's own.
    """
    if size_px is not None:
        reference, other = (
            dataclasses.replace(rule, min_size_px=size_px, max_size_px=max(size_px, rule.max_size_px))
            for rule in (reference, other)
        )
    sizes = {
        "min_size_px": reference.min_size_px,
        "max_size_px": reference.max_size_px,
        "divisor": math.lcm(reference.divisor, other.divisor),
        "resize": reference.resize,  # it decides how sides are rounded, too
    }
    first, second = (Feeding(rule, dataclasses.replace(rule, **sizes)) for rule in (reference, other))
    return first, second


def feeds_of(images: Sequence[np.ndarray], preprocessing: Preprocessing) -> dict[str, np.ndarray]:
    """Inputs of a detector; images without pixels become slots of size 0 × 0, all padding.

    Args:
        images: uint8 `[H, W, 3]` RGB, the first with pixels, those without any last.
        preprocessing: the model's.
    """
    present = [image for image in images if image.size]
    pixels, sizes = batch_images(present, preprocessing)
    empty = len(images) - len(present)
    return {
        "images": np.concatenate([pixels, np.zeros((empty, *pixels.shape[1:]), np.float32)]),
        "image_sizes": np.concatenate([sizes, np.zeros((empty, 2), np.int64)]),
    }
