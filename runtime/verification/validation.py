"""Comparing a model with another on inputs that neither was made with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from maskrcnn.data.shapes import shapes_image
from maskrcnn.runtime.backend import Backend
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
