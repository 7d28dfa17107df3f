"""What a check of a dataset found, as text and as JSON."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskrcnn.data.coco import CocoDataset, ImageRecord, Instance

_EXAMPLES = 3  # shown of each problem
_MOST_CLASSES = 100  # rows of the table; a longer list is complete in the JSON file
SIZES = ("small", "medium", "large")  # COCO's: areas below 32², below 96², and the rest


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
        name: dict(zip(SIZES, counts, strict=True)) | {"all": sum(counts)} for name, counts in figures.objects.items()
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
    head = [["", *(cell for f in splits for cell in (f.split, *[""] * len(SIZES)))]]
    head += [["class", *("objects", *SIZES) * len(splits)]]
    rows = [[name, *(str(n) for f in splits for n in _counts(f, name))] for name in ordered]
    sums = [[sum(counts) for counts in zip(*f.objects.values(), strict=True)] or [0] * len(SIZES) for f in splits]
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
    counts = figures.objects.get(name, (0,) * len(SIZES))
    return (sum(counts), *counts)


def _examples(name: str, findings: list[Finding]) -> list[str]:
    lines = [f"  {len(findings)} × {name}"]
    lines += [f"      {f.split}: {f.where}: {f.detail}" for f in findings[:_EXAMPLES]]
    if len(findings) > _EXAMPLES:
        lines.append(f"      … and {len(findings) - _EXAMPLES} more")
    return lines
