"""The report of `check_dataset`: text, JSON, and images of the findings."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maskrcnn.data.coco import CocoDataset, instance_mask
from maskrcnn.data.records import ImageRecord, Instance
from maskrcnn.data.survey import read_for_display
from maskrcnn.errors import UserError
from maskrcnn.imaging.draw import colour_of, save_drawing, stacked

_EXAMPLES = 3  # examples per problem
_MAX_CLASSES = 100  # rows of the table; the JSON file has all classes
_SIZES = ("small", "medium", "large")  # COCO's: areas below 32², below 96², and the rest


@dataclass(frozen=True)
class Problem:
    """A kind of fault: an error, which stops training, or a remark."""

    name: str
    is_error: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """One fault."""

    problem: Problem
    split: str
    where: str  # the file, image or annotation
    detail: str
    record: ImageRecord | None = None  # the image to draw
    instances: tuple[Instance, ...] = ()  # the objects to draw
    boxes_xyxy_px: tuple[tuple[float, float, float, float], ...] = ()  # boxes of skipped annotations to draw


@dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """Statistics of a split. Objects are the annotations that training uses, without crowd regions."""

    split: str
    images: int
    images_without_objects: int
    crowd_regions: int
    skipped_annotations: int
    smallest_image_hw: tuple[int, int]  # by area, from the annotation file
    largest_image_hw: tuple[int, int]
    objects_per_image_median: float
    objects_per_image_max: int
    objects: dict[str, tuple[int, int, int]]  # class name -> small, medium and large objects
    has_masks: bool = True  # False: boxes only, for models without masks
    objects_with_keypoints: int = 0  # with labelled keypoints

    @property
    def object_count(self) -> int:
        """Number of objects of all classes."""
        return sum(sum(counts) for counts in self.objects.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class DatasetReport:
    """The result of a check."""

    root: Path
    datasets: tuple[CocoDataset, ...]  # splits with a readable annotation file
    splits: tuple[SplitStatistics, ...]  # of the same splits
    findings: tuple[Finding, ...]

    def by_problem(self, *, is_error: bool) -> dict[str, list[Finding]]:
        """The errors, or the remarks, by the name of their problem."""
        groups: dict[str, list[Finding]] = defaultdict(list)
        for finding in self.findings:
            if finding.problem.is_error == is_error:
                groups[finding.problem.name].append(finding)
        return dict(groups)

    def to_dict(self) -> dict[str, Any]:
        """The report without images and objects, as JSON values."""
        return {
            "root": str(self.root),
            "splits": [_statistics_as_json(split) for split in self.splits],
            "errors": _findings_as_json(self.by_problem(is_error=True)),
            "remarks": _findings_as_json(self.by_problem(is_error=False)),
        }

    def text(self) -> str:
        """The report as text: a summary of each split, the class table, and each problem with its first examples."""
        lines = [f"{self.root}", *(_summary(split) for split in self.splits)]
        if self.splits:
            lines += ["", *_class_table(self.splits)]
        for title, is_error in (("errors, at which training stops", True), ("remarks", False)):
            groups = self.by_problem(is_error=is_error)
            lines += ["", f"{title}: {sum(map(len, groups.values())) or 'none'}"]
            for name, findings in groups.items():
                lines += _examples(name, findings)
        return "\n".join(lines)


def _statistics_as_json(split: SplitStatistics) -> dict[str, Any]:
    values = dict(vars(split))
    values["objects"] = {
        name: dict(zip(_SIZES, counts, strict=True)) | {"all": sum(counts)} for name, counts in split.objects.items()
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


def _summary(split: SplitStatistics) -> str:
    (low_h, low_w), (high_h, high_w) = split.smallest_image_hw, split.largest_image_hw
    sizes = (
        f"{low_w}×{low_h}"
        if split.smallest_image_hw == split.largest_image_hw
        else (f"{low_w}×{low_h} to {high_w}×{high_h}")
    )
    return (
        f"  {split.split}: {split.images} images of {sizes} px, {split.images_without_objects} without objects; "
        f"{split.object_count} objects, {split.objects_per_image_median:g} per image (median), "
        f"{split.objects_per_image_max} at most; {split.crowd_regions} crowd regions"
        + (f"; {split.objects_with_keypoints} objects with keypoints" if split.objects_with_keypoints else "")
        + ("" if split.has_masks else "; boxes without masks (train a fasterrcnn_… model)")
    )


def _class_table(splits: tuple[SplitStatistics, ...]) -> list[str]:
    """Objects by class, the most frequent first, with a group of columns for each split."""
    names = {name: None for split in splits for name in split.objects}
    totals = {name: sum(sum(split.objects.get(name, ())) for split in splits) for name in names}
    ordered = sorted(names, key=lambda name: -totals[name])[:_MAX_CLASSES]
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


def _counts(split: SplitStatistics, name: str) -> tuple[int, ...]:
    counts = split.objects.get(name, (0,) * len(_SIZES))
    return (sum(counts), *counts)


def _examples(name: str, findings: list[Finding]) -> list[str]:
    lines = [f"  {len(findings)} × {name}"]
    lines += [f"      {f.split}: {f.where}: {f.detail}" for f in findings[:_EXAMPLES]]
    if len(findings) > _EXAMPLES:
        lines.append(f"      … and {len(findings) - _EXAMPLES} more")
    return lines


# Images of findings, and a contact sheet of annotated samples.

_Box = tuple[float, float, float, float]  # xyxy, pixels of the image

_PANEL_PX = 640  # longest side of one or two panels
_THUMBNAIL_PX = 320
_COLUMNS, _ROWS, _GAP_PX = 4, 4, 6  # of the contact sheet
_FONT_PX = 14
_LETTER_PX = 7.5  # average width at that size
_OPACITY = 0.4
_MIN_VIEW_PX = 64  # of the enlarged part; smaller ones show only squares
_BACKGROUND = (32, 32, 32)
_join = partial(stacked, background=_BACKGROUND)


@dataclass(frozen=True)
class _Mark:
    box_xyxy_px: _Box
    text: str
    colour: tuple[int, int, int]


def draw_findings(report: DatasetReport, folder: Path, *, per_problem: int) -> int:
    """Draws the first findings of each problem, and a contact sheet of random samples, `samples.png`.

    The image of a finding shows the whole image with its objects and, where these are small, an enlarged part.
    Findings without a readable image are not drawn.

    Args:
        report: result of `check_dataset`.
        folder: output folder.
        per_problem: maximum number of images per problem.

    Returns:
        The number of images written.
    """
    names = {dataset.split: dataset.class_names for dataset in report.datasets}
    written = 0
    for is_error in (True, False):
        for problem, findings in report.by_problem(is_error=is_error).items():
            for number, finding in enumerate(findings[:per_problem], start=1):
                image = _draw_finding(finding, names)
                if image is not None and finding.record is not None:
                    save_drawing(image, folder / f"{_slug(problem)}-{number:02}-{finding.record.path.stem}.png")
                    written += 1
    sheet = _contact_sheet(report.datasets)
    if sheet:
        save_drawing(sheet, folder / "samples.png")
    return written + bool(sheet)


def _draw_finding(finding: Finding, class_names: dict[str, tuple[str, ...]]) -> Image.Image | None:
    """The image of a finding with a caption; None without a readable image. `class_names` are by split."""
    if finding.record is None:
        return None
    try:
        image = read_for_display(finding.record)
    except UserError:
        return None
    marks = [_mark(index, instance, class_names[finding.split]) for index, instance in enumerate(finding.instances)]
    marks += [_Mark(box, "left out", (255, 255, 255)) for box in finding.boxes_xyxy_px]
    pixels = _with_masks(image, finding.record, finding.instances)
    whole = (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))
    panels = [_panel(pixels, marks, whole, _PANEL_PX)]
    enlarged = _enlarged_view([mark.box_xyxy_px for mark in marks], image.shape[:2])
    if enlarged:
        panels.append(_panel(pixels, marks, enlarged, _PANEL_PX))
    return _with_caption(_join(panels), f"{finding.problem.name}\n{finding.split}: {finding.where}: {finding.detail}")


def _contact_sheet(datasets: Sequence[CocoDataset]) -> Image.Image | None:
    """Up to 16 random images (with a fixed seed) with all their objects; None if no image can be read."""
    pool = [(dataset, index) for dataset in datasets for index in np.flatnonzero(dataset.images.counts).tolist()]
    cells = []
    for place in np.random.default_rng(0).permutation(len(pool)):
        dataset, index = pool[place]
        record = dataset.images[index]
        try:
            image = read_for_display(record)
        except UserError:
            continue
        marks = [_mark(k, instance, dataset.class_names) for k, instance in enumerate(record.instances)]
        whole = (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))
        panel = _panel(_with_masks(image, record, record.instances), marks, whole, _THUMBNAIL_PX, crowded=True)
        cell = Image.new("RGB", (_THUMBNAIL_PX + _GAP_PX, _THUMBNAIL_PX + _GAP_PX), _BACKGROUND)
        cell.paste(panel, (0, 0))
        cells.append(_with_caption(cell, f"{dataset.split}: {record.path.name}"))
        if len(cells) == _COLUMNS * _ROWS:
            break
    rows = [_join(cells[k : k + _COLUMNS]) for k in range(0, len(cells), _COLUMNS)]
    return _join(rows, vertical=True) if rows else None


def _mark(index: int, instance: Instance, class_names: Sequence[str]) -> _Mark:
    name = class_names[instance.label - 1]
    return _Mark(instance.box_xyxy_px, f"{name}, crowd" if instance.is_crowd else name, colour_of(index))


def _with_masks(image: np.ndarray, record: ImageRecord, instances: Sequence[Instance]) -> np.ndarray:
    """The image, uint8 `[H, W, 3]`, with coloured masks; a mask of another size is aligned at the top left."""
    canvas = image.astype(np.float32)
    for index, instance in enumerate(instances):
        mask = instance_mask(record, instance)[: image.shape[0], : image.shape[1]]
        part = canvas[: mask.shape[0], : mask.shape[1]]
        part[mask] = (1 - _OPACITY) * part[mask] + _OPACITY * np.array(colour_of(index), np.float32)
    return canvas.round().astype(np.uint8)


def _enlarged_view(boxes: Sequence[_Box], size_hw: tuple[int, int]) -> _Box | None:
    """The part of the image around the boxes; None if it is longer than half the image."""
    if not boxes:
        return None
    height, width = size_hw
    corners = np.array(boxes, np.float64).clip(0, [width, height, width, height])
    low, high = corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)
    half = max(float((high - low).max()), _MIN_VIEW_PX / 2)
    centre = (low + high) / 2
    if 4 * half > max(size_hw):
        return None
    corner = np.floor(centre - half)
    left, top = corner.clip(0, [width, height])
    right, bottom = (corner + np.ceil(2 * half)).clip(0, [width, height])
    return (left, top, right, bottom) if right > left and bottom > top else None


def _panel(
    pixels: np.ndarray, marks: Sequence[_Mark], view: _Box, longest_px: int, *, crowded: bool = False
) -> Image.Image:
    """A part of the image, scaled to `longest_px`, with boxes and labels; if crowded, only labels that fit."""
    left, top, right, bottom = (int(value) for value in view)
    scale = longest_px / max(right - left, bottom - top)
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    panel = Image.fromarray(pixels[top:bottom, left:right]).resize(size, resampling)
    draw = ImageDraw.Draw(panel)
    font = ImageFont.load_default(_FONT_PX)
    for mark in marks:
        x1, y1, x2, y2 = (np.array(mark.box_xyxy_px) - [left, top, left, top]) * scale
        # A box is clipped just outside the view; one of negative size is drawn too.
        x1, x2 = sorted(np.clip([x1, x2], -2, size[0] + 1))
        y1, y2 = sorted(np.clip([y1, y2], -2, size[1] + 1))
        draw.rectangle((x1, y1, x2, y2), outline=mark.colour)
        if crowded and font.getlength(mark.text) > x2 - x1:
            continue
        x, y = max(x1 + 2, 2), max(y1 - _FONT_PX - 3, 1)
        draw.rectangle(draw.textbbox((x, y), mark.text, font=font), fill=mark.colour)
        draw.text((x, y), mark.text, fill="black", font=font)
    return panel


def _with_caption(image: Image.Image, text: str) -> Image.Image:
    """The image under a caption that is wrapped to the image's width."""
    letters = max(int(image.width / _LETTER_PX), 20)
    # Pillow's font has no multiplication sign.
    lines = [part for line in text.replace("×", "x").splitlines() for part in textwrap.wrap(line, letters)]
    font, step = ImageFont.load_default(_FONT_PX), _FONT_PX + 5
    bar = Image.new("RGB", (image.width, step * len(lines) + 6), _BACKGROUND)
    for number, line in enumerate(lines):
        ImageDraw.Draw(bar).text((6, 3 + number * step), line, fill="white", font=font)
    return _join([bar, image], vertical=True)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
