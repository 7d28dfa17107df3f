"""What a check of a dataset found, as text and as JSON."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maskrcnn.data.coco import CocoDataset, ImageRecord, Instance, instance_mask
from maskrcnn.data.images import read_image
from maskrcnn.errors import UserError
from maskrcnn.files import atomic_path
from maskrcnn.imaging.draw import colour_of

_EXAMPLES = 3  # shown of each problem
_MOST_CLASSES = 100  # rows of the table; a longer list is complete in the JSON file
_SIZES = ("small", "medium", "large")  # COCO's: areas below 32², below 96², and the rest


@dataclass(frozen=True)
class Problem:
    """A kind of fault. Training stops at an error; it goes on with a remark."""

    name: str
    is_error: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """One fault."""

    problem: Problem
    split: str
    where: str  # the file, image or annotation
    detail: str
    record: ImageRecord | None = None  # the image, where there is one to look at
    instances: tuple[Instance, ...] = ()  # the objects to show on it
    boxes_xyxy_px: tuple[tuple[float, float, float, float], ...] = ()  # regions to show that are no objects


@dataclass(frozen=True, kw_only=True)
class SplitFigures:
    """What a split holds. Objects are annotations that training uses; crowd regions it leaves out."""

    split: str
    images: int
    images_without_objects: int
    crowd_regions: int
    skipped_annotations: int
    smallest_image_hw: tuple[int, int]  # by its area, as the JSON says
    largest_image_hw: tuple[int, int]
    objects_per_image_median: float
    objects_per_image_max: int
    objects: dict[str, tuple[int, int, int]]  # class name -> objects of each of SIZES
    has_masks: bool = True  # False: boxes only, for models without masks
    objects_with_keypoints: int = 0  # of which some are labelled

    @property
    def object_count(self) -> int:
        """All objects."""
        return sum(sum(counts) for counts in self.objects.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class DatasetReport:
    """The whole check."""

    root: Path
    datasets: tuple[CocoDataset, ...]  # those whose annotations can be read
    splits: tuple[SplitFigures, ...]  # of the same ones
    findings: tuple[Finding, ...]

    def by_problem(self, *, is_error: bool) -> dict[str, list[Finding]]:
        """The errors, or the remarks, by the name of their problem."""
        groups: dict[str, list[Finding]] = defaultdict(list)
        for finding in self.findings:
            if finding.problem.is_error == is_error:
                groups[finding.problem.name].append(finding)
        return dict(groups)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the objects themselves, as JSON holds it."""
        return {
            "root": str(self.root),
            "splits": [_figures_as_json(figures) for figures in self.splits],
            "errors": _findings_as_json(self.by_problem(is_error=True)),
            "remarks": _findings_as_json(self.by_problem(is_error=False)),
        }

    def text(self) -> str:
        """A summary of each split, the table of classes, and each problem with its first examples."""
        lines = [f"{self.root}", *(_summary(figures) for figures in self.splits)]
        if self.splits:
            lines += ["", *_class_table(self.splits)]
        for title, is_error in (("errors, at which training stops", True), ("remarks", False)):
            groups = self.by_problem(is_error=is_error)
            lines += ["", f"{title}: {sum(map(len, groups.values())) or 'none'}"]
            for name, findings in groups.items():
                lines += _examples(name, findings)
        return "\n".join(lines)


def _figures_as_json(figures: SplitFigures) -> dict[str, Any]:
    values = dict(vars(figures))
    values["objects"] = {
        name: dict(zip(_SIZES, counts, strict=True)) | {"all": sum(counts)} for name, counts in figures.objects.items()
    }
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _findings_as_json(groups: dict[str, list[Finding]]) -> dict[str, Any]:
    return {
        name: {
            "count": len(findings),
            "findings": [{"split": f.split, "where": f.where, "detail": f.detail} for f in findings],
        }
        for name, findings in groups.items()
    }


def _summary(figures: SplitFigures) -> str:
    (low_h, low_w), (high_h, high_w) = figures.smallest_image_hw, figures.largest_image_hw
    sizes = (
        f"{low_w}×{low_h}"
        if figures.smallest_image_hw == figures.largest_image_hw
        else (f"{low_w}×{low_h} to {high_w}×{high_h}")
    )
    return (
        f"  {figures.split}: {figures.images} images of {sizes} px, {figures.images_without_objects} without objects; "
        f"{figures.object_count} objects, {figures.objects_per_image_median:g} per image (median), "
        f"{figures.objects_per_image_max} at most; {figures.crowd_regions} crowd regions"
        + (f"; {figures.objects_with_keypoints} objects with keypoints" if figures.objects_with_keypoints else "")
        + ("" if figures.has_masks else "; boxes without masks (train a fasterrcnn_… model)")
    )


def _class_table(splits: tuple[SplitFigures, ...]) -> list[str]:
    """Objects by class, the most frequent first, with a group of columns for each split."""
    names = {name: None for figures in splits for name in figures.objects}
    totals = {name: sum(sum(figures.objects.get(name, ())) for figures in splits) for name in names}
    ordered = sorted(names, key=lambda name: -totals[name])[:_MOST_CLASSES]
    head = [["", *(cell for f in splits for cell in (f.split, *[""] * len(_SIZES)))]]
    head += [["class", *("objects", *_SIZES) * len(splits)]]
    rows = [[name, *(str(n) for f in splits for n in _counts(f, name))] for name in ordered]
    sums = [[sum(counts) for counts in zip(*f.objects.values(), strict=True)] or [0] * len(_SIZES) for f in splits]
    rows.append(["all classes", *(str(n) for counts in sums for n in (sum(counts), *counts))])
    widths = [max(len(row[k]) for row in head + rows) for k in range(len(rows[0]))]
    table = [
        "  " + "  ".join(c.rjust(w) if k else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in head + rows
    ]
    if len(names) > len(ordered):
        table.insert(-1, f"  … and {len(names) - len(ordered)} more classes")
    return [line.rstrip() for line in table]


def _counts(figures: SplitFigures, name: str) -> tuple[int, ...]:
    counts = figures.objects.get(name, (0,) * len(_SIZES))
    return (sum(counts), *counts)


def _examples(name: str, findings: list[Finding]) -> list[str]:
    lines = [f"  {len(findings)} × {name}"]
    lines += [f"      {f.split}: {f.where}: {f.detail}" for f in findings[:_EXAMPLES]]
    if len(findings) > _EXAMPLES:
        lines.append(f"      … and {len(findings) - _EXAMPLES} more")
    return lines


# Pictures of what a check of a dataset found, and a sheet of samples as they are annotated.

_Box = tuple[float, float, float, float]  # xyxy, pixels of the image

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
    box_xyxy_px: _Box
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
                picture = finding.record and _picture_of(finding, names[finding.split])
                if picture:
                    _save(picture, folder / f"{_slug(problem)}-{number:02}-{finding.record.path.stem}.png")
                    written += 1
    sheet = contact_sheet(report.datasets)
    if sheet:
        _save(sheet, folder / "samples.png")
    return written + bool(sheet)


def _picture_of(finding: Finding, class_names: Sequence[str]) -> Image.Image | None:
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


def _closer_view(boxes: Sequence[_Box], size_hw: tuple[int, int]) -> _Box | None:
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
    painted: np.ndarray, marks: Sequence[_Mark], view: _Box, longest_px: int, *, crowded: bool = False
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
