"""Annotation files as arrays, also for files of COCO's size.

Entries that need no repair are decoded by type and checked in bulk. All others are read by the tolerant reader
(`maskrcnn.data.annotations`), with the same objects and notes as if it had read the whole file. The arrays of larger
files are cached under a hash of the file's content.
"""

from __future__ import annotations

import codecs
import ctypes
import gc
import hashlib
import json
import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from pycocotools import mask as mask_api

from maskrcnn import __version__
from maskrcnn.data.annotations import (
    SAMPLE,
    AnnotationFile,
    CategoryKeypoints,
    ImageEntry,
    Notes,
    ObjectEntry,
    PlainObjects,
    Reader,
    SizeOf,
    UnlikeCocoError,
    category_key,
    load_annotations,
    read_annotations,
    usable_id,
)
from maskrcnn.data.records import FORMAT, NO_COUNT, Instance, Pool, Table, object_columns, placed
from maskrcnn.errors import UserError
from maskrcnn.files import cache_folder
from maskrcnn.imaging.run_lengths import runs_from_strings

_AT_ONCE = 2048  # annotations
_BLOCK = 1 << 24  # bytes hashed at once
_CACHED_BYTES = 1 << 22  # minimum size of annotation files whose arrays are cached
_KEPT_S = 30 * 86400  # cached arrays are removed after this time without use

_Id = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]


class _RunLengths(msgspec.Struct, gc=False):
    size: tuple[int, int]
    counts: str | list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]


class _Attributes(msgspec.Struct, gc=False):
    rotation: Literal[0] = 0  # attributes of CVAT's boxes


class _Annotation(msgspec.Struct, gc=False):
    """An entry without anything to repair."""

    id: Annotated[int, msgspec.Meta(gt=0, le=2**62)]
    image_id: _Id
    category_id: _Id
    bbox: tuple[float, float, float, float]
    area: Annotated[float, msgspec.Meta(gt=0)]
    segmentation: list[list[float]] | _RunLengths | None = None
    iscrowd: Literal[0, 1] = 0
    keypoints: list[float] | None = None
    num_keypoints: _Id | None = None
    attributes: _Attributes | None = None


class _File(msgspec.Struct):
    images: msgspec.Raw
    annotations: list[msgspec.Raw]
    categories: msgspec.Raw


def table_of(path: Path, *, size_of: SizeOf, drop_roots: bool) -> tuple[Table, AnnotationFile]:
    """The arrays of an annotation file, and the result of `read_annotations` without the objects.

    Args:
        path: JSON file.
        size_of: see `read_annotations`.
        drop_roots: see `read_annotations`.

    Raises:
        UserError: see `read_annotations`.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # missing or empty
        return table_of_content(load_annotations(path), str(path), size_of=size_of, drop_roots=drop_roots)
    with file:  # the mapping is released with its last reference
        cached = None
        if len(data) >= _CACHED_BYTES:
            with suppress(OSError, UserError):
                cached = cache_folder() / "annotations" / f"{_digest(data)}-{drop_roots:d}-{__version__}-{FORMAT}"
        if cached is not None:
            with suppress(OSError, ValueError, KeyError, TypeError):
                table, facts = Table.read(cached)
                read = _file_of_facts(facts, str(path))
                with suppress(OSError):  # a read-only folder
                    cached.touch()  # for `_remove_old`
                return table, read
        was_asked = False

        def asked(name: str, names: Sequence[str]) -> tuple[int, int] | None:
            nonlocal was_asked
            was_asked = True
            return size_of(name, names)

        table, read = _read(data, path, size_of=asked, drop_roots=drop_roots)
    # Sizes of image files, and the file's name in errors, do not follow from the file's content.
    if cached is not None and not was_asked and read.keypoints.fault is None:
        with suppress(OSError, UserError, TypeError):
            table = table.write(cached, _facts(read))
            _remove_old(cached.parent)
    if cached is not None:
        _release_memory()
    return table, read


def _release_memory() -> None:
    """Returns the memory of the parsed file from glibc to the system."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def table_of_content(content: Any, source: str, *, size_of: SizeOf, drop_roots: bool) -> tuple[Table, AnnotationFile]:
    """As `table_of`, for parsed content."""
    file = read_annotations(content, source, size_of=size_of, drop_roots=drop_roots)
    pool = Pool()
    columns = _columns(file.objects, file.images, file.categories, pool)
    return _table(file.images, columns, pool), replace(file, images={}, objects=[])


def _read(data: mmap.mmap, path: Path, *, size_of: SizeOf, drop_roots: bool) -> tuple[Table, AnnotationFile]:
    try:
        with _without_collection():
            return _read_plain(data, str(path), size_of=size_of, drop_roots=drop_roots)
    except (msgspec.MsgspecError, UnlikeCocoError, json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        pass
    return table_of_content(load_annotations(path), str(path), size_of=size_of, drop_roots=drop_roots)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Disables garbage collection, which would take longer than parsing, as it visits every list each time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _digest(data: mmap.mmap) -> str:
    """A hash of the content, computed by several threads."""
    with memoryview(data) as view, ThreadPoolExecutor() as pool:
        blocks = [view[start : start + _BLOCK] for start in range(0, len(view), _BLOCK)]
        digests = list(pool.map(lambda block: hashlib.sha256(block).digest(), blocks))
        for block in blocks:
            block.release()
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _remove_old(folder: Path) -> None:
    oldest = time.time() - _KEPT_S
    for path in folder.iterdir():
        if not path.name.endswith(f"-{FORMAT}") or path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)


def _facts(file: AnnotationFile) -> dict[str, Any]:
    keypoints = file.keypoints
    return {
        "categories": [*file.categories.items()],
        "keypoints": [keypoints.names, keypoints.skeleton, sorted(keypoints.category_ids)],
        "has_masks": file.has_masks,
        "notes": file.notes.to_json(),
        "image_keys": file.image_keys,
        "category_keys": file.category_keys,
    }


def _file_of_facts(facts: dict[str, Any], source: str) -> AnnotationFile:
    names, skeleton, category_ids = facts["keypoints"]
    return AnnotationFile(
        source=source,
        categories=dict(facts["categories"]),
        images={},
        objects=[],
        keypoints=CategoryKeypoints(tuple(names), tuple((a, b) for a, b in skeleton), frozenset(category_ids)),
        has_masks=facts["has_masks"],
        notes=Notes.from_json(facts["notes"]),
        image_keys=facts["image_keys"],
        category_keys=facts["category_keys"],
    )


def _table(images: dict[int, ImageEntry], columns: dict[str, np.ndarray], pool: Pool) -> Table:
    """The table of objects in any order with their `index` in the file and the `image_id`."""
    order = np.argsort(columns["index"], kind="stable")
    entries = [(image_id, entry.file_name, entry.height, entry.width) for image_id, entry in images.items()]
    rows = _rows_of(columns.pop("image_id"), images)
    del columns["index"]
    return Table.of(entries, rows[order], {name: values[order] for name, values in columns.items()}, pool)


def _rows_of(image_ids: np.ndarray, images: dict[int, ImageEntry]) -> np.ndarray:
    """The position of each id among the images; -1 if unknown."""
    known = np.fromiter(images, np.int64, len(images))
    order = np.argsort(known)
    at = order[np.searchsorted(known, image_ids, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[at] == image_ids, at, -1)


def _columns(
    objects: Sequence[ObjectEntry], images: dict[int, ImageEntry], categories: dict[int, str], pool: Pool
) -> dict[str, np.ndarray]:
    labels = {category_id: label for label, category_id in enumerate(categories, start=1)}
    instances = [
        Instance(
            annotation_id=each.annotation_id,
            label=labels[each.category_id],
            box_xyxy_px=each.box_xyxy,
            segmentation=each.segmentation,
            is_crowd=each.is_crowd,
            area_px=each.area,
            keypoints=each.keypoints,
            stated_keypoints=each.stated_keypoints,
            has_mask=each.has_mask,
        )
        for each in objects
    ]
    sizes = [(images[each.image_id].height, images[each.image_id].width) for each in objects]
    columns = object_columns(instances, pool, sizes_hw=sizes, bboxes_xywh_px=[each.bbox_xywh for each in objects])
    columns["index"] = np.array([each.index for each in objects], np.int64)
    columns["image_id"] = np.array([each.image_id for each in objects], np.int64)
    return columns


# --- plain entries -----------------------------------------------------------------------------------


def _read_plain(data: mmap.mmap, source: str, *, size_of: SizeOf, drop_roots: bool) -> tuple[Table, AnnotationFile]:
    """As `table_of`.

    Raises:
        MsgspecError, ValueError, RecursionError, UnlikeCocoError: for a file that only the tolerant reader can judge.
    """
    _require_utf8(data)
    content = msgspec.json.decode(data, type=_File)
    raws = content.annotations
    lists = [json.loads(bytes(content.images)), json.loads(bytes(content.categories))]
    images, categories = (value if isinstance(value, list) else [] for value in lists)
    if [images, categories] != lists or (raws and b'"segments_info"' in bytes(raws[0])):
        raise UnlikeCocoError
    pool = Pool()
    found, others = _plain(raws, pool)
    rest = {index: json.loads(bytes(raws[index])) for index in others}
    reader = Reader(images, [*rest.items()], categories, source, size_of)
    used = {*np.unique(found["category_id"]).tolist(), *map(category_key, rest.values())} - {None}
    names, keypoints = reader.classes(used, drop_roots=drop_roots)
    named = [each for each in categories if isinstance(each, dict) and usable_id(each.get("id")) in names]
    if found["points_count"].any() and not any(each.get("keypoints") for each in named):
        raise UnlikeCocoError  # the names follow from all annotations
    by_id = reader.images()
    row = _rows_of(found["image_id"], by_id)
    size = np.array([(entry.width, entry.height) for entry in by_id.values()], np.int64)[row]
    good = (row >= 0) & np.isin(found["category_id"], [*names]) & _fits(found, size)
    good &= _fits_keypoints(found, keypoints)
    has_mask = found["part_count"] + found["text_count"] > 0
    if (good & has_mask).any() or any(isinstance(each, dict) and each.get("segmentation") for each in rest.values()):
        good &= has_mask  # an object without a mask is noted only if others have one
    taken = {usable_id(each.get("id")) for each in rest.values() if isinstance(each, dict)}
    taken_ids = [key for key in taken if isinstance(key, int) and 0 < key <= 2**62]
    _, place, count = np.unique(found["id"], return_inverse=True, return_counts=True)
    good &= (count[place] == 1) & ~np.isin(found["id"], taken_ids)
    rest |= {index: json.loads(bytes(raws[index])) for index in found["index"][~good].tolist()}
    reader.annotations = sorted(rest.items())
    others_placed = list(reader.placed(by_id, names))
    by_id = reader.sized(by_id, others_placed)
    first = [
        (index, image_id, category_id, json.loads(bytes(raws[index])))
        for index, image_id, category_id in np.stack(
            [found[name][good][:SAMPLE] for name in ("index", "image_id", "category_id")], axis=1
        ).tolist()
    ]
    plain = PlainObjects(
        number=int(good.sum()),
        have_masks=bool((good & has_mask).any()),
        largest_id=int(found["id"][good].max(initial=0)),
        first=first,
    )
    del raws, content
    objects, has_masks = reader.objects(others_placed, by_id, keypoints, plain)
    columns = _plain_columns(found, good, size, names, keypoints, pool)
    more = _columns(objects, by_id, names, pool)
    columns = {name: np.concatenate([columns[name], more[name]]) for name in columns}
    file = AnnotationFile(
        source=source,
        categories=names,
        images={},
        objects=[],
        keypoints=keypoints,
        has_masks=has_masks,
        notes=reader.notes,
        image_keys=reader.image_keys,
        category_keys=reader.category_keys,
    )
    return _table(by_id, columns, pool), file


def _require_utf8(data: mmap.mmap) -> None:
    """Raises ValueError for other encodings, like `json.loads`; msgspec does not check strings that it skips."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        if not block.isascii() or decoder.getstate()[0]:
            decoder.decode(block)
    decoder.decode(b"", final=True)


def _plain(raws: Sequence[msgspec.Raw], pool: Pool) -> tuple[dict[str, np.ndarray], list[int]]:
    """Columns of the entries that need no repair by themselves, and the indices of the others.

    Polygons and run lengths are added to the pool. The columns are those of `_chunk`, not yet checked against the
    images and categories.
    """
    decode = msgspec.json.Decoder(_Annotation).decode
    chunks, others = [], []
    for start in range(0, max(len(raws), 1), _AT_ONCE):
        some = raws[start : start + _AT_ONCE]
        indices = list(range(start, start + len(some)))
        try:
            entries = [decode(raw) for raw in some]
        except msgspec.MsgspecError:
            decoded = [_decoded(decode, raw) for raw in some]
            others += [index for index, entry in zip(indices, decoded, strict=True) if entry is None]
            indices = [index for index, entry in zip(indices, decoded, strict=True) if entry is not None]
            entries = [entry for entry in decoded if entry is not None]
        chunk, malformed = _chunk(entries, indices, pool)
        chunks.append(chunk)
        others += malformed
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}, others


def _decoded(decode: Callable[[msgspec.Raw], _Annotation], raw: msgspec.Raw) -> _Annotation | None:
    try:
        return decode(raw)
    except msgspec.MsgspecError:
        return None


def _chunk(entries: list[_Annotation], indices: list[int], pool: Pool) -> tuple[dict[str, np.ndarray], list[int]]:
    """Columns of some entries, and the indices of those with malformed polygons, which are left out."""
    polygons = [entry.segmentation if type(entry.segmentation) is list else () for entry in entries]
    part_counts = np.fromiter(map(len, polygons), np.int64, len(entries))
    parts = list(chain.from_iterable(polygons))
    lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    odd = (lengths < 6) | (lengths % 2 == 1)
    if odd.any():
        malformed = set(np.repeat(np.arange(len(entries)), part_counts)[odd].tolist())
        kept = [k for k in range(len(entries)) if k not in malformed]
        chunk, _ = _chunk([entries[k] for k in kept], [indices[k] for k in kept], pool)
        return chunk, [indices[k] for k in malformed]
    values = np.fromiter(chain.from_iterable(parts), np.float64, int(lengths.sum()))
    numbers = {
        name: np.fromiter(map(attrgetter(name), entries), np.float64 if name == "area" else np.int64, len(entries))
        for name in ("id", "image_id", "category_id", "iscrowd", "area")
    }
    boxes = np.fromiter(chain.from_iterable(map(attrgetter("bbox"), entries)), np.float64, 4 * len(entries))
    points = [each.keypoints or () for each in entries]
    stated = [NO_COUNT if each.num_keypoints is None else each.num_keypoints for each in entries]
    texts, run_sizes = _run_lengths(entries)
    return {
        "index": np.array(indices, np.int64),
        **numbers,
        "bbox": boxes.reshape(-1, 4),
        "stated": np.array(stated, np.int64),
        "points_count": np.fromiter(map(len, points), np.int64, len(points)),
        "points": np.array([*chain.from_iterable(points)], np.float64),  # of one entry after the other
        "extent": _extents(values, lengths, part_counts),
        "run_size": run_sizes,
        **placed(pool.add_polygons(values, lengths), part_counts, "part"),
        **placed(pool.add_texts(texts), np.fromiter(map(len, texts), np.int64, len(texts)), "text"),
    }, []


def _extents(values: np.ndarray, lengths: np.ndarray, part_counts: np.ndarray) -> np.ndarray:
    """Minimum and maximum x and y of the polygons of each entry, `[N, 4]`; zeros for an entry without polygons."""
    extents = np.zeros((len(part_counts), 4))
    outlined = part_counts > 0
    if outlined.any():
        first_parts = (np.cumsum(part_counts) - part_counts)[outlined]
        starts = (np.cumsum(lengths) - lengths)[first_parts] // 2
        for axis in (0, 1):
            along = np.ascontiguousarray(values[axis::2])
            extents[outlined, axis] = np.minimum.reduceat(along, starts)
            extents[outlined, axis + 2] = np.maximum.reduceat(along, starts)
    return extents


def _run_lengths(entries: Sequence[_Annotation]) -> tuple[list[bytes], np.ndarray]:
    """Run lengths in COCO's form (b"" for entries without), and the image size `[N, 2]` (height, width) of each.

    The size is -1 for entries without run lengths, and 0 for malformed ones.
    """
    texts, sizes = [b""] * len(entries), np.full((len(entries), 2), -1, np.int64)
    masks = [entry.segmentation for entry in entries]
    for index, mask in enumerate(masks if _RunLengths in set(map(type, masks)) else ()):
        if not isinstance(mask, _RunLengths):
            continue
        height, width = sizes[index] = mask.size if min(mask.size) > 0 and max(mask.size) < 2**15 else (0, 0)
        if not height:
            continue
        if isinstance(mask.counts, str):
            texts[index] = mask.counts.encode(errors="surrogatepass")
        else:
            uncompressed = {"size": [height, width], "counts": mask.counts}
            texts[index] = mask_api.frPyObjects(uncompressed, height, width)["counts"]
    encoded = np.flatnonzero(sizes[:, 0] > 0)
    if encoded.size:
        runs, well_formed = runs_from_strings([texts[index] for index in encoded])
        pixels, totals = runs.sums()
        well_formed = well_formed & (pixels > 0) & (totals == sizes[encoded].prod(axis=1))
        well_formed[np.repeat(np.arange(len(encoded)), runs.lengths)[runs.runs < 0]] = False
        sizes[encoded[~well_formed]] = 0
    return texts, sizes


def _fits(found: dict[str, np.ndarray], size: np.ndarray) -> np.ndarray:
    """Whether the box and the mask of each entry need no repair in an image of this size, `[N, 2]` (width, height)."""
    low, high = found["extent"][:, :2], found["extent"][:, 2:]
    corner, sides = found["bbox"][:, :2], found["bbox"][:, 2:]
    is_inside = np.minimum(corner + sides, size) > np.maximum(corner, 0)
    good = (size > 0) & (sides > 0) & is_inside & (low + size >= 0) & (high <= 2 * size)
    run_size = found["run_size"]
    good &= (run_size < 0) | (run_size == size[:, ::-1])
    fits: np.ndarray = good.all(axis=1)
    return fits


def _fits_keypoints(found: dict[str, np.ndarray], keypoints: CategoryKeypoints) -> np.ndarray:
    """Whether the keypoints of each entry need no repair, see `checked_keypoints`."""
    counts, ends = found["points_count"], np.cumsum(found["points_count"])
    good = ~np.isin(found["category_id"], [*keypoints.category_ids]) | (counts == 0)
    whole = np.flatnonzero(~good & (counts == 3 * len(keypoints.names)))
    shown = found["points"][(ends[whole] - counts[whole])[:, None] + np.arange(2, 3 * len(keypoints.names), 3)]
    good[whole] = np.isin(shown, (0, 1, 2)).all(axis=1)
    fits: np.ndarray = good
    return fits


def _plain_columns(
    found: dict[str, np.ndarray],
    good: np.ndarray,
    size: np.ndarray,
    categories: dict[int, str],
    keypoints: CategoryKeypoints,
    pool: Pool,
) -> dict[str, np.ndarray]:
    """The columns of the entries that are good, see `_columns`."""
    starts = np.cumsum(found["points_count"]) - found["points_count"]
    some = {name: values[good] for name, values in found.items() if name not in ("points", "extent", "run_size")}
    starts, size, count = starts[good], size[good], len(keypoints.names)
    corner, sides = some["bbox"][:, :2], some["bbox"][:, 2:]
    box = np.concatenate([np.maximum(corner, 0.0), np.minimum(corner + sides, size)], axis=1)
    has_points = np.isin(some["category_id"], [*keypoints.category_ids])
    stated = np.where(has_points, some["stated"], NO_COUNT)
    has_points &= some["points_count"] > 0
    points = found["points"][starts[has_points][:, None] + np.arange(3 * count)].reshape(
        int(has_points.sum()), count, 3
    )
    labelled = points[:, :, 2] > 0
    has_points[has_points] = labelled.any(axis=1)
    points = (points * labelled[:, :, None])[labelled.any(axis=1)]
    has_mask = some["part_count"] + some["text_count"] > 0
    return {
        "annotation_id": some["id"],
        "label": (1 + np.searchsorted([*categories], some["category_id"])).astype(np.int32),
        "box": box,
        "bbox": some["bbox"],
        "area": some["area"],
        "is_crowd": some["iscrowd"].astype(bool),
        "has_mask": has_mask,
        "stated": stated,
        "keypoint_row": np.where(has_points, np.cumsum(has_points) - 1 + pool.add_keypoints(points), -1),
        **{name: some[name] for name in ("part_first", "part_count", "text_first", "text_count", "index", "image_id")},
    }
