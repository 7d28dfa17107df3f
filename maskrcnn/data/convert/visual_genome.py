"""Visual Genome: `objects.json`, boxes with free-text names.

Names are compared without case, repeated spaces and a full stop at the end. Boxes are clipped to the image.
`objects.json` has several hundred megabytes: it is read entry by entry, first for the positions and names of all
entries, then again image by image.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from maskrcnn.data.convert.files import (
    UNREADABLE,
    annotated_size,
    as_fault,
    list_at,
    number_at,
    object_at,
    read_json,
)
from maskrcnn.data.convert.source import (
    AnnotatedImage,
    BadEntry,
    Category,
    Entry,
    Faults,
    ObjectAnnotation,
    Options,
    Source,
    box_fields,
    require_entries,
)
from maskrcnn.data.convert.vocabulary import Vocabulary, normalized, read_aliases, read_classes
from maskrcnn.errors import UserError
from maskrcnn.files import parse_json

_LAYOUT = "a folder with objects.json, optional image_data.json, and images in VG_100K, VG_100K_2, images or itself"
_IMAGE_FOLDERS = ("VG_100K", "VG_100K_2", "images", "")
_JSON_LIST = "a complete JSON list"
_NOT_SPACE = re.compile(r"[^ \t\r\n]")


def open_visual_genome(root: Path, options: Options, faults: Faults) -> Source:
    """Opens all images of `objects.json`, with the objects whose class is in the vocabulary.

    Raises:
        UserError: without `options.classes`, or if there is nothing to convert.
    """
    if options.classes is None:
        expected = "--classes FILE, or --classes N for the N most frequent"
        raise UserError("Visual Genome without --classes", expected, "add for example --classes 1600")
    path = root / "objects.json"
    if not path.is_file():
        raise UserError(f"no file {path}", _LAYOUT, "give the folder that contains it")
    aliases = read_aliases(options.alias, faults) if options.alias else {}
    max_classes = int(options.classes) if options.classes.isdecimal() and not Path(options.classes).exists() else None
    if max_classes == 0:
        raise UserError("--classes 0", "at least 1", "correct the number of classes")
    entries, counts = _list_images(root, path, faults)
    require_entries(entries, root, _LAYOUT)
    if max_classes is None:
        categories, synonyms = read_classes(Path(options.classes))
        vocabulary = Vocabulary(categories, aliases | synonyms, is_closed=True, origin=options.classes)
    else:
        categories = _most_frequent(counts, aliases, max_classes)
        vocabulary = Vocabulary(categories, aliases, is_closed=True)
    return Source(vocabulary.categories, entries, partial(_read, vocabulary=vocabulary, faults=faults))


def _list_images(root: Path, path: Path, faults: Faults) -> tuple[list[Entry], Counter[str]]:
    """The images of `objects.json`, and the number of objects per name."""
    images: dict[str, Path] = {}  # image id as text -> file
    for name in _IMAGE_FOLDERS:
        for file in sorted((root / name).glob("*.jpg")):
            images.setdefault(file.stem, file)
    sizes_hw = _declared_sizes(root / "image_data.json")
    counts: Counter[str] = Counter()
    entries: list[Entry] = []
    seen: set[int] = set()
    for span in array_spans(path):
        try:
            image_id, objects = _read_entry(path, span)
            if image_id in seen:
                found = f"{path}, image {image_id}: a second time"
                raise BadEntry("image that is listed twice", found, "one entry for each image", "correct the file")
        except BadEntry as fault:
            faults.handle(fault)
            continue
        seen.add(image_id)
        counts.update(name for name in map(_name, objects) if name)
        file = images.get(str(image_id), root / _IMAGE_FOLDERS[0] / f"{image_id}.jpg")
        data = (file, span, sizes_hw.get(image_id))
        entries.append(Entry(name=file.name, path=path, image_id=image_id, data=data))
    return entries, counts


def _most_frequent(counts: Counter[str], aliases: dict[str, str], max_classes: int) -> list[Category]:
    """The most frequent names; equally frequent ones in alphabetical order."""
    merged: Counter[str] = Counter()
    for name, count in counts.items():
        merged[normalized(aliases.get(name, name))] += count
    ordered = sorted(merged, key=lambda name: (-merged[name], name))[:max_classes]
    if not ordered:
        raise UserError("no named object in objects.json", "objects with names", "restore the file from its source")
    return [Category(k, name) for k, name in enumerate(ordered, start=1)]


def _declared_sizes(path: Path) -> dict[int, tuple[int, int]]:
    """Image id -> (height, width); empty if the file does not exist."""
    if not path.is_file():
        return {}
    sizes_hw = {}
    for value in list_at(read_json(path), str(path)):
        entry = object_at(value, str(path))
        values: list[Any] = [entry.get("image_id", entry.get("id")), entry.get("height"), entry.get("width")]
        if all(type(each) is int for each in values):
            sizes_hw[values[0]] = (values[1], values[2])
    return sizes_hw


def _read_entry(path: Path, span: tuple[int, int]) -> tuple[int, list[Any]]:
    """The image id and the objects of an entry; older files use the key `id`."""
    with open(path, "rb") as file:
        file.seek(span[0])
        where = f"{path}, entry at byte {span[0]}"
        with as_fault(UNREADABLE):
            content = parse_json(file.read(span[1] - span[0]), where, _JSON_LIST)
    entry = object_at(content, where)
    image_id = entry.get("image_id", entry.get("id"))
    if type(image_id) is not int or image_id < 1:
        raise BadEntry("malformed entry", f"{where}: image_id {image_id!r}", "a positive integer", "correct the file")
    return image_id, list_at(entry.get("objects"), f"{path}, image {image_id}, objects")


def _name(value: Any) -> str:
    """The normalized first name of an object; empty without one."""
    names = value.get("names") if isinstance(value, dict) else None
    first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    return normalized(first.strip().rstrip("."))


def _read(entry: Entry, *, vocabulary: Vocabulary, faults: Faults) -> AnnotatedImage:
    file, span, declared_hw = entry.data
    _, objects = _read_entry(entry.path, span)
    where = f"{entry.path.with_name('image_data.json')}, image {entry.image_id}"
    size_hw = annotated_size(file, declared_hw, where)

    def convert(index: int, value: Any) -> ObjectAnnotation | None:
        fields = value if isinstance(value, dict) else {}
        object_id = fields.get("object_id", fields.get("id", f"number {index}"))
        where = f"{entry.path}, image {entry.image_id}, object {object_id}"
        name = _name(object_at(value, where))
        if not name:
            found = f"{where}: names {value.get('names')!r}"
            raise BadEntry("object without a name", found, "a list with a name", "correct the file")
        category_id = vocabulary.id_of(name, where, faults)
        if category_id is None:
            return None
        x, y, width, height = (number_at(value.get(key), f"{where}, {key}") for key in "xywh")
        fields = box_fields((x, y, x + width, y + height), size_hw, f"{where} ({name})")
        return ObjectAnnotation(category_id, fields)

    return AnnotatedImage(file, size_hw, tuple(faults.convert_each(objects, convert)))


def array_spans(path: Path, *, chunk_bytes: int = 1 << 20) -> Iterator[tuple[int, int]]:
    """Yields (start, end) in bytes of each entry of a JSON file with one list, without loading the whole file.

    Args:
        path: file to read.
        chunk_bytes: number of bytes read at a time.

    Raises:
        BadEntry: if the file is missing or is not such a list.
    """
    decoder = json.JSONDecoder()
    try:
        with open(path, "rb") as file:
            window = _Window(file, chunk_bytes)
            if window.next_character() != "[":
                raise _not_a_list(path, window.offset + window.position)
            window.position += 1
            while (character := window.next_character()) != "]":
                if character == ",":
                    window.position += 1
                    continue
                try:
                    _, end = decoder.raw_decode(window.text, window.position)
                except json.JSONDecodeError as error:  # the entry may continue after the window
                    byte = window.offset + error.pos
                    if not window.grow():
                        raise _not_a_list(path, byte) from error
                    continue
                yield window.offset + window.position, window.offset + end
                window.position = end
    except OSError as error:
        found = f"{path} cannot be read ({error.strerror or error})"
        raise BadEntry(UNREADABLE, found, _JSON_LIST, "complete the dataset") from error


def _not_a_list(path: Path, byte: int) -> BadEntry:
    found = f"{path}, byte {byte}: not JSON, or not one list"
    return BadEntry(UNREADABLE, found, _JSON_LIST, "restore the file from its source")


class _Window:
    """The part of a file in memory, decoded to one character per byte.

    JSON's structural characters are ASCII, and no byte of a multi-byte UTF-8 character is, so that strings need not be
    decoded to find them.
    """

    def __init__(self, file: BinaryIO, chunk_bytes: int) -> None:
        head = file.read(len(codecs.BOM_UTF8))
        has_mark = head == codecs.BOM_UTF8
        self._file, self._chunk_bytes = file, chunk_bytes
        self.offset, self.position = len(head) if has_mark else 0, 0  # of the window; in the window
        self.text = "" if has_mark else head.decode("latin-1")

    def grow(self) -> bool:
        """Drops the text before `position` and reads on; False at the end of the file."""
        read = self._file.read(max(self._chunk_bytes, len(self.text))).decode("latin-1")
        self.offset, self.text, self.position = self.offset + self.position, self.text[self.position :] + read, 0
        return bool(read)

    def next_character(self) -> str:
        """Moves `position` to the next non-space character and returns it; empty at the end."""
        while True:
            match = _NOT_SPACE.search(self.text, self.position)
            if match:
                self.position = match.start()
                return match.group()
            self.position = len(self.text)
            if not self.grow():
                return ""
