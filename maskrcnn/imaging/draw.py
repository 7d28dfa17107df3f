"""Drawing of detections and annotations on images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from maskrcnn.files import atomic_path

if TYPE_CHECKING:
    from maskrcnn.imaging.postprocess import Detections

Colour = tuple[int, int, int]
_Box = tuple[float, float, float, float]  # x0, y0, x1, y1
_Line = tuple[_Box, Colour]

# Lowest score of a keypoint that is drawn, as in Detectron. It is a logit of the heat map, not a probability: its range
# depends on the training, and a hidden keypoint may have a high score as well.
POINT_SCORE = 2.0
_OPACITY = 0.45
_MIN_SIDE_PX = 640  # smaller images are enlarged, so that the text does not hide them
_POINT_PX = 3  # radius of a keypoint
_LINE_PX = 3  # width of a skeleton line


@dataclass(frozen=True, eq=False)
class Mark:
    """An object to draw, in pixels of the image."""

    box_xyxy_px: _Box
    text: str  # at the top left corner
    colour: Colour
    mask: np.ndarray | None = None  # [H, W] bool
    points_px: Sequence[tuple[float, float]] = ()  # x, y
    lines: Sequence[_Line] = ()


def colour_of(index: int) -> Colour:
    """Returns a bright colour, different for neighbouring indices (golden-ratio hues)."""
    red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(index * 0.61803398875 % 1.0, 0.75, 1.0))
    return red, green, blue


def displayed(image: np.ndarray) -> np.ndarray:
    """An image `[H, W, C]`, uint8 or float32 from 0 to 255, for the eye: uint8 `[H, W, 3]`.

    The first three bands are taken as RGB, or the first of fewer as grey.
    """
    if image.dtype != np.uint8:
        image = image.round().astype(np.uint8)
    return image if image.shape[2] == 3 else image[..., [0, 1, 2] if image.shape[2] > 3 else [0, 0, 0]]


def overlay(
    image: np.ndarray,
    detections: Detections,
    class_names: tuple[str, ...],
    skeleton: Sequence[tuple[int, int]] = (),
    *,
    point_score: float = POINT_SCORE,
) -> Image.Image:
    """Draws detections on an image: box, class and score, and mask with outline and keypoints if present.

    The highest score is on top. Small images are enlarged by an integer factor to at least 640 px on the longer side.

    Args:
        image: `[H, W, C]`, see `displayed`.
        detections: of this image, in its pixels.
        class_names: of labels 1, 2, ….
        skeleton: pairs of keypoints, counted from 1, connected by a line; each pair has its own colour.
        point_score: lowest score of a keypoint that is drawn, with the lines to it; see `POINT_SCORE`.
    """
    image = displayed(image)
    scale = _scale(image)
    detections = _enlarged(detections, scale)
    masks = detections.full_masks() if detections.has_masks else None
    marks = []
    for k, (box, label, score) in enumerate(
        zip(detections.boxes_xyxy_px.tolist(), detections.labels, detections.scores, strict=True)
    ):
        mask = None if masks is None else masks[k]
        mark = Mark(tuple(box), f"{class_names[label - 1]} {score:.2f}", colour_of(k), mask)
        if detections.keypoints is not None:
            points = detections.keypoints[k]
            mark = with_pose(mark, points, points[:, 2] >= point_score, skeleton)
        marks.append(mark)
    return _draw(_enlarge(image, scale), marks)


def with_pose(
    mark: Mark,
    keypoints: np.ndarray,
    is_shown: np.ndarray,
    skeleton: Sequence[tuple[int, int]],
    colour: Colour | None = None,
) -> Mark:
    """Returns a mark with keypoints and skeleton lines.

    Args:
        mark: of the object.
        keypoints: `[K, 3]` x, y in pixels of the image; the third value is not used.
        is_shown: bool `[K]`.
        skeleton: see `overlay`; a line is drawn if both its ends are shown.
        colour: of all lines (default: a different one for each).
    """
    places = keypoints[:, :2].astype(float).tolist()
    lines = [
        ((*places[first - 1], *places[second - 1]), colour or colour_of(number))
        for number, (first, second) in enumerate(skeleton)
        if is_shown[first - 1] and is_shown[second - 1]
    ]
    return replace(mark, points_px=[(places[k][0], places[k][1]) for k in np.flatnonzero(is_shown)], lines=lines)


def draw_marks(image: np.ndarray, marks: Sequence[Mark]) -> Image.Image:
    """Draws marks on an image, the first on top; enlarged as by `overlay`.

    Args:
        image: `[H, W, C]`, see `displayed`.
        marks: in its pixels.
    """
    image = displayed(image)
    scale = _scale(image)
    enlarged = [
        replace(
            mark,
            box_xyxy_px=_scaled_box(mark.box_xyxy_px, scale),
            mask=None if mark.mask is None else _enlarge(mark.mask, scale),
            points_px=[(scale * x, scale * y) for x, y in mark.points_px],
            lines=[(_scaled_box(ends, scale), colour) for ends, colour in mark.lines],
        )
        for mark in marks
    ]
    return _draw(_enlarge(image, scale), enlarged)


def save_drawing(image: Image.Image, path: Path) -> None:
    """Writes a PNG file that `maskrcnn.files.DRAWING` recognises: its entry `Software` says maskrcnn."""
    entries = PngInfo()
    entries.add_text("Software", "maskrcnn")
    with atomic_path(path) as draft:
        image.save(draft, format="PNG", pnginfo=entries)


def _scaled_box(box: _Box, scale: int) -> _Box:
    x0, y0, x1, y1 = box
    return scale * x0, scale * y0, scale * x1, scale * y1


def _draw(image: np.ndarray, marks: Sequence[Mark]) -> Image.Image:
    canvas = image.astype(np.float32)
    for mark in reversed(marks):
        if mark.mask is not None:
            tint = np.array(mark.colour, np.float32)
            canvas[mark.mask] = (1 - _OPACITY) * canvas[mark.mask] + _OPACITY * tint
            canvas[_outline(mark.mask)] = tint
    drawn = Image.fromarray(canvas.round().astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
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
    return drawn


def _scale(image: np.ndarray) -> int:
    return max(1, -(-_MIN_SIDE_PX // int(max(image.shape[:2]))))


def _enlarge(pixels: np.ndarray, scale: int) -> np.ndarray:
    return np.repeat(np.repeat(pixels, scale, axis=0), scale, axis=1)


def _enlarged(detections: Detections, scale: int) -> Detections:
    """The detections on an image of `scale` times the size."""
    height, width = detections.size_hw
    points = None if detections.keypoints is None else detections.keypoints * np.array([scale, scale, 1], np.float32)
    size_hw = height * scale, width * scale
    return replace(detections, boxes_xyxy_px=detections.boxes_xyxy_px * scale, size_hw=size_hw, keypoints=points)


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask bool `[H, W]` with a neighbour outside it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    outline: np.ndarray = mask & ~inner
    return outline
