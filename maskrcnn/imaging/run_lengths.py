"""COCO run lengths of many masks at once, as numbers and as strings. NumPy only.

A mask is encoded as runs down the columns, from left to right, alternating between background and object, starting with
a (possibly empty) run of background. Each character of the string encodes six bits, as its code minus 48: five bits of
the number, least significant first, and a continuation bit; the top bit of a number's last five is its sign. From the
fourth run on, the number is the difference from the run before the previous one.

Source: pycocotools, `rleToString`.

Masks of large scenes are also combined without pixels, as spans: int64 `[S, 2]`, start (inclusive) and end (exclusive)
of each piece of a mask, ascending, where pixels are numbered down the columns as in run lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BITS, _MORE, _SIGN, _ZERO = 5, 32, 16, 48
_MAX_CHARACTERS = 8  # characters of a number below 2³⁹ in magnitude
_FEW_CHARACTERS = 6  # characters of a number below 2²⁹, as all runs except in very large images: 32 bits suffice


class Runs(NamedTuple):
    """The runs of several masks, one mask after the other."""

    runs: np.ndarray  # [sum of lengths] int64, pixels
    lengths: np.ndarray  # [masks] int64, runs of each mask

    @property
    def starts(self) -> np.ndarray:
        """Index of each mask's first run."""
        starts: np.ndarray = np.cumsum(self.lengths) - self.lengths
        return starts

    def places(self) -> np.ndarray:
        """Index of each run within its mask, from 0."""
        places: np.ndarray = np.arange(len(self.runs)) - np.repeat(self.starts, self.lengths)
        return places

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of each mask's object, and of all its runs, `[masks]` int64 each."""
        objects = np.where(self.places() & 1, self.runs, 0)
        ends = self.starts + self.lengths
        object_total, total = (np.concatenate(([0], np.cumsum(values))) for values in (objects, self.runs))
        return object_total[ends] - object_total[self.starts], total[ends] - total[self.starts]

    def chosen(self, keep: np.ndarray) -> Runs:
        """The masks for which `keep`, bool `[masks]`, is true."""
        return Runs(self.runs[np.repeat(keep, self.lengths)], self.lengths[keep])

    def spans(self) -> list[np.ndarray]:
        """The spans of each mask's object, int64 `[S, 2]`."""
        own = np.split(self.runs, np.cumsum(self.lengths))[:-1]
        return [np.cumsum(runs)[: len(runs) // 2 * 2].reshape(-1, 2) for runs in own]


def strings_from_runs(masks: Runs) -> list[str]:
    """Returns the COCO string of each mask, empty for a mask without runs."""
    # Runs of most images fit into 32 bits; halving the memory halves the time.
    is_small = masks.runs.max(initial=0) < 1 << _BITS * _FEW_CHARACTERS - 1
    number: type[np.signedinteger] = np.int32 if is_small else np.int64
    rest = masks.runs.astype(number)
    later = np.flatnonzero(masks.places() > 2)
    rest[later] -= masks.runs[later - 2].astype(number)
    most = _FEW_CHARACTERS if is_small else _MAX_CHARACTERS
    characters = np.zeros((len(rest), most), np.uint8)
    rows, sizes = np.arange(len(rest)), np.zeros(len(rest), np.int64)
    for digit in range(most):
        low = rest & (_MORE - 1)
        rest >>= _BITS
        goes_on = rest != -(low >> (_BITS - 1))
        sizes[rows] += 1
        characters[rows, digit] = _ZERO + low + _MORE * goes_on
        if not goes_on.any():
            break
        rows, rest = rows[goes_on], rest[goes_on]
    text = characters[characters > 0].tobytes().decode("ascii")
    ends = np.concatenate(([0], np.cumsum(sizes)))
    starts = ends[masks.starts].tolist()
    stops = ends[masks.starts + masks.lengths].tolist()
    return [text[start:stop] for start, stop in zip(starts, stops, strict=True)]


def runs_from_strings(strings: Sequence[str | bytes]) -> tuple[Runs, np.ndarray]:
    """Parses COCO strings.

    Args:
        strings: possibly malformed.

    Returns:
        The runs of each string, and whether it is well-formed, bool `[masks]`. A malformed string has no runs; negative
        runs are not checked.
    """
    coded = [value.encode(errors="surrogatepass") if isinstance(value, str) else value for value in strings]
    sizes = np.array([len(value) for value in coded], np.int64)
    code = np.frombuffer(b"".join(coded), np.uint8) - np.uint8(_ZERO)  # codes below 48 wrap around
    borders = np.cumsum(sizes)
    good = sizes > 0
    good[good] = (code[borders[good] - 1] & _MORE) == 0  # otherwise the string ends within a number
    good[np.searchsorted(borders, np.flatnonzero(code > 63), "right")] = False
    end = np.flatnonzero((code & _MORE) == 0)
    start = np.concatenate(([0], end[:-1] + 1)) if end.size else end
    if good[sizes > 0].all():
        good[np.searchsorted(borders, end[end - start >= _MAX_CHARACTERS], "right")] = False
    if not good[sizes > 0].all():
        clean, is_clean = runs_from_strings([text if fine else b"" for text, fine in zip(coded, good, strict=True)])
        return clean, is_clean
    sizes = end - start + 1
    number: type[np.signedinteger] = np.int32 if sizes.max(initial=0) <= _FEW_CHARACTERS else np.int64
    shift = _BITS * (np.arange(len(code), dtype=number) - np.repeat(start.astype(number), sizes))
    numbers = np.add.reduceat((code & (_MORE - 1)).astype(number) << shift, start) if end.size else start
    is_negative = np.flatnonzero(code[end] & _SIGN)
    numbers = numbers.astype(np.int64)
    numbers[is_negative] -= np.int64(1) << _BITS * sizes[is_negative]
    masks = Runs(numbers, np.diff(np.searchsorted(end, np.concatenate(([0], borders)))))
    return Runs(_summed(masks), masks.lengths), good


def _summed(masks: Runs) -> np.ndarray:
    """Runs from the numbers of strings: from the fourth on, each is relative to the run before the previous one."""
    places, starts = masks.places(), masks.starts
    is_odd = (places & 1).astype(bool)
    found = masks.runs
    for members in (is_odd, ~is_odd & (places > 0)):
        totals = np.concatenate(([0], np.cumsum(np.where(members, masks.runs, 0))))
        found = np.where(members, totals[1:] - np.repeat(totals[starts], masks.lengths), found)
    return found


def runs_from_spans(spans: Sequence[np.ndarray], pixels: int) -> Runs:
    """The runs of masks of `pixels` pixels each, from the spans of each, int64 `[S, 2]`."""
    own = [np.diff(np.concatenate(([0], each.ravel(), [pixels]))) for each in spans]
    own = [runs if runs[-1] else runs[:-1] for runs in own]
    runs = np.concatenate(own) if own else np.zeros(0, np.int64)
    return Runs(runs, np.array([len(each) for each in own], np.int64))


def window_of(spans: np.ndarray, height: int) -> tuple[np.ndarray, int, int]:
    """The part of an image of this height that holds a mask, bool `[h, w]`, and the row and column of its first pixel.

    A mask without pixels gives `[0, 0]`, row 0, column 0.
    """
    if not len(spans):
        return np.zeros((0, 0), bool), 0, 0
    left, right = int(spans[0, 0]) // height, (int(spans[-1, 1]) - 1) // height + 1
    columns = np.zeros((right - left, height), bool)
    flat = columns.reshape(-1)
    for start, stop in (spans - left * height).tolist():
        flat[start:stop] = True
    rows = np.flatnonzero(columns.any(axis=0))
    return columns[:, rows[0] : rows[-1] + 1].T, int(rows[0]), left


def moved(spans: np.ndarray, size_hw: tuple[int, int], top: int, left: int, into_height: int) -> np.ndarray:
    """The spans of a window's mask in the whole image, split where columns end.

    Args:
        spans: int64 `[S, 2]` of the window's pixels.
        size_hw: size of the window.
        top, left: position of the window in the image.
        into_height: height of the image.
    """
    height = size_hw[0]
    first, last = spans[:, 0] // height, (spans[:, 1] - 1) // height
    columns = last - first + 1
    owner = np.repeat(np.arange(len(spans)), columns)
    column = np.arange(len(owner)) - np.repeat(np.cumsum(columns) - columns, columns) + first[owner]
    start = np.maximum(spans[owner, 0], column * height) - column * height
    stop = np.minimum(spans[owner, 1], (column + 1) * height) - column * height
    spans_there: np.ndarray = np.stack([start, stop], axis=1) + ((column + left) * into_height + top)[:, None]
    return spans_there


def clipped(spans: np.ndarray, height: int, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
    """The part of spans within rows and columns (start inclusive, end exclusive) of an image of this height.

    Args:
        spans: as returned by `moved`, none longer than a column.
    """
    column = spans[:, 0] // height
    start = np.maximum(spans[:, 0], column * height + rows[0])
    stop = np.minimum(spans[:, 1], column * height + rows[1])
    inside: np.ndarray = np.stack([start, stop], axis=1)
    inside = inside[(start < stop) & (columns[0] <= column) & (column < columns[1])]
    return inside


def covered(masks: Sequence[np.ndarray], depth: int) -> np.ndarray:
    """Spans of the pixels in at least `depth` of the masks: 1 for their union, their number for the intersection."""
    ends = np.concatenate(masks).ravel()
    places, owner = np.unique(ends, return_inverse=True)
    steps = np.tile([1.0, -1.0], len(ends) // 2)
    is_in = np.cumsum(np.bincount(owner.ravel(), weights=steps, minlength=len(places))) >= depth
    turns = np.flatnonzero(np.diff(np.concatenate(([False], is_in))))
    return places[turns].reshape(-1, 2)
