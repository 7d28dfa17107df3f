"""Writes a dataset in COCO layout, image by image, so that the folder appears whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from maskrcnn.data.convert.pictures import place
from maskrcnn.data.convert.source import Picture
from maskrcnn.data.convert.vocabulary import Category
from maskrcnn.errors import UserError
from maskrcnn.files import make_folder

_LISTS = ("images", "annotations")


class DatasetWriter:
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
) -> Iterator[DatasetWriter]:
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
        writer = DatasetWriter(temporary, categories, info, **options)
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
