"""Detections in the formats of other tools: outlines, tables, and `supervision` objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from maskrcnn.errors import missing_library
from maskrcnn.imaging.paste import paste_mask
from maskrcnn.imaging.run_lengths import window_of

if TYPE_CHECKING:
    from maskrcnn.imaging.postprocess import Detections


def polygons(detections: Detections, threshold: float = 0.5) -> list[list[np.ndarray]]:
    """Outlines of the masks, between pixels, where the mask probability crosses `threshold`.

    Args:
        detections: detections of one image, with masks.
        threshold: mask probability, 0 to 1.

    Returns:
        for each detection, a list of closed outlines, float64 `[P, 2]` (x, y) in pixels of the original image, one per
        connected part; the first point is repeated at the end. Holes are left out. A mask that is below the threshold
        everywhere has no outline.

    Raises:
        UserError: for detections without masks, and if contourpy is not installed.
    """
    try:
        from contourpy import FillType, contour_generator
    except ImportError as error:
        raise missing_library("contourpy", "trace the outlines of masks", "pip install contourpy") from error
    outlines: list[list[np.ndarray]] = []
    for window, top, left in _windows(detections, threshold):
        parts: list[np.ndarray] = []
        if window.size and window.max() > threshold:
            # A border of zeros closes outlines at the edge of the window. The value of pixel j is at x = j + 0.5.
            generator = contour_generator(z=np.pad(window, 1), fill_type=FillType.OuterOffset)
            points, offsets = generator.filled(threshold, np.inf)  # type: ignore[misc]
            for ring, starts in zip(points, offsets, strict=True):
                outer = ring[starts[0] : starts[1]] + np.array((left - 0.5, top - 0.5))
                height, width = detections.size_hw
                parts.append(np.clip(outer, 0, (width, height)))
        outlines.append(parts)
    return outlines


def _windows(detections: Detections, threshold: float) -> Iterator[tuple[np.ndarray, int, int]]:
    """Mask probabilities, or 0 and 1, in the part of the image that contains the mask, and its first row and column."""
    if detections.mask_runs is None:
        for mask, box in zip(detections.require_masks(), detections.boxes_xyxy_px, strict=True):
            yield paste_mask(mask, box, detections.size_hw)
    else:
        for spans in detections.runs(threshold).spans():
            window, top, left = window_of(spans, detections.size_hw[0])
            yield window.astype(np.float32), top, left


def to_dataframe(detections: Detections) -> Any:
    """A pandas DataFrame with one row per detection.

    Columns: `label`, `class_name` (empty if the class names are unknown), `score`, `x0`, `y0`, `x1`, `y1` in pixels of
    the original image, and with masks `area_px`, the number of pixels of the mask.

    Raises:
        UserError: if pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise missing_library("pandas", "make a table of detections", "pip install pandas") from error
    table = {"label": detections.labels, "class_name": detections.names, "score": detections.scores}
    table |= dict(zip(("x0", "y0", "x1", "y1"), detections.boxes_xyxy_px.T, strict=True))
    if detections.has_masks:
        table["area_px"] = detections.runs().sums()[0]
    return pandas.DataFrame(table)


def to_supervision(detections: Detections) -> Any:
    """A `supervision.Detections`: `class_id` are labels minus 1, class names are in `data["class_name"]`.

    Raises:
        UserError: if supervision is not installed.
    """
    try:
        import supervision
    except ImportError as error:
        raise missing_library("supervision", "convert detections for it", "pip install supervision") from error
    return supervision.Detections(
        xyxy=detections.boxes_xyxy_px,
        mask=detections.full_masks() if detections.has_masks else None,
        confidence=detections.scores,
        class_id=detections.labels - 1,
        data={"class_name": np.array(detections.names, dtype=str)},
    )
