"""Comparing a model with another on inputs that neither was made with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from maskrcnn.data.shapes import shapes_image
from maskrcnn.imaging.preprocess import Preprocessing, batch_images
from maskrcnn.runtime.backends.base import Backend
from maskrcnn.runtime.verification.compare import Difference, Tolerance, compare_outputs, merge


def validation_batches(divisor: int, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Feeds of several batch sizes and shapes: drawn shapes, a grey image, and an empty slot.

    An empty slot is an image of size 0 × 0, all padding; it has no detections whatever the weights. The grey image has
    nothing in it but gets lighter by some levels: to an even one a model that has learnt little may give the same
    scores everywhere, and which are the best of equals is a matter of rounding.
    """
    rng = np.random.default_rng(seed)
    for batch, blocks in ((1, (5, 7)), (3, (8, 6)), (2, (12, 10))):
        height, width = (max(1, round(b * 32 / divisor)) * divisor for b in blocks)
        yield _drawn(rng, [(height, width), (height - 17, width - 40), (0, 0)][:batch], (height, width))
    ramp = np.linspace(-10, 10, 4 * divisor, dtype=np.float32)
    grey = np.full((1, 3, 4 * divisor, 4 * divisor), 128, np.float32) + ramp[:, None] + 0.5 * ramp
    yield {"images": grey, "image_sizes": np.array([[4 * divisor, 4 * divisor]], np.int64)}


def batches_of_shapes(shapes: Iterable[tuple[int, int, int]], seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Feeds of drawn shapes for an engine that takes certain shapes alone.

    Args:
        shapes: images, height and width in pixels of each batch. The second image of a batch is smaller than it; the
            last of three or more is an empty slot.
        seed: of the drawings.
    """
    rng = np.random.default_rng(seed)
    for batch, height, width in shapes:
        sizes = [(height, width)] * batch
        sizes[1:2] = [(-(-3 * height // 4), -(-2 * width // 3))] * (batch > 1)
        sizes[-1:] = [(0, 0)] if batch > 2 else sizes[-1:]
        yield _drawn(rng, sizes, (height, width))


def _drawn(rng: np.random.Generator, sizes: list[tuple[int, int]], size_hw: tuple[int, int]) -> dict[str, np.ndarray]:
    """A batch of drawn shapes, each image of its own size in the common one."""
    images = np.zeros((len(sizes), 3, *size_hw), np.float32)
    for image, (h, w) in zip(images, sizes, strict=True):
        if h:
            image[:, :h, :w] = shapes_image(rng, (h, w))[0].transpose(2, 0, 1)
    return {"images": images, "image_sizes": np.array(sizes, np.int64)}


def compare_backends(
    reference: Backend, other: Backend, tolerance: Tolerance, batches: Iterable[dict[str, np.ndarray]] | None = None
) -> Difference:
    """The difference of two backends on `batches`, by default `validation_batches`."""
    if batches is None:
        batches = validation_batches(reference.metadata.preprocessing.divisor)
    return merge([compare_outputs(reference(feeds), other(feeds), tolerance) for feeds in batches])


# The images on which two models are compared, and how each model is fed with them.


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
class _Feeding:
    """How one of two models gets its images."""

    own: Preprocessing  # by its metadata
    shared: Preprocessing  # in the sizes of the reference, so that tensors can be compared

    def own_feeds(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """What this model would be fed with anywhere."""
        return _feeds_of(images, self.own)

    def shared_feeds(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """The same images in the reference's sizes."""
        return _feeds_of(images, self.shared)

    @property
    def is_resized(self) -> bool:
        """Whether the two differ."""
        return self.own != self.shared


def feedings(reference: Preprocessing, other: Preprocessing, size_px: int | None = None) -> tuple[_Feeding, _Feeding]:
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
    first, second = (_Feeding(rule, dataclasses.replace(rule, **sizes)) for rule in (reference, other))
    return first, second


def _feeds_of(images: Sequence[np.ndarray], preprocessing: Preprocessing) -> dict[str, np.ndarray]:
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
