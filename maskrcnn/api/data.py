"""`maskrcnn.convert(...)` and `maskrcnn.check_data(...)`: convert datasets to COCO format, and check them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from maskrcnn.api.progress import Progress
from maskrcnn.api.results import Result
from maskrcnn.errors import check_range
from maskrcnn.files import DRAWING, Output, check_output_folder, check_outputs, report_kind, write_report

if TYPE_CHECKING:
    from maskrcnn.data.check_report import DatasetReport


@dataclass(frozen=True, repr=False)
class ConvertResult(Result):
    """The converted dataset, and the entries left out."""

    out: Path
    classes: int
    images: dict[str, int]  # by split
    objects: dict[str, int]  # by split
    skipped: dict[str, int]  # entries that could not be converted: reason → count
    left_out: dict[str, int]  # entries not converted by design: reason → count
    repaired: dict[str, int]  # entries changed on reading: reason → count
    notes: list[str] = field(default_factory=list)  # one line per reason, with an example

    def lines(self) -> list[str]:
        """The result as lines of text."""
        splits = [f"{split}: {count} images, {self.objects[split]} objects" for split, count in self.images.items()]
        empty = [
            f"{split} has no objects: choose another --seed or share" for split, n in self.objects.items() if not n
        ]
        return [f"{self.out}: {self.classes} classes", *(f"  {line}" for line in (*splits, *empty, *self.notes))]


def convert(
    kind: str,
    source: str | Path,
    out: str | Path,
    *,
    keep_going: bool = False,
    copy: bool = False,
    split: Sequence[str] = (),
    rest: str | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    sets: Sequence[str] = (),
    classes: str | Path | int | None = None,
    alias: str | Path | None = None,
    class_name: str | None = None,
    class_attribute: str | None = None,
    with_masks: bool = False,
    difficult: str = "crowd",
    zero_based: bool = False,
    images: str | None = None,
    mask_folder: str | None = None,
    mask_suffix: str | None = None,
    divisor: int | None = None,
    void: int | None = None,
    crowd: bool = True,
    json: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Converts a dataset to COCO format.

    Args:
        kind: format of the source: "coco" (any layout that training reads), "yolo", "voc", "visual-genome",
            "penn-fudan", "synthia", "cityscapes", "id-masks", "mask-files", "labelme", "via", or "datumaro:FORMAT" for
            any format that the library Datumaro reads.
        source: folder of the dataset; for "coco", "yolo" and "via" also its annotation file.
        out: folder to write; must be new or empty.
        keep_going: skip and count entries that cannot be converted instead of stopping.
        copy: copy the images. Default: hard links.
        split: splits, each `NAME=LIST` (a file of image names or ids) or `NAME=SHARE` (0 to 1).
        rest: name of the split for all other images.
        val_fraction: short for `split=["val=FRACTION"], rest="train"`. Default: 0.1 if the source has no splits.
        seed: random seed for splits given by shares.
        sets: splits of the source to convert ("coco", "voc", "cityscapes").
        classes: file with one class per line (`name` or `id: name`), or the number of most frequent classes to keep.
        alias: file of synonyms: on each line, all names of one class, separated by commas.
        class_name: class to give to all objects.
        class_attribute: "via": the attribute that holds the class.
        with_masks: "voc": use the masks of the segmentation lists instead of the boxes.
        difficult: "voc": treatment of difficult objects: "crowd", "keep" or "drop".
        zero_based: "voc": box coordinates are zero-based.
        images: folder of the images; for "id-masks" and "via" relative to `source`.
        mask_folder: "id-masks": folder of the masks below `source`.
        mask_suffix: "id-masks": suffix that mask names add to image names, such as "_mask".
        divisor: "id-masks": pixel values are class · divisor + instance.
        void: "id-masks": pixel value, besides 0, that marks no object.
        crowd: "coco": keep crowd regions. False: convert them to objects.
        json: file to write the counts to.
        overwrite: replace `json` even if `convert` did not write it; input files are never replaced.
        progress: receives progress.

    Raises:
        UserError: for a source that cannot be read; without `keep_going`, for the first entry that cannot be converted.
    """
    from maskrcnn.data.convert.conversion import convert as run
    from maskrcnn.data.convert.conversion import split_plan
    from maskrcnn.data.convert.source import Options

    check_range("seed", seed, 0)
    options = Options(
        classes=None if classes is None else str(classes),
        alias=None if alias is None else Path(alias),
        class_name=class_name,
        sets=tuple(sets),
        with_masks=with_masks,
        difficult=difficult,
        zero_based=zero_based,
        class_attribute=class_attribute,
        image_folder=images,
        mask_folder=mask_folder,
        mask_suffix=mask_suffix,
        divisor=divisor,
        void=void,
        crowd=crowd,
    )
    read = (source, classes if isinstance(classes, (str, Path)) else None, alias)
    lists = [text.partition("=")[2] for text in split]
    if json is not None:
        output = Output("--json", Path(json), report_kind("data convert"))
        check_outputs([output], (*read, *filter(None, lists)), overwrite=overwrite)
    plan = split_plan(split, rest=rest, val_fraction=val_fraction, seed=seed)
    with _counted(progress, "converting") as advance:
        report = run(
            kind,
            Path(source),
            Path(out),
            options=options,
            plan=plan,
            keep_going=keep_going,
            copies=copy,
            progress=advance,
        )
    result = ConvertResult(
        report.out,
        report.classes,
        report.images,
        report.objects,
        report.skipped,
        report.left_out,
        report.repaired,
        list(report.notes),
    )
    if json is not None:
        write_report(json, "data convert", result.to_dict())
    return result


def check_data(
    data: str | Path,
    *,
    images: str | Path | None = None,
    split: Sequence[str] = (),
    exif: str = "auto",
    output: str | Path | None = None,
    pictures: int = 16,
    json: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DatasetReport:
    """Checks a dataset for faults that stop training, are skipped by it, or mislead it.

    Args:
        data: folder of the dataset (see docs/formats.md for the layouts), or its annotation file.
        images: folder of the images. Default: searched for near the annotations.
        split: splits to check. Default: all.
        exif: EXIF orientation: "auto" from the annotated sizes, "upright" or "stored" for all images.
        output: folder for images of the findings and of samples.
        pictures: maximum number of images to draw per finding.
        json: file to write the report to.
        overwrite: replace files that `check_data` did not write; files of the dataset are never replaced.
        progress: receives messages and progress.

    Returns:
        a report with `findings`, `text()` and `to_dict()`.

    Raises:
        UserError: if no dataset is found.
    """
    from maskrcnn.data.check import check_dataset
    from maskrcnn.data.check_report import draw_findings

    check_range("pictures", pictures, 0)
    progress = progress or Progress()
    if output is not None:
        check_output_folder("--output", Path(output), [data, images], [DRAWING], overwrite=overwrite)
    if json is not None:
        check_outputs([Output("--json", Path(json), report_kind("data check"))], [data, images], overwrite=overwrite)
    with _counted(progress, "checking") as advance:
        report = check_dataset(Path(data), split, images=images, exif=exif, progress=advance)
    if output is not None:
        count = draw_findings(report, Path(output), per_problem=pictures)
        progress.message(f"{count} images → {output}")
    if json is not None:
        write_report(json, "data check", report.to_dict())
    return report


class _counted:
    """Adapts `Progress` to functions that report (done, total)."""

    def __init__(self, progress: Progress | None, title: str) -> None:
        self._task = (progress or Progress()).task(title)
        self._done = 0

    def __enter__(self) -> _counted:
        self._advance = self._task.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._task.__exit__(*error)  # type: ignore[arg-type]

    def __call__(self, done: int, total: int) -> None:
        self._advance(done - self._done)
        self._done = done
