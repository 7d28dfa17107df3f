"""Annotated objects in COCO's format, as arrays for our scoring and as pycocotools takes them.

Image ids, boxes, areas and flags are the file's, so that the figures are the official ones. What the file has of an
unknown image or category counts for nothing, in pycocotools as here.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.data.annotations import AnnotationError, checked_segmentation, compressed_rle, finite_numbers
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.imaging.run_lengths import Runs, runs_from_strings, strings_from_runs
from maskrcnn.keypoints import sigmas_of
from maskrcnn.runtime.evaluation.protocol import SIGMAS

if TYPE_CHECKING:
    from pycocotools.coco import COCO


# COCO's segmentations of many objects as compressed run lengths, checked before pycocotools' C code sees them.
#
# That code trusts its input: it reads beyond a mask whose runs add up to more than the image. Strings, which results
# files hold by the hundred thousand, are checked many at a time.

_AT_ONCE = 256  # strings of some hundred characters: their numbers stay in the processor's cache

_Fault = Callable[[int, str], UserError]


def compressed(
    segmentations: Sequence[Any], sizes_hw: Sequence[tuple[int, int]], fault: _Fault
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Run lengths as pycocotools takes them, and pixels `[N]` int64 of each mask.

    Args:
        segmentations: polygons, or run lengths as a list or as COCO's string; a mask may be empty.
        sizes_hw: (height, width) of each one's image.
        fault: makes the error for the segmentation of an index, of what is wrong with it.

    Raises:
        UserError: made by `fault`, for what is malformed or of another size than the image.
    """
    found: list[dict[str, Any]] = []
    areas = []
    for start in range(0, len(segmentations), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        sizes = sizes_hw[part]
        masks = [
            value if _is_compressed(value, size) else _as_strings(value, size, index, fault)
            for index, (value, size) in enumerate(zip(segmentations[part], sizes, strict=True), start)
        ]
        runs, is_good = runs_from_strings([mask["counts"] for mask in masks])
        pixels, totals = runs.sums()
        is_good &= totals == [height * width for height, width in sizes]
        is_good[np.repeat(np.arange(len(masks)), runs.lengths)[runs.runs < 0]] = False
        for index in np.flatnonzero(~is_good).tolist():
            height, width = sizes[index]
            raise fault(start + index, f"run lengths that do not add up to {height}×{width} pixels")
        found += masks
        areas.append(pixels)
    return found, np.concatenate(areas) if areas else np.zeros(0, np.int64)


def _is_compressed(segmentation: Any, size_hw: tuple[int, int]) -> bool:
    """Whether it is run lengths as COCO's string, of the right size."""
    return (
        type(segmentation) is dict
        and type(segmentation.get("counts")) in (str, bytes)
        and segmentation.get("size") == [*size_hw]
    )


def _as_strings(segmentation: Any, size_hw: tuple[int, int], index: int, fault: _Fault) -> dict[str, Any]:
    """Compressed run lengths, whose string is yet to be checked, of anything else."""
    height, width = size_hw
    if isinstance(segmentation, list) and segmentation and all(isinstance(part, np.ndarray) for part in segmentation):
        return compressed_rle(segmentation, height, width)  # of a dataset, which has checked it
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


def boxes_of(masks: Sequence[dict[str, Any]]) -> np.ndarray:
    """The box (x, y, width, height) `[N, 4]` float64 around each mask."""
    return np.asarray(mask_api.toBbox(list(masks)), np.float64).reshape(-1, 4) if masks else np.zeros((0, 4))


_LISTS = ("images", "annotations", "categories")
_FORMAT = "COCO's annotation format (cocodataset.org/#format-data)"


class GroundTruth:
    """What there is to be found.

    Args:
        content: `images`, `annotations` and `categories` of an annotation file.
        source: its name, for messages.
        sigmas: of the keypoints, see `GroundTruth.sigmas`; by default what the categories' names of them give.

    Raises:
        UserError: for a file of another structure, naming the entry.
    """

    def __init__(self, content: dict[str, Any], source: str, sigmas: Sequence[float] = ()) -> None:
        self.source, self._given_sigmas = source, tuple(sigmas)
        self._content = content
        self.images = {_integer(entry, "id", self._fault): entry for entry in self._list("images")}
        self.categories = {
            _integer(entry, "id", self._fault): str(entry.get("name", entry["id"]))
            for entry in self._list("categories")
        }
        for name, known in (("images", self.images), ("categories", self.categories)):
            if len(known) != len(content[name]):
                raise self._fault(f"an id occurs twice in {name!r}", "unique ids")
        self.image_ids = np.array(sorted(self.images), np.int64)
        self.category_ids = np.array(sorted(self.categories), np.int64)
        self._image_places = {value: place for place, value in enumerate(self.image_ids.tolist())}
        self._category_places = {value: place for place, value in enumerate(self.category_ids.tolist())}
        self.entries, self.image, self.category = self._sorted_entries()

    @classmethod
    def read(cls, path: Path) -> GroundTruth:
        """The objects of an annotation file.

        Raises:
            UserError: for a file that cannot be read or is of another structure.
        """
        return cls(read_json(path, "an annotation file"), str(path))

    @classmethod
    def of_dataset(cls, dataset: CocoDataset, sigmas: Sequence[float] = ()) -> GroundTruth:
        """The usable objects of a dataset; a model has the `sigmas` that its keypoints are to be measured with."""
        return cls(dataset.ground_truth().dataset, str(dataset.annotation_path), sigmas)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def category_names(self) -> tuple[str, ...]:
        """In ascending order of the ids."""
        return tuple(self.categories[value] for value in self.category_ids.tolist())

    def image_place(self, image_id: Any) -> int | None:
        """The index of an image id in `image_ids`; None for an unknown one."""
        return self._image_places.get(image_id) if _is_number(image_id) else None

    def category_place(self, category_id: Any) -> int | None:
        """The index of a category id in `category_ids`; None for an unknown one."""
        return self._category_places.get(category_id) if _is_number(category_id) else None

    @cached_property
    def sizes_hw(self) -> list[tuple[int, int]]:
        """Height and width of each image, in the order of `image_ids`."""
        entries = [self.images[value] for value in self.image_ids.tolist()]
        return [tuple(_integer(entry, key, self._fault) for key in ("height", "width")) for entry in entries]

    @cached_property
    def areas_px(self) -> np.ndarray:
        """`[G]` float64, as the file has them."""
        return self._numbers("area", None).reshape(-1)

    @cached_property
    def boxes(self) -> np.ndarray:
        """`[G, 4]` float64 (x, y, width, height)."""
        return self._numbers("bbox", 4)

    @cached_property
    def sigmas(self) -> np.ndarray:
        """`[K]` float64, how far annotators are off at each keypoint, relative to the object's size.

        Those given; else, as `maskrcnn.keypoints` has it, by the names that the categories give their keypoints; else
        COCO's of a person, which pycocotools knows alone.
        """
        named = {tuple(map(str, entry["keypoints"])) for entry in self._naming_keypoints()}
        if len(named) > 1:
            raise self._fault("categories with different keypoints", "the same names in all that have any")
        names = next(iter(named), ())
        if self._given_sigmas and names and len(names) != len(self._given_sigmas):
            raise self._fault(f"{len(names)} keypoints", f"the model's {len(self._given_sigmas)}")
        return np.array(self._given_sigmas or sigmas_of(names) or SIGMAS)

    @cached_property
    def skeleton(self) -> list[tuple[int, int]]:
        """Lines between keypoints for pictures, counted from 1; what is malformed is left out."""
        lines = [line for entry in self._naming_keypoints() for line in entry.get("skeleton") or ()]
        known = range(1, len(self.sigmas) + 1)
        pairs = [tuple(line) for line in lines if isinstance(line, (list, tuple)) and len(line) == 2]
        return list(dict.fromkeys(pair for pair in pairs if all(number in known for number in pair)))

    @cached_property
    def keypoints(self) -> np.ndarray:
        """`[G, K, 3]` float64: x, y, visibility; zeros where an object has none, though others have."""
        count = len(self.sigmas)
        nothing = [0] * (3 * count) if any("keypoints" in entry for entry in self.entries) else None
        return self._numbers("keypoints", 3 * count, nothing).reshape(-1, count, 3)

    @cached_property
    def masks(self) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Compressed run lengths, and their pixels `[G]`."""
        segmentations = [entry.get("segmentation") for entry in self.entries]
        sizes = [self.sizes_hw[image] for image in self.image.tolist()]
        return compressed(segmentations, sizes, lambda index, what: self._fault(f"{self._name(index)}: {what}"))

    @cached_property
    def is_crowd(self) -> np.ndarray:
        """`[G]` bool; what does not say is none."""
        flags = [entry.get("iscrowd", 0) for entry in self.entries]
        for place, flag in enumerate(flags):
            if flag not in (0, 1):
                raise self._fault(f"{self._name(place)}: iscrowd is {_shown(flag)}", "0 or 1")
        return np.array(flags, bool)

    def is_ignored(self, kind: str) -> np.ndarray:
        """`[G]` bool: regions that need not be found, and what is found in them is not wrong."""
        if kind != "keypoints":
            return self.is_crowd
        annotated = np.count_nonzero(self.keypoints[:, :, 2] > 0, axis=1).tolist()
        numbers = [entry.get("num_keypoints", count) for entry, count in zip(self.entries, annotated, strict=True)]
        return self.is_crowd | np.array([number == 0 for number in numbers], bool)

    def coco(self, kind: str) -> COCO:
        """The objects as pycocotools' evaluation takes them; it changes them, so they are copies."""
        from pycocotools.coco import COCO

        masks = self.masks[0] if kind == "segm" else None
        annotations = []
        for place, entry in enumerate(self.entries):
            # pycocotools takes an object of id 0 for none, and mixes those of one id up.
            copy = entry | {"id": place + 1, "iscrowd": int(self.is_crowd[place])}
            if masks is not None:
                copy["segmentation"] = masks[place]
            if kind == "keypoints":
                copy.setdefault("keypoints", [0] * (3 * len(self.sigmas)))
                copy["num_keypoints"] = int(not self.is_ignored(kind)[place] or copy["iscrowd"])
            annotations.append(copy)
        coco = COCO()
        coco.dataset = {**{name: self._content[name] for name in _LISTS}, "annotations": annotations}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def _sorted_entries(self) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
        """The annotations of known images and categories with the places of both, image by image."""
        found = []
        for entry in self._list("annotations"):
            image, category = self.image_place(entry.get("image_id")), self.category_place(entry.get("category_id"))
            if image is not None and category is not None:
                found.append((image, category, entry))
        found.sort(key=lambda values: values[0])  # a stable order
        image, category = (np.array([values[k] for values in found], np.int64) for k in (0, 1))
        return [values[2] for values in found], image, category

    def _list(self, name: str) -> list[dict[str, Any]]:
        entries = self._content.get(name) if isinstance(self._content, dict) else None
        if not isinstance(entries, list):
            raise self._fault(f"no list {name!r}")
        if not all(isinstance(entry, dict) for entry in entries):
            raise self._fault(f"an entry of {name!r} is not an object")
        return entries

    def _naming_keypoints(self) -> list[dict[str, Any]]:
        """The categories that say which keypoints their objects have."""
        return [entry for entry in self._list("categories") if isinstance(entry.get("keypoints"), list)]

    def _numbers(self, key: str, count: int | None, default: list[int] | None = None) -> np.ndarray:
        """A field of all objects `[G, count]`, checked; those without it have the default, if there is one."""
        values = np.empty((len(self), count or 1))
        for place, entry in enumerate(self.entries):
            value = entry.get(key, default)
            numbers = finite_numbers(value if count else [value])
            if numbers is None or numbers.size != (count or 1):
                wanted = f"{count} numbers" if count else "a number"
                raise self._fault(f"{self._name(place)}: {key} is {_shown(value)}", wanted)
            values[place] = numbers
        return values

    def _name(self, place: int) -> str:
        return f"annotation {self.entries[place].get('id', f'number {place}')}"

    def _fault(self, what: str, expected: str = _FORMAT) -> UserError:
        return UserError(f"{self.source}: {what}", expected, "correct the file, or name another one")


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: where it is missing or no JSON; `what` says what it was to be.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", what, "check the path") from error
    except (ValueError, RecursionError) as error:
        expected = f"{what} in COCO's format"
        raise UserError(f"{path}: not JSON ({error})", expected, "name a complete JSON file") from error


def _integer(entry: dict[str, Any], key: str, fault: Any) -> int:
    value = entry.get(key)
    if type(value) is not int:
        raise fault(f"{key!r} is {_shown(value)} in {_shown(entry)}", "an integer")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
