"""Pasting of masks, given in the frame of their box, as pixels of an image or directly as run lengths. NumPy only.

Masks are pasted as in torchvision's `paste_masks_in_image`: one pixel of zero padding, the box enlarged in proportion
and truncated to integers, then linear interpolation. Only the part of a box inside the image is computed.

Run lengths are computed without pixels. Down a column, interpolation between rows a and b of the mask is monotonic and
stays between them, also in float32: a + w · (b − a) is rounded three times, each time monotonically, and a weight is at
most 1 − 2⁻²³, which compensates the rounding of difference and product (w can be 1 − 2⁻²⁴ in the first row, but there a
is zero and the difference exact). A run therefore starts or ends only between two rows of the mask on either side of
the threshold, and bisection finds its first pixel. The cost grows with the width of a box, not with its area, and the
result is the same as with pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from maskrcnn.imaging.run_lengths import Runs

_PADDING_PX = 1  # zeros around a mask before pasting, torchvision's default
MAX_COLUMNS = 1 << 15  # maximum columns interpolated at a time, to stay within the CPU's cache


class _Axis(NamedTuple):
    """Taps of linear interpolation along one axis for the pixels of all windows, window after window."""

    first: np.ndarray  # [D] int64, first pixel in the image
    counts: np.ndarray  # [D] int64, pixels of the window; 0 if the box does not touch the image
    low: np.ndarray  # [sum of counts] int64
    high: np.ndarray  # [sum of counts] int64, the same pixel at the border
    weight: np.ndarray  # [sum of counts] float32, of `high`; the weight of `low` is one minus this

    @property
    def owner(self) -> np.ndarray:
        """The window of each pixel."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def starts(self) -> np.ndarray:
        """Index of each window's first pixel."""
        starts: np.ndarray = np.cumsum(self.counts) - self.counts
        return starts


def paste_mask(mask: np.ndarray, box_xyxy_px: np.ndarray, size_hw: tuple[int, int]) -> tuple[np.ndarray, int, int]:
    """Pastes a mask and returns the part inside the image.

    Args:
        mask: `[M, M]` float32 probabilities in the frame of the box.
        box_xyxy_px: `[4]` in pixels of the image; may be partly or completely outside it.
        size_hw: height and width of the image.

    Returns:
        The probabilities `[h, w]` float32 and the row and column of their first pixel in the image; outside
        this window they are zero. A box that does not touch the image gives `[0, 0]`, row 0, column 0.
    """
    boxes = np.asarray(box_xyxy_px, np.float32).reshape(1, 4)
    columns, rows = _axes(boxes, size_hw, mask.shape[-1])
    if not columns.counts[0]:
        return np.zeros((0, 0), np.float32), 0, 0
    lines = _interpolated_columns(np.asarray(mask, np.float32)[None], columns)
    low, high = lines[:, rows.low], lines[:, rows.high]
    return (low + rows.weight * (high - low)).T, int(rows.first[0]), int(columns.first[0])


def pasted_runs(masks: np.ndarray, boxes_xyxy_px: np.ndarray, size_hw: tuple[int, int], threshold: float) -> Runs:
    """Pastes masks and returns COCO run lengths of the pixels whose probability exceeds `threshold`.

    Args:
        masks: `[D, M, M]` float32 probabilities in the frames of the boxes, not negative.
        boxes_xyxy_px: `[D, 4]` in pixels of the image; may be partly or completely outside it.
        size_hw: height and width of the image.
        threshold: 0 or more.
    """
    masks, boxes = np.asarray(masks, np.float32), np.asarray(boxes_xyxy_px, np.float32).reshape(-1, 4)
    parts = [_runs(masks[some], boxes[some], size_hw, np.float32(threshold)) for some in _portions(boxes, size_hw)]
    if not parts:
        return Runs(np.zeros(0, np.int64), np.zeros(0, np.int64))
    return Runs(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _portions(boxes: np.ndarray, size_hw: tuple[int, int]) -> Iterator[slice]:
    """Slices of boxes of about `MAX_COLUMNS` in total, at least one box each."""
    width = np.nan_to_num(boxes[:, 2] - boxes[:, 0]).clip(1, size_hw[1]) + 4
    portion = (np.cumsum(width) // MAX_COLUMNS).astype(np.int64)
    edges = [0, *(np.flatnonzero(np.diff(portion)) + 1).tolist(), len(boxes)]
    return (slice(start, stop) for start, stop in pairwise(edges) if start < stop)


def _axes(boxes: np.ndarray, size_hw: tuple[int, int], mask_size: int) -> tuple[_Axis, _Axis]:
    """Columns and rows of the windows of boxes `[D, 4]` float32."""
    first, last = _grown(boxes, mask_size)
    limits = np.array([size_hw[1], size_hw[0]])
    start, stop = np.maximum(first, 0), np.minimum(last + 1, limits)
    is_inside = (start < stop).all(axis=1)
    start, count = np.where(is_inside[:, None], start, 0), np.where(is_inside[:, None], stop - start, 0)
    offset, length = start - first, np.maximum(last - first + 1, 1)
    size_in = mask_size + 2 * _PADDING_PX
    columns, rows = (_axis(start[:, k], count[:, k], offset[:, k], length[:, k], size_in) for k in (0, 1))
    return columns, rows


def _grown(boxes: np.ndarray, mask_size: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last pixel (x, y) `[D, 2]` int64 of the padded masks' boxes, in torchvision's float32 arithmetic."""
    low, high = boxes[:, :2], boxes[:, 2:]
    half = (high - low) * np.float32(0.5) * np.float32((mask_size + 2 * _PADDING_PX) / mask_size)
    centre = (high + low) * np.float32(0.5)
    # Conversion to integers truncates towards zero, so boxes beyond the top or left border move inwards by up to one
    # pixel, as in torchvision.
    return (centre - half).astype(np.int64), (centre + half).astype(np.int64)


def _axis(start: np.ndarray, count: np.ndarray, offset: np.ndarray, length: np.ndarray, size_in: int) -> _Axis:
    """Taps of pixels `offset` to `offset + count` of linear resizing to `length`; arguments are `[D]`."""
    place = np.arange(count.sum()) + np.repeat(offset - (np.cumsum(count) - count), count)
    scale = np.float32(size_in) / length.astype(np.float32)
    # Rounded once, see `preprocess.linear_taps`.
    centres = (place.astype(np.float32) + np.float32(0.5)).astype(np.float64)
    positions = (centres * np.repeat(scale.astype(np.float64), count) - 0.5).astype(np.float32)
    np.maximum(positions, np.float32(0), out=positions)
    low = np.minimum(positions.astype(np.int64), size_in - 1)
    weight = np.clip(positions - low.astype(np.float32), np.float32(0), np.float32(1))
    return _Axis(start, count, low, np.minimum(low + 1, size_in - 1), weight)


def _interpolated_columns(masks: np.ndarray, columns: _Axis) -> np.ndarray:
    """Values `[columns, M + 2]` of each window's columns at the rows of its padded mask `[D, M, M]`."""
    size = masks.shape[-1] + 2 * _PADDING_PX
    padded = np.zeros((len(masks), size, size), np.float32)
    padded[:, _PADDING_PX:-_PADDING_PX, _PADDING_PX:-_PADDING_PX] = masks.transpose(0, 2, 1)
    lines = padded.reshape(-1, size)
    owner = columns.owner * size
    low: np.ndarray = lines[owner + columns.low]
    high: np.ndarray = lines[owner + columns.high]
    high -= low
    high *= columns.weight[:, None]
    high += low
    return high


def _runs(masks: np.ndarray, boxes: np.ndarray, size_hw: tuple[int, int], threshold: np.float32) -> Runs:
    columns, rows = _axes(boxes, size_hw, masks.shape[-1])
    lines = _interpolated_columns(masks, columns)
    window, column, row = _turns(lines, columns, rows, threshold)
    height, width = size_hw
    inside = columns.first[window] + column - columns.starts[window]
    places = window * (height * width + 1) + inside * height + rows.first[window] + row
    # A start and an end at the same place cancel: at the top of a column, or at rows of the mask without pixels.
    starts = np.flatnonzero(np.concatenate(([True], places[1:] != places[:-1]))[: len(places)])
    repeats = np.diff(np.concatenate((starts, [len(places)])))
    return _runs_from_turns(places[starts[repeats % 2 == 1]], len(masks), height * width)


def _turns(
    lines: np.ndarray, columns: _Axis, rows: _Axis, threshold: np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows at which pixels cross the threshold, column by column: window, column of all windows, row of the window.

    Args:
        lines: `[columns, taps]` float32, see `_interpolated_columns`.
        columns, rows: of the windows.
        threshold: 0 or more.
    """
    taps = lines.shape[1]
    is_above = (lines > threshold).ravel()
    found = np.flatnonzero(is_above[1:] != is_above[:-1])  # never between columns: both ends are padding
    column, tap = np.divmod(found, taps)
    window = columns.owner[column]
    per_tap = np.bincount(rows.owner * taps + rows.low, minlength=len(rows.counts) * taps).reshape(-1, taps)
    above_tap = np.cumsum(per_tap, axis=1) - per_tap  # rows of a window that read earlier taps
    start, stop = above_tap[window, tap], above_tap[window, tap + 1]
    values, before = lines.ravel()[found], is_above[found]
    steps = lines.ravel()[found + 1] - values
    base = rows.starts[window]
    row = start.copy()
    for _ in range(int(per_tap.max(initial=0)).bit_length()):  # bisection for the first row that differs from `before`
        middle = (row + stop) // 2
        weight = np.take(rows.weight, base + middle, mode="clip")  # beyond the window if the search has ended
        is_open = row < stop
        has_turned = (values + weight * steps > threshold) != before
        stop = np.where(is_open & has_turned, middle, stop)
        row = np.where(is_open & ~has_turned, middle + 1, row)
    return window, column, row


def _runs_from_turns(turns: np.ndarray, masks: int, pixels: int) -> Runs:
    """Runs of masks of `pixels` pixels each, from the pixels at which a run starts, `[turns]` ascending.

    Pixels of mask k are numbered from k · (pixels + 1); a run that starts after the last pixel is empty and dropped.
    """
    owner = turns // (pixels + 1)
    lengths = np.bincount(owner, minlength=masks) + 1
    ends = np.full(lengths.sum(), pixels)
    ends[np.arange(len(turns)) + owner] = turns - owner * (pixels + 1)
    last = np.cumsum(lengths) - 1
    begins = np.concatenate(([0], ends[:-1]))
    begins[last[:-1] + 1] = 0
    runs = ends - begins
    is_empty = runs[last] == 0
    return Runs(np.delete(runs, last[is_empty]), lengths - is_empty)
