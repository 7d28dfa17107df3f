"""The batch sizes and image sizes that an engine takes: TensorRT's optimisation profiles.

An engine is tuned for the middle of each profile and refuses what lies outside of all. A profile of one size alone is
the fastest one, and the best for CUDA graphs, of which each holds one shape.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.preprocess import Preprocessing, resized_size

USUAL_PHOTO_HW = (480, 640)  # most of COCO's: a range is tuned for what becomes of it
_SMALLEST_SHARE = 4  # a range begins at this part of the usual shorter side, so at images six times as long as wide
_MOST = 8  # profiles; each takes as long to build as the first, and memory for its largest shape where it runs
_NAMED = ("coco", "landscape", "portrait")
_SIZES = f"HEIGHTxWIDTH, MIN:OPT:MAX of such, or {', '.join(_NAMED)}, with commas between"


@dataclass(frozen=True)
class Span:
    """What a length may be: from the least to the greatest, tuned for the one between."""

    least: int
    best: int
    greatest: int

    @property
    def is_fixed(self) -> bool:
        """Whether there is one length alone."""
        return self.least == self.greatest

    def __contains__(self, length: int) -> bool:
        return self.least <= length <= self.greatest

    def __str__(self) -> str:
        return str(self.best) if self.is_fixed else f"{self.least}–{self.greatest}"


@dataclass(frozen=True)
class Profile:
    """One profile: images in a batch, and height and width of the padded images in pixels."""

    batch: Span
    height: Span
    width: Span

    @property
    def spans(self) -> tuple[Span, Span, Span]:
        """Batch, height, width."""
        return self.batch, self.height, self.width

    @property
    def is_fixed(self) -> bool:
        """Whether it takes one shape alone."""
        return all(span.is_fixed for span in self.spans)

    def takes(self, shape: tuple[int, int, int]) -> bool:
        """Whether a batch of this many images of this height and width is inside."""
        return all(length in span for span, length in zip(self.spans, shape, strict=True))

    def corner(self, which: str) -> tuple[int, int, int]:
        """Batch, height, width of its `least`, `best` or `greatest` shape."""
        batch, height, width = (getattr(span, which) for span in self.spans)
        return batch, height, width

    def to_dict(self) -> dict[str, list[int]]:
        """As the stamp holds it."""
        names = ("batch", "height", "width")
        return {name: [s.least, s.best, s.greatest] for name, s in zip(names, self.spans, strict=True)}

    def __str__(self) -> str:
        best = "" if self.is_fixed else f", tuned for {self.batch.best} of {self.height.best}×{self.width.best}"
        return f"batch {self.batch} of {self.height}×{self.width}{best}"


def parsed_profiles(batch: str, size: str, preprocessing: Preprocessing) -> list[Profile]:
    """The profiles that two options of the command line ask for: one for each batch size with each image size.

    Args:
        batch: numbers, or ranges MIN:OPT:MAX, with commas between: `1,4,8` or `1:4:8`.
        size: `HxW`, or ranges `HxW:HxW:HxW`, or names, with commas between. `landscape` and `portrait` are the shape of
            the largest images that the model's resizing gives; `coco` is a range that holds all usual ones.
        preprocessing: the model's, whose divisor all sizes must be multiples of.

    Raises:
        UserError: for anything else, and for more than eight profiles.
    """
    batches = [_batch(part) for part in batch.split(",")]
    sizes = [_size(part, preprocessing) for part in size.split(",")]
    # The same pair asked for twice is one profile.
    made = list(dict.fromkeys(Profile(b, *hw) for hw, b in itertools.product(sizes, batches)))
    if len(made) > _MOST:
        came = f"--batch {batch} with --size {size}: {len(made)} profiles"
        raise UserError(came, f"at most {_MOST}", "use a range, as --batch 1:4:8, or build several engines")
    return made


def to_json(profiles: Sequence[Profile]) -> str:
    """The profiles as the stamp's entry `profiles`."""
    return json.dumps([profile.to_dict() for profile in profiles])


def from_json(text: str) -> list[Profile]:
    """The profiles of a stamp.

    Raises:
        UserError: for a text that `to_json` did not write.
    """
    try:
        entries = json.loads(text)
        return [Profile(*(_checked(Span(*entry[name])) for name in ("batch", "height", "width"))) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"profiles {text[:80]!r} in an engine's stamp ({error})",
            "what build-engine wrote",
            "build the engine again",
        ) from error


def choose(profiles: Sequence[Profile], shape: tuple[int, int, int], *, rebuild: str = "") -> int:
    """The index of the profile to run a shape in: one for it alone, else the one tuned for the nearest shape.

    Args:
        profiles: of an engine, in its order.
        shape: images, height and width in pixels.
        rebuild: the command that builds the engine, for the message.

    Raises:
        UserError: where none takes the shape, naming all of them.
    """
    fitting = [index for index, profile in enumerate(profiles) if profile.takes(shape)]
    if not fitting:
        raise _unfit(profiles, shape, rebuild)
    return min(fitting, key=lambda index: (not profiles[index].is_fixed, _distance(profiles[index], shape)))


def roomy_shape(profiles: Sequence[Profile], shape: tuple[int, int, int], *, rebuild: str = "") -> tuple[int, int, int]:
    """The smallest shape at least as large that a profile takes: what to pad a batch to.

    Raises:
        UserError: where every profile ends below the shape, naming all of them.
    """
    larger = [
        tuple(max(span.least, length) for span, length in zip(profile.spans, shape, strict=True))
        for profile in profiles
        if all(length <= span.greatest for span, length in zip(profile.spans, shape, strict=True))
    ]
    if not larger:
        raise _unfit(profiles, shape, rebuild)
    return min(larger, key=math.prod)


def set_shapes(trt_profile: Any, profile: Profile) -> None:
    """Writes a profile into TensorRT's, for the inputs of the detector contract (docs/architecture.md)."""
    corners = [profile.corner(which) for which in ("least", "best", "greatest")]
    trt_profile.set_shape("images", *((batch, 3, height, width) for batch, height, width in corners))
    trt_profile.set_shape("image_sizes", *((batch, 2) for batch, _, _ in corners))


def _distance(profile: Profile, shape: tuple[int, int, int]) -> float:
    """How far a shape is from what a profile is tuned for."""
    best = profile.corner("best")
    return sum(abs(math.log(length / wanted)) for length, wanted in zip(shape, best, strict=True))


def _unfit(profiles: Sequence[Profile], shape: tuple[int, int, int], rebuild: str) -> UserError:
    batch, height, width = shape
    known = "; ".join(map(str, profiles)) or "no profile"
    do = "give it other batches or sizes, or build an engine with others: --batch and --size"
    return UserError(
        f"a batch of {batch} of {height}×{width} for an engine with other profiles",
        known,
        f"{do} of `{rebuild or 'maskrcnn build-engine'}`",
    )


def _batch(text: str) -> Span:
    numbers = text.strip().split(":")
    if len(numbers) not in (1, 3) or not all(number.isdigit() for number in numbers):
        raise _bad("--batch", text, "numbers, or MIN:OPT:MAX, with commas between", "--batch 1,4,8 or --batch 1:4:8")
    span = _span([int(number) for number in numbers])
    if span is None:
        raise _bad("--batch", text, "1 ≤ MIN ≤ OPT ≤ MAX", "--batch 1:4:8")
    return span


def _size(text: str, preprocessing: Preprocessing) -> tuple[Span, Span]:
    """Height and width."""
    text = text.strip()
    if text in _NAMED:
        return _named(text, preprocessing)
    matches = [re.fullmatch(r"(\d+)[x×](\d+)", part) for part in text.split(":")]
    if len(matches) not in (1, 3) or not all(matches):
        raise _bad("--size", text, _SIZES, "--size 800x1344 or --size coco")
    spans = [_span([int(match[axis]) for match in matches]) for axis in (1, 2)]
    divisor = preprocessing.divisor
    if any(span is None or any(length % divisor for length in _lengths(span)) for span in spans):
        expected = f"multiples of {divisor} from {divisor} on, MIN ≤ OPT ≤ MAX in height and in width"
        raise _bad("--size", text, expected, f"--size {_roomy(800, divisor)}x{_roomy(1333, divisor)}")
    return spans[0], spans[1]


def _named(name: str, preprocessing: Preprocessing) -> tuple[Span, Span]:
    shorter, longer = (_roomy(side, preprocessing.divisor) for side in _largest_sides(preprocessing))
    if name != "coco":
        fixed = Span(shorter, shorter, shorter), Span(longer, longer, longer)
        return fixed if name == "landscape" else fixed[::-1]
    least = _roomy(preprocessing.min_size_px // _SMALLEST_SHARE, preprocessing.divisor)
    usual = (_roomy(side, preprocessing.divisor) for side in resized_size(USUAL_PHOTO_HW, preprocessing))
    height, width = (Span(min(least, side), side, longer) for side in usual)
    return height, width


def _largest_sides(preprocessing: Preprocessing) -> tuple[int, int]:
    """The shorter and the longer side, in pixels, of the largest images that resizing gives."""
    longest = max(preprocessing.max_size_px, preprocessing.min_size_px)
    return min(preprocessing.min_size_px, preprocessing.max_size_px), longest


def _roomy(length: int, divisor: int) -> int:
    """A length rounded up to a multiple of the divisor, at least one."""
    return max(-(-length // divisor), 1) * divisor


def _span(lengths: list[int]) -> Span | None:
    """Of one number or three; None where they are out of order or zero."""
    span = Span(*lengths) if len(lengths) == 3 else Span(lengths[0], lengths[0], lengths[0])
    return span if 1 <= span.least <= span.best <= span.greatest else None


def _checked(span: Span) -> Span:
    if _span(_lengths(span)) is None:
        raise ValueError(f"{_lengths(span)} is no range")
    return span


def _lengths(span: Span) -> list[int]:
    return [span.least, span.best, span.greatest]


def _bad(option: str, text: str, expected: str, example: str) -> UserError:
    return UserError(f"{option} {text}", expected, f"for example {example}")
