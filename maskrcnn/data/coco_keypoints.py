"""Keypoints in annotation files of COCO's format: a category names them, an annotation says where they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.data.segmentation import AnnotationError, finite_numbers
from maskrcnn.errors import UserError
from maskrcnn.keypoints import check_skeleton

_VISIBILITIES = (0, 1, 2)  # not labelled; labelled and hidden; labelled and visible


@dataclass(frozen=True)
class CategoryKeypoints:
    """What the categories of a file say of keypoints."""

    names: tuple[str, ...] = ()  # the same in all categories that have any; (): there are none that can be used
    skeleton: tuple[tuple[int, int], ...] = ()  # lines between them, which count from 1
    category_ids: frozenset[int] = frozenset()  # of the categories that have them
    fault: UserError | None = None  # why there are none that can be used, where categories have some


def keypoints_of(path: Path, entries: list[dict[str, Any]]) -> CategoryKeypoints:
    """The keypoints of a file's categories.

    A fault is no error here: boxes and masks of the file can be used all the same.

    Args:
        path: of the file, for messages.
        entries: its categories, with valid ids.
    """
    having = [entry for entry in entries if entry.get("keypoints")]
    if not having:
        return CategoryKeypoints()
    try:
        names = _names(path, having[0])
        for entry in having[1:]:
            if _names(path, entry) != names:
                raise UserError(
                    f"{path}: categories {having[0]['id']} and {entry['id']} with different keypoints",
                    "the same keypoints in all categories that have any, as a model finds one set of them",
                    "keep the keypoints of one category, or write a file for each",
                )
        skeleton = _skeleton(path, having[0], len(names))
    except UserError as fault:
        return CategoryKeypoints(fault=fault)
    return CategoryKeypoints(names, skeleton, frozenset(entry["id"] for entry in having))


def _names(path: Path, entry: dict[str, Any]) -> tuple[str, ...]:
    names = entry["keypoints"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise UserError(
            f"{path}: 'keypoints' of category {entry['id']} is {str(names)[:80]}",
            "a list of different names",
            "correct the file (format: cocodataset.org/#format-data)",
        )
    return tuple(names)


def _skeleton(path: Path, entry: dict[str, Any], count: int) -> tuple[tuple[int, int], ...]:
    where, lines = f"{path}: 'skeleton' of category {entry['id']}", entry.get("skeleton") or []
    shaped = isinstance(lines, list) and all(isinstance(line, list) for line in lines)
    if not shaped or not all(type(number) is int for line in lines for number in line):
        raise UserError(
            f"{where} is {str(lines)[:80]}", "a list of pairs of numbers", "correct the file, or leave it out"
        )
    check_skeleton(where, tuple(tuple(line) for line in lines), count)
    return tuple(tuple(line) for line in lines)


def checked_keypoints(value: Any, count: int) -> np.ndarray | None:
    """The keypoints of an annotation as float64 `[K, 3]`: x, y in pixels and visibility; zeros where unlabelled.

    Coordinates are as the file has them, distances from the image's corner; nothing is added for the middle of a
    pixel, as torchvision adds nothing.

    Args:
        value: `keypoints` of the annotation; nothing or an empty list is an object without.
        count: K, of its category.

    Returns:
        None for an object of which nothing is labelled.

    Raises:
        AnnotationError: for another number of numbers, what is no finite number, and an unknown visibility.
    """
    if not value:
        return None
    numbers = finite_numbers(value)
    if numbers is None:
        raise AnnotationError("malformed keypoints", "not a list of finite numbers")
    if numbers.size != 3 * count:
        raise AnnotationError("malformed keypoints", f"{numbers.size} numbers instead of 3 for each of {count}")
    keypoints = numbers.reshape(count, 3)
    unknown = keypoints[~np.isin(keypoints[:, 2], _VISIBILITIES), 2]
    if unknown.size:
        raise AnnotationError("malformed keypoints", f"visibility {unknown[0]:g} instead of 0, 1 or 2")
    labelled = keypoints[:, 2] > 0
    return keypoints * labelled[:, None] if labelled.any() else None
