"""`maskrcnn data convert`: converts a dataset in its own format to a folder in COCO layout."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import secrets
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TextIO

from maskrcnn.data.convert.annotation_tools import open_labelme, open_via
from maskrcnn.data.convert.coco_splits import DATUMARO, open_coco, open_datumaro
from maskrcnn.data.convert.files import read_json, read_lines, write_image
from maskrcnn.data.convert.masks import open_cityscapes, open_id_masks, open_mask_files, open_penn_fudan, open_synthia
from maskrcnn.data.convert.source import AnnotatedImage, BadEntry, Category, Entry, Faults, Options, Source
from maskrcnn.data.convert.visual_genome import open_visual_genome
from maskrcnn.data.convert.voc import open_voc
from maskrcnn.errors import UserError
from maskrcnn.files import make_folder
from maskrcnn.metadata import hash_of_text

_DEFAULT_VAL_SHARE = 0.1  # validation share of a dataset without splits
_SPLIT_NAME = re.compile(r"[\w.-]+")
_LISTS = ("images", "annotations")  # lists of an annotation file that grow with the dataset


class _Kind(NamedTuple):
    """A source format."""

    open: Callable[[Path, Options, Faults], Source]
    options: tuple[str, ...]  # accepted fields of Options


_NAMES = ("classes", "alias")
KINDS: dict[str, _Kind] = {
    "coco": _Kind(open_coco, ("sets", "image_folder", "crowd")),
    "yolo": _Kind(open_coco, ("sets", "image_folder")),
    "voc": _Kind(open_voc, (*_NAMES, "sets", "with_masks", "difficult", "zero_based")),
    "visual-genome": _Kind(open_visual_genome, _NAMES),
    "penn-fudan": _Kind(open_penn_fudan, ("class_name",)),
    "synthia": _Kind(open_synthia, ("classes",)),
    "cityscapes": _Kind(open_cityscapes, ("classes", "sets")),
    "id-masks": _Kind(
        open_id_masks, ("classes", "class_name", "image_folder", "mask_folder", "mask_suffix", "divisor", "void")
    ),
    "mask-files": _Kind(open_mask_files, ("class_name",)),
    "labelme": _Kind(open_labelme, _NAMES),
    "via": _Kind(open_via, (*_NAMES, "class_name", "class_attribute", "image_folder")),
}


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """The splits to make.

    Without lists, shares and `rest`, images stay in the dataset's own splits; where it has none, a tenth becomes
    `val` and the rest `train`.
    """

    lists: dict[str, Path] = dataclasses.field(default_factory=dict)  # split -> file of image names or ids
    shares: dict[str, float] = dataclasses.field(default_factory=dict)  # split -> share of the images not in a list
    rest: str | None = None  # split for all other images (default: their own split; images without one are left out)
    seed: int = 0  # random seed for shares

    def assign(self, entries: Sequence[Entry], faults: Faults, *, has_splits: bool) -> list[str | None]:
        """The split of each entry; None, counted in `faults`, for an entry without one.

        Raises:
            UserError: for a list that cannot be read or has an image twice or of another list, and for an empty split.
            BadEntry: for a line of a list that is not an image of the dataset, unless faults are counted.
        """
        plan = self
        if not (self.lists or self.shares or self.rest or has_splits):
            plan = SplitPlan(shares={"val": _DEFAULT_VAL_SHARE}, rest="train", seed=self.seed)
        splits = plan._assign_lists(entries, faults)
        plan._assign_shares(entries, splits)
        for index, entry in enumerate(entries):
            splits[index] = splits[index] or plan.rest or entry.split
            if splits[index] is None:
                faults.leave_out("image that no split list has", entry.name)
        return splits

    def _assign_lists(self, entries: Sequence[Entry], faults: Faults) -> list[str | None]:
        splits: list[str | None] = [None] * len(entries)
        origins: dict[int, str] = {}
        indices: dict[str, set[int]] = defaultdict(set)  # by path, file name, both without suffix, and id
        for index, entry in enumerate(entries if self.lists else ()):
            name = PurePosixPath(entry.name)
            keys = {entry.name, str(name.with_suffix("")), name.name, name.stem}
            for key in keys if entry.image_id is None else keys | {str(entry.image_id)}:
                indices[key].add(index)
        for split, path in self.lists.items():
            for where, key in _read_list(path):
                first_word = key.partition(" ")[0]  # the first column of lists with several
                matching = indices.get(key) or indices.get(first_word, set())
                if len(matching) != 1:
                    found = f"{where}: {key}" + (f", the name of {len(matching)} images" if matching else "")
                    expected = "the path, file name or id of one image of the dataset"
                    reason = "line of a split list that is no image"
                    faults.handle(BadEntry(reason, found, expected, "correct the list"))
                    continue
                (index,) = matching
                if index in origins:
                    found = f"{where}: {key}, also in {origins[index]}"
                    raise UserError(found, "each image once, in one list", "correct the lists")
                splits[index], origins[index] = split, where
        return splits

    def _assign_shares(self, entries: Sequence[Entry], splits: list[str | None]) -> None:
        """Assigns images to the shares, in the order of a hash of seed and image name.

        The split of an image therefore depends neither on the order of files nor, except at the boundaries, on other
        images.
        """
        free = [index for index, split in enumerate(splits) if split is None]
        free.sort(key=lambda index: hash_of_text(f"{self.seed}:{entries[index].name}"))
        begin = 0
        for split, share in self.shares.items():
            end = begin + max(1, round(share * len(free)))
            if end + bool(self.rest) > len(free):
                found = f"{len(free)} image(s) for {', '.join(self.shares)}"
                raise UserError(found, "at least one image for each split", "lower the shares, or add images")
            for index in free[begin:end]:
                splits[index] = split
            begin = end


def split_plan(
    texts: Sequence[str], *, rest: str | None = None, val_fraction: float | None = None, seed: int = 0
) -> SplitPlan:
    """A plan from command-line options.

    Args:
        texts: `NAME=LIST.txt`, `NAME=LIST.json` or `NAME=SHARE` each.
        rest: split for all other images.
        val_fraction: short for `val=FRACTION` with the rest `train`.
        seed: random seed for shares.

    Raises:
        UserError: for a malformed text or name, a duplicate split, or shares that are not between 0 and 1.
    """
    lists: dict[str, Path] = {}
    shares: dict[str, float] = {}
    if val_fraction is not None:
        texts, rest = [*texts, f"val={val_fraction}"], rest or "train"
    for text in texts:
        name, _, value = text.partition("=")
        if not value or name in lists or name in shares or not _SPLIT_NAME.fullmatch(name) or name == rest:
            found = f"--split {text}" + (f" with --rest {rest}" if rest else "")
            raise UserError(found, "NAME=LIST.txt or NAME=SHARE, unique names", "for example --split val=0.1")
        try:
            shares[name] = float(value)
        except ValueError:
            lists[name] = Path(value)
    if rest is not None and not _SPLIT_NAME.fullmatch(rest):
        raise UserError(f"--rest {rest}", "letters, digits, - and _", "correct the name of the split")
    if any(not 0 < share < 1 for share in shares.values()) or sum(shares.values()) > 1:
        found = "shares " + ", ".join(f"{name}={share:g}" for name, share in shares.items())
        raise UserError(found, "each between 0 and 1, at most 1 in total", "correct the shares")
    return SplitPlan(lists=lists, shares=shares, rest=rest, seed=seed)


def _read_list(path: Path) -> list[tuple[str, str]]:
    """The images of a list, each with its place: from lines of text, a JSON list, or the image ids of COCO JSON."""
    if path.suffix.lower() != ".json":
        return [(f"{path}, line {number}", line.replace("\t", " ")) for number, line in read_lines(path)]
    content = values = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        values = [image.get("id") if isinstance(image, dict) else None for image in content["images"]]
    if not isinstance(values, list) or not all(type(value) in (int, str) for value in values):
        found = f"{path}: {json.dumps(content)[:60]} …"
        raise UserError(found, "a list of names or ids, or COCO JSON with images", "correct the file")
    return [(f"{path}, entry {index}", str(value)) for index, value in enumerate(values)]


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """Counts of a conversion."""

    out: Path
    classes: int
    images: dict[str, int]  # split -> count
    objects: dict[str, int]
    skipped: dict[str, int]  # reason of a fault -> count
    left_out: dict[str, int]  # reason to exclude an entry -> count
    repaired: dict[str, int]  # reason of a repair -> count
    notes: tuple[str, ...]  # one line for each reason, with an example


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
) -> ConversionReport:
    """Converts a dataset. The same input gives byte-identical JSON.

    Images are read one at a time. Image ids are the dataset's own, or the position in its list, so that a skipped
    image does not change the ids of others.

    Args:
        kind: format, one of `KINDS`, or "datumaro:FORMAT".
        source: the dataset's folder, or for some formats its annotation file.
        out: folder to write, new or empty.
        options: options of the format.
        plan: splits to make.
        keep_going: skip and count entries that cannot be converted, instead of stopping at the first.
        copies: copy image files instead of hard-linking them.
        progress: called with the numbers of converted images and of all images.

    Raises:
        UserError: for an unknown kind, an option that the kind does not accept, a dataset of another kind, an `out`
            that is not empty, and a fault (a BadEntry) unless `keep_going`.
    """
    options, plan, chosen = options or Options(), plan or SplitPlan(), _kind(kind)
    for field in dataclasses.fields(Options):
        if getattr(options, field.name) != field.default and field.name not in chosen.options:
            kinds = ", ".join(name for name, each in KINDS.items() if field.name in each.options)
            option = {"class_name": "class", "crowd": "no-crowd"}.get(field.name, field.name.replace("_", "-"))
            raise UserError(f"--{option} with kind {kind}", f"the option with {kinds} only", "remove the option")
    source, out, faults = Path(source), Path(os.path.realpath(out)), Faults(keep_going=keep_going)
    if not source.exists():
        raise UserError(f"{source} does not exist", f"a dataset of kind {kind}", "correct the path")
    if source.is_dir() and Path(os.path.realpath(source)) in out.parents:
        found = f"{out}, in {source}, which the command reads"
        raise UserError(found, "a folder elsewhere: the next command would read its annotations, too", "choose another")
    opened = chosen.open(source, options, faults)
    splits = plan.assign(opened.entries, faults, has_splits=opened.has_splits)
    for split in sorted({split for split in splits if split}):
        if split == "annotations" or split.startswith("."):
            raise UserError(f"split {split!r}", "a name for a folder of images", "rename the split, e.g. train")
    numbered = zip(itertools.count(1), opened.entries, splits, strict=False)
    selected = [(number, entry, split) for number, entry, split in numbered if split]
    with _new_dataset(kind, opened, out, copies=copies, faults=faults) as writer:
        for done, (number, entry, split) in enumerate(selected, start=1):
            try:
                image = opened.read(entry)
            except BadEntry as fault:
                faults.handle(fault)
            else:
                writer.add(split, number if entry.image_id is None else entry.image_id, entry.name, image)
            progress(done, len(selected))
        if not writer.images:
            raise UserError(f"{source}: no image could be converted", "at least one", "\n  ".join(faults.lines()))
    return ConversionReport(
        out=out,
        classes=len(opened.categories),
        images=dict(sorted(writer.images.items())),
        objects={split: writer.objects[split] for split in sorted(writer.images)},
        skipped=dict(faults.skipped),
        left_out=dict(faults.left_out),
        repaired=dict(faults.repaired),
        notes=tuple(faults.lines()),
    )


def _kind(name: str) -> _Kind:
    if name.startswith(DATUMARO) and name != DATUMARO:
        return _Kind(partial(open_datumaro, format_name=name.removeprefix(DATUMARO)), ("sets",))
    if name not in KINDS:
        expected = f"one of {', '.join(KINDS)}, or {DATUMARO}FORMAT for formats of the library Datumaro"
        raise UserError(f"kind {name!r}", expected, "specify the dataset's format")
    return KINDS[name]


class _DatasetWriter:
    """Writes a dataset in COCO layout to an empty folder, image by image; see `_new_dataset`.

    Entries are written immediately, one line of JSON each, to a file for each split and list; no image is kept in
    memory. `finish` joins these files.
    """

    def __init__(
        self,
        root: Path,
        categories: Sequence[Category],
        description: str,
        *,
        first_annotation_id: int,
        copies: bool,
        files: ExitStack,
        faults: Faults,
    ) -> None:
        self.images: Counter[str] = Counter()  # by split
        self.objects: Counter[str] = Counter()
        self._root, self._copies, self._next_id, self._files = root, copies, first_annotation_id, files
        self._faults = faults
        entries = [{**category.fields, "id": category.id, "name": category.name} for category in categories]
        self._head = {"info": {"description": description}, "categories": entries}
        self._parts: dict[tuple[str, str], TextIO] = {}
        (root / "annotations").mkdir()

    def add(self, split: str, image_id: int, name: str, image: AnnotatedImage) -> None:
        """Writes one image and its objects.

        Raises:
            UserError: if the split already has an image of this name.
        """
        target = self._root / split / name
        if target.exists():
            found = f"two images for {split}/{name}"
            raise UserError(found, "unique image names in a split", "rename one, or put them into two splits")
        write_image(image.content, target, copies=self._copies)
        height, width = image.size_hw
        entry = {**image.fields, "id": image_id, "file_name": name, "height": height, "width": width}
        self._write(split, "images", entry)
        for each in image.objects:
            annotation_id = each.fields.get("id", self._next_id)
            self._next_id += "id" not in each.fields
            ids = {"id": annotation_id, "image_id": image_id, "category_id": each.category_id}
            self._write(split, "annotations", ids | {k: v for k, v in each.fields.items() if k not in ids})
        self.images[split] += 1
        self.objects[split] += len(image.objects)

    def finish(self) -> None:
        """Writes the annotation file of each split."""
        self._files.close()
        for split in self.images:
            final = self._root / "annotations" / f"instances_{split}.json"
            with _open_text(final) as file:
                file.write(self._json(self._head, "categories")[:-1])
                for name in _LISTS:
                    file.write(f', "{name}": [')
                    part = self._part_path(split, name)
                    if part.exists():
                        with open(part, encoding="utf-8", newline="\n") as entries:
                            shutil.copyfileobj(entries, file)
                        part.unlink()
                    file.write("]")
                file.write("}\n")

    def _part_path(self, split: str, name: str) -> Path:
        return self._root / "annotations" / f"{name}_{split}.part"

    def _write(self, split: str, name: str, entry: dict[str, Any]) -> None:
        part = self._parts.get((split, name))
        if part is None:
            part = self._parts[split, name] = self._files.enter_context(_open_text(self._part_path(split, name)))
        else:
            part.write(",\n")
        part.write(self._json(entry, f"{name} of {split}, id {entry['id']}"))

    def _json(self, entry: dict[str, Any], where: str) -> str:
        try:
            return json.dumps(entry, ensure_ascii=False, allow_nan=False)
        except ValueError:
            self._faults.repair("NaN or infinity, which JSON cannot hold: written as null", where)
            return json.dumps(_without_nan(entry), ensure_ascii=False, allow_nan=False)


def _open_text(path: Path) -> TextIO:
    """Opens a file for JSON text; a lone surrogate (a byte of a name that is not UTF-8) becomes its JSON escape."""
    return open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n")


def _without_nan(value: Any) -> Any:
    """The JSON value with null for NaN and infinity."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _new_dataset(kind: str, source: Source, out: Path, *, copies: bool, faults: Faults) -> Iterator[_DatasetWriter]:
    """A writer whose folder becomes `out` when the block ends without an exception, and is removed otherwise.

    Raises:
        UserError: if `out` is not empty or cannot be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        expected = "a new or empty folder"
        raise UserError(f"{out} exists already", expected, "choose another folder, or remove this one")
    make_folder(out.parent)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        with ExitStack() as files:
            temporary.mkdir()
            writer = _DatasetWriter(
                temporary,
                source.categories,
                f"converted from {kind} by maskrcnn data convert",
                first_annotation_id=source.first_annotation_id,
                copies=copies,
                files=files,
                faults=faults,
            )
            yield writer
            writer.finish()
        if out.exists():
            out.rmdir()  # empty; Windows does not rename onto it
        os.rename(temporary, out)
    except OSError as error:
        found = f"the dataset cannot be written to {out} ({error.strerror or error})"
        raise UserError(found, "a writable folder, on a disk with space", "choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
