"""Annotated objects as arrays, from a file in COCO's format or from a dataset.

Image ids, boxes, areas and crowd flags are the file's, so that metrics equal the official ones. Annotations of an
unknown image or category are left out, as in pycocotools.

Polygons and masks become compressed run-length encodings by `pycocotools.mask`, whose C code rasterises polygons as
COCO's annotations expect; everything else is NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.data.annotations import AnnotationError, checked_segmentation, compressed_rle, finite_numbers
from maskrcnn.data.coco import CocoDataset, image_folder
from maskrcnn.errors import UserError
from maskrcnn.files import read_json
from maskrcnn.imaging.run_lengths import Runs, runs_from_strings, strings_from_runs
from maskrcnn.keypoints import sigmas_of
from maskrcnn.runtime.evaluation.protocol import SIGMAS

_FORMAT = "COCO's annotation format (cocodataset.org/#format-data)"
_STRINGS_AT_ONCE = 256  # strings of some hundred characters, so that their numbers stay in the processor's cache

_Fault = Callable[[int, str], UserError]
_Masks = tuple[list[dict[str, Any]], np.ndarray]  # compressed run-length encodings, and pixels `[N]` int64 of each


class GroundTruth:
    """The annotated objects of an annotation file, checked field by field as the fields are needed.

    Args:
        content: `images`, `annotations` and `categories` of the file.
        source: file name, for error texts.
        sigmas: OKS sigmas (default: see `GroundTruth.sigmas`).

    Raises:
        UserError: for a file of another structure; names the entry.
    """

    def __init__(self, content: Any, source: str, sigmas: Sequence[float] = ()) -> None:
        self.source = source
        entries = {name: self._list(content, name) for name in ("images", "annotations", "categories")}
        images = {_integer(entry, "id", self._fault): entry for entry in entries["images"]}
        categories = {_integer(entry, "id", self._fault): entry for entry in entries["categories"]}
        for name, known in (("images", images), ("categories", categories)):
            if len(known) != len(entries[name]):
                raise self._fault(f"an id occurs twice in {name!r}", "unique ids")
        names = {value: str(entry.get("name", value)) for value, entry in categories.items()}
        self._set_tables(images, names, entries["categories"], sigmas)
        known_entries = []
        for entry in entries["annotations"]:
            image, category = self.image_index(entry.get("image_id")), self.category_index(entry.get("category_id"))
            if image is not None and category is not None:
                known_entries.append((image, category, entry))
        known_entries.sort(key=lambda values: values[0])  # stable
        self.image = np.array([image for image, _, _ in known_entries], np.int64)  # [G] index in `image_ids`
        self.category = np.array([category for _, category, _ in known_entries], np.int64)  # [G] in `category_ids`
        self._entries: list[dict[str, Any]] = [entry for _, _, entry in known_entries]

    def _set_tables(
        self,
        images: Mapping[int, Mapping[str, Any]],
        categories: Mapping[int, str],
        category_entries: Sequence[Mapping[str, Any]],
        sigmas: Sequence[float],
    ) -> None:
        self.images, self.categories, self._given_sigmas = images, categories, tuple(sigmas)
        self._keypoint_categories = [entry for entry in category_entries if isinstance(entry.get("keypoints"), list)]
        self.image_ids = np.array(sorted(images), np.int64)
        self.category_ids = np.array(sorted(categories), np.int64)
        self._image_indices = {value: index for index, value in enumerate(self.image_ids.tolist())}
        self._category_indices = {value: index for index, value in enumerate(self.category_ids.tolist())}

    @classmethod
    def read(cls, path: Path) -> GroundTruth:
        """Reads an annotation file.

        Raises:
            UserError: for a file that cannot be read or is of another structure.
        """
        return cls(read_json(path, "an annotation file in COCO's format"), str(path))

    @staticmethod
    def of_dataset(dataset: CocoDataset, sigmas: Sequence[float] = ()) -> GroundTruth:
        """The usable objects of a dataset; `sigmas` are the model's."""
        return _DatasetTruth(dataset, sigmas)

    def __len__(self) -> int:
        return len(self.image)

    @property
    def category_names(self) -> tuple[str, ...]:
        """Category names in ascending order of the ids."""
        return tuple(self.categories[value] for value in self.category_ids.tolist())

    def image_index(self, image_id: Any) -> int | None:
        """The index of an image id in `image_ids`; None for an unknown one."""
        return self._image_indices.get(image_id) if isinstance(image_id, (int, float)) else None

    def category_index(self, category_id: Any) -> int | None:
        """The index of a category id in `category_ids`; None for an unknown one."""
        return self._category_indices.get(category_id) if isinstance(category_id, (int, float)) else None

    @cached_property
    def sizes_hw(self) -> list[tuple[int, int]]:
        """Height and width of each image, in the order of `image_ids`."""
        entries = [self.images[value] for value in self.image_ids.tolist()]
        return [(_integer(e, "height", self._fault), _integer(e, "width", self._fault)) for e in entries]

    @cached_property
    def areas_px(self) -> np.ndarray:
        """Areas `[G]` float64 as the file has them."""
        return self._numbers("area", None).reshape(-1)

    @cached_property
    def boxes(self) -> np.ndarray:
        """Boxes `[G, 4]` float64 (x, y, width, height)."""
        return self._numbers("bbox", 4)

    @cached_property
    def sigmas(self) -> np.ndarray:
        """OKS sigmas `[K]` float64: those given, else `maskrcnn.keypoints`' for the keypoint names, else a person's."""
        named = {tuple(map(str, entry["keypoints"])) for entry in self._keypoint_categories}
        if len(named) > 1:
            raise self._fault("categories with different keypoints", "the same names in all that have any")
        names = next(iter(named), ())
        if self._given_sigmas and names and len(names) != len(self._given_sigmas):
            raise self._fault(f"{len(names)} keypoints", f"the model's {len(self._given_sigmas)}")
        return np.array(self._given_sigmas or sigmas_of(names) or SIGMAS)

    @cached_property
    def skeleton(self) -> list[tuple[int, int]]:
        """Lines between keypoints, counted from 1, for drawings; malformed ones are left out."""
        lines = [line for entry in self._keypoint_categories for line in entry.get("skeleton") or ()]
        known = range(1, len(self.sigmas) + 1)
        pairs = [tuple(line) for line in lines if isinstance(line, (list, tuple)) and len(line) == 2]
        return list(dict.fromkeys((a, b) for a, b in pairs if a in known and b in known))

    @cached_property
    def keypoints(self) -> np.ndarray:
        """Keypoints `[G, K, 3]` float64: x, y, visibility; zeros for objects without any."""
        count = len(self.sigmas)
        default = [0] * (3 * count) if any("keypoints" in entry for entry in self._entries) else None
        return self._numbers("keypoints", 3 * count, default).reshape(-1, count, 3)

    @cached_property
    def masks(self) -> _Masks:
        """Compressed run-length encodings, and pixels `[G]` int64 of each."""
        segmentations = [entry.get("segmentation") for entry in self._entries]
        sizes = [self.sizes_hw[image] for image in self.image.tolist()]
        return checked_masks(segmentations, sizes, lambda index, what: self._fault(f"{self._name(index)}: {what}"))

    @cached_property
    def is_crowd(self) -> np.ndarray:
        """Crowd flags `[G]` bool (default: False)."""
        flags = [entry.get("iscrowd", 0) for entry in self._entries]
        for index, flag in enumerate(flags):
            if flag not in (0, 1):
                raise self._fault(f"{self._name(index)}: iscrowd is {_shortened(flag)}", "0 or 1")
        return np.array(flags, bool)

    def is_ignored(self, kind: str) -> np.ndarray:
        """Objects `[G]` bool that need not be found: crowds and, for keypoints, objects without labelled keypoints."""
        return self.is_crowd | self._is_unlabelled if kind == "keypoints" else self.is_crowd

    @cached_property
    def _is_unlabelled(self) -> np.ndarray:
        visible = np.count_nonzero(self.keypoints[:, :, 2] > 0, axis=1).tolist()
        numbers = [entry.get("num_keypoints", count) for entry, count in zip(self._entries, visible, strict=True)]
        return np.array([number == 0 for number in numbers], bool)

    def _list(self, content: Any, name: str) -> list[dict[str, Any]]:
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise self._fault(f"no list {name!r}")
        if not all(isinstance(entry, dict) for entry in entries):
            raise self._fault(f"an entry of {name!r} is not an object")
        return entries

    def _numbers(self, key: str, count: int | None, default: list[int] | None = None) -> np.ndarray:
        """A field of all objects `[G, count]`, checked; None: a single number."""
        values = np.empty((len(self), count or 1))
        for index, entry in enumerate(self._entries):
            value = entry.get(key, default)
            numbers = finite_numbers(value if count else [value])
            if numbers is None or numbers.size != (count or 1):
                expected = f"{count} numbers" if count else "a number"
                raise self._fault(f"{self._name(index)}: {key} is {_shortened(value)}", expected)
            values[index] = numbers
        return values

    def _name(self, index: int) -> str:
        return f"annotation {self._entries[index].get('id', f'number {index}')}"

    def _fault(self, what: str, expected: str = _FORMAT) -> UserError:
        return UserError(f"{self.source}: {what}", expected, "correct the file, or name another one")


class _DatasetTruth(GroundTruth):
    """The objects of a `CocoDataset`, which has checked them."""

    def __init__(self, dataset: CocoDataset, sigmas: Sequence[float]) -> None:
        self.source = str(dataset.annotation_path)
        folder = image_folder(dataset.root, dataset.split)
        images = {
            record.id: {
                "file_name": record.path.relative_to(folder).as_posix(),
                "height": record.height,
                "width": record.width,
            }
            for record in dataset.images
        }
        categories = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
        keypoints = {"keypoints": list(dataset.keypoint_names), "skeleton": dataset.keypoint_skeleton}
        self._set_tables(images, categories, [keypoints] if dataset.keypoint_names else [], sigmas)
        records = sorted(dataset.images, key=lambda record: record.id)
        self._objects = [instance for record in records for instance in record.instances]
        self._boxes = dataset.file_boxes_xywh_px
        self.image = np.repeat(np.arange(len(records)), [len(record.instances) for record in records])
        self.category = np.array([instance.label - 1 for instance in self._objects], np.int64)

    @cached_property
    def areas_px(self) -> np.ndarray:
        return np.array([instance.area_px for instance in self._objects], np.float64)

    @cached_property
    def boxes(self) -> np.ndarray:
        boxes = [self._boxes[instance.annotation_id] for instance in self._objects]
        return np.array(boxes, np.float64).reshape(-1, 4)

    @cached_property
    def keypoints(self) -> np.ndarray:
        if not self._keypoint_categories and len(self):
            raise self._fault("no category with keypoints", "a category with keypoint names")
        none = np.zeros((len(self.sigmas), 3))
        points = [none if instance.keypoints is None else instance.keypoints for instance in self._objects]
        return np.array(points, np.float64).reshape(-1, len(self.sigmas), 3)

    @cached_property
    def masks(self) -> _Masks:
        masks = [
            compressed_rle(instance.segmentation, *self.sizes_hw[image])
            for instance, image in zip(self._objects, self.image.tolist(), strict=True)
        ]
        return masks, _pixel_counts(masks)

    @cached_property
    def is_crowd(self) -> np.ndarray:
        return np.array([instance.is_crowd for instance in self._objects], bool)

    @cached_property
    def _is_unlabelled(self) -> np.ndarray:
        return np.logical_not((self.keypoints[:, :, 2] > 0).any(axis=1))


def checked_masks(segmentations: Sequence[Any], sizes_hw: Sequence[tuple[int, int]], fault: _Fault) -> _Masks:
    """Converts COCO's segmentations to compressed run-length encodings.

    `pycocotools.mask` trusts its input and reads beyond a mask whose runs exceed the image, so run lengths are checked
    first, many strings at a time: results files hold them by the hundred thousand.

    Args:
        segmentations: polygons, or run lengths as a list or as COCO's string; a mask may be empty.
        sizes_hw: (height, width) of the image of each.
        fault: makes the error for the index of a segmentation and what is wrong with it.

    Raises:
        UserError: made by `fault`, for a malformed segmentation or one of another size than its image.
    """
    masks: list[dict[str, Any]] = []
    areas = [np.zeros(0, np.int64)]
    for start in range(0, len(segmentations), _STRINGS_AT_ONCE):
        part = slice(start, start + _STRINGS_AT_ONCE)
        sizes = sizes_hw[part]
        some = [
            value if _is_compressed(value, size) else _compressed(value, size, index, fault)
            for index, (value, size) in enumerate(zip(segmentations[part], sizes, strict=True), start)
        ]
        runs, is_good = runs_from_strings([mask["counts"] for mask in some])
        pixels, totals = runs.sums()
        is_good &= totals == [height * width for height, width in sizes]
        is_good[np.repeat(np.arange(len(some)), runs.lengths)[runs.runs < 0]] = False
        for index in np.flatnonzero(~is_good).tolist():
            height, width = sizes[index]
            raise fault(start + index, f"run lengths that do not add up to {height}×{width} pixels")
        masks += some
        areas.append(pixels)
    return masks, np.concatenate(areas)


def _pixel_counts(masks: Sequence[dict[str, Any]]) -> np.ndarray:
    """Pixels `[N]` int64 of compressed masks; `pycocotools.mask.area` fails for more than 255 with NumPy 2."""
    counts = [np.zeros(0, np.int64)]
    for start in range(0, len(masks), _STRINGS_AT_ONCE):
        runs, _ = runs_from_strings([mask["counts"] for mask in masks[start : start + _STRINGS_AT_ONCE]])
        counts.append(runs.sums()[0])
    return np.concatenate(counts)


def _is_compressed(segmentation: Any, size_hw: tuple[int, int]) -> bool:
    """Whether it is a compressed run-length encoding of this size."""
    return (
        type(segmentation) is dict
        and type(segmentation.get("counts")) in (str, bytes)
        and segmentation.get("size") == [*size_hw]
    )


def _compressed(segmentation: Any, size_hw: tuple[int, int], index: int, fault: _Fault) -> dict[str, Any]:
    """Compresses any other segmentation; its string is not checked yet."""
    height, width = size_hw
    if isinstance(segmentation, list):
        try:
            return compressed_rle(checked_segmentation(segmentation, height, width), height, width)
        except AnnotationError as error:
            raise fault(index, str(error)) from error
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise fault(index, f"segmentation of type {type(segmentation).__name__}, neither polygons nor run lengths")
    if list(segmentation["size"]) != [height, width]:
        raise fault(index, f"a mask of size {segmentation['size']!r}, its image measures [{height}, {width}]")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        runs = finite_numbers(counts)
        if runs is None or not runs.size or runs.min() < 0 or runs.max() > height * width or (runs % 1).any():
            raise fault(index, "run lengths that are not numbers of pixels")
        counts = strings_from_runs(Runs(runs.astype(np.int64), np.array([runs.size])))[0]
    if not isinstance(counts, (str, bytes)):
        raise fault(index, f"run lengths of type {type(counts).__name__}")
    return {"size": [height, width], "counts": counts}


def _integer(entry: Mapping[str, Any], key: str, fault: Callable[[str, str], UserError]) -> int:
    value = entry.get(key)
    if type(value) is not int:
        raise fault(f"{key!r} is {_shortened(value)} in {_shortened(entry)}", "an integer")
    return value


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
