"""Detections as pre-labels for annotation tools: COCO datasets, LabelMe files, YOLO's text files.

Masks become outlines along the edges between pixels, simplified to a tolerance. Polygons cannot have holes in these
formats, nor several parts in YOLO's: a hole or another part is connected by a line there and back, which has no area
and does not change the filled polygon.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.errors import UserError, missing_library
from maskrcnn.files import atomic_path, make_folder, write_json
from maskrcnn.imaging.run_lengths import runs_from_strings, window_of

_MIN_AREA_PX = 1.0  # minimum area of a part

Records = Callable[
    [], Iterator[dict[str, Any]]
]  # iterates over the images in order, as stored by `runtime.predictions`; may be called repeatedly


def outlines(segmentation: dict[str, Any], tolerance_px: float) -> list[np.ndarray]:
    """The outlines of a mask's parts, with holes connected to them.

    Args:
        segmentation: run lengths in COCO's format, `{"size": [H, W], "counts": str}`.
        tolerance_px: maximum distance of the simplified outline from the mask's; 0: not simplified.

    Returns:
        float64 `[P, 2]` (x, y) in pixels of the image for each part, largest first, not closed. Parts smaller than a
        pixel are left out, except a single one.

    Raises:
        UserError: if contourpy or shapely is not installed.
    """
    try:
        import shapely
        from contourpy import FillType, contour_generator
    except ImportError as error:
        install = "pip install contourpy shapely"
        raise missing_library(error.name or "shapely", "trace the outlines of masks", install) from error
    window, top, left = mask_window(segmentation)
    if not window.any():
        return []
    generator = contour_generator(z=np.pad(window, 1).astype(np.float32), fill_type=FillType.OuterOffset)
    parts: list[tuple[float, np.ndarray]] = []
    height, width = segmentation["size"]
    for points, offsets in zip(*generator.filled(0.5, np.inf), strict=True):
        # The value of pixel j is at x = j + 0.5; one row and column were added.
        placed = np.clip(points + np.array((left - 0.5, top - 0.5)), 0, (width, height))
        rings = [placed[start:stop] for start, stop in pairwise(offsets)]
        polygon = shapely.Polygon(rings[0], rings[1:])
        if tolerance_px:
            polygon = shapely.simplify(polygon, tolerance_px)
        for each in shapely.get_parts(polygon):
            if each.area > 0:
                holes = [np.asarray(ring.coords)[:-1] for ring in each.interiors]
                parts.append((each.area, joined([np.asarray(each.exterior.coords)[:-1], *holes])))
    parts.sort(key=lambda part: -part[0])
    return [ring for area, ring in parts if area >= _MIN_AREA_PX] or [ring for _, ring in parts[:1]]


def mask_window(segmentation: dict[str, Any]) -> tuple[np.ndarray, int, int]:
    """The part of a mask that contains its object, bool `[h, w]`, and the row and column of its first pixel.

    Args:
        segmentation: run lengths in COCO's format, of an image of any size.
    """
    spans = runs_from_strings([segmentation["counts"]])[0].spans()[0]
    return window_of(spans, int(segmentation["size"][0]))


def joined(rings: Sequence[np.ndarray]) -> np.ndarray:
    """Joins rings into one, connected by lines between their nearest points.

    Args:
        rings: float64 `[P, 2]` each, not closed.
    """
    whole, rest = rings[0], list(rings[1:])
    while rest:
        distances = [((whole[:, None] - ring[None]) ** 2).sum(2) for ring in rest]
        nearest = int(np.argmin([each.min() for each in distances]))
        at, to = np.unravel_index(int(distances[nearest].argmin()), distances[nearest].shape)
        ring = rest.pop(nearest)
        whole = np.concatenate((whole[: at + 1], ring[to:], ring[: to + 1], whole[at:]))
    return whole


def write_coco(
    records: Records, path: Path, categories: Sequence[dict[str, Any]], threshold: float, tolerance_px: float
) -> None:
    """Writes an annotation file in COCO's format: polygons, which CVAT, Label Studio and FiftyOne can edit.

    Args:
        records: records of the images.
        path: file to write.
        categories: entries of `categories`.
        threshold: minimum score.
        tolerance_px: see `outlines`.
    """
    base = _base_of(records)
    with atomic_path(path) as draft, open(draft, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f'{{"info": {{"description": "detections of maskrcnn"}},\n"categories": {json.dumps(categories)},\n')
        file.write('"images": [')
        separator = "\n"
        for record in _usable(records):
            keys = {"id": record["image_id"], "file_name": _below(record["file"], base)}
            entry = {**keys, "height": record["height"], "width": record["width"]}
            file.write(separator + json.dumps(entry, ensure_ascii=False))
            separator = ",\n"
        file.write('\n],\n"annotations": [')
        separator, number = "\n", 0
        for record in _usable(records):
            for each in record["detections"]:
                if each["score"] < threshold:
                    continue
                number += 1
                keys = {"id": number, "image_id": record["image_id"], "category_id": each["category_id"], "iscrowd": 0}
                entry = {**keys, "bbox": each["bbox"], "score": each["score"]}
                entry["area"] = each["bbox"][2] * each["bbox"][3]
                if "segmentation" in each:
                    rings = outlines(each["segmentation"], tolerance_px)
                    entry["segmentation"] = [ring.round(2).ravel().tolist() for ring in rings]
                    entry["area"] = int(runs_from_strings([each["segmentation"]["counts"]])[0].sums()[0][0])
                if "keypoints" in each:
                    points = np.array(each["keypoints"]).reshape(-1, 3)
                    points[:, 2] = 2
                    entry |= {"keypoints": points.round(2).ravel().tolist(), "num_keypoints": len(points)}
                file.write(separator + json.dumps(entry, ensure_ascii=False))
                separator = ",\n"
        file.write("\n]}\n")


def write_labelme(records: Records, folder: Path, threshold: float, tolerance_px: float, *, keep: bool = False) -> None:
    """Writes a LabelMe file for each image; the parts of an object share a group id.

    Args:
        records: records of the images.
        folder: folder to write to; files have the images' paths relative to their common parent folder.
        threshold: minimum score.
        tolerance_px: see `outlines`.
        keep: keep existing files, which may have been corrected.
    """
    base = _base_of(records)
    for record in _usable(records):
        target = folder / Path(_below(record["file"], base)).with_suffix(".json")
        if keep and target.exists():
            continue
        make_folder(target.parent)
        shapes: list[dict[str, Any]] = []
        for number, each in enumerate(each for each in record["detections"] if each["score"] >= threshold):
            x, y, w, h = each["bbox"]
            kind, rings = "rectangle", [np.array([[x, y], [x + w, y + h]])]
            if "segmentation" in each:
                kind, rings = "polygon", outlines(each["segmentation"], tolerance_px)
            group = number if len(rings) > 1 else None
            shared = {"label": each["category_name"], "group_id": group, "shape_type": kind, "flags": {}}
            shared["description"] = f"score {each['score']:.3f}"
            shapes += [{**shared, "points": ring.round(2).tolist()} for ring in rings if len(ring) > 1]
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": _relative(record["file"], target.parent),
            "imageData": None,
            "imageHeight": record["height"],
            "imageWidth": record["width"],
        }
        write_json(target, content)


def write_yolo(
    records: Records,
    folder: Path,
    categories: Sequence[dict[str, Any]],
    threshold: float,
    tolerance_px: float,
    *,
    keep: bool = False,
) -> None:
    """Writes a dataset in YOLO's format: `labels/`, `data.yaml`, and `images/` with links to the images.

    A line is the class, counted from 0, and a polygon, or without masks a box (centre, width, height), in fractions of
    the image.

    Args:
        records: records of the images.
        folder: folder to write to.
        categories: with `id` and `name`, in the order of the classes.
        threshold: minimum score.
        tolerance_px: see `outlines`.
        keep: as in `write_labelme`.
    """
    base = _base_of(records)
    number_of = {category["id"]: number for number, category in enumerate(categories)}
    for record in _usable(records):
        name = Path(_below(record["file"], base))
        target = folder / "labels" / name.with_suffix(".txt")
        if keep and target.exists():
            continue
        size_wh = np.array((record["width"], record["height"]))
        lines = []
        for each in record["detections"]:
            if each["score"] < threshold:
                continue
            x, y, w, h = each["bbox"]
            values = np.array([[x + w / 2, y + h / 2], [w, h]])
            if "segmentation" in each:
                rings = outlines(each["segmentation"], tolerance_px)
                if not rings:
                    continue
                values = joined(rings)
            fractions = " ".join(f"{value:.6f}" for value in (values / size_wh).ravel())
            lines.append(f"{number_of[each['category_id']]} {fractions}\n")
        make_folder(target.parent)
        with atomic_path(target) as draft:
            draft.write_text("".join(lines), encoding="utf-8")
        _link(Path(record["file"]), folder / "images" / name)
    names = {number: category["name"] for number, category in enumerate(categories)}
    with atomic_path(folder / "data.yaml") as draft:
        text = json.dumps({"train": "images", "val": "images", "names": names}, ensure_ascii=False, indent=1)
        draft.write_text(f"{text}\n", encoding="utf-8")  # JSON is YAML


def require_files(names: Sequence[str], option: str) -> None:
    """Checks that images are files, to which labels can refer.

    Raises:
        UserError: for frames of videos, and URLs.
    """
    for name in names:
        if "://" in name or not Path(name).is_file():
            raise UserError(
                f"{option} of {name}", "image files, to which labels can refer", "save its images as files first"
            )


def _usable(records: Records) -> Iterator[dict[str, Any]]:
    return (record for record in records() if "error" not in record)


def _base_of(records: Records) -> str:
    """The common parent folder of all images."""
    base = ""
    for record in records():
        folder = os.path.dirname(os.path.abspath(record["file"]))
        base = os.path.commonpath([base, folder]) if base else folder
    return base


def _below(name: str, base: str) -> str:
    return Path(os.path.relpath(name, base)).as_posix()


def _relative(file: str | Path, folder: Path) -> str:
    """The path of a file relative to a folder; a path with `..` is valid only without links on the way."""
    place = os.path.join(os.path.realpath(os.path.dirname(file)), os.path.basename(file))
    return Path(os.path.relpath(place, os.path.realpath(folder))).as_posix()


def _link(image: Path, target: Path) -> None:
    """Creates a symbolic link to an image, or a copy if the file system has no links."""
    make_folder(target.parent)
    with suppress(FileNotFoundError):
        target.unlink()
    try:
        target.symlink_to(_relative(image, target.parent))
    except OSError:
        shutil.copyfile(image, target)
