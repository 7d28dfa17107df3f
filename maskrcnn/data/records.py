"""Annotated images and objects as flat arrays, in a file that processes map into memory and read image by image.

Python objects would take ten times the memory, and each loading process would copy them, because reading an object
writes its reference count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from maskrcnn.data.layouts import ImageFinder
from maskrcnn.data.segmentation import Segmentation, box_polygon, compressed_rle
from maskrcnn.files import atomic_path

FORMAT = 2  # version of `Table.write`, and of the reading of annotations; part of the name of a cached file
_MAGIC = b"maskrcnn arrays\n"
_ALIGNMENT = 64  # bytes
NO_COUNT = np.iinfo(np.int64).min  # `stated_keypoints` of an object without keypoints
_SCALE = 100  # polygons with at most two decimals, as in COCO's files, are stored as integers


@dataclass(frozen=True, eq=False)
class Instance:
    """One annotated object, or one crowd region."""

    annotation_id: int  # unique in the dataset and positive
    label: int  # 1 … number of classes
    box_xyxy_px: tuple[float, float, float, float]  # clipped to the image
    segmentation: Segmentation  # for an object without a mask: the pixels of its box
    is_crowd: bool
    area_px: float  # the file's, else the pixels of the mask
    # float64 [K, 3] x, y in pixels and visibility: 0 not labelled, 1 hidden, 2 visible. None: none is labelled.
    keypoints: np.ndarray | None = None
    stated_keypoints: int | None = None  # the file's `num_keypoints`
    has_mask: bool = True  # False: the file has no usable mask; boxes are learnt and scored, masks are not


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image and its objects; an image without objects is a valid negative."""

    id: int
    path: Path
    height: int
    width: int
    instances: tuple[Instance, ...]
    exif: str = "auto"  # one of `images.EXIF_RULES`, see `survey.with_exif`


class Pool:
    """Collects segmentations and keypoints, which objects refer to by position."""

    def __init__(self) -> None:
        self._arrays: dict[str, list[np.ndarray]] = {name: [] for name in ("part_start", "part_length", "text")}
        self._arrays |= {"hundredths": [], "coordinates": [], "keypoints": []}
        self._sizes = dict.fromkeys(self._arrays, 0)

    def _add(self, name: str, array: np.ndarray) -> int:
        """Appends an array and returns the position of its first element."""
        place = self._sizes[name]
        self._arrays[name].append(array)
        self._sizes[name] += len(array)
        return place

    def add_polygons(self, values: np.ndarray, lengths: np.ndarray) -> int:
        """Appends polygons and returns the number of the first.

        Args:
            values: coordinates x, y, x, y, … of the concatenated polygons, float64.
            lengths: number of coordinates of each, positive.
        """
        starts = np.cumsum(lengths) - lengths
        with np.errstate(over="ignore", invalid="ignore"):
            hundredths = np.rint(values * _SCALE)
            exact = (hundredths / _SCALE == values) & (np.abs(hundredths) < 2**31)
        exact_parts = np.logical_and.reduceat(exact, starts) if len(starts) else np.zeros(0, bool)
        is_exact = np.repeat(exact_parts, lengths)
        places = np.where(exact_parts, np.cumsum(exact_parts * lengths), np.cumsum(~exact_parts * lengths)) - lengths
        whole = self._add("hundredths", hundredths[is_exact].astype(np.int32))
        other = self._add("coordinates", values[~is_exact])
        self._add("part_length", lengths.astype(np.int32))
        return self._add("part_start", np.where(exact_parts, places + whole, ~(places + other)))

    def add_texts(self, texts: Sequence[bytes]) -> int:
        """Appends run lengths in COCO's form and returns the position of the first character."""
        return self._add("text", np.frombuffer(b"".join(texts), np.uint8))

    def add_keypoints(self, keypoints: Sequence[np.ndarray] | np.ndarray) -> int:
        """Appends keypoints `[K, 3]` of objects, with the same K in all calls, and returns the number of the first."""
        return self._add("keypoints", np.array(keypoints, np.float64)) if len(keypoints) else self._sizes["keypoints"]

    def arrays(self) -> dict[str, np.ndarray]:
        """The content; empties the pool."""
        dtypes = {"part_start": np.int64, "part_length": np.int32, "text": np.uint8, "hundredths": np.int32}
        joined = {}
        for name, arrays in self._arrays.items():
            joined[name] = np.concatenate(arrays) if arrays else np.zeros(0, dtypes.get(name, np.float64))
            arrays.clear()
        return joined


def object_columns(
    objects: Sequence[Instance],
    pool: Pool,
    *,
    sizes_hw: Sequence[tuple[int, int]],
    bboxes_xywh_px: Sequence[Sequence[float]],
) -> dict[str, np.ndarray]:
    """The arrays of objects; segmentations and keypoints are added to a pool.

    Args:
        objects: the objects.
        pool: for segmentations and keypoints.
        sizes_hw: height and width of the image of each.
        bboxes_xywh_px: box of each, not clipped to the image.
    """
    polygons: list[np.ndarray] = []
    texts: list[bytes] = []
    part_counts, text_counts = [], []
    for each, size_hw in zip(objects, sizes_hw, strict=True):
        parts: list[np.ndarray] = []
        text = b""
        if each.has_mask and isinstance(each.segmentation, list):
            parts = each.segmentation
        elif each.has_mask:
            counts = compressed_rle(each.segmentation, *size_hw)["counts"]
            text = counts.encode("latin-1") if isinstance(counts, str) else counts
        polygons += parts
        texts.append(text)
        part_counts.append(len(parts))
        text_counts.append(len(text))
    points = [each.keypoints for each in objects if each.keypoints is not None]
    has_points = np.array([each.keypoints is not None for each in objects], bool)
    stated = (each.stated_keypoints for each in objects)
    values = np.concatenate(polygons).astype(np.float64) if polygons else np.zeros(0)
    lengths = np.array([part.size for part in polygons], np.int64)
    return {
        "annotation_id": np.array([each.annotation_id for each in objects], np.int64),
        "label": np.array([each.label for each in objects], np.int32),
        "box": np.array([each.box_xyxy_px for each in objects], np.float64).reshape(-1, 4),
        "bbox": np.array(bboxes_xywh_px, np.float64).reshape(-1, 4),
        "area": np.array([each.area_px for each in objects], np.float64),
        "is_crowd": np.array([each.is_crowd for each in objects], bool),
        "has_mask": np.array([each.has_mask for each in objects], bool),
        "stated": np.array([NO_COUNT if n is None else min(max(n, -(2**62)), 2**62) for n in stated], np.int64),
        "keypoint_row": np.where(has_points, np.cumsum(has_points) - 1 + pool.add_keypoints(points), -1),
        **placed(pool.add_polygons(values, lengths), np.array(part_counts, np.int64), "part"),
        **placed(pool.add_texts(texts), np.array(text_counts, np.int64), "text"),
    }


def placed(first: int, counts: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Positions of the objects' parts in a pool, where `counts` parts each are appended from `first`."""
    return {f"{name}_first": np.cumsum(counts) - counts + first, f"{name}_count": counts.astype(np.int32)}


@dataclass(frozen=True, eq=False)
class Table:
    """The arrays of a dataset; the objects of an image are contiguous.

    For N images: `image_id`, `size` (height, width), `name_end` (ends of the names in `names`), `object_end`. For G
    objects: `object_columns`. In addition, those of `Pool`.
    """

    arrays: Mapping[str, np.ndarray]
    path: Path | None = None  # the file of the arrays

    @classmethod
    def of(
        cls,
        images: Sequence[tuple[int, str, int, int]],
        image_row: np.ndarray,
        columns: Mapping[str, np.ndarray],
        pool: Pool,
    ) -> Table:
        """The arrays of images (id, name, height, width) and objects.

        Args:
            images: the images.
            image_row: position of the image of each object; the order within an image is kept.
            columns: columns of the objects, see `object_columns`.
            pool: their segmentations and keypoints.
        """
        names = [name.encode("utf-8", "surrogatepass") for _, name, _, _ in images]
        order = np.argsort(image_row, kind="stable")
        arrays: dict[str, np.ndarray] = {
            "image_id": np.array([each[0] for each in images], np.int64),
            "size": np.array([each[2:] for each in images], np.int32).reshape(-1, 2),
            "names": np.frombuffer(b"".join(names), np.uint8),
            "name_end": np.cumsum([len(name) for name in names], dtype=np.int64),
            "object_end": np.cumsum(np.bincount(image_row, minlength=len(images)), dtype=np.int64),
            **{name: values[order] for name, values in columns.items()},
            **pool.arrays(),
        }
        return cls(arrays)

    def write(self, path: Path, facts: Any) -> Table:
        """Writes the arrays and JSON data to a file; returns the arrays in it.

        Raises:
            UserError: if it cannot be written.
        """
        places, end = {}, 0
        for name, array in self.arrays.items():
            places[name] = (end, array.dtype.str, array.shape)
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        header = json.dumps({"arrays": places, "facts": facts}).encode()
        start = len(_MAGIC) + 16 + len(header)
        start += -start % _ALIGNMENT
        with atomic_path(path) as draft, open(draft, "wb") as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + (start + end).to_bytes(8, "little") + header)
            for name, array in self.arrays.items():
                file.seek(start + places[name][0])
                file.write(np.ascontiguousarray(array).data)
            file.truncate(start + end)
        return self.read(path)[0]

    @classmethod
    def read(cls, path: Path) -> tuple[Table, Any]:
        """The arrays of a file, mapped into memory, and its JSON data.

        Raises:
            OSError: if the file does not exist.
            ValueError: for an incomplete file, or one of another kind.
        """
        content = np.memmap(path, np.uint8, "r")
        head = len(_MAGIC) + 16
        if content[: len(_MAGIC)].tobytes() != _MAGIC or len(content) < head:
            raise ValueError(f"{path} is not a file of arrays")
        length, total = (int.from_bytes(content[at : at + 8].tobytes(), "little") for at in (head - 16, head - 8))
        if len(content) != total:
            raise ValueError(f"{path} has {len(content)} bytes instead of {total}")
        header = json.loads(content[head : head + length].tobytes())
        start = head + length + -(head + length) % _ALIGNMENT
        arrays = {}
        for name, (place, dtype, shape) in header["arrays"].items():
            size = int(np.dtype(dtype).itemsize * np.prod(shape))
            arrays[name] = content[start + place : start + place + size].view(np.ndarray).view(dtype).reshape(shape)
        return cls(arrays, path), header["facts"]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the path, so that another process maps the same file."""
        return (_mapped, (self.path,)) if self.path else (Table, (self.arrays,))

    def polygons(self, row: int) -> list[np.ndarray]:
        """The polygons of an object, float64 each; [] for run lengths and objects without a mask."""
        first = int(self.arrays["part_first"][row])
        found = []
        for part in range(first, first + int(self.arrays["part_count"][row])):
            start, length = int(self.arrays["part_start"][part]), int(self.arrays["part_length"][part])
            if start >= 0:
                found.append(self.arrays["hundredths"][start : start + length] / _SCALE)
            else:
                found.append(self.arrays["coordinates"][~start : ~start + length].copy())
        return found

    def segmentation(self, row: int, size_hw: tuple[int, int]) -> Segmentation:
        """The mask of an object, or the pixels of its box."""
        if not self.arrays["has_mask"][row]:
            return box_polygon(self.arrays["box"][row].tolist())
        first, length = int(self.arrays["text_first"][row]), int(self.arrays["text_count"][row])
        if length:
            return {"size": [*size_hw], "counts": self.arrays["text"][first : first + length].tobytes()}
        return self.polygons(row)

    def keypoints(self, row: int) -> np.ndarray | None:
        """Keypoints `[K, 3]` of an object."""
        at = int(self.arrays["keypoint_row"][row])
        return None if at < 0 else np.array(self.arrays["keypoints"][at])


def _mapped(path: Path) -> Table:
    return Table.read(path)[0]


@dataclass(frozen=True, eq=False)
class Records(Sequence[ImageRecord]):
    """Images and their objects, created from arrays on access."""

    table: Table
    rows: np.ndarray  # int64 [N], positions of the images in the table
    finder: ImageFinder | None = None  # finds the image files; None: the names are paths
    exif: str = "auto"
    crowd_objects: bool = False  # crowd regions are objects

    @classmethod
    def of(cls, records: Iterable[ImageRecord]) -> Records:
        """The arrays of records, all with the same `exif`."""
        records, pool = list(records), Pool()
        objects = [each for record in records for each in record.instances]
        row = np.repeat(np.arange(len(records)), [len(record.instances) for record in records])
        sizes = [(records[k].height, records[k].width) for k in row.tolist()]
        boxes = [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in (each.box_xyxy_px for each in objects)]
        columns = object_columns(objects, pool, sizes_hw=sizes, bboxes_xywh_px=boxes)
        images = [(record.id, str(record.path), record.height, record.width) for record in records]
        exif = records[0].exif if records else "auto"
        return cls(Table.of(images, row, columns, pool), np.arange(len(records)), None, exif)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> ImageRecord | Records:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        row = int(self.rows[index])
        arrays = self.table.arrays
        height, width = arrays["size"][row].tolist()
        return ImageRecord(
            id=int(arrays["image_id"][row]),
            path=self.path(index),
            height=height,
            width=width,
            instances=tuple(self._instance(k, (height, width)) for k in _range(arrays["object_end"], row)),
            exif=self.exif,
        )

    def _instance(self, row: int, size_hw: tuple[int, int]) -> Instance:
        arrays = self.table.arrays
        stated, box = int(arrays["stated"][row]), arrays["box"][row].tolist()
        return Instance(
            annotation_id=int(arrays["annotation_id"][row]),
            label=int(arrays["label"][row]),
            box_xyxy_px=(box[0], box[1], box[2], box[3]),
            segmentation=self.table.segmentation(row, size_hw),
            is_crowd=bool(arrays["is_crowd"][row]) and not self.crowd_objects,
            area_px=float(arrays["area"][row]),
            keypoints=self.table.keypoints(row),
            stated_keypoints=None if stated == NO_COUNT else stated,
            has_mask=bool(arrays["has_mask"][row]),
        )

    def take(self, indices: np.ndarray | Sequence[int]) -> Records:
        """Some of the images, in this order."""
        return Records(self.table, self.rows[np.asarray(indices, np.int64)], self.finder, self.exif, self.crowd_objects)

    def name(self, index: int) -> str:
        """The file name of an image in the annotation file."""
        span = _range(self.table.arrays["name_end"], int(self.rows[index]))
        return self.table.arrays["names"][span.start : span.stop].tobytes().decode("utf-8", "surrogatepass")

    def names(self) -> list[str]:
        """The file names of all images."""
        ends = self.table.arrays["name_end"]
        starts, blob = np.concatenate(([0], ends[:-1]))[self.rows].tolist(), self.table.arrays["names"].tobytes()
        spans = zip(starts, ends[self.rows].tolist(), strict=True)
        if blob.isascii():  # one character per byte
            text = blob.decode()
            return [text[start:end] for start, end in spans]
        return [blob[start:end].decode("utf-8", "surrogatepass") for start, end in spans]

    def path(self, index: int) -> Path:
        """The file of an image; if missing, the path where it was expected."""
        return self.finder.find(self.name(index)) if self.finder else Path(self.name(index))

    def missing(self) -> list[Path]:
        """The paths of the images that do not exist."""
        listed: dict[str, set[str]] = {}  # folder -> its files: faster than checking each file
        found = []
        for index, name in enumerate(self.names()):
            folder, _, file = name.rpartition("/")
            if self.finder and folder not in listed:
                is_below = not folder.startswith("/") and ".." not in folder and ":" not in folder
                listed[folder] = _files(self.finder.folder / folder) if is_below else set()
            if not (self.finder and file in listed[folder]) and not os.path.isfile(path := self.path(index)):
                found.append(path)
        return found

    @property
    def ids(self) -> np.ndarray:
        """Image ids `[N]` int64."""
        ids: np.ndarray = self.table.arrays["image_id"][self.rows]
        return ids

    @property
    def sizes_hw(self) -> np.ndarray:
        """Height and width of the images, `[N, 2]` int32."""
        sizes: np.ndarray = self.table.arrays["size"][self.rows]
        return sizes

    @property
    def counts(self) -> np.ndarray:
        """Number of objects and crowd regions of each image, `[N]` int64, G in total, numbered in this order."""
        counts: np.ndarray = np.diff(self.table.arrays["object_end"], prepend=0)[self.rows]
        return counts

    @property
    def image_of_object(self) -> np.ndarray:
        """Index of the image of each object, `[G]` int64."""
        return np.repeat(np.arange(len(self)), self.counts)

    def objects(self, name: str) -> np.ndarray:
        """A column of the objects and crowd regions, `[G, …]`, see `object_columns`."""
        if name == "is_crowd" and self.crowd_objects:
            return np.zeros(int(self.counts.sum()), bool)
        values: np.ndarray = self.table.arrays[name][self._object_rows()]
        return values

    def segmentations(self) -> Iterator[tuple[Segmentation, int, int]]:
        """The segmentation of each object, and the height and width of its image."""
        sizes = self.sizes_hw.tolist()
        for row, image in zip(self._object_rows().tolist(), self.image_of_object.tolist(), strict=True):
            height, width = sizes[image]
            yield self.table.segmentation(row, (height, width)), height, width

    def keypoints(self, count: int) -> np.ndarray:
        """Keypoints `[G, K, 3]` float64 of the objects; zeros for objects without any.

        Args:
            count: K for a dataset without keypoints.
        """
        at, points = self.objects("keypoint_row"), self.table.arrays["keypoints"]
        found = np.zeros((len(at), points.shape[1] if points.ndim == 3 else count, 3))
        found[at >= 0] = points[at[at >= 0]] if points.ndim == 3 else 0
        return found

    def stated_keypoints(self, otherwise: np.ndarray) -> np.ndarray:
        """The file's `num_keypoints` of each object `[G]`; if missing, the value of `otherwise`."""
        stated = self.objects("stated")
        return np.where(stated == NO_COUNT, otherwise, stated)

    def _object_rows(self) -> np.ndarray:
        counts = self.counts
        firsts = (self.table.arrays["object_end"][self.rows]) - counts
        return np.repeat(firsts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))


def _range(ends: np.ndarray, row: int) -> range:
    return range(int(ends[row - 1]) if row else 0, int(ends[row]))


def _files(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()
