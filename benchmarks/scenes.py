"""Recall and precision of detection in a large drawn scene, with and without tiles, and the time and memory of both.

    python benchmarks/scenes.py --dataset runs/scenes    # to train MODEL on: maskrcnn train --data runs/scenes
    python benchmarks/scenes.py MODEL [--side 20000 --objects 3000 --tile 512] [--json FILE]

Draws a BigTIFF file (tiles of 512 px, deflate) with separate circles, rectangles and triangles on a smooth background;
one in 150 objects is a bar longer than a tile. MODEL runs on tiles and on the whole scene, each in its own process. The
images of the dataset are such tiles at 128 px, with objects cut at the border. A detection is correct if it has the
class of an object and a mask IoU of at least 0.5 with it; each object counts once, for the detection with the highest
score.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api
from resources import call_in_new_process, resident_mb
from session import aligned, count
from timing import environment, machine

from maskrcnn.data.drawn import contrasting_colour, mask_annotation, pixel_centres, write_drawn_dataset
from maskrcnn.data.shapes import CLASS_NAMES, polygon_distance
from maskrcnn.errors import report_errors
from maskrcnn.files import write_json
from maskrcnn.imaging.run_lengths import moved, runs_from_spans, strings_from_runs
from maskrcnn.runtime.tiles import Tiles

_LIMIT_S = 7200.0  # time limit of a measurement
_FILE_TILE_PX = 512
_TRAINING_PX = 128  # tile side in the dataset
_TRAINING_OBJECTS = 24  # on an area of 4 × 4 tiles, whose middle is the image
_DIAMETERS = (20 / 128, 60 / 128)  # relative to the tile side
_ONE_LARGE_OF = 150
_LARGE = (1.3, 2.0)  # length of a bar, relative to the tile side
_THICKNESS = 0.25  # relative to the tile side
_GAP_PX = 6
_KNOTS = 3  # of the background gradient, per tile side
_GROUND = (95, 160)  # darkest and brightest
_NOISE = 5.0
_MIN_IOU = 0.5
_SCORE = 0.5  # for models without a recommended threshold
_MIN_VISIBLE_PX = 20  # of an object in the dataset
_BATCH = 8
KINDS = ("whole in a tile", "over borders", "larger than a tile")


@dataclass(frozen=True, eq=False)
class Drawn:
    """An object of the scene."""

    label: int
    outline: np.ndarray  # [P, 2] x, y of a convex polygon
    colour: np.ndarray  # [3]

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        """The bounding box in whole pixels: left, top, right, bottom."""
        low, high = np.floor(self.outline.min(axis=0)) - 1, np.ceil(self.outline.max(axis=0)) + 1
        return int(low[0]), int(low[1]), int(high[0]), int(high[1])

    def coverage(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """The covered fraction of each pixel in a window, `[H, W]`, 0 to 1."""
        distance, _ = polygon_distance(self.outline - (left, top), *pixel_centres((bottom - top, right - left)))
        return np.clip(0.5 - distance, 0, 1)


class DrawnScene:
    """A square scene, drawn window by window; the same arguments give the same pixels.

    Args:
        side_px: side of the scene.
        objects: number of objects.
        tile_px: side of the tiles for which the objects are sized.
        seed: random seed.
    """

    def __init__(self, side_px: int, objects: int, tile_px: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.side_px, self._knot_px, self._seed = side_px, tile_px / _KNOTS, seed
        knots = math.ceil((side_px + _FILE_TILE_PX) / self._knot_px) + 2
        self._knots = rng.uniform(*_GROUND, (knots, knots, 3)).astype(np.float32)
        self.objects: list[Drawn] = []
        taken: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
        reach = 1.1 * max(_LARGE) * tile_px + 2 * _GAP_PX  # objects farther apart than this cannot touch
        for number in range(objects):
            label, corners = _shape(rng, tile_px, is_large=number < max(1, objects // _ONE_LARGE_OF))
            radius = float(np.linalg.norm(corners, axis=1).max()) + _GAP_PX
            for _ in range(10_000):
                x, y = rng.uniform(radius, side_px - radius, 2) if 2 * radius < side_px else (side_px / 2,) * 2
                cell = int(x // reach), int(y // reach)
                near = [
                    each for i in (-1, 0, 1) for j in (-1, 0, 1) for each in taken.get((cell[0] + i, cell[1] + j), ())
                ]
                if all(math.hypot(x - a, y - b) > radius + other for a, b, other in near):
                    break
            else:
                raise SystemExit(f"{objects} objects do not fit into {side_px} px: use fewer, or a larger --side")
            taken.setdefault(cell, []).append((x, y, radius))
            under = self._ground(int(x), int(y), int(x) + 1, int(y) + 1)[0, 0]
            self.objects.append(Drawn(label, corners + np.array([x, y]), contrasting_colour(rng, under)))

    def _ground(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """A smooth gradient in all directions, float32 `[H, W, 3]`."""
        part = self._knots
        for axis, (start, stop) in enumerate(((top, bottom), (left, right))):
            place = (np.arange(start, stop, dtype=np.float32) + 0.5) / self._knot_px
            low = place.astype(np.int64)
            weight = np.expand_dims(place - low, (1, 2) if axis == 0 else (0, 2)).astype(np.float32)
            part = part.take(low, axis) * (1 - weight) + part.take(low + 1, axis) * weight
        return part

    def window(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """The pixels of a window, uint8 `[H, W, 3]`; the noise depends on the window."""
        image = self._ground(left, top, right, bottom)
        for each in self.objects:
            a, b, c, d = each.box
            a, b, c, d = max(a, left), max(b, top), min(c, right), min(d, bottom)
            if a < c and b < d:
                part = image[b - top : d - top, a - left : c - left]
                part += each.coverage(a, b, c, d)[..., None] * (each.colour - part)
        noise = np.random.default_rng([self._seed, left, top]).standard_normal(image.shape, np.float32)
        return np.clip(np.rint(image + _NOISE * noise), 0, 255).astype(np.uint8)

    def write(self, path: Path) -> None:
        """Writes a BigTIFF file, tile by tile."""
        import tifffile

        side = _FILE_TILE_PX

        def tiles() -> Iterator[np.ndarray]:
            for top in range(0, self.side_px, side):
                for left in range(0, self.side_px, side):
                    yield self.window(left, top, left + side, top + side)

        shape = (self.side_px, self.side_px, 3)
        options = {"tile": (side, side), "compression": "zlib", "photometric": "rgb", "bigtiff": True}
        tifffile.imwrite(path, tiles(), shape=shape, dtype=np.uint8, **options)

    def truth(self) -> list[dict[str, Any]]:
        """The mask of each object, as COCO's RLE of the scene."""
        spans = []
        for each in self.objects:
            a, b, c, d = each.box
            inside = each.coverage(a, b, c, d) > 0.5
            turns = np.flatnonzero(np.diff(np.concatenate(([False], inside.T.ravel(), [False])).astype(np.int8)))
            spans.append(moved(turns.reshape(-1, 2), inside.shape, b, a, self.side_px))
        size = [self.side_px, self.side_px]
        strings = strings_from_runs(runs_from_spans(spans, self.side_px**2))
        return [{"size": size, "counts": text} for text in strings]

    def kinds(self, tiles: Tiles) -> np.ndarray:
        """The index in `KINDS` of each object."""
        starts = np.array(tiles.starts(self.side_px))
        kinds = []
        for each in self.objects:
            low, high = each.outline.min(axis=0), each.outline.max(axis=0)
            is_whole = all(
                ((starts <= a) & (starts + tiles.size_px >= b)).any() for a, b in zip(low, high, strict=True)
            )
            kinds.append(2 if (high - low).max() > tiles.size_px else 0 if is_whole else 1)
        return np.array(kinds)


def _shape(rng: np.random.Generator, tile_px: int, *, is_large: bool) -> tuple[int, np.ndarray]:
    """The label of a shape, and its corners `[P, 2]` around (0, 0)."""
    label = CLASS_NAMES.index("rectangle") + 1 if is_large else int(rng.integers(len(CLASS_NAMES))) + 1
    turn = rng.uniform(0, 2 * math.pi)
    radius = rng.uniform(*_DIAMETERS) * tile_px / 2
    if CLASS_NAMES[label - 1] == "circle":
        angles = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    elif CLASS_NAMES[label - 1] == "triangle":
        angles = np.array([0, 2, 4]) * (math.pi / 3) + rng.uniform(-0.25, 0.25, 3)
    else:
        half_angle = math.atan(rng.uniform(0.45, 1))
        if is_large:
            length = rng.uniform(*_LARGE)
            radius, half_angle = math.hypot(length, _THICKNESS) * tile_px / 2, math.atan(_THICKNESS / length)
            turn = rng.integers(2) * math.pi / 2 + rng.uniform(-0.3, 0.3)  # keeps it longer than a tile in x or y
        angles = np.array([half_angle, math.pi - half_angle, math.pi + half_angle, -half_angle])
    return label, radius * np.stack([np.cos(angles + turn), np.sin(angles + turn)], axis=1)


def write_dataset(folder: Path, images: int) -> None:
    """Writes a dataset of tiles in COCO's format, a tenth of them for validation."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, list[dict[str, Any]]]:
        side = _TRAINING_PX
        scene = DrawnScene(4 * side, _TRAINING_OBJECTS, side, int(rng.integers(1 << 31)))
        window = (3 * side // 2, 3 * side // 2, 5 * side // 2, 5 * side // 2)
        visible = [(each.label, each.coverage(*window) > 0.5) for each in scene.objects]
        annotations = [mask_annotation(label, mask) for label, mask in visible if mask.sum() >= _MIN_VISIBLE_PX]
        return scene.window(*window), annotations

    write_drawn_dataset(
        folder,
        draw,
        name="scenes",
        info={"description": "tiles of drawn scenes", "generator": "benchmarks/scenes.py, version 1"},
        categories=[{"id": label, "name": name} for label, name in enumerate(CLASS_NAMES, start=1)],
        train_images=images - images // 10,
        val_images=max(1, images // 10),
        size_px=_TRAINING_PX,
        seed=0,
    )


def detect(model: str, scene: str, tile: int | None, overlap: float, output: str) -> dict[str, float]:
    """Detects in this process and writes COCO results.

    Args:
        model: ONNX file or engine.
        scene: file of the scene.
        tile: tile side; None: detect in the whole scene at once.
        overlap: overlap of the tiles.
        output: JSON file to write.

    Returns:
        Seconds, initial and peak resident memory in MB, and the minimum score of the detections that count.
    """
    from maskrcnn.runtime.detector import Detector
    from maskrcnn.runtime.tiles import detect_tiles

    detector = Detector.load(model)
    before = resident_mb("VmRSS")
    began = time.perf_counter()
    if tile is None:
        found = detector.detect([scene])[0]
    else:
        found = detect_tiles(detector, scene, Tiles(tile, overlap), batch_size=_BATCH)
    entries = found.to_coco()
    seconds = time.perf_counter() - began
    Path(output).write_text(json.dumps(entries))
    threshold = detector.metadata.recommended_threshold
    return {
        "seconds": seconds,
        "loaded_mb": before or 0.0,
        "peak_mb": resident_mb("VmHWM") or 0.0,
        "threshold": _SCORE if threshold is None else threshold,
    }


def scored(
    entries: Sequence[dict[str, Any]], truth: Sequence[dict[str, Any]], labels: Sequence[int], kinds: np.ndarray
) -> dict[str, Any]:
    """Recall and precision of COCO results against the objects of a scene.

    Args:
        entries: the detections; `category_id` is the label.
        truth: RLE of each object.
        labels: label of each object.
        kinds: index in `KINDS` of each object.

    Returns:
        The number of detections, their recall and precision; how many of the incorrect ones match an object of another
        class, or one that is already found; and for each of `KINDS` the numbers of found and of all objects.
    """
    entries = sorted(entries, key=lambda each: -each["score"])
    is_found = np.zeros(len(truth), bool)
    right = of_other_class = again = 0
    iou = mask_api.iou([each["segmentation"] for each in entries], [*truth], [0] * len(truth)) if entries else []
    for entry, row in zip(entries, iou, strict=True):
        is_label = np.array(labels) == entry["category_id"]
        free = np.where(is_label & ~is_found, row, 0)
        if free.max() >= _MIN_IOU:
            is_found[free.argmax()] = True
            right += 1
        elif row.max() >= _MIN_IOU:
            again += int(is_label[row.argmax()])
            of_other_class += int(not is_label[row.argmax()])
    return {
        "detections": len(entries),
        "recall": float(is_found.mean()),
        "precision": right / len(entries) if entries else None,
        "other class": of_other_class,
        "again": again,
        **{name: [int(is_found[kinds == k].sum()), int((kinds == k).sum())] for k, name in enumerate(KINDS)},
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Draws the scene, detects in separate processes, prints a table, and returns the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="ONNX file or engine, trained on the dataset")
    parser.add_argument("--dataset", type=Path, help="write the dataset to this folder instead of measuring")
    parser.add_argument("--images", type=count, default=1000, help="number of images in the dataset (default: 1000)")
    parser.add_argument("--side", type=count, default=4096, help="side of the scene, px (default: 4096)")
    parser.add_argument("--objects", type=count, default=100, help="number of objects (default: 100)")
    parser.add_argument("--tile", type=count, default=512, help="side of the tiles, px (default: 512)")
    parser.add_argument(
        "--overlap", type=float, default=0.2, help="overlap of the tiles, share of their side (default: 0.2)"
    )
    parser.add_argument("--score", type=float, help="minimum score of a detection (default: the model's, else 0.5)")
    parser.add_argument("--json", type=Path, help="JSON file for the results")
    given = parser.parse_args(arguments)
    if (given.model is None) == (given.dataset is None):
        parser.error("pass a model, or --dataset")
    if given.dataset is not None:
        write_dataset(given.dataset, given.images)
        return {}
    tiles = Tiles(given.tile, given.overlap)
    scene = DrawnScene(given.side, given.objects, given.tile)
    truth, labels, kinds = scene.truth(), [each.label for each in scene.objects], scene.kinds(tiles)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder, "scene.tif"), Path(folder, "results.json")
        scene.write(file)
        print(f"drawn: {given.side} × {given.side} px, {file.stat().st_size / 1e6:.0f} MB", file=sys.stderr, flush=True)
        for way, tile in ((f"tiles of {given.tile} px", given.tile), ("whole", None)):
            call = {"model": str(given.model), "scene": str(file), "tile": tile, "overlap": given.overlap}
            measured = call_in_new_process("scenes:detect", {**call, "output": str(output)}, _LIMIT_S)
            score = measured.pop("threshold") if given.score is None else given.score
            entries = [each for each in json.loads(output.read_text()) if each["score"] >= score]
            rows[way] = {**measured, "score": score, **scored(entries, truth, labels, kinds)}
            print(way, rows[way], file=sys.stderr, flush=True)
    settings = {name: getattr(given, name) for name in ("side", "objects", "tile", "overlap")}
    content = {"schema": 1, "environment": environment(), **settings, "model": given.model.name, "rows": rows}
    if given.json:
        write_json(given.json, content)
    head = ["way", "seconds", "peak MB", "detections", "recall", "precision", "other class", "again", *KINDS]
    print("\n".join([*machine(content["environment"]), "", aligned(head, [_cells(*each) for each in rows.items()])]))
    return content


def _cells(way: str, row: dict[str, Any]) -> list[str]:
    precision = "–" if row["precision"] is None else f"{row['precision']:.3f}"
    cells = [
        way,
        f"{row['seconds']:.0f}",
        f"{row['peak_mb']:.0f}",
        str(row["detections"]),
        f"{row['recall']:.3f}",
        precision,
        str(row["other class"]),
        str(row["again"]),
    ]
    return [*cells, *("{} of {}".format(*row[name]) for name in KINDS)]


if __name__ == "__main__":
    with report_errors():
        main()
