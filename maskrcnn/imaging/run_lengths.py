"""COCO's run lengths of many masks at once, as numbers and as strings. Needs NumPy only.

A mask is its runs down the columns, from left to right, alternating from a (maybe empty) run of background. The
string has six bits per character, its code less 48: five of the number, little end first, and one that says whether
more follow; the top bit of a number's last five is its sign. From the fourth run on, the number is the difference to
the run before the previous one (pycocotools, `rleToString`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BITS, _MORE, _SIGN, _ZERO = 5, 32, 16, 48
_LONGEST = 6  # characters of a number that is less than 2³⁰ either way, as every run of an image is


class Runs(NamedTuple):
    """The runs of several masks, one mask after the other."""

    runs: np.ndarray  # [sum of lengths] int64, pixels
    lengths: np.ndarray  # [masks] int64, runs of each mask

    @property
    def starts(self) -> np.ndarray:
        """Where each mask's runs begin."""
        return np.cumsum(self.lengths) - self.lengths

    def places(self) -> np.ndarray:
        """Of each run its place in its mask, from 0."""
        return np.arange(len(self.runs)) - np.repeat(self.starts, self.lengths)

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of each mask's object, and of all its runs, both `[masks]` int64."""
        objects = np.where(self.places() & 1, self.runs, 0)
        ends = self.starts + self.lengths
        totals = (np.concatenate(([0], np.cumsum(values))) for values in (objects, self.runs))
        return tuple(total[ends] - total[self.starts] for total in totals)


def strings_from_runs(masks: Runs) -> list[str]:
    """COCO's string of each mask; a mask without runs gives an empty one."""
    rest = masks.runs.astype(np.int32)  # runs of an image and their differences fit; half the memory is half the time
    later = np.flatnonzero(masks.places() > 2)
    rest[later] -= masks.runs[later - 2].astype(np.int32)
    characters = np.zeros((len(rest), _LONGEST + 1), np.uint8)
    rows, sizes = np.arange(len(rest)), np.zeros(len(rest), np.int64)
    for digit in range(_LONGEST + 1):
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
    """The runs of each string, and which strings are well-formed, `[masks]` bool.

    Args:
        strings: of any origin. One that is malformed gives no runs; negative runs are given as they are.
    """
    coded = [value.encode(errors="surrogatepass") if isinstance(value, str) else value for value in strings]
    sizes = np.array([len(value) for value in coded], np.int64)
    code = np.frombuffer(b"".join(coded), np.uint8) - np.uint8(_ZERO)  # wraps around below
    borders = np.cumsum(sizes)
    good = sizes > 0
    good[good] = (code[borders[good] - 1] & _MORE) == 0  # otherwise a number goes on where the string ends
    good[np.searchsorted(borders, np.flatnonzero(code > 63), "right")] = False
    end = np.flatnonzero((code & _MORE) == 0)
    start = np.concatenate(([0], end[:-1] + 1)) if end.size else end
    if good[sizes > 0].all():
        good[np.searchsorted(borders, end[end - start > _LONGEST], "right")] = False
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
    """Runs from the numbers that strings hold: from the fourth on, each adds to the one before the previous."""
    places, starts = masks.places(), masks.starts
    is_odd = (places & 1).astype(bool)
    found = masks.runs
    for members in (is_odd, ~is_odd & (places > 0)):
        totals = np.concatenate(([0], np.cumsum(np.where(members, masks.runs, 0))))
        found = np.where(members, totals[1:] - np.repeat(totals[starts], masks.lengths), found)
    return found
