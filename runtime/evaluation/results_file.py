"""Detections in COCO's results format: read from any file, checked, and written as COCO's server takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.files import write_json
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth, boxes_of, compressed, read_json

_FORMAT = "a list of results as COCO's server takes them (cocodataset.org/#format-results)"
FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # of a result, by the kind
_SCORED = ("image_id", "category_id", "score")
_MOST_NAMED = 5  # of unknown ids in a message


@dataclass(frozen=True, eq=False)
class Results:
    """Detections of the images of a ground truth, in the order of the file; see `checked_results`."""

    kind: str  # what they can be scored as: "bbox", "segm" or "keypoints"
    entries: Sequence[dict[str, Any]]  # of all categories
    place: np.ndarray  # [D] int64, index in `entries`, of those whose category is known
    image: np.ndarray  # [D] int64, index in the ground truth's `image_ids`
    category: np.ndarray  # [D] int64, likewise
    score: np.ndarray  # [D] float64
    area_px: np.ndarray  # [D] float64, what decides on small, medium and large; see `measured_by`
    own_boxes: np.ndarray | None  # [D, 4] float64 (x, y, width, height); None where masks give them
    masks: list[dict[str, Any]] | None  # compressed run lengths, of "segm"
    pixels: np.ndarray | None  # [D] int64 of the masks
    keypoints: np.ndarray | None  # [D, K, 3] float64, of "keypoints"; K as the ground truth has them
    measured_by: str  # the field that gives boxes and areas: that which pycocotools takes
    unknown_categories: dict[str, int]  # category id -> results that count for nothing

    def __len__(self) -> int:
        return len(self.place)

    @cached_property
    def boxes(self) -> np.ndarray:
        """`[D, 4]` float64 (x, y, width, height)."""
        return boxes_of(self.masks) if self.own_boxes is None else self.own_boxes

    def coco_entries(self) -> list[dict[str, Any]]:
        """The results for pycocotools' `loadRes`, which changes them: copies of the fields that count."""
        copies = []
        for row, place in enumerate(self.place.tolist()):
            entry = self.entries[place]
            copy = {name: entry[name] for name in _SCORED}
            if self.measured_by == "bbox":
                copy["bbox"] = entry["bbox"]
            if self.masks is not None:
                copy["segmentation"] = dict(self.masks[row])
            if self.keypoints is not None or self.measured_by == "keypoints":
                copy["keypoints"] = entry["keypoints"]
            copies.append(copy)
        return copies

    def remark(self) -> str:
        """What a reader of the scores should know, or nothing."""
        remarks = []
        if self.unknown_categories:
            ids = ", ".join(list(self.unknown_categories)[:_MOST_NAMED])
            remarks.append(
                f"{sum(self.unknown_categories.values())} result(s) of categories that the annotations do not have "
                f"({ids}) are not scored"
            )
        if self.kind != "bbox" and self.measured_by == "bbox":
            remarks.append(
                f"the results have boxes beside {FIELDS[self.kind]}: as in pycocotools, boxes decide on "
                "small, medium and large"
            )
        return "; ".join(remarks)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The entries of a results file, unchecked.

    Raises:
        UserError: for a file that is missing or no JSON list.
    """
    content = read_json(path, "a results file")
    if not isinstance(content, list):
        came = f"{path}: {_named(content)}"
        raise UserError(came, _FORMAT, "pass the list itself; annotation files go to --annotations")
    return content


def checked_results(truth: GroundTruth, entries: Sequence[dict[str, Any]], kind: str, source: str) -> Results:
    """The results as arrays.

    Which field gives boxes and areas is decided by the first result, as pycocotools decides: `bbox`, else
    `segmentation`, else `keypoints`.

    Args:
        truth: the images and categories that results may be of.
        entries: in COCO's results format, in any order; none are fine.
        kind: "bbox", "segm" or "keypoints".
        source: the name of the file, for messages.

    Raises:
        UserError: for a result of an unknown image, without the fields of the kind, or malformed; all unknown
            images are counted, otherwise the first such result is named.
    """

    def fault(place: int, what: str, expected: str = _FORMAT) -> UserError:
        return UserError(f"{source}: result {place}: {what}", expected, "correct the file, or name another one")

    measured_by = _check_fields(entries, kind, fault)
    image = _image_places(truth, entries, source)
    categories = [truth.category_place(entry["category_id"]) for entry in entries]
    known = np.array([place for place, value in enumerate(categories) if value is not None], np.int64)
    unknown = Counter(repr(e["category_id"]) for e, c in zip(entries, categories, strict=True) if c is None)
    kept = [entries[place] for place in known.tolist()]
    has_masks = kind == "segm" or measured_by == "segmentation"
    return Results(
        kind=kind,
        entries=entries,
        place=known,
        image=image[known],
        category=np.array([value for value in categories if value is not None], np.int64),
        measured_by=measured_by,
        unknown_categories=dict(unknown),
        **_geometry(
            kept,
            [truth.sizes_hw[place] for place in image[known].tolist()] if has_masks else [],
            kind,
            measured_by,
            len(truth.sigmas),
            lambda row, what: fault(int(known[row]), what),
        ),
    )


def _check_fields(entries: Sequence[Any], kind: str, fault: Any) -> str:
    """Looks for the fields that results of the kind need, and returns that which gives boxes and areas."""
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise fault(place, _named(entry))
        missing = [name for name in (*_SCORED, FIELDS[kind]) if name not in entry]
        if missing and not _has_substitute(kind, missing, entry):
            raise fault(place, f"without {', '.join(missing)}", f"{', '.join(_SCORED)} and {FIELDS[kind]}")
    measured_by = _measure(entries[0]) if entries else FIELDS[kind]
    if kind == "bbox" and measured_by != "bbox":
        for place, entry in enumerate(entries):
            if entry.get("bbox", []) != []:
                raise fault(place, "has a bbox, which the first result has not", "bbox in all results or in none")
    return measured_by


def _geometry(
    entries: Sequence[dict[str, Any]],
    sizes_hw: Sequence[tuple[int, int]],
    kind: str,
    measured_by: str,
    keypoints: int,
    fault: Any,
) -> dict[str, Any]:
    """The fields of `Results` that hold scores, boxes, masks and so many keypoints."""
    points = masks = pixels = boxes = None
    score = _numbers(([entry["score"]] for entry in entries), 1, "score", fault).reshape(-1)
    if "keypoints" in (kind, measured_by):
        lists = (entry.get("keypoints") for entry in entries)
        points = _numbers(lists, 3 * keypoints, "keypoints", fault).reshape(-1, keypoints, 3)
    if kind == "segm" or measured_by == "segmentation":
        masks, pixels = compressed([entry.get("segmentation") for entry in entries], sizes_hw, fault)
    if measured_by == "bbox":
        boxes = _numbers((entry.get("bbox") for entry in entries), 4, "bbox", fault)
    elif measured_by == "keypoints":
        boxes = _boxes_around(points)
    area = pixels.astype(np.float64) if boxes is None else boxes[:, 2] * boxes[:, 3]
    return {
        "score": score,
        "area_px": area,
        "own_boxes": boxes,
        "masks": masks,
        "pixels": pixels,
        "keypoints": points,
    }


def write_server_results(path: Path, entries: Iterable[dict[str, Any]], kind: str) -> None:
    """Writes results of one kind as COCO's server takes them: ids, score and the one field of the kind."""
    fields = ("image_id", "category_id", FIELDS[kind], "score")
    write_json(path, [{name: entry[name] for name in fields} for entry in entries], indent=None)


def kinds_of(entries: Sequence[Any]) -> tuple[str, ...]:
    """What results can be scored as, by the first of them; boxes where there is none."""
    first = entries[0] if entries and isinstance(entries[0], dict) else {}
    return tuple(kind for kind, field in FIELDS.items() if first.get(field, []) != []) or ("bbox",)


def of_kind(entries: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """A detector's results as they are written for the server, so that masks are measured by their own area."""
    fields = (*_SCORED, FIELDS[kind])
    return [{name: entry[name] for name in fields} for entry in entries]


def _has_substitute(kind: str, missing: list[str], entry: dict[str, Any]) -> bool:
    """Boxes can be had from masks and keypoints."""
    return kind == "bbox" and missing == ["bbox"] and ("segmentation" in entry or "keypoints" in entry)


def _measure(first: dict[str, Any]) -> str:
    names = [name for name in ("bbox", "segmentation", "keypoints") if first.get(name, []) != []]
    return names[0] if names else "bbox"


def _image_places(truth: GroundTruth, entries: Sequence[dict[str, Any]], source: str) -> np.ndarray:
    places = [truth.image_place(entry["image_id"]) for entry in entries]
    unknown = Counter(repr(entry["image_id"]) for entry, place in zip(entries, places, strict=True) if place is None)
    if unknown:
        ids = ", ".join(list(unknown)[:_MOST_NAMED])
        raise UserError(
            f"{source}: {sum(unknown.values())} result(s) of {len(unknown)} image(s) that are unknown: image_id {ids}",
            f"image ids of {truth.source}, which has {len(truth.images)} image(s)",
            "name the annotations of the images that the results are of",
        )
    return np.array(places, np.int64)


def _numbers(lists: Iterable[Any], count: int, name: str, fault: Any) -> np.ndarray:
    """Lists of so many finite numbers each as float64 `[D, count]`."""
    values = list(lists)
    for row, value in enumerate(values):
        if not isinstance(value, (list, tuple)) or len(value) != count:
            raise fault(row, f"{name} is {_named(value)}, not {count} numbers")
    try:
        array = np.array(list(chain.from_iterable(values)))
        array = array.astype(np.float64) if array.dtype.kind in "iuf" or not array.size else None
    except (ValueError, OverflowError):  # lists among the numbers
        array = None
    is_bad = np.ones(len(values), bool) if array is None else ~np.isfinite(array.reshape(-1, count)).all(axis=1)
    for row in np.flatnonzero(is_bad).tolist():
        fine = [type(number) in (int, float) and np.isfinite(number) for number in values[row]]
        if not all(fine):
            raise fault(row, f"{name} has {values[row][fine.index(False)]!r} among its numbers")
    return np.array(values, np.float64).reshape(-1, count) if array is None else array.reshape(-1, count)


def _boxes_around(keypoints: np.ndarray) -> np.ndarray:
    """The box (x, y, width, height) `[D, 4]` around all keypoints, visible or not."""
    low, high = keypoints[:, :, :2].min(axis=1), keypoints[:, :, :2].max(axis=1)
    return np.concatenate([low, high - low], axis=1)


def _named(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '…'}"
