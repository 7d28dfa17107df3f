"""Pictures of detections."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from maskrcnn.postprocess import Detections

_OPACITY = 0.45
_MIN_SIDE_PX = 640  # smaller pictures are enlarged, so that the text does not hide them


def colour_of(index: int) -> tuple[int, int, int]:
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
    scale = max(1, -(-_MIN_SIDE_PX // max(image.shape[:2])))
    detections = _enlarged(detections, scale)
    canvas = np.repeat(np.repeat(image, scale, axis=0), scale, axis=1).astype(np.float32)
    order = range(len(detections) - 1, -1, -1)
    masks = detections.full_masks() if detections.has_masks else None
    for k in order if masks is not None else ():
        mask, colour = masks[k], np.array(colour_of(k), np.float32)
        canvas[mask] = (1 - _OPACITY) * canvas[mask] + _OPACITY * colour
        canvas[_outline(mask)] = colour
    picture = Image.fromarray(canvas.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for k in order:
        box = [float(v) for v in detections.boxes_xyxy_px[k]]
        text = f"{class_names[detections.labels[k] - 1]} {detections.scores[k]:.2f}"
        draw.rectangle(box, outline=colour_of(k))
        left, top, right, bottom = draw.textbbox((box[0] + 2, max(box[1] - 12, 0)), text)
        draw.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=colour_of(k))
        draw.text((left, max(box[1] - 12, 0)), text, fill="black")
    return picture


def _enlarged(detections: Detections, scale: int) -> Detections:
    """The detections in a picture of `scale` times the size."""
    height, width = detections.size_hw
    return replace(detections, boxes_xyxy_px=detections.boxes_xyxy_px * scale, size_hw=(height * scale, width * scale))


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask bool `[H, W]` with a neighbour outside it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner
