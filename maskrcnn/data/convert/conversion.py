"""`maskrcnn data convert`: from a dataset in its own format to a folder in COCO layout."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from maskrcnn.data.convert.coco_splits import open_coco
from maskrcnn.data.convert.documents import BadEntry, Faults, place
from maskrcnn.data.convert.labelme import open_labelme
from maskrcnn.data.convert.masks import open_cityscapes, open_id_masks, open_mask_files, open_penn_fudan, open_synthia
from maskrcnn.data.convert.source import Entry, Options, Picture, Source
from maskrcnn.data.convert.splits import SplitPlan
from maskrcnn.data.convert.via import open_via
from maskrcnn.data.convert.visual_genome import open_visual_genome
from maskrcnn.data.convert.voc import open_voc
from maskrcnn.data.convert.vocabulary import Category
from maskrcnn.errors import UserError
from maskrcnn.files import make_folder

# Writes a dataset in COCO layout, image by image, so that the folder appears whole or not at all.

_LISTS = ("images", "annotations")


class _DatasetWriter:
    """An unfinished dataset.

    Entries go to the disk as they come, one line of JSON each; nothing of an image stays in memory. `new_dataset`
    makes one.

    Args:
        root: an empty folder.
        categories: of all splits.
        info: what the annotation files say of the dataset.
        first_annotation_id: of objects without an id of their own.
        copies: copy image files instead of linking them.
    """

    def __init__(
        self,
        root: Path,
        categories: Sequence[Category],
        info: dict[str, Any],
        *,
        first_annotation_id: int = 1,
        copies: bool = False,
    ) -> None:
        self.images: Counter[str] = Counter()  # by split
        self.objects: Counter[str] = Counter()
        self._root, self._copies, self._next_id = root, copies, first_annotation_id
        self._head = {
            "info": info,
            "categories": [{**c.fields, "id": c.id, "name": c.name} for c in categories],
        }
        self._parts: dict[tuple[str, str], TextIO] = {}
        self._open = ExitStack()
        (root / "annotations").mkdir()

    def add(self, split: str, image_id: int, name: str, picture: Picture) -> None:
        """One image with its objects.

        Raises:
            UserError: where the split has an image of this name.
        """
        if (self._root / split / name).exists():
            came = f"two images for {split}/{name}"
            raise UserError(came, "one image for each name in a split", "rename one, or put them into two splits")
        place(picture.content, self._root / split / name, is_upright=picture.is_upright, copies=self._copies)
        height, width = picture.size_hw
        image = {**picture.fields, "id": image_id, "file_name": name, "height": height, "width": width}
        self._write(split, "images", image)
        for each in picture.objects:
            annotation_id = each.fields.get("id", self._next_id)
            self._next_id += "id" not in each.fields
            own = {"id": annotation_id, "image_id": image_id, "category_id": each.category_id}
            self._write(split, "annotations", own | {k: v for k, v in each.fields.items() if k not in own})
        self.images[split] += 1
        self.objects[split] += len(picture.objects)

    def finish(self) -> None:
        """Joins the parts to one annotation file for each split."""
        self._open.close()
        for split in self.images:
            final = self._root / "annotations" / f"instances_{split}.json"
            with open(final, "w", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(self._head, ensure_ascii=False)[:-1])
                for kind in _LISTS:
                    file.write(f', "{kind}": [')
                    part = self._part_path(split, kind)
                    if part.exists():
                        with open(part, encoding="utf-8", newline="\n") as entries:
                            shutil.copyfileobj(entries, file)
                        part.unlink()
                    file.write("]")
                file.write("}\n")

    def close(self) -> None:
        """Lets go of all files."""
        self._open.close()

    def _part_path(self, split: str, kind: str) -> Path:
        return self._root / "annotations" / f"{kind}_{split}.part"

    def _write(self, split: str, kind: str, entry: dict[str, Any]) -> None:
        part = self._parts.get((split, kind))
        if part is None:
            part = open(self._part_path(split, kind), "w", encoding="utf-8", newline="\n")  # noqa: SIM115
            self._parts[split, kind] = self._open.enter_context(part)
        else:
            part.write(",\n")
        part.write(json.dumps(entry, ensure_ascii=False, allow_nan=False))


@contextmanager
def new_dataset(
    out: Path, categories: Sequence[Category], info: dict[str, Any], **options: Any
) -> Iterator[_DatasetWriter]:
    """A writer whose folder becomes `out` when the block ends without an exception, and is removed otherwise.

    Raises:
        UserError: where `out` holds anything, or cannot be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        expected = "a folder that is missing or empty"
        raise UserError(f"{out} exists already", expected, "name another folder, or remove this one")
    make_folder(out.parent)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    writer = None
    try:
        temporary.mkdir()
        writer = _DatasetWriter(temporary, categories, info, **options)
        yield writer
        writer.finish()
        if out.exists():
            out.rmdir()  # empty; Windows does not rename onto it
        os.rename(temporary, out)
    except OSError as error:
        came = f"the dataset cannot be written to {out} ({error.strerror or error})"
        raise UserError(came, "a folder that can be written, on a disk with space", "name another folder") from error
    finally:
        if writer is not None:
            writer.close()
        shutil.rmtree(temporary, ignore_errors=True)


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
class _Report:
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
) -> _Report:
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
    return _Report(
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
    writer: _DatasetWriter,
    faults: Faults,
    progress: Callable[[int, int], None],
) -> None:
    wanted = [(number, entry) for number, entry in enumerate(source.entries, start=1) if splits[number - 1]]
    for done, (number, entry) in enumerate(wanted, start=1):
        _write_one(source, number, entry, splits[number - 1], writer, faults)
        progress(done, len(wanted))


def _write_one(source: Source, number: int, entry: Entry, split: str, writer: _DatasetWriter, faults: Faults) -> None:
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
