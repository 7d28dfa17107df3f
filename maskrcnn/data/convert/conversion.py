"""`maskrcnn data convert`: from a dataset in its own format to a folder in COCO layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskrcnn.data.convert.coco_splits import open_coco
from maskrcnn.data.convert.dataset_writer import DatasetWriter, new_dataset
from maskrcnn.data.convert.faults import BadEntry, Faults
from maskrcnn.data.convert.id_masks import open_cityscapes, open_id_masks, open_penn_fudan, open_synthia
from maskrcnn.data.convert.labelme import open_labelme
from maskrcnn.data.convert.mask_files import open_mask_files
from maskrcnn.data.convert.source import Entry, Options, Source
from maskrcnn.data.convert.splits import SplitPlan
from maskrcnn.data.convert.via import open_via
from maskrcnn.data.convert.visual_genome import open_visual_genome
from maskrcnn.data.convert.voc import open_voc
from maskrcnn.errors import UserError


@dataclass(frozen=True)
class Kind:
    """A format."""

    open: Callable[[Path, Options, Faults], Source]
    options: tuple[str, ...]  # the fields of Options that it takes


_NAMES = ("classes", "alias")
KINDS: dict[str, Kind] = {
    "coco": Kind(open_coco, ("sets",)),
    "voc": Kind(open_voc, (*_NAMES, "sets", "with_masks", "difficult", "zero_based")),
    "visual-genome": Kind(open_visual_genome, _NAMES),
    "penn-fudan": Kind(open_penn_fudan, ("class_name",)),
    "synthia": Kind(open_synthia, ("classes",)),
    "cityscapes": Kind(open_cityscapes, ("classes", "sets")),
    "id-masks": Kind(
        open_id_masks, ("classes", "class_name", "image_folder", "mask_folder", "mask_suffix", "divisor", "void")
    ),
    "mask-files": Kind(open_mask_files, ("class_name",)),
    "labelme": Kind(open_labelme, _NAMES),
    "via": Kind(open_via, (*_NAMES, "class_name", "class_attribute", "image_folder")),
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion wrote, and what it did not."""

    out: Path
    classes: int
    images: dict[str, int]  # split -> count
    objects: dict[str, int]
    skipped: dict[str, int]  # fault -> count
    left_out: dict[str, int]  # what was not meant to be converted -> count
    notes: tuple[str, ...]  # a line for each of both, with an example

    def lines(self) -> list[str]:
        """The report as text."""
        splits = [f"{split}: {count} images, {self.objects[split]} objects" for split, count in self.images.items()]
        return [f"{self.out}: {self.classes} classes", *(f"  {line}" for line in (*splits, *self.notes))]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {**dataclasses.asdict(self), "out": str(self.out), "notes": list(self.notes)}


def convert(
    kind: str,
    source: str | Path,
    out: str | Path,
    *,
    options: Options | None = None,
    plan: SplitPlan | None = None,
    keep_going: bool = False,
    copies: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Converts a dataset. The same input gives the same bytes of JSON.

    Images are read one at a time. Image ids are the dataset's own, or number the images it lists, so that leaving
    one out changes no other's.

    Args:
        kind: one of `KINDS`.
        source: the dataset's folder, or for some formats its annotation file.
        out: a folder that is missing or empty.
        options: what the format is to be told.
        plan: which image goes into which split.
        keep_going: leave out and count what cannot be converted, instead of stopping at the first.
        copies: copy image files instead of linking them.
        progress: called with the images that are done, and with all there are.

    Raises:
        UserError: for an unknown kind, an option that the kind does not take, a dataset that is not of this kind,
            `out` that holds anything, and a fault (a BadEntry) unless `keep_going`.
    """
    options, plan = options or Options(), plan or SplitPlan(lists={}, shares={})
    if kind not in KINDS:
        raise UserError(f"kind {kind!r}", f"one of {', '.join(KINDS)}", "name the dataset's format")
    _require_taken(kind, options)
    source, out, faults = Path(source), Path(out).resolve(), Faults(keep_going=keep_going)
    if not source.exists():
        raise UserError(f"{source} does not exist", f"a dataset of kind {kind}", "correct the path")
    opened = KINDS[kind].open(source, options, faults)
    splits = plan.assigned(opened.entries, faults, has_splits=opened.has_splits)
    for split in sorted(set(splits) - {None}):
        _require_name(split)
    info = {"description": f"converted from {kind} by maskrcnn data convert"}
    first_id = opened.first_annotation_id
    with new_dataset(out, opened.categories, info, first_annotation_id=first_id, copies=copies) as writer:
        _write_all(opened, splits, writer, faults, progress)
        if not writer.images:
            raise UserError(f"{source}: no image could be converted", "at least one", "\n  ".join(faults.lines()))
    return Report(
        out=out,
        classes=len(opened.categories),
        images=dict(sorted(writer.images.items())),
        objects={split: writer.objects[split] for split in sorted(writer.images)},
        skipped=dict(faults.skipped),
        left_out=dict(faults.left_out),
        notes=tuple(faults.lines()),
    )


def _write_all(
    source: Source,
    splits: Sequence[str | None],
    writer: DatasetWriter,
    faults: Faults,
    progress: Callable[[int, int], None],
) -> None:
    wanted = [(number, entry) for number, entry in enumerate(source.entries, start=1) if splits[number - 1]]
    for done, (number, entry) in enumerate(wanted, start=1):
        _write_one(source, number, entry, splits[number - 1], writer, faults)
        progress(done, len(wanted))


def _write_one(source: Source, number: int, entry: Entry, split: str, writer: DatasetWriter, faults: Faults) -> None:
    try:
        picture = source.read(entry)
    except BadEntry as fault:
        faults.meet(fault)
        return
    writer.add(split, number if entry.image_id is None else entry.image_id, entry.name, picture)


def _require_taken(kind: str, options: Options) -> None:
    """Raises a UserError for an option that the kind would ignore."""
    for field in dataclasses.fields(Options):
        if getattr(options, field.name) != field.default and field.name not in KINDS[kind].options:
            takers = ", ".join(name for name, each in KINDS.items() if field.name in each.options)
            option = "class" if field.name == "class_name" else field.name.replace("_", "-")
            came = f"--{option} with kind {kind}"
            raise UserError(came, f"it with {takers}", "leave it out")


def _require_name(split: str) -> None:
    if split == "annotations" or split.startswith("."):
        raise UserError(f"split {split!r}", "a name for a folder of images", "name the split otherwise, as train")
