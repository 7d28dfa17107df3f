"""Where the time of one call goes: decoding, preprocessing, copies, the engine, postprocessing."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.data.images import read_image
from maskrcnn.postprocess import unpack
from maskrcnn.preprocess import batch_images
from maskrcnn.runtime import Detector

PARTS = ("decode", "preprocess", "copy in", "engine", "copy out", "postprocess")


def split_of_call(
    detector: Any, images: Sequence[np.ndarray], files: Sequence[Path], *, repeat: int
) -> dict[str, float] | None:
    """Milliseconds of each part of one call, medians.

    Args:
        detector: opened; a peer, which does not show its parts, gives None.
        images: of one call.
        files: those that the images were read from; without them there is no "decode".
        repeat: measured calls, after one to warm up.

    Returns:
        by the names of `PARTS`. Backends that do not tell their copies apart have them in "engine".
    """
    if not isinstance(detector, Detector):
        return None
    calls = [_one_call(detector, images, files) for _ in range(repeat + 1)][1:]
    found = {part: statistics.median(call[part] for call in calls) for part in PARTS if part in calls[0]}
    return {part: milliseconds for part, milliseconds in found.items() if part in calls[0]}


def _one_call(detector: Detector, images: Sequence[np.ndarray], files: Sequence[Path]) -> dict[str, float]:
    marks = [("", time.perf_counter())]

    def mark(part: str) -> None:
        marks.append((part, time.perf_counter()))

    for path in files:
        read_image(path)
    mark("decode")
    pixels, sizes = batch_images(list(images), detector.metadata.preprocessing)
    mark("preprocess")
    feeds = {"images": pixels, "image_sizes": sizes}
    timed = getattr(detector.backend, "infer_timed", None)
    outputs, inside = timed(feeds) if timed else (detector.backend(feeds), {})
    mark("engine")
    for found in unpack(outputs, sizes, [image.shape[:2] for image in images]):
        if found.has_masks:
            found.rles()
    mark("postprocess")
    parts = {part: 1e3 * (end - began) for (_, began), (part, end) in itertools.pairwise(marks)} | inside
    return parts if files else {part: value for part, value in parts.items() if part != "decode"}
