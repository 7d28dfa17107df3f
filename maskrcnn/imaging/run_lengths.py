"""COCO run lengths of many masks at once, as numbers and as strings. NumPy only.

A mask is encoded as runs down the columns, from left to right, alternating between background and object, starting with
a (possibly empty) run of background. Each character of the string encodes six bits, as its code minus 48: five bits of
the number, least significant first, and one that is set if more follow; the top bit of a number's last five is its
sign. From the fourth run on, the number is the difference from the run before the previous one.

Source: pycocotools, `rleToString`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BITS, _MORE, _SIGN, _ZERO = 5, 32, 16, 48
_MAX_CHARACTERS = 6  # of a number below 2³⁰ in magnitude, as every run of an image


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


def strings_from_runs(masks: Runs) -> list[str]:
    """Returns the COCO string of each mask, empty for a mask without runs."""
    rest = masks.runs.astype(np.int32)  # runs of an image fit; half the memory takes half the time
    later = np.flatnonzero(masks.places() > 2)
    rest[later] -= masks.runs[later - 2].astype(np.int32)
    characters = np.zeros((len(rest), _MAX_CHARACTERS + 1), np.uint8)
    rows, sizes = np.arange(len(rest)), np.zeros(len(rest), np.int64)
    for digit in range(_MAX_CHARACTERS + 1):
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
        good[np.searchsorted(borders, end[end - start > _MAX_CHARACTERS], "right")] = False
    if not good[sizes > 0].all():
        clean, is_clean = runs_from_strings([text if fine else b"" for text, fine in zip(coded, good, strict=True)])
        return clean, is_clean
    sizes = end - start + 1
    shift = _BITS * (np.arange(len(code), dtype=np.int32) - np.repeat(start.astype(np.int32), sizes))
    numbers = np.add.reduceat((code & (_MORE - 1)).astype(np.int32) << shift, start) if end.size else start
    is_negative = np.flatnonzero(code[end] & _SIGN)
    numbers = numbers.astype(np.int64)
    numbers[is_negative] -= np.int64(1) << _BITS * sizes[is_negative]
    masks = Runs(numbers, np.diff(np.searchsorted(end, np.concatenate(([0], borders)))))
    return Runs(_summed(masks), masks.lengths), good


def _summed(masks: Runs) -> np.ndarray:
    """Runs from the numbers of strings: from the fourth on, each is added to the one before the previous."""
    places, starts = masks.places(), masks.starts
    is_odd = (places & 1).astype(bool)
    found = masks.runs
    for members in (is_odd, ~is_odd & (places > 0)):
        totals = np.concatenate(([0], np.cumsum(np.where(members, masks.runs, 0))))
        found = np.where(members, totals[1:] - np.repeat(totals[starts], masks.lengths), found)
    return found
