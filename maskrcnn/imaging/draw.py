"""Drawing of detections and annotations on images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from maskrcnn.files import atomic_path
from maskrcnn.imaging.run_lengths import window_of

if TYPE_CHECKING:
    from maskrcnn.imaging.postprocess import Detections

Colour = tuple[int, int, int]
_Box = tuple[float, float, float, float]  # x0, y0, x1, y1
_Line = tuple[_Box, Colour]

# Minimum score of drawn keypoints, as in Detectron. It is a logit of the heat map, not a probability: its range depends
# on the training, and a hidden keypoint may also have a high score.
POINT_SCORE = 2.0
_OPACITY = 0.45
_MIN_SIDE_PX = 640  # smaller images are enlarged, so that the text does not hide them
# Sizes as shares of the image's longer side, so that large and small photos look the same when they fill the screen.
_LINE, _POINT, _FONT = 1 / 400, 1 / 220, 1 / 55  # width of lines, radius of keypoints, height of text
_DARK = 110  # luma of a label below which its text is white
_JPEG_QUALITY = 92


@dataclass(frozen=True, eq=False)
class Mark:
    """An object to draw, in pixels of the image."""

    box_xyxy_px: _Box
    text: str  # label of the box
    colour: Colour
    mask: np.ndarray | None = None  # bool [H, W], or the part of it that contains the object
    mask_at: tuple[int, int] = (0, 0)  # row and column of its first pixel
    points_px: Sequence[tuple[float, float]] = ()  # x, y
    lines: Sequence[_Line] = ()


def colour_of(index: int) -> Colour:
    """Returns a bright colour, different for neighbouring indices (golden-ratio hues)."""
    red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(index * 0.61803398875 % 1.0, 0.75, 1.0))
    return red, green, blue


def displayed(image: np.ndarray) -> np.ndarray:
    """Converts an image `[H, W, C]`, uint8 or float32 from 0 to 255, for display: uint8 `[H, W, 3]`.

    The first three bands are used as RGB; with fewer bands, the first is used as grey.
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
    with_scores: bool = True,
) -> Image.Image:
    """Draws detections on an image: box, class and score, and mask with outline and keypoints if present.

    The highest score is on top. Lines and text scale with the image; small images are enlarged by an integer factor to
    at least 640 px on the longer side. A label is placed where it covers no other label, if its box has such a place.

    Args:
        image: `[H, W, C]`, see `displayed`.
        detections: detections in pixels of this image.
        class_names: names of labels 1, 2, ….
        skeleton: pairs of keypoints, counted from 1, connected by a line; each pair has its own colour.
        point_score: minimum score of drawn keypoints and their lines; see `POINT_SCORE`.
        with_scores: write the score after the class; False for annotations.
    """
    image = displayed(image)
    scale = _scale(image)
    masks = _masks(detections, scale)
    detections = _enlarged(detections, scale)
    marks = []
    for k, (box, label, score) in enumerate(
        zip(detections.boxes_xyxy_px.tolist(), detections.labels, detections.scores, strict=True)
    ):
        text = f"{class_names[label - 1]} {score:.2f}" if with_scores else class_names[label - 1]
        mark = Mark(tuple(box), text, colour_of(k), *masks[k])
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
        mark: mark of the object.
        keypoints: `[K, 3]` x, y in pixels of the image; the third value is not used.
        is_shown: bool `[K]`.
        skeleton: see `overlay`; a line is drawn if both its ends are shown.
        colour: colour of all lines (default: a different colour for each).
    """
    places = keypoints[:, :2].astype(float).tolist()
    lines = [
        ((*places[first - 1], *places[second - 1]), colour or colour_of(number))
        for number, (first, second) in enumerate(skeleton)
        if is_shown[first - 1] and is_shown[second - 1]
    ]
    return replace(mark, points_px=[(places[k][0], places[k][1]) for k in np.flatnonzero(is_shown)], lines=lines)


def draw_marks(image: np.ndarray, marks: Sequence[Mark]) -> Image.Image:
    """Draws marks on an image, the first on top; enlarged as in `overlay`.

    Args:
        image: `[H, W, C]`, see `displayed`.
        marks: marks in pixels of the image.
    """
    image = displayed(image)
    scale = _scale(image)
    enlarged = [
        replace(
            mark,
            box_xyxy_px=_scaled_box(mark.box_xyxy_px, scale),
            mask=None if mark.mask is None else _enlarge(mark.mask, scale),
            mask_at=(scale * mark.mask_at[0], scale * mark.mask_at[1]),
            points_px=[(scale * x, scale * y) for x, y in mark.points_px],
            lines=[(_scaled_box(ends, scale), colour) for ends, colour in mark.lines],
        )
        for mark in marks
    ]
    return _draw(_enlarge(image, scale), enlarged)


def stacked(images: Sequence[Image.Image], *, vertical: bool = False, background: Colour = (0, 0, 0)) -> Image.Image:
    """Images side by side, or one below the other, aligned at the top or the left."""
    widths, heights = zip(*(image.size for image in images), strict=True)
    whole = Image.new("RGB", (max(widths), sum(heights)) if vertical else (sum(widths), max(heights)), background)
    offset = 0
    for image in images:
        whole.paste(image, (0, offset) if vertical else (offset, 0))
        offset += image.height if vertical else image.width
    return whole


def save_drawing(image: Image.Image, path: Path) -> None:
    """Writes a JPEG (.jpg) or PNG file with an entry from which `maskrcnn.files.DRAWING` recognises it."""
    entries = PngInfo()
    entries.add_text("Software", "maskrcnn")
    with atomic_path(path) as draft:
        if path.suffix == ".jpg":
            image.save(draft, format="JPEG", quality=_JPEG_QUALITY, comment=b"maskrcnn")
        else:
            image.save(draft, format="PNG", pnginfo=entries)


def _scaled_box(box: _Box, scale: int) -> _Box:
    x0, y0, x1, y1 = box
    return scale * x0, scale * y0, scale * x1, scale * y1


def _draw(image: np.ndarray, marks: Sequence[Mark]) -> Image.Image:
    canvas, side = image.copy(), max(image.shape[:2])
    line, point = max(1, round(side * _LINE)), max(3, round(side * _POINT))
    for mark in reversed(marks):
        if mark.mask is not None:
            (y, x), (height, width) = mark.mask_at, mark.mask.shape
            _tint(canvas[y : y + height, x : x + width], mark.mask, mark.colour, line)
    drawn = Image.fromarray(canvas)
    draw = ImageDraw.Draw(drawn)
    for mark in reversed(marks):
        x0, y0, x1, y1 = mark.box_xyxy_px
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=mark.colour, width=line)
        for ends, colour in mark.lines:
            draw.line(ends, fill=colour, width=line + 1)
        for px, py in mark.points_px:
            draw.ellipse((px - point, py - point, px + point, py + point), fill=mark.colour)
    font = ImageFont.load_default(max(12, round(side * _FONT)))
    for mark, (left, top, right, bottom) in reversed(
        list(zip(marks, _label_boxes(marks, font, drawn.size), strict=True))
    ):
        red, green, blue = mark.colour
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < _DARK
        draw.rectangle((left, top, right - 1, bottom - 1), fill=mark.colour)
        middle = ((left + right) / 2, (top + bottom) / 2)
        draw.text(middle, mark.text, fill="white" if is_dark else "black", font=font, anchor="mm")
    return drawn


def _label_boxes(marks: Sequence[Mark], font: Any, size_wh: tuple[int, int]) -> list[_Box]:
    """Places labels, starting with the first mark, where they cover no earlier label, or else as little as possible.

    Tried in order: above the box, inside its upper left corner, below it, and the same at its right side.
    """
    width, height = size_wh
    ascent, descent = font.getmetrics()
    placed = np.zeros((0, 4))
    for mark in marks:
        w, h = font.getlength(mark.text) + ascent / 2, float(ascent + descent)
        x0, y0, x1, y1 = mark.box_xyxy_px
        corners = [(x, y) for x in (x0, x1 - w) for y in (y0 - h, y0, y1, y1 - h)]
        corners += [(x1, y0), (x0 - w, y0)]
        low = np.array(corners).clip(0, [max(width - w, 0), max(height - h, 0)])
        places = np.concatenate([low, low + np.array([w, h])], axis=1)
        sides = np.minimum(places[:, None, 2:], placed[:, 2:]) - np.maximum(places[:, None, :2], placed[:, :2])
        covered = sides.clip(0).prod(axis=2).sum(axis=1)
        placed = np.concatenate([placed, places[[int(covered.argmin())]]])
    return [(left, top, right, bottom) for left, top, right, bottom in placed.tolist()]


def _tint(canvas: np.ndarray, mask: np.ndarray, colour: Colour, line: int) -> None:
    """Colours the pixels of a mask bool `[H, W]` in place, and more strongly its outline of `line` pixels."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside, part = mask[window], canvas[window]
    tint = np.array(colour, np.float32)
    part[inside] = ((1 - _OPACITY) * part[inside] + _OPACITY * tint).round()
    core = inside
    for _ in range(line):  # eroded by a pixel on all sides
        padded = np.pad(core, 1)
        core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:] & core
    part[inside & ~core] = colour


def _scale(image: np.ndarray) -> int:
    return max(1, -(-_MIN_SIDE_PX // int(max(image.shape[:2]))))


def _enlarge(pixels: np.ndarray, scale: int) -> np.ndarray:
    return np.repeat(np.repeat(pixels, scale, axis=0), scale, axis=1)


def _masks(detections: Detections, scale: int) -> list[tuple[np.ndarray | None, tuple[int, int]]]:
    """The mask of each detection on an image enlarged by `scale`, and its position, as in `Mark`."""
    if detections.mask_runs is not None:  # joined from tiles: never in the whole scene
        windows = (window_of(spans, detections.size_hw[0]) for spans in detections.runs().spans())
        return [(_enlarge(mask, scale), (scale * top, scale * left)) for mask, top, left in windows]
    if not detections.has_masks:
        return [(None, (0, 0))] * len(detections)
    return [(mask, (0, 0)) for mask in _enlarged(detections, scale).full_masks()]


def _enlarged(detections: Detections, scale: int) -> Detections:
    """The detections on an image enlarged by `scale`."""
    height, width = detections.size_hw
    points = None if detections.keypoints is None else detections.keypoints * np.array([scale, scale, 1], np.float32)
    size_hw = height * scale, width * scale
    return replace(detections, boxes_xyxy_px=detections.boxes_xyxy_px * scale, size_hw=size_hw, keypoints=points)
