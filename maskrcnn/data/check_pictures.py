"""Pictures of what a check of a dataset found, and a sheet of samples as they are annotated."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maskrcnn.data.coco import CocoDataset, ImageRecord, Instance, instance_mask
from maskrcnn.data.findings import DatasetReport, Finding
from maskrcnn.data.images import read_image
from maskrcnn.draw import colour_of
from maskrcnn.errors import UserError
from maskrcnn.files import atomic_path

Box = tuple[float, float, float, float]  # xyxy, pixels of the image

_PANEL_PX = 640  # longest side of each of a picture's one or two panels
_THUMBNAIL_PX = 320
_COLUMNS, _ROWS, _GAP_PX = 4, 4, 6  # of the sheet
_FONT_PX = 14
_LETTER_PX = 7.5  # average width at that size
_OPACITY = 0.4
_LEAST_VIEW_PX = 64  # a closer look at less than this shows only squares
_BACKGROUND = (32, 32, 32)


@dataclass(frozen=True)
class _Mark:
    box_xyxy_px: Box
    text: str
    colour: tuple[int, int, int]


def write_pictures(report: DatasetReport, folder: Path, *, per_problem: int) -> int:
    """Draws the first findings of each problem and a sheet of random samples, `samples.png`.

    A finding's picture holds the whole image with the objects concerned and, where these are small, a closer look
    at them. Findings without a readable image have none.

    Args:
        report: of `check_dataset`.
        folder: to write to; it is made.
        per_problem: most pictures of each problem.

    Returns:
        how many pictures were written.
    """
    names = {dataset.split: dataset.class_names for dataset in report.datasets}
    written = 0
    for is_error in (True, False):
        for problem, findings in report.by_problem(is_error=is_error).items():
            for number, finding in enumerate(findings[:per_problem], start=1):
                picture = finding.record and picture_of(finding, names[finding.split])
                if picture:
                    _save(picture, folder / f"{_slug(problem)}-{number:02}-{finding.record.path.stem}.png")
                    written += 1
    sheet = contact_sheet(report.datasets)
    if sheet:
        _save(sheet, folder / "samples.png")
    return written + bool(sheet)


def picture_of(finding: Finding, class_names: Sequence[str]) -> Image.Image | None:
    """The picture of a finding, with what is wrong as its caption; None where the image cannot be read."""
    try:
        image = read_image(finding.record.path)
    except UserError:
        return None
    marks = [_mark(index, instance, class_names) for index, instance in enumerate(finding.instances)]
    marks += [_Mark(box, "left out", (255, 255, 255)) for box in finding.boxes_xyxy_px]
    painted = _painted(image, finding.record, finding.instances)
    whole = (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))
    panels = [_panel(painted, marks, whole, _PANEL_PX)]
    closer = _closer_view([mark.box_xyxy_px for mark in marks], image.shape[:2])
    if closer:
        panels.append(_panel(painted, marks, closer, _PANEL_PX))
    return _captioned(_beside(panels), f"{finding.problem.name}\n{finding.split}: {finding.where}: {finding.detail}")


def contact_sheet(datasets: Sequence[CocoDataset]) -> Image.Image | None:
    """Up to 16 random images with all their objects, always the same ones; None where no image can be read."""
    pool = [(dataset, record) for dataset in datasets for record in dataset.images if record.instances]
    cells = []
    for index in np.random.default_rng(0).permutation(len(pool)):
        dataset, record = pool[index]
        try:
            image = read_image(record.path)
        except UserError:
            continue
        marks = [_mark(k, instance, dataset.class_names) for k, instance in enumerate(record.instances)]
        whole = (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))
        panel = _panel(_painted(image, record, record.instances), marks, whole, _THUMBNAIL_PX, crowded=True)
        cell = Image.new("RGB", (_THUMBNAIL_PX + _GAP_PX, _THUMBNAIL_PX + _GAP_PX), _BACKGROUND)
        cell.paste(panel, (0, 0))
        cells.append(_captioned(cell, f"{dataset.split}: {record.path.name}"))
        if len(cells) == _COLUMNS * _ROWS:
            break
    rows = [_beside(cells[k : k + _COLUMNS]) for k in range(0, len(cells), _COLUMNS)]
    return _below(rows) if rows else None


def _mark(index: int, instance: Instance, class_names: Sequence[str]) -> _Mark:
    name = class_names[instance.label - 1]
    return _Mark(instance.box_xyxy_px, f"{name}, crowd" if instance.is_crowd else name, colour_of(index))


def _painted(image: np.ndarray, record: ImageRecord, instances: Sequence[Instance]) -> np.ndarray:
    """The image uint8 `[H, W, 3]` with the masks tinted; a mask of another size lies at the top left."""
    canvas = image.astype(np.float32)
    for index, instance in enumerate(instances):
        mask = instance_mask(record, instance)[: image.shape[0], : image.shape[1]]
        part = canvas[: mask.shape[0], : mask.shape[1]]
        part[mask] = (1 - _OPACITY) * part[mask] + _OPACITY * np.array(colour_of(index), np.float32)
    return canvas.round().astype(np.uint8)


def _closer_view(boxes: Sequence[Box], size_hw: tuple[int, int]) -> Box | None:
    """The surroundings of the boxes, or None where they take half the image's length anyway."""
    if not boxes:
        return None
    height, width = size_hw
    corners = np.array(boxes, np.float64).clip(0, [width, height, width, height])
    low, high = corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)
    half = max(float((high - low).max()), _LEAST_VIEW_PX / 2)
    centre = (low + high) / 2
    if 4 * half > max(size_hw):
        return None
    corner = np.floor(centre - half)
    left, top = corner.clip(0, [width, height])
    right, bottom = (corner + np.ceil(2 * half)).clip(0, [width, height])
    return (left, top, right, bottom) if right > left and bottom > top else None


def _panel(
    painted: np.ndarray, marks: Sequence[_Mark], view: Box, longest_px: int, *, crowded: bool = False
) -> Image.Image:
    """A part of the image at `longest_px`, with the marked boxes and their texts; if crowded, those that fit."""
    left, top, right, bottom = (int(value) for value in view)
    scale = longest_px / max(right - left, bottom - top)
    size = tuple(max(1, round(side * scale)) for side in (right - left, bottom - top))
    way = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    panel = Image.fromarray(painted[top:bottom, left:right]).resize(size, way)
    draw = ImageDraw.Draw(panel)
    font = ImageFont.load_default(_FONT_PX)
    for mark in marks:
        x1, y1, x2, y2 = (np.array(mark.box_xyxy_px) - [left, top, left, top]) * scale
        # A box that reaches out of the view is cut just outside it, and one of negative size is drawn all the same.
        x1, x2 = sorted(np.clip([x1, x2], -2, size[0] + 1))
        y1, y2 = sorted(np.clip([y1, y2], -2, size[1] + 1))
        draw.rectangle((x1, y1, x2, y2), outline=mark.colour)
        if crowded and font.getlength(mark.text) > x2 - x1:
            continue
        x, y = max(x1 + 2, 2), max(y1 - _FONT_PX - 3, 1)
        draw.rectangle(draw.textbbox((x, y), mark.text, font=font), fill=mark.colour)
        draw.text((x, y), mark.text, fill="black", font=font)
    return panel


def _captioned(picture: Image.Image, text: str) -> Image.Image:
    """The picture below its caption, which is wrapped to the picture's width."""
    letters = max(int(picture.width / _LETTER_PX), 20)
    # The font that comes with Pillow has no multiplication sign.
    lines = [part for line in text.replace("×", "x").splitlines() for part in textwrap.wrap(line, letters)]
    font, step = ImageFont.load_default(_FONT_PX), _FONT_PX + 5
    bar = Image.new("RGB", (picture.width, step * len(lines) + 6), _BACKGROUND)
    for number, line in enumerate(lines):
        ImageDraw.Draw(bar).text((6, 3 + number * step), line, fill="white", font=font)
    return _below([bar, picture])


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    joined = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), _BACKGROUND)
    left = 0
    for picture in pictures:
        joined.paste(picture, (left, 0))
        left += picture.width
    return joined


def _below(pictures: Sequence[Image.Image]) -> Image.Image:
    joined = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), _BACKGROUND)
    top = 0
    for picture in pictures:
        joined.paste(picture, (0, top))
        top += picture.height
    return joined


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_path(path) as draft:
        picture.save(draft, format="PNG")
