"""Pictures of detections and annotations."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from maskrcnn.imaging.postprocess import Detections

Colour = tuple[int, int, int]
_Line = tuple[tuple[float, float, float, float], Colour]  # x0, y0, x1, y1

# Keypoints below it are not drawn. It is a logit of the heat map, as in Detectron's pictures, and no probability: how
# large it gets depends on the training, and one that is hidden may have a high one as well.
POINT_SCORE = 2.0
_OPACITY = 0.45
_MIN_SIDE_PX = 640  # smaller pictures are enlarged, so that the text does not hide them
_POINT_PX = 3  # radius of a keypoint
_LINE_PX = 3  # width of a line between two


@dataclass(frozen=True, eq=False)
class Mark:
    """One object on a picture, in its pixels."""

    box_xyxy_px: tuple[float, float, float, float]
    text: str  # at the upper left corner
    colour: Colour
    mask: np.ndarray | None = None  # [H, W] bool
    points_px: Sequence[tuple[float, float]] = ()  # x, y
    lines: Sequence[_Line] = ()


def colour_of(index: int) -> Colour:
    """A bright colour, different for neighbouring indices (golden-ratio hues)."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(index * 0.61803398875 % 1.0, 0.75, 1.0))


def overlay(
    image: np.ndarray,
    detections: Detections,
    class_names: tuple[str, ...],
    skeleton: Sequence[tuple[int, int]] = (),
    *,
    point_score: float = POINT_SCORE,
) -> Image.Image:
    """The image with each detection's box, class and score and, where it has them, mask with outline and keypoints.

    The best is on top. Small images are enlarged by a whole factor to at least 640 px on their longer side.

    Args:
        image: uint8 `[H, W, 3]` RGB.
        detections: of this image, in its pixels.
        class_names: of labels 1, 2, ….
        skeleton: pairs of keypoints, counted from 1, between which a line is drawn, each pair in a colour of its own.
        point_score: keypoints of a lower score are left out, and the lines to them; see `POINT_SCORE`.
    """
    scale = _scale(image)
    detections = _enlarged(detections, scale)
    masks = detections.full_masks() if detections.has_masks else [None] * len(detections)
    marks = [
        Mark(tuple(box.tolist()), f"{class_names[label - 1]} {score:.2f}", colour_of(k), mask)
        for k, (box, label, score, mask) in enumerate(
            zip(detections.boxes_xyxy_px, detections.labels, detections.scores, masks, strict=True)
        )
    ]
    if detections.keypoints is not None:
        marks = [
            replace(mark, **figure_of(keypoints, keypoints[:, 2] >= point_score, skeleton))
            for mark, keypoints in zip(marks, detections.keypoints, strict=True)
        ]
    return _drawn(_repeated(image, scale), marks)


def figure_of(
    keypoints: np.ndarray, is_shown: np.ndarray, skeleton: Sequence[tuple[int, int]], colour: Colour | None = None
) -> dict[str, Sequence]:
    """The points and lines of a mark.

    Args:
        keypoints: `[K, 3]` x, y in pixels of the picture, and a third number that is not read.
        is_shown: bool `[K]`.
        skeleton: see `overlay`; a line is drawn where both its ends are shown.
        colour: of all lines; by default each has its own.
    """
    places = keypoints[:, :2].astype(float).tolist()
    lines = [
        ((*places[first - 1], *places[second - 1]), colour or colour_of(number))
        for number, (first, second) in enumerate(skeleton)
        if is_shown[first - 1] and is_shown[second - 1]
    ]
    return {"points_px": [tuple(places[k]) for k in np.flatnonzero(is_shown)], "lines": lines}


def marked(image: np.ndarray, marks: Sequence[Mark]) -> Image.Image:
    """The image with marks, the first on top; enlarged as by `overlay`.

    Args:
        image: uint8 `[H, W, 3]` RGB.
        marks: in its pixels.
    """
    scale = _scale(image)
    enlarged = [
        replace(
            mark,
            box_xyxy_px=tuple(scale * side for side in mark.box_xyxy_px),
            mask=None if mark.mask is None else _repeated(mark.mask, scale),
            points_px=[(scale * x, scale * y) for x, y in mark.points_px],
            lines=[(tuple(scale * side for side in ends), colour) for ends, colour in mark.lines],
        )
        for mark in marks
    ]
    return _drawn(_repeated(image, scale), enlarged)


def _drawn(image: np.ndarray, marks: Sequence[Mark]) -> Image.Image:
    canvas = image.astype(np.float32)
    for mark in reversed(marks):
        if mark.mask is not None:
            colour = np.array(mark.colour, np.float32)
            canvas[mark.mask] = (1 - _OPACITY) * canvas[mark.mask] + _OPACITY * colour
            canvas[_outline(mark.mask)] = colour
    picture = Image.fromarray(canvas.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for mark in reversed(marks):
        x0, y0, x1, y1 = mark.box_xyxy_px
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=mark.colour)
        for ends, colour in mark.lines:
            draw.line(ends, fill=colour, width=_LINE_PX)
        for x, y in mark.points_px:
            draw.ellipse((x - _POINT_PX, y - _POINT_PX, x + _POINT_PX, y + _POINT_PX), fill=mark.colour)
        left, top, right, bottom = draw.textbbox((x0 + 2, max(y0 - 12, 0)), mark.text)
        draw.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=mark.colour)
        draw.text((left, max(y0 - 12, 0)), mark.text, fill="black")
    return picture


def _scale(image: np.ndarray) -> int:
    return max(1, -(-_MIN_SIDE_PX // max(image.shape[:2])))


def _repeated(pixels: np.ndarray, scale: int) -> np.ndarray:
    return np.repeat(np.repeat(pixels, scale, axis=0), scale, axis=1)


def _enlarged(detections: Detections, scale: int) -> Detections:
    """The detections in a picture of `scale` times the size."""
    height, width = detections.size_hw
    points = None if detections.keypoints is None else detections.keypoints * np.float32([scale, scale, 1])
    size_hw = height * scale, width * scale
    return replace(detections, boxes_xyxy_px=detections.boxes_xyxy_px * scale, size_hw=size_hw, keypoints=points)


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask bool `[H, W]` with a neighbour outside it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner
