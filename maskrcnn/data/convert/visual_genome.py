"""Visual Genome: `objects.json`, boxes with free-text names, of which a vocabulary is chosen.

Names are compared without case, repeated spaces and a full stop at the end. A box that reaches over the image's edge
is cut. `objects.json` is some hundred megabytes: it is read entry by entry, first for where the entries lie and which
names occur, then again image by image.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from maskrcnn.data.convert.documents import (
    BadEntry,
    Faults,
    array_spans,
    json_from,
    list_at,
    look,
    object_at,
    read_json,
    require_size,
)
from maskrcnn.data.convert.source import (
    Entry,
    Options,
    Picture,
    Source,
    SourceObject,
    box_fields,
    number,
    require_entries,
)
from maskrcnn.data.convert.vocabulary import Category, Vocabulary, plain, read_aliases, read_classes
from maskrcnn.errors import UserError

_LAYOUT = "a folder with objects.json, maybe image_data.json, and images in VG_100K and VG_100K_2, images or itself"
_IMAGE_FOLDERS = ("VG_100K", "VG_100K_2", "images", "")


def open_visual_genome(root: Path, options: Options, faults: Faults) -> Source:
    """All images of `objects.json`, with the objects whose class is in the vocabulary.

    Raises:
        UserError: where no vocabulary is asked for, or there is nothing to convert.
    """
    if options.classes is None:
        came = "Visual Genome without --classes"
        raise UserError(came, "--classes FILE, or --classes N for the N most frequent", "say --classes 1600")
    path = root / "objects.json"
    if not path.is_file():
        raise UserError(f"no file {path}", _LAYOUT, "point at the folder that holds it")
    aliases = read_aliases(options.alias, faults) if options.alias else {}
    most = int(options.classes) if options.classes.isdecimal() and not Path(options.classes).exists() else None
    if most == 0:
        raise UserError("--classes 0", "at least 1", "say how many classes")
    entries, counts = _listed(root, path, faults)
    require_entries(entries, root, _LAYOUT)
    vocabulary = _vocabulary(options.classes, most, counts, aliases)
    read = partial(_read, vocabulary=vocabulary, faults=faults)
    return Source(categories=vocabulary.categories, entries=entries, read=read)


def _listed(root: Path, path: Path, faults: Faults) -> tuple[list[Entry], Counter[str]]:
    """The images of `objects.json`, and how often each name occurs."""
    images, sizes = _images_in(root), _declared_sizes(root / "image_data.json")
    counts: Counter[str] = Counter()
    entries: list[Entry] = []
    seen: set[int] = set()
    for span in array_spans(path):
        try:
            image_id, objects = _image(path, span)
            if image_id in seen:
                came = f"{path}, image {image_id}: a second time"
                raise BadEntry("image that is listed twice", came, "one entry for each image", "correct the file")
        except BadEntry as fault:
            faults.meet(fault)
            continue
        seen.add(image_id)
        counts.update(name for name in map(_plain_name, objects) if name)
        file = images.get(str(image_id), root / _IMAGE_FOLDERS[0] / f"{image_id}.jpg")
        entries.append(Entry(name=file.name, where=path, image_id=image_id, data=(file, span, sizes.get(image_id))))
    return entries, counts


def _vocabulary(classes: str, most: int | None, counts: Counter[str], aliases: dict[str, str]) -> Vocabulary:
    """The classes of a file, or the most frequent ones; of equally frequent ones the first in the alphabet."""
    if most is None:
        categories, others = read_classes(Path(classes))
        return Vocabulary(categories, aliases | others, is_closed=True, origin=classes)
    joined: Counter[str] = Counter()
    for name, count in counts.items():
        joined[plain(aliases.get(name, name))] += count
    ordered = sorted(joined, key=lambda name: (-joined[name], name))[:most]
    if not ordered:
        raise UserError("no named object in objects.json", "objects with names", "restore the file from its source")
    categories = [Category(k, name) for k, name in enumerate(ordered, start=1)]
    return Vocabulary(categories, aliases, is_closed=True)


def _images_in(root: Path) -> dict[str, Path]:
    """Image id, as text -> file."""
    found: dict[str, Path] = {}
    for name in _IMAGE_FOLDERS:
        for path in sorted((root / name).glob("*.jpg")):
            found.setdefault(path.stem, path)
    return found


def _declared_sizes(path: Path) -> dict[int, tuple[int, int]]:
    """Image id -> (height, width), where there is the file."""
    if not path.is_file():
        return {}
    sizes = {}
    for value in list_at(read_json(path), str(path)):
        entry = object_at(value, str(path))
        values = [entry.get("image_id", entry.get("id")), entry.get("height"), entry.get("width")]
        if all(type(each) is int for each in values):
            sizes[values[0]] = (values[1], values[2])
    return sizes


def _image(path: Path, span: tuple[int, int]) -> tuple[int, list[Any]]:
    """The image id and the objects of an entry; older files call the id `id`."""
    with open(path, "rb") as file:
        file.seek(span[0])
        where = f"{path}, entry at byte {span[0]}"
        entry = object_at(json_from(file.read(span[1] - span[0]), where), where)
    image_id = entry.get("image_id", entry.get("id"))
    if type(image_id) is not int or image_id < 1:
        raise BadEntry("malformed entry", f"{where}: image_id {image_id!r}", "a positive integer", "correct the file")
    return image_id, list_at(entry.get("objects"), f"{path}, image {image_id}, objects")


def _plain_name(value: Any) -> str:
    """An object's first name as it is compared; empty where it has none."""
    names = value.get("names") if isinstance(value, dict) else None
    first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    return plain(first.strip().rstrip("."))


def _read(entry: Entry, *, vocabulary: Vocabulary, faults: Faults) -> Picture:
    file, span, declared_hw = entry.data
    _, objects = _image(entry.where, span)
    size_hw = look(file).size_hw
    if declared_hw is not None:
        require_size(declared_hw, size_hw, f"{entry.where.with_name('image_data.json')}, image {entry.image_id}")

    def found(index: int, value: Any) -> SourceObject | None:
        where = f"{entry.where}, image {entry.image_id}, object {_object_id(value, index)}"
        name = _plain_name(object_at(value, where))
        if not name:
            came = f"{where}: names {value.get('names')!r}"
            raise BadEntry("object without a name", came, "a list with a name", "correct the file")
        category_id = vocabulary.id_of(name, where, faults)
        if category_id is None:
            return None
        x, y, width, height = (number(value.get(key), f"{where}, {key}") for key in "xywh")
        return SourceObject(category_id, box_fields((x, y, x + width, y + height), size_hw, f"{where} ({name})"))

    return Picture(file, size_hw, tuple(faults.usable(objects, found)))


def _object_id(value: Any, index: int) -> Any:
    entry = value if isinstance(value, dict) else {}
    return entry.get("object_id", entry.get("id", f"number {index}"))
