"""COCO's segmentations of many objects as compressed run lengths, checked before pycocotools' C code sees them.

That code trusts its input: it reads beyond a mask whose runs add up to more than the image. Strings, which results
files hold by the hundred thousand, are checked many at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.data.segmentation import AnnotationError, checked_segmentation, compressed_rle, finite_numbers
from maskrcnn.errors import UserError
from maskrcnn.run_lengths import Runs, runs_from_strings, strings_from_runs

_AT_ONCE = 256  # strings of some hundred characters: their numbers stay in the processor's cache

Fault = Callable[[int, str], UserError]


def compressed(
    segmentations: Sequence[Any], sizes_hw: Sequence[tuple[int, int]], fault: Fault
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Run lengths as pycocotools takes them, and pixels `[N]` int64 of each mask.

    Args:
        segmentations: polygons, or run lengths as a list or as COCO's string; a mask may be empty.
        sizes_hw: (height, width) of each one's image.
        fault: makes the error for the segmentation of an index, of what is wrong with it.

    Raises:
        UserError: made by `fault`, for what is malformed or of another size than the image.
    """
    found: list[dict[str, Any]] = []
    areas = []
    for start in range(0, len(segmentations), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        sizes = sizes_hw[part]
        masks = [
            value if _is_compressed(value, size) else _as_strings(value, size, index, fault)
            for index, (value, size) in enumerate(zip(segmentations[part], sizes, strict=True), start)
        ]
        runs, is_good = runs_from_strings([mask["counts"] for mask in masks])
        pixels, totals = runs.sums()
        is_good &= totals == [height * width for height, width in sizes]
        is_good[np.repeat(np.arange(len(masks)), runs.lengths)[runs.runs < 0]] = False
        for index in np.flatnonzero(~is_good).tolist():
            height, width = sizes[index]
            raise fault(start + index, f"run lengths that do not add up to {height}×{width} pixels")
        found += masks
        areas.append(pixels)
    return found, np.concatenate(areas) if areas else np.zeros(0, np.int64)


def _is_compressed(segmentation: Any, size_hw: tuple[int, int]) -> bool:
    """Whether it is run lengths as COCO's string, of the right size."""
    return (
        type(segmentation) is dict
        and type(segmentation.get("counts")) in (str, bytes)
        and segmentation.get("size") == [*size_hw]
    )


def _as_strings(segmentation: Any, size_hw: tuple[int, int], index: int, fault: Fault) -> dict[str, Any]:
    """Compressed run lengths, whose string is yet to be checked, of anything else."""
    height, width = size_hw
    if isinstance(segmentation, list) and segmentation and all(isinstance(part, np.ndarray) for part in segmentation):
        return compressed_rle(segmentation, height, width)  # of a dataset, which has checked it
    if isinstance(segmentation, list):
        try:
            return compressed_rle(checked_segmentation(segmentation, height, width), height, width)
        except AnnotationError as error:
            raise fault(index, str(error)) from error
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise fault(index, f"segmentation of type {type(segmentation).__name__}, neither polygons nor run lengths")
    if list(segmentation["size"]) != [height, width]:
        raise fault(index, f"a mask of size {segmentation['size']!r}, its image measures [{height}, {width}]")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        runs = finite_numbers(counts)
        if runs is None or not runs.size or runs.min() < 0 or runs.max() > height * width or (runs % 1).any():
            raise fault(index, "run lengths that are not numbers of pixels")
        counts = strings_from_runs(Runs(runs.astype(np.int64), np.array([runs.size])))[0]
    if not isinstance(counts, (str, bytes)):
        raise fault(index, f"run lengths of type {type(counts).__name__}")
    return {"size": [height, width], "counts": counts}


def boxes_of(masks: Sequence[dict[str, Any]]) -> np.ndarray:
    """The box (x, y, width, height) `[N, 4]` float64 around each mask."""
    return np.asarray(mask_api.toBbox(list(masks)), np.float64).reshape(-1, 4) if masks else np.zeros((0, 4))
