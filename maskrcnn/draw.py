"""Pictures of detections and annotations."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from maskrcnn.postprocess import Detections

Colour = tuple[int, int, int]

_OPACITY = 0.45
_MIN_SIDE_PX = 640  # smaller pictures are enlarged, so that the text does not hide them
_POINT_PX = 3  # radius of a keypoint


@dataclass(frozen=True, eq=False)
class Mark:
    """One object on a picture, in its pixels."""

    box_xyxy_px: tuple[float, float, float, float]
    text: str  # at the upper left corner
    colour: Colour
    mask: np.ndarray | None = None  # [H, W] bool
    points_px: Sequence[tuple[float, float]] = ()  # x, y


def colour_of(index: int) -> Colour:
    """A bright colour, different for neighbouring indices (golden-ratio hues)."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(index * 0.61803398875 % 1.0, 0.75, 1.0))


def overlay(image: np.ndarray, detections: Detections, class_names: tuple[str, ...]) -> Image.Image:
    """The image with each detection's box, class and score and, where there are masks, mask and outline.

    The best is on top. Small images are enlarged by a whole factor to at least 640 px on their longer side.

    Args:
        image: uint8 `[H, W, 3]` RGB.
        detections: of this image, in its pixels.
        class_names: of labels 1, 2, ….
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
    return _drawn(_repeated(image, scale), marks)


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
    return replace(detections, boxes_xyxy_px=detections.boxes_xyxy_px * scale, size_hw=(height * scale, width * scale))


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask bool `[H, W]` with a neighbour outside it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner
