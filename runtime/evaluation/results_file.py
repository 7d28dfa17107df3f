"""Detections in COCO's results format: reading, checking, and writing for COCO's server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.errors import UserError
from maskrcnn.files import read_json, write_json
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth, checked_masks
from maskrcnn.runtime.predictions import read_parquet, read_predictions

_FORMAT = "a list of results in COCO's format (cocodataset.org/#format-results)"
FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # field of a result by kind
_REQUIRED = ("image_id", "category_id", "score")
_MAX_NAMED = 5  # unknown ids in a message

_Fault = Callable[..., UserError]


@dataclass(frozen=True, eq=False)
class Results:
    """Detections on the images of a ground truth, in the order of the file, without those of unknown categories."""

    kind: str  # "bbox", "segm" or "keypoints"
    measured_by: str  # the field that boxes and areas are taken from, see `checked_results`
    image: np.ndarray  # [D] int64, index in the ground truth's `image_ids`
    category: np.ndarray  # [D] int64, index in the ground truth's `category_ids`
    score: np.ndarray  # [D] float64
    given_boxes: np.ndarray | None  # [D, 4] float64 (x, y, width, height); None: the masks' boxes
    masks: list[dict[str, Any]]  # compressed run-length encodings of kind "segm"; empty if not needed
    pixels: np.ndarray  # [D] int64 of the masks; empty if not needed
    keypoints: np.ndarray  # [D, K, 3] float64 of kind "keypoints", K as in the ground truth; empty if not needed
    unknown_categories: dict[str, int]  # category id -> results that are not scored

    def __len__(self) -> int:
        return len(self.score)

    @cached_property
    def boxes(self) -> np.ndarray:
        """Boxes `[D, 4]` float64 (x, y, width, height)."""
        if self.given_boxes is not None:
            return self.given_boxes
        return np.asarray(mask_api.toBbox(self.masks), np.float64).reshape(-1, 4) if self.masks else np.zeros((0, 4))

    @property
    def area_px(self) -> np.ndarray:
        """Areas `[D]` float64 for COCO's size ranges: small, medium and large."""
        if self.given_boxes is None:
            return self.pixels.astype(np.float64)
        areas: np.ndarray = self.given_boxes[:, 2] * self.given_boxes[:, 3]
        return areas

    def remark(self) -> str:
        """Warnings about the scores, or an empty text."""
        remarks = []
        if self.unknown_categories:
            ids = ", ".join(list(self.unknown_categories)[:_MAX_NAMED])
            remarks.append(
                f"{sum(self.unknown_categories.values())} result(s) of categories that are not in the annotations "
                f"({ids}) are not scored"
            )
        if self.kind != "bbox" and self.measured_by == "bbox":
            remarks.append(
                f"the results have boxes in addition to {FIELDS[self.kind]}: as in pycocotools, box areas determine "
                "small, medium and large"
            )
        return "; ".join(remarks)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Reads the entries of a results file, or of a Parquet or JSON Lines file of `maskrcnn predict`, without checks.

    Raises:
        UserError: for a file that is missing or in none of these formats.
    """
    if path.suffix == ".parquet" or path.is_dir():
        return read_parquet(path)
    if path.suffix == ".jsonl":
        return [entry for record in read_predictions(path) for entry in record.get("detections", ())]
    content = read_json(path, "a results file in COCO's format")
    if not isinstance(content, list):
        fix = "pass the list itself; annotation files go to --annotations"
        raise UserError(f"{path}: {_typed(content)}", _FORMAT, fix)
    return content


def checked_results(
    truth: GroundTruth, entries: Sequence[dict[str, Any]], kind: str, source: str, *, measured_by: str | None = None
) -> Results:
    """Converts results to arrays.

    Args:
        truth: ground truth with the images and categories of the results.
        entries: results in COCO's format, in any order; may be empty.
        kind: "bbox", "segm" or "keypoints".
        source: file name, for error texts.
        measured_by: field to take boxes and areas from (default, as in pycocotools: the first of `bbox`,
            `segmentation` and `keypoints` that the first result has).

    Raises:
        UserError: for results of unknown images, with their number, or for the first result that is malformed or lacks
            a field of the kind.
    """

    def fault(index: int, what: str, expected: str = _FORMAT) -> UserError:
        return UserError(f"{source}: result {index}: {what}", expected, "correct the file, or pass another one")

    measured_by = _check_fields(entries, kind, measured_by, fault)
    images = _image_indices(truth, entries, source)
    categories = [truth.category_index(entry["category_id"]) for entry in entries]
    known = [index for index, category in enumerate(categories) if category is not None]
    kept = [entries[index] for index in known]
    image = np.array([images[index] for index in known], np.int64)

    def kept_fault(row: int, what: str) -> UserError:
        return fault(known[row], what)

    masks: list[dict[str, Any]] = []
    pixels, points, boxes = np.zeros(0, np.int64), np.zeros((0, 0, 3)), None
    score = _numbers(([entry["score"]] for entry in kept), 1, "score", kept_fault).reshape(-1)
    if "keypoints" in (kind, measured_by):
        count = len(truth.sigmas)
        lists = (entry.get("keypoints") for entry in kept)
        points = _numbers(lists, 3 * count, "keypoints", kept_fault).reshape(-1, count, 3)
    if kind == "segm" or measured_by == "segmentation":
        sizes_hw = [truth.sizes_hw[index] for index in image.tolist()]
        masks, pixels = checked_masks([entry.get("segmentation") for entry in kept], sizes_hw, kept_fault)
    if measured_by == "bbox":
        boxes = _numbers((entry.get("bbox") for entry in kept), 4, "bbox", kept_fault)
    elif measured_by == "keypoints":  # around all keypoints, visible or not
        low, high = points[:, :, :2].min(axis=1), points[:, :, :2].max(axis=1)
        boxes = np.concatenate([low, high - low], axis=1)
    return Results(
        kind=kind,
        measured_by=measured_by,
        image=image,
        category=np.array([category for category in categories if category is not None], np.int64),
        score=score,
        given_boxes=boxes,
        masks=masks,
        pixels=pixels,
        keypoints=points,
        unknown_categories=dict(
            Counter(repr(e["category_id"]) for e, c in zip(entries, categories, strict=True) if c is None)
        ),
    )


def _check_fields(entries: Sequence[Any], kind: str, measured_by: str | None, fault: _Fault) -> str:
    """Checks that results have the fields of the kind; returns the field that boxes and areas are taken from."""
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise fault(index, _typed(entry))
        missing = [name for name in (*_REQUIRED, FIELDS[kind]) if name not in entry]
        boxes_follow = kind == "bbox" and missing == ["bbox"] and ("segmentation" in entry or "keypoints" in entry)
        if missing and not boxes_follow:
            raise fault(index, f"without {', '.join(missing)}", f"{', '.join(_REQUIRED)} and {FIELDS[kind]}")
    if measured_by is None:
        fields = _fields_of(entries[0]) if entries else (FIELDS[kind],)
        measured_by = next(iter(fields), "bbox")
    if kind == "bbox" and measured_by != "bbox":
        for index, entry in enumerate(entries):
            if entry.get("bbox", []) != []:
                raise fault(index, "has a bbox, but the first result does not", "bbox in all results or in none")
    return measured_by


def write_server_results(path: Path, entries: Iterable[dict[str, Any]], kind: str) -> None:
    """Writes results of one kind for COCO's server: ids, score and the field of the kind."""
    fields = ("image_id", "category_id", FIELDS[kind], "score")
    write_json(path, [{name: entry[name] for name in fields} for entry in entries], indent=None)


def kinds_of(entries: Sequence[Any]) -> tuple[str, ...]:
    """The kinds that results can be scored as, from the first result; boxes if there are no results."""
    fields = _fields_of(entries[0]) if entries and isinstance(entries[0], dict) else ()
    return tuple(kind for kind, field in FIELDS.items() if field in fields) or ("bbox",)


def _fields_of(entry: dict[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in FIELDS.values() if entry.get(name, []) != [])


def _image_indices(truth: GroundTruth, entries: Sequence[dict[str, Any]], source: str) -> list[int | None]:
    indices = [truth.image_index(entry["image_id"]) for entry in entries]
    unknown = Counter(repr(entry["image_id"]) for entry, index in zip(entries, indices, strict=True) if index is None)
    if unknown:
        ids = ", ".join(list(unknown)[:_MAX_NAMED])
        raise UserError(
            f"{source}: {sum(unknown.values())} result(s) of {len(unknown)} unknown image(s): image_id {ids}",
            f"image ids of {truth.source}, which has {len(truth.images)} image(s)",
            "pass the annotations of the images in the results",
        )
    return indices


def _numbers(lists: Iterable[Any], count: int, name: str, fault: _Fault) -> np.ndarray:
    """Converts lists of `count` finite numbers each to float64 `[D, count]`."""
    values = list(lists)
    for row, value in enumerate(values):
        if not isinstance(value, (list, tuple)) or len(value) != count:
            raise fault(row, f"{name} is {_typed(value)}, not {count} numbers")
    array = None
    try:
        flat = np.array(list(chain.from_iterable(values)))
        array = flat.astype(np.float64) if flat.dtype.kind in "iuf" or not flat.size else None
    except (ValueError, OverflowError):  # lists among the numbers
        pass
    is_bad = np.ones(len(values), bool) if array is None else ~np.isfinite(array.reshape(-1, count)).all(axis=1)
    for row in np.flatnonzero(is_bad).tolist():
        is_number = [type(number) in (int, float) and np.isfinite(number) for number in values[row]]
        if not all(is_number):
            raise fault(row, f"{name} has {values[row][is_number.index(False)]!r} among its numbers")
    return np.array(values, np.float64).reshape(-1, count) if array is None else array.reshape(-1, count)


def _typed(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '…'}"
