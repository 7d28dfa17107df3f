"""Object masks as crops of constant size, from which `maskrcnn.model.mask_targets` computes training targets.

A mask in the resized image has pixel i where the original has pixel floor(i · in / out): nearest-neighbour
interpolation, as torchvision resizes masks. The crop keeps those pixels as they are where the object is small enough.
"""

from __future__ import annotations

import numpy as np

MASK_SIDE = 112  # pixels per side of a crop: four times the 28 × 28 that the mask head predicts


def nearest_index(size_in: int, size_out: int) -> np.ndarray:
    """The pixel that each pixel of a resized axis is read from, int64 `[size_out]`.

    In the arithmetic of torch's `interpolate(mode="nearest")`, which multiplies by a rounded ratio.
    """
    ratio = np.float32(size_in) / np.float32(size_out)
    index = np.floor(np.arange(size_out, dtype=np.float32) * ratio).astype(np.int64)
    return np.minimum(index, size_in - 1)


def resized_mask(mask: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """A mask bool `[H, W]` at another size, nearest pixel: bool `[h, w]`."""
    rows, columns = (nearest_index(size_in, size_out) for size_in, size_out in zip(mask.shape, size_hw, strict=True))
    return mask[rows][:, columns]


def mask_extent(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """(x1, y1, x2, y2) of the pixels set in a mask bool `[H, W]`, upper ends exclusive; None without any."""
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0:
        return None
    columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def mask_crop(mask: np.ndarray, size_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """The crop of a mask after resizing, and the region of the resized image that it covers.

    Along each axis on which the resized object measures at most `MASK_SIDE` pixels, the crop begins with the object's
    first pixel and has one pixel per pixel. On a longer one, the crop covers the object exactly and holds the pixels
    at its own pixels' centres.

    Args:
        mask: bool `[H, W]`.
        size_hw: of the resized image.

    Returns:
        uint8 `[MASK_SIDE, MASK_SIDE]` of 0 or 255, and its frame float32 `[4]` xyxy in pixels of the resized image;
        None where the resized mask has no pixel.
    """
    extent = mask_extent(mask)
    if extent is None:
        return None
    x1, y1, x2, y2 = extent
    top, rows = _reading(nearest_index(mask.shape[0], size_hw[0]), y1, y2)
    left, columns = _reading(nearest_index(mask.shape[1], size_hw[1]), x1, x2)
    if size_hw[0] < mask.shape[0] or size_hw[1] < mask.shape[1]:
        # Rows or columns are left out, perhaps at the object's edge: only what is read tells the extent.
        extent = mask_extent(mask[rows][:, columns])
        if extent is None:
            return None
        x1, y1, x2, y2 = extent
        top, left, rows, columns = top + y1, left + x1, rows[y1:y2], columns[x1:x2]
    (height, rows), (width, columns) = _sampled(rows), _sampled(columns)
    crop = np.zeros((MASK_SIDE, MASK_SIDE), np.uint8)
    crop[: rows.size, : columns.size] = mask[rows][:, columns]
    return crop * np.uint8(255), np.array([left, top, left + width, top + height], np.float32)


def _reading(index: np.ndarray, start: int, end: int) -> tuple[int, np.ndarray]:
    """The part of an ascending index that reads pixels from `start` to `end`, and its first place."""
    first, last = np.searchsorted(index, (start, end))
    return int(first), index[first:last]


def _sampled(index: np.ndarray) -> tuple[int, np.ndarray]:
    """How many resized pixels a crop covers along an axis, and the original pixels it holds.

    Args:
        index: the original pixel of each resized one that shows the object.
    """
    if index.size <= MASK_SIDE:
        return MASK_SIDE, index
    return index.size, index[((np.arange(MASK_SIDE) + 0.5) * index.size / MASK_SIDE).astype(np.int64)]
