"""Annotated objects as arrays.

Image ids, boxes, areas and crowd flags are read from the file unchanged, so that metrics equal COCO's.

`pycocotools.mask` converts polygons and masks to compressed run-length encodings, as its C code rasterises polygons
the way COCO does; everything else is NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.data.annotations import usable_id
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.segmentation import AnnotationError, checked_segmentation, compressed_rle, finite_numbers
from maskrcnn.errors import UserError
from maskrcnn.imaging.run_lengths import Runs, runs_from_strings, strings_from_runs
from maskrcnn.keypoints import sigmas_of
from maskrcnn.runtime.evaluation.protocol import SIGMAS

_STRINGS_AT_ONCE = 256  # strings have some hundred characters; their numbers fit into the CPU cache

_Fault = Callable[[int, str], UserError]
_Masks = tuple[list[dict[str, Any]], np.ndarray]  # compressed run-length encodings and areas `[N]` int64 in pixels


class GroundTruth:
    """The annotated objects of a dataset, as arrays.

    Args:
        dataset: images and annotations.
        sigmas: OKS sigmas (default: see `GroundTruth.sigmas`).
    """

    def __init__(self, dataset: CocoDataset, sigmas: Sequence[float] = ()) -> None:
        self.dataset, self.source, self._given_sigmas = dataset, str(dataset.annotation_path), tuple(sigmas)
        self.categories = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
        self.images = dataset.images.take(np.argsort(dataset.images.ids, kind="stable"))
        self.image_ids = self.images.ids
        self.category_ids = np.array(sorted(self.categories), np.int64)
        self._image_indices = {value: index for index, value in enumerate(self.image_ids.tolist())}
        self._category_indices = {value: index for index, value in enumerate(self.category_ids.tolist())}
        # [G] index in `image_ids`, and in `category_ids`, of each object; G objects in the order of the image ids.
        self.image = self.images.image_of_object
        self.category = self.images.objects("label").astype(np.int64) - 1

    @classmethod
    def read(cls, path: Path, folder: Path | None = None) -> GroundTruth:
        """Reads an annotation file.

        Args:
            path: JSON file in COCO's format.
            folder: folder of the images, if available.

        Raises:
            UserError: for a file that cannot be read or has another structure.
        """
        if folder is not None:
            return cls(CocoDataset.read(path, folder, require_images=False))
        return cls.of_content(None, str(path))

    @classmethod
    def of_content(cls, content: Any, source: str, sigmas: Sequence[float] = ()) -> GroundTruth:
        """Creates the ground truth from the parsed content of an annotation file, or reads `source` if it is None."""
        return cls(CocoDataset.from_content(content, source), sigmas)

    def __len__(self) -> int:
        return len(self.image)

    @property
    def category_names(self) -> tuple[str, ...]:
        """Category names in ascending order of the ids."""
        return tuple(self.categories[value] for value in self.category_ids.tolist())

    def image_index(self, image_id: Any) -> int | None:
        """The index of an image id in `image_ids`; None for an unknown one."""
        return _index(image_id, self.dataset.image_keys, self._image_indices)

    def category_index(self, category_id: Any) -> int | None:
        """The index of a category id in `category_ids`; None for an unknown one."""
        return _index(category_id, self.dataset.category_keys, self._category_indices)

    def path(self, image_id: int) -> Path:
        """The file of an image."""
        return self.images.path(self._image_indices[image_id])

    def file_name(self, image_id: int) -> str:
        """The file of an image, relative to the folder of the images."""
        path, folder = self.path(image_id), self.dataset.image_folder
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()

    @cached_property
    def sizes_hw(self) -> list[tuple[int, int]]:
        """Height and width of each image, in the order of `image_ids`."""
        return [(height, width) for height, width in self.images.sizes_hw.tolist()]

    @cached_property
    def areas_px(self) -> np.ndarray:
        """Areas `[G]` float64 from the file."""
        return self.images.objects("area")

    @cached_property
    def boxes(self) -> np.ndarray:
        """Boxes `[G, 4]` float64 (x, y, width, height) from the file."""
        return self.images.objects("bbox")

    @cached_property
    def sigmas(self) -> np.ndarray:
        """OKS sigmas `[K]` float64: as given, else of `maskrcnn.keypoints` by name, else COCO's for persons."""
        if self.dataset.keypoint_fault is not None:
            raise self.dataset.keypoint_fault
        names = self.dataset.keypoint_names
        if self._given_sigmas and names and len(names) != len(self._given_sigmas):
            found, expected = f"{len(names)} keypoints", f"the model's {len(self._given_sigmas)}"
            raise UserError(f"{self.source}: {found}", expected, "correct the file, or pass another one")
        return np.array(self._given_sigmas or sigmas_of(names) or SIGMAS)

    @cached_property
    def skeleton(self) -> list[tuple[int, int]]:
        """Lines between keypoints, counted from 1, for drawings."""
        return list(self.dataset.keypoint_skeleton)

    @cached_property
    def keypoints(self) -> np.ndarray:
        """Keypoints `[G, K, 3]` float64: x, y, visibility; zeros for objects without any."""
        sigmas = self.sigmas
        if not self.dataset.keypoint_names and len(self):
            found = f"{self.source}: no category with keypoints"
            raise UserError(found, "a category with keypoint names", "pass another annotation file")
        return self.images.keypoints(len(sigmas))

    @cached_property
    def masks(self) -> _Masks:
        """Compressed run-length encodings and areas `[G]` int64 in pixels; the box if an object has no mask."""
        masks = [compressed_rle(*each) for each in self.images.segmentations()]
        return masks, _pixel_counts(masks)

    @cached_property
    def is_crowd(self) -> np.ndarray:
        """Crowd flags `[G]` bool."""
        return self.images.objects("is_crowd")

    def is_ignored(self, kind: str) -> np.ndarray:
        """Objects `[G]` bool that are ignored in scoring.

        These are crowd regions; for keypoints, objects without labelled keypoints; for masks, objects without a mask.
        """
        ignored: np.ndarray = self.is_crowd
        if kind == "keypoints":
            ignored = ignored | self._is_unlabelled
        if kind == "segm":
            ignored = ignored | ~self.images.objects("has_mask")
        return ignored

    @cached_property
    def _is_unlabelled(self) -> np.ndarray:
        labelled = np.count_nonzero(self.keypoints[:, :, 2] > 0, axis=1)
        unlabelled: np.ndarray = self.images.stated_keypoints(labelled) == 0
        return unlabelled


def _index(value: Any, keys: Mapping[str, int], indices: Mapping[int, int]) -> int | None:
    key = usable_id(value)
    number = keys.get(key) if isinstance(key, str) else key
    return None if number is None else indices.get(number)


def checked_masks(segmentations: Sequence[Any], sizes_hw: Sequence[tuple[int, int]], fault: _Fault) -> _Masks:
    """Converts COCO's segmentations to compressed run-length encodings.

    `pycocotools.mask` does not check its input and reads out of bounds if the runs exceed the image. Run lengths are
    therefore checked first, many strings at a time: results files contain hundreds of thousands.

    Args:
        segmentations: polygons, or run lengths as a list or as COCO's string; a mask may be empty.
        sizes_hw: (height, width) of the image of each segmentation.
        fault: returns the error for the index of a segmentation and a description of what is wrong.

    Raises:
        UserError: from `fault`, for a malformed segmentation or one with another size than its image.
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
    """Areas `[N]` int64 in pixels; `pycocotools.mask.area` fails for more than 255 masks with NumPy 2."""
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
    """Compresses any other segmentation, without checking its string."""
    height, width = size_hw
    if isinstance(segmentation, list):
        try:
            return compressed_rle(checked_segmentation(segmentation, height, width), height, width)
        except AnnotationError as error:
            raise fault(index, str(error)) from error
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise fault(index, f"segmentation of type {type(segmentation).__name__}, neither polygons nor run lengths")
    if list(segmentation["size"]) != [height, width]:
        raise fault(index, f"a mask of size {segmentation['size']!r} in an image of size [{height}, {width}]")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        runs = finite_numbers(counts)
        if runs is None or not runs.size or runs.min() < 0 or runs.max() > height * width or (runs % 1).any():
            raise fault(index, f"run lengths that are not integers from 0 to {height * width}")
        counts = strings_from_runs(Runs(runs.astype(np.int64), np.array([runs.size])))[0]
    if not isinstance(counts, (str, bytes)):
        raise fault(index, f"run lengths of type {type(counts).__name__}")
    return {"size": [height, width], "counts": counts}
