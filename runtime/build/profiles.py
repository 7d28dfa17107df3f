"""Optimization profiles: the batch sizes and image sizes that a TensorRT engine accepts.

TensorRT tunes an engine for the `opt` shape of each profile, and the engine rejects shapes outside every profile. A
profile with one fixed shape runs fastest, and suits CUDA graphs, each of which captures one shape.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing, resized_size

_USUAL_IMAGE_HW = (480, 640)  # the most frequent size in COCO; a range is tuned for its resized shape
_MIN_SIDE_DIVISOR = 4  # a range starts at min_size_px / 4, which covers images six times as long as wide
_MAX_PROFILES = 8  # each adds the same build time, and run-time memory for its largest shape
_NAMED_SIZES = ("coco", "landscape", "portrait")
_SIZE_SYNTAX = f"HEIGHTxWIDTH, MIN:OPT:MAX of such sizes, or {', '.join(_NAMED_SIZES)}; separated by commas"


@dataclass(frozen=True)
class Span:
    """Range of one dimension, and the length that TensorRT tunes for.

    Raises:
        ValueError: unless 1 ≤ min ≤ opt ≤ max.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"{[*astuple(self)]} is not a range: 1 ≤ MIN ≤ OPT ≤ MAX")

    @property
    def is_fixed(self) -> bool:
        """Whether the range contains only one length."""
        return self.min == self.max

    def __contains__(self, length: int) -> bool:
        return self.min <= length <= self.max

    def __str__(self) -> str:
        return str(self.opt) if self.is_fixed else f"{self.min}–{self.max}"


@dataclass(frozen=True)
class Profile:
    """Ranges of the batch size and of height and width of the padded images in pixels."""

    batch: Span
    height: Span
    width: Span

    @property
    def spans(self) -> tuple[Span, Span, Span]:
        """Batch, height, width."""
        return self.batch, self.height, self.width

    @property
    def is_fixed(self) -> bool:
        """Whether the profile accepts one shape only."""
        return all(span.is_fixed for span in self.spans)

    def takes(self, shape: tuple[int, int, int]) -> bool:
        """Whether (batch, height, width) lies inside the profile."""
        return all(length in span for span, length in zip(self.spans, shape, strict=True))

    def corner(self, which: str) -> tuple[int, int, int]:
        """(batch, height, width) of the `min`, `opt` or `max` shape."""
        batch, height, width = (getattr(span, which) for span in self.spans)
        return batch, height, width

    def __str__(self) -> str:
        tuned = "" if self.is_fixed else f", tuned for {self.batch.opt} of {self.height.opt}×{self.width.opt}"
        return f"batch {self.batch} of {self.height}×{self.width}{tuned}"


def parse_profiles(batch: str, size: str, preprocessing: Preprocessing) -> list[Profile]:
    """Parses `--batch` and `--size` into one profile for each combination of batch size and image size.

    Args:
        batch: numbers or ranges MIN:OPT:MAX, separated by commas: `1,4,8` or `1:4:8`.
        size: `HxW`, ranges `HxW:HxW:HxW`, or names, separated by commas. `landscape` and `portrait` are the shapes
            of the largest resized images; `coco` is a range that covers the usual shapes.
        preprocessing: preprocessing of the model; all sizes must be multiples of its divisor.

    Raises:
        UserError: on a syntax error, and for more than eight profiles.
    """
    batches = [_parse_batch(part) for part in batch.split(",")]
    sizes = [_parse_size(part, preprocessing) for part in size.split(",")]
    profiles = list(dict.fromkeys(Profile(b, *hw) for hw, b in itertools.product(sizes, batches)))
    if len(profiles) > _MAX_PROFILES:
        found = f"--batch {batch} with --size {size}: {len(profiles)} profiles"
        raise UserError(found, f"at most {_MAX_PROFILES}", "use a range such as --batch 1:4:8, or several engines")
    return profiles


def to_json(profiles: Sequence[Profile]) -> str:
    """Serializes profiles for the stamp's entry `profiles`: [min, opt, max] per dimension."""
    names = ("batch", "height", "width")
    return json.dumps([dict(zip(names, map(astuple, profile.spans), strict=True)) for profile in profiles])


def from_json(text: str) -> list[Profile]:
    """Reads the profiles of a stamp.

    Raises:
        UserError: if `to_json` did not write the text.
    """
    try:
        return [Profile(*(Span(*entry[name]) for name in ("batch", "height", "width"))) for entry in json.loads(text)]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"profiles {text[:80]!r} in an engine's stamp ({error})",
            "the profiles that build-engine writes",
            "build the engine again",
        ) from error


def choose(profiles: Sequence[Profile], shape: tuple[int, int, int], *, rebuild: str = "") -> int:
    """Returns the index of the profile for a shape: a fixed one if it exists, else the one tuned for the nearest shape.

    Args:
        profiles: profiles of an engine, in its order.
        shape: (batch, height, width), height and width in pixels.
        rebuild: the command that builds the engine, for the error text.

    Raises:
        UserError: if the shape is outside every profile; lists all of them.
    """

    def distance(profile: Profile) -> float:
        return sum(abs(math.log(length / opt)) for length, opt in zip(shape, profile.corner("opt"), strict=True))

    fitting = [index for index, profile in enumerate(profiles) if profile.takes(shape)]
    if not fitting:
        raise _outside(profiles, shape, rebuild)
    return min(fitting, key=lambda index: (not profiles[index].is_fixed, distance(profiles[index])))


def padded_shape(
    profiles: Sequence[Profile], shape: tuple[int, int, int], *, rebuild: str = ""
) -> tuple[int, int, int]:
    """Returns the smallest shape inside a profile to which a batch of this shape can be padded.

    Raises:
        UserError: if the shape exceeds every profile; lists all of them.
    """
    padded = []
    for profile in profiles:
        if all(length <= span.max for span, length in zip(profile.spans, shape, strict=True)):
            batch, height, width = (max(span.min, length) for span, length in zip(profile.spans, shape, strict=True))
            padded.append((batch, height, width))
    if not padded:
        raise _outside(profiles, shape, rebuild)
    return min(padded, key=math.prod)


def _outside(profiles: Sequence[Profile], shape: tuple[int, int, int], rebuild: str) -> UserError:
    batch, height, width = shape
    return UserError(
        f"a batch of {batch} image(s) of {height}×{width}, outside the profiles of the engine",
        "; ".join(map(str, profiles)) or "no profile",
        "use another batch size or image size, or build an engine for this one: --batch and --size of "
        f"`{rebuild or 'maskrcnn build-engine'}`",
    )


def _parse_batch(text: str) -> Span:
    numbers = text.strip().split(":")
    if len(numbers) not in (1, 3) or not all(number.isdigit() for number in numbers):
        expected = "numbers, or MIN:OPT:MAX; separated by commas"
        raise _invalid("--batch", text, expected, "--batch 1,4,8 or --batch 1:4:8")
    try:
        return _span([int(number) for number in numbers])
    except ValueError as error:
        raise _invalid("--batch", text, "1 ≤ MIN ≤ OPT ≤ MAX", "--batch 1:4:8") from error


def _parse_size(text: str, preprocessing: Preprocessing) -> tuple[Span, Span]:
    """Height and width."""
    text = text.strip()
    divisor = preprocessing.divisor
    if text in _NAMED_SIZES:
        return _named_size(text, preprocessing)
    matches = [re.fullmatch(r"(\d+)[x×](\d+)", part) for part in text.split(":")]
    sizes = [(int(match[1]), int(match[2])) for match in matches if match]
    if len(matches) not in (1, 3) or len(sizes) != len(matches):
        raise _invalid("--size", text, _SIZE_SYNTAX, "--size 800x1344 or --size coco")
    try:
        if any(length % divisor for size in sizes for length in size):
            raise ValueError(f"not multiples of {divisor}")
        heights, widths = zip(*sizes, strict=True)
        return _span(heights), _span(widths)
    except ValueError as error:
        expected = f"multiples of {divisor} from {divisor} on, MIN ≤ OPT ≤ MAX in height and in width"
        example = f"--size {_round_up(800, divisor)}x{_round_up(1333, divisor)}"
        raise _invalid("--size", text, expected, example) from error


def _named_size(name: str, preprocessing: Preprocessing) -> tuple[Span, Span]:
    sides = sorted((preprocessing.min_size_px, preprocessing.max_size_px))  # of the largest resized images
    shorter, longer = (_round_up(side, preprocessing.divisor) for side in sides)
    if name == "landscape":
        return _span([shorter]), _span([longer])
    if name == "portrait":
        return _span([longer]), _span([shorter])
    least = _round_up(preprocessing.min_size_px // _MIN_SIDE_DIVISOR, preprocessing.divisor)
    usual = (_round_up(side, preprocessing.divisor) for side in resized_size(_USUAL_IMAGE_HW, preprocessing))
    height, width = (Span(min(least, side), side, longer) for side in usual)
    return height, width


def _round_up(length: int, divisor: int) -> int:
    """A length rounded up to a multiple of the divisor, at least one multiple."""
    return max(-(-length // divisor), 1) * divisor


def _span(lengths: Sequence[int]) -> Span:
    """Span of [length] or [min, opt, max]."""
    return Span(*lengths) if len(lengths) == 3 else Span(lengths[0], lengths[0], lengths[0])


def _invalid(option: str, text: str, expected: str, example: str) -> UserError:
    return UserError(f"{option} {text}", expected, f"for example {example}")
