"""Difference between exported files and PyTorch, for every architecture and several batch sizes, image sizes and kinds.

    python tests/support/export_matrix.py --json OUT
    python tests/support/export_matrix.py --quick
    python tests/support/export_matrix.py --model maskrcnn_resnet101_fpn --model fasterrcnn_resnet50_fpn:detectron2

Each model is exported once. The file runs in ONNX Runtime and the model in PyTorch, both on the CPU, on batches of 1, 2
and 5 images in four sizes. The images are ordinary, empty (or empty slots), or crowded, which fill the output. Weights
are random (see `matrix_model`).

The full matrix takes about half an hour on two cores. To save time, only `maskrcnn_resnet50_fpn` and the small model
are unchanged. The other models have 300 proposals, narrower longest images, and a ResNet-18, except with Detectron2's
conventions, one of which concerns only bottlenecks. Models given by `--model` are compared unchanged. ResNet-50 in a
batch of 5 needs 8 GB of memory.

The exit code is 1 if a cell exceeds `EXACT` of `maskrcnn.runtime.verification.compare`, or if a kind of images does not
produce its kind of outputs.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskrcnn.config import MODELS, NECKS, POOL_METHODS, ModelConfig, model_config
from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError, report_errors
from maskrcnn.export.exporter import export_onnx
from maskrcnn.files import write_json
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime.backends.base import Backend
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.verification.compare import EXACT, Difference, compare_outputs, merge
from maskrcnn.weights.checkpoint import load_weights
from maskrcnn.weights.detectron2 import CONVENTIONS

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # for use as a script

from peers import calibrated_state_dict
from session import Progress, aligned, numbers, size_hw
from timing import environment, machine

_BATCHES = (1, 2, 5)
# Small, landscape, portrait, and one with the longest side of the default preprocessing.
_SIZES_HW = ((160, 192), (480, 640), (640, 416), (800, 1344))
_GREY = 128
_TILE_PX = (32, 96)  # sides of the tiles of a crowded image
_TILES_ALONG = 5  # per shorter side, within these limits
_MIN_OBJECTS = 3  # per ordinary image
_MAX_DRAWINGS = 20  # attempts; images of 32 px have no room for three objects
_PADDING_HW = (17, 40)  # how much smaller than its batch every other image is


class Kind(Enum):
    """Content of the images of a batch."""

    ORDINARY = "ordinary"  # a few shapes
    EMPTY = "empty"  # even grey images, and empty slots: images of size 0 × 0, all padding
    CROWDED = "crowded"  # hundreds of shapes


@dataclass(frozen=True)
class Cell:
    """One combination of the matrix."""

    kind: Kind
    batch: int
    size_hw: tuple[int, int]  # of the batch's tensor, multiples of 32

    def __str__(self) -> str:
        return f"N={self.batch}, {self.size_hw[0]}×{self.size_hw[1]}"


def cells(batches: Sequence[int], sizes_hw: Sequence[tuple[int, int]]) -> list[Cell]:
    """Combine every kind, size and batch size."""
    return [Cell(kind, batch, size) for kind in Kind for size in sizes_hw for batch in batches]


def cell_feeds(cell: Cell) -> Iterator[dict[str, np.ndarray]]:
    """Yield the detector's inputs for a cell: one batch, or two for a grey image and an empty slot in batches of 1.

    Every other image is smaller than the tensor and padded; every other empty one is an empty slot. Cells of different
    batch sizes have different images.
    """
    first = cell.batch * (cell.batch - 1) // 2
    starts = (0, 1) if cell.kind is Kind.EMPTY and cell.batch == 1 else (first,)
    for start in starts:
        yield _feeds(cell, range(start, start + cell.batch))


def _feeds(cell: Cell, indices: range) -> dict[str, np.ndarray]:
    images = np.zeros((cell.batch, 3, *cell.size_hw), np.float32)
    sizes = [_true_size(cell, index) for index in indices]
    for image, (height, width), index in zip(images, sizes, indices, strict=True):
        image[:, :height, :width] = draw_image(cell.kind, (height, width), index).transpose(2, 0, 1)
    return {"images": images, "image_sizes": np.array(sizes, np.int64)}


def _true_size(cell: Cell, index: int) -> tuple[int, int]:
    """Height and width of an image before padding."""
    if index % 2 == 0:
        return cell.size_hw
    return (0, 0) if cell.kind is Kind.EMPTY else tuple(np.subtract(cell.size_hw, _PADDING_HW).tolist())


@lru_cache(maxsize=256)
def draw_image(kind: Kind, size_hw: tuple[int, int], index: int) -> np.ndarray:
    """Draw an image, uint8 `[H, W, 3]`, read-only; the same arguments give the same image."""
    if kind is Kind.EMPTY:
        image = np.full((*size_hw, 3), _GREY, np.uint8)
    elif kind is Kind.ORDINARY:
        image = _with_objects(np.random.default_rng((0, index)), size_hw)
    else:
        image = _mosaic(np.random.default_rng((1, index)), size_hw)
    image.flags.writeable = False
    return image


def _with_objects(rng: np.random.Generator, size_hw: tuple[int, int]) -> np.ndarray:
    """At least three shapes."""
    for _ in range(_MAX_DRAWINGS):
        image, objects = shapes_image(rng, size_hw)
        if len(objects) >= _MIN_OBJECTS:
            break
    return image


def _mosaic(rng: np.random.Generator, size_hw: tuple[int, int]) -> np.ndarray:
    """Many small images of shapes side by side, cropped at the right and bottom."""
    side = int(np.clip(min(size_hw) // _TILES_ALONG, *_TILE_PX))
    rows, columns = (-(-length // side) for length in size_hw)
    tiles = [[shapes_image(rng, (side, side))[0] for _ in range(columns)] for _ in range(rows)]
    return np.ascontiguousarray(np.block([[[tile] for tile in row] for row in tiles])[: size_hw[0], : size_hw[1]])


# Suffixes of a model name after a colon, joined by "+".
_VARIANTS: dict[str, dict[str, Any]] = {
    "detectron2": CONVENTIONS,
    **{neck: {"neck": neck} for neck in NECKS},
    **{method: {"pool_method": method} for method in POOL_METHODS},
}
_CLASSES = 90  # as torchvision's COCO weights
_CALIBRATION_IMAGES = 4
_CALIBRATION_SIZE_HW = (320, 416)
_OTHER_IMAGES = 1000  # first index of the images for fitting; the matrix has smaller ones
_FITTED_SIZES = 3  # the smallest ones, to save time
_RIDGE = 1e-1  # relative to the mean square of a feature
_CLASS_GAIN = 2.0  # factor of the classes' logits, so that some scores are high
_STRENGTH = 5.0  # difference of the background logit between grey and ordinary, and ordinary and crowded images


def variant_config(variant: str) -> ModelConfig:
    """Return the configuration of a model name with optional variants, such as `:detectron2` or `:panet+crop`.

    Raises:
        UserError: for an unknown model or variant.
    """
    name, _, endings = variant.partition(":")
    chosen = endings.split("+") if endings else []
    if name not in MODELS or not set(chosen) <= _VARIANTS.keys():
        expected = f"one of {', '.join(MODELS)}, optionally with :{', :'.join(_VARIANTS)}"
        raise UserError(f"model {variant!r}", expected, "choose one of these")
    return model_config(
        name,
        class_names=tuple(f"class_{label}" for label in range(1, _CLASSES + 1)),
        category_ids=tuple(range(1, _CLASSES + 1)),
        **{field: value for ending in chosen for field, value in _VARIANTS[ending].items()},
    )


def matrix_model(variant: str, sizes_hw: Sequence[tuple[int, int]], proposals: int | None = None) -> MaskRCNN:
    """Make a model of the matrix, with reproducible random weights.

    Calibrated random weights (`peers.calibrated_state_dict`) find about as many objects in a grey image as in a crowded
    one. The background's row of the last layer is therefore fitted to other images of each kind (`tell_kinds_apart`),
    so that grey is background, ordinary images have some detections, and crowded ones fill the output.

    Args:
        variant: see `variant_config`.
        sizes_hw: image sizes of the matrix, the smallest of which are used for fitting.
        proposals: proposals per image (default: the model's).
    """
    config = variant_config(variant)
    config = dataclasses.replace(config, proposals=proposals or config.proposals)
    images = [draw_image(Kind.ORDINARY, _CALIBRATION_SIZE_HW, _OTHER_IMAGES + k) for k in range(_CALIBRATION_IMAGES)]
    short, long = min(_CALIBRATION_SIZE_HW), max(_CALIBRATION_SIZE_HW)
    # torchvision's model is calibrated: it has no other conventions, but with the same neck the same tensors.
    weights = calibrated_state_dict(
        config.name, _CLASSES + 1, images, 0, min_size_px=short, max_size_px=long, neck=config.neck
    )
    model = MaskRCNN(config)
    load_weights(model, for_pixels_of(config, weights), "calibrated weights")
    tell_kinds_apart(model.eval(), sorted(sizes_hw, key=math.prod)[:_FITTED_SIZES])
    return model


def for_pixels_of(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adapt weights for the default preprocessing to another standard deviation of pixels."""
    name = "backbone.body.conv1.weight"
    factor = torch.tensor(config.preprocessing.std) / torch.tensor(ModelConfig().preprocessing.std)
    return weights | {name: weights[name] * factor.view(1, 3, 1, 1)}


@torch.no_grad()
def tell_kinds_apart(model: MaskRCNN, sizes_hw: Sequence[tuple[int, int]], images: int = 1) -> None:
    """Fit the background logit by least squares: high in grey images, low in crowded ones, in between in ordinary ones.

    Args:
        model: model whose last layer of the box head is modified.
        sizes_hw: sizes of the images to fit to.
        images: number of images per kind and size.
    """
    target = {Kind.EMPTY: 1.0, Kind.ORDINARY: 0.0, Kind.CROWDED: -1.0}
    fitted, others = ([_OTHER_IMAGES + 2 * k + part for k in range(images)] for part in (0, 1))
    seen = [(kind, rows) for kind in Kind for rows in _embeddings(model, kind, sizes_hw, fitted)]
    inputs = torch.cat([rows for _, rows in seen]).double()
    targets = torch.cat([torch.full((len(rows),), target[kind]) for kind, rows in seen]).double()
    mean, level = inputs.mean(dim=0), targets.mean()
    centred = inputs - mean
    square = centred.T @ centred
    square.diagonal().add_(_RIDGE * square.diagonal().mean())
    row = torch.linalg.solve(square, centred.T @ (targets - level))
    layer = model.roi_heads.box_predictor.cls_score
    layer.weight[1:] *= _CLASS_GAIN
    layer.bias[1:] *= _CLASS_GAIN
    layer.weight[0] = _STRENGTH * row
    layer.bias[0] = _STRENGTH * (level - mean @ row)
    fresh = _embeddings(model, Kind.ORDINARY, sizes_hw, others)  # unseen images: fitted ones are separated too well
    layer.bias[0] += _shift([layer(rows) for rows in fresh], model.config)


def _embeddings(
    model: MaskRCNN, kind: Kind, sizes_hw: Sequence[tuple[int, int]], indices: Sequence[int]
) -> Iterator[Tensor]:
    """Inputs of the box head's last layer for each image's proposals, `[R, C]`."""
    caught: list[Tensor] = []
    hook = model.roi_heads.box_predictor.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        for size, index in itertools.product(sizes_hw, indices):
            image = torch.from_numpy(draw_image(kind, size, index).transpose(2, 0, 1)[None].copy()).float()
            stages: dict[str, Tensor] = {}
            model(image, torch.tensor([size]), stages)
            yield caught.pop()[stages["proposals"][0].any(dim=1)]  # without padding rows
    finally:
        hook.remove()


def _shift(logits: Sequence[Tensor], config: ModelConfig) -> float:
    """Return the offset of the background logit at which the median image has as many scores as output rows.

    NMS then suppresses some of them, and the output is not full.

    Args:
        logits: `[R, 1 + classes]` per image.
        config: score threshold and number of output rows.
    """
    low, high = -40.0, 40.0
    for _ in range(30):
        middle = (low + high) / 2
        shifted = [rows + torch.tensor([middle] + [0.0] * config.num_classes) for rows in logits]
        passing = [int((rows.softmax(dim=1)[:, 1:] > config.score_threshold).sum()) for rows in shifted]
        low, high = (middle, high) if statistics.median(passing) > config.detections else (low, middle)
    return high


@dataclass(frozen=True, kw_only=True)
class Result:
    """Difference of two backends in a cell."""

    model: str
    cell: Cell
    difference: Difference
    full: int  # images whose reference output fills all rows
    partly: int  # images whose reference output fills some rows

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-compatible values."""
        kind, size = self.cell.kind.value, list(self.cell.size_hw)
        place = {"model": self.model, "kind": kind, "batch": self.cell.batch, "size_hw": size}
        return {
            **place,
            "full": self.full,
            "partly": self.partly,
            "within": self.difference.within(EXACT),
            **_numbers(self.difference),
        }


@dataclass(frozen=True, kw_only=True)
class Row:
    """All cells of a model and a kind of images."""

    model: str
    kind: Kind
    cells: int
    difference: Difference
    full: int
    partly: int
    worst: Result  # the cell closest to the tolerance, or farthest beyond it
    beyond: int  # number of cells beyond the tolerance

    @property
    def status(self) -> str:
        """The error, or ok."""
        if self.beyond:
            return f"{self.beyond} of {self.cells} cells beyond the tolerance"
        missing = {
            Kind.ORDINARY: self.partly == 0 and "no output that is partly full",
            Kind.EMPTY: self.difference.images_without_detections == 0 and "no empty output",
            Kind.CROWDED: self.full == 0 and "no full output",
        }
        return missing[self.kind] or "ok"

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON-compatible values."""
        place = {
            "model": self.model,
            "kind": self.kind.value,
            "cells": self.cells,
            "full": self.full,
            "partly": self.partly,
        }
        verdict = {"worst": str(self.worst.cell), "beyond": self.beyond, "status": self.status}
        return {**place, **_numbers(self.difference), **verdict}


def compare_cell(model: str, reference: Backend, other: Backend, cell: Cell) -> Result:
    """Compare two backends on the batches of a cell."""
    parts, full, partly = [], 0, 0
    for feeds in cell_feeds(cell):
        expected = reference(feeds)
        parts.append(compare_outputs(expected, other(feeds), EXACT))
        counts, rows = expected["num_detections"], expected["scores"].shape[1]
        full += int((counts == rows).sum())
        partly += int(((counts > 0) & (counts < rows)).sum())
    return Result(model=model, cell=cell, difference=merge(parts), full=full, partly=partly)


def summary(results: Sequence[Result]) -> list[Row]:
    """Merge the results of each model and kind into a row, in the order of the results."""
    rows = []
    for (model, kind), group in groupby(results, key=lambda result: (result.model, result.cell.kind)):
        found = list(group)
        rows.append(
            Row(
                model=model,
                kind=kind,
                cells=len(found),
                difference=merge([result.difference for result in found]),
                full=sum(result.full for result in found),
                partly=sum(result.partly for result in found),
                worst=max(found, key=lambda result: needed_share(result.difference)),
                beyond=sum(not result.difference.within(EXACT) for result in found),
            )
        )
    return rows


def needed_share(difference: Difference) -> float:
    """Return the difference relative to `EXACT`: above 1 it exceeds it; infinite for NaN and unpaired detections."""
    shares = (
        difference.box_px / EXACT.box_px,
        difference.score / EXACT.score,
        (difference.mask or 0.0) / EXACT.mask,
        (difference.mask_mean or 0.0) / EXACT.mask_mean,
    )
    points = difference.keypoints
    if points is not None:
        shares += (points.px / EXACT.keypoints.px, points.score / EXACT.keypoints.score)
        if not points.within(EXACT.keypoints):
            return math.inf
    if difference.unpaired or any(math.isnan(share) for share in shares):
        return math.inf
    return max(shares)


def table(rows: Sequence[Row]) -> str:
    """Format the rows as a Markdown table."""
    head = [
        *("model", "kind", "cells", "images", "empty", "partly full", "full", "detections"),
        *("box px", "score", "mask", "mask mean", "keypoint px", "elsewhere", "unpaired", "worst cell", "status"),
    ]
    return aligned(head, [_columns(row) for row in rows])


def _columns(row: Row) -> list[str]:
    found = row.difference
    counts = (row.cells, found.images, found.images_without_detections, row.partly, row.full, found.detections)
    points = found.keypoints
    differences = (found.box_px, found.score, found.mask, found.mask_mean, points and points.px)
    return [
        *(row.model, row.kind.value),
        *(str(count) for count in counts),
        *("" if value is None else f"{value:.1e}" for value in differences),
        "" if points is None else f"{points.beyond} of {points.compared}",
        *(str(found.unpaired), str(row.worst.cell) if needed_share(found) else "", row.status),
    ]


def _numbers(difference: Difference) -> dict[str, Any]:
    """The fields of a difference, with NaN as text: JSON has no NaN."""
    return _without_nan(dataclasses.asdict(difference))


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    inner = {name: _without_nan(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {name: "NaN" if isinstance(v, float) and np.isnan(v) else v for name, v in inner.items()}


_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class _Extent:
    """The cells of a model."""

    model: str  # see `variant_config`
    batches: tuple[int, ...] = _BATCHES
    sizes_hw: tuple[tuple[int, int], ...] = _SIZES_HW
    proposals: int | None = None  # per image; None: the model's


def _lighter(model: str) -> _Extent:
    return _Extent(model=model, sizes_hw=(*_SIZES_HW[:-1], (320, 1344)), proposals=300)


FULL = (
    _Extent(model="maskrcnn_resnet18_fpn_small"),
    _lighter("maskrcnn_resnet18_fpn"),
    _lighter("maskrcnn_resnet18_fpn_v2"),
    _lighter("fasterrcnn_resnet18_fpn"),
    _lighter("fasterrcnn_resnet18_fpn_v2"),
    _lighter("keypointrcnn_resnet50_fpn"),
    _lighter("maskrcnn_resnet50_fpn:detectron2"),
    _lighter("maskrcnn_resnet18_fpn:panet+crop"),
    _lighter("maskrcnn_resnet18_fpn:bifpn+pool"),
    _Extent(model="maskrcnn_resnet50_fpn"),
)
_QUICK = tuple(
    _Extent(model=model, batches=(1, 2), sizes_hw=((160, 192), (320, 224), (64, 1344)))
    for model in ("maskrcnn_resnet18_fpn_small", "fasterrcnn_resnet18_fpn")
)


def compare_model(
    name: str, reference: Backend, other: Backend, combinations: Iterable[Cell], progress: Progress | None = None
) -> list[Result]:
    """Compare two backends in every cell.

    Args:
        name: name of the model, for the table.
        reference: PyTorch.
        other: the exported file.
        combinations: cells, grouped by kind.
        progress: progress output.
    """
    results = []
    for cell in combinations:
        results.append(compare_cell(name, reference, other, cell))
        if progress:
            progress.say(f"  {cell.kind.value}, {cell}: {results[-1].difference}")
    return results


def export_and_compare(extent: _Extent, progress: Progress) -> list[Result]:
    """Export a model to a temporary file and compare it in all cells.

    Raises:
        UserError: if it cannot be exported.
    """
    progress.say(f"{extent.model}: weights")
    model = matrix_model(extent.model, extent.sizes_hw, extent.proposals)
    with tempfile.TemporaryDirectory(prefix="maskrcnn-matrix-") as folder:
        progress.say(f"{extent.model}: export")
        path = Path(folder) / "model.onnx"
        export_onnx(model, path)
        other = OnnxRuntimeBackend(path, providers=["CPUExecutionProvider"])
        combinations = cells(extent.batches, extent.sizes_hw)
        return compare_model(extent.model, TorchBackend(model, device="cpu"), other, combinations, progress)


def _planned(given: argparse.Namespace) -> list[_Extent]:
    """The models and cells of the command line, with all model names checked."""
    plan = _QUICK if given.quick else FULL
    if given.model:
        first = plan[0]  # for its batches and sizes
        plan = tuple(dataclasses.replace(first, model=model) for model in given.model)
    changes: dict[str, Any] = {}
    if given.batch:
        changes["batches"] = given.batch
    if given.size:
        changes["sizes_hw"] = tuple(given.size)
    for extent in plan:
        variant_config(extent.model)
    return [dataclasses.replace(extent, **changes) for extent in plan]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", action="append", help="model, also with variants as :detectron2 or :panet+crop; repeatable")
    add("--batch", type=numbers, help=f"batch sizes; default: {','.join(map(str, _BATCHES))}")
    add("--size", type=size_hw, action="append", help="height×width of the images, such as 480x640; repeatable")
    add("--quick", action="store_true", help="two models, batches of 1 and 2, smaller images")
    add("--json", type=Path, help="JSON file for the results, with machine and versions")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print the table, and return the exit code."""
    given = parse(arguments)
    extents, progress = _planned(given), Progress()
    results: list[Result] = []
    failures: dict[str, str] = {}
    for extent in extents:
        try:
            results += export_and_compare(extent, progress)
        except UserError as error:
            failures[extent.model] = error.found
            progress.say(f"{extent.model}: {error.found}")
    rows, here = summary(results), environment()
    print("\n" + "\n".join([table(rows), "", f"- Tolerance: {EXACT}.", *machine(here)]))
    for model, reason in failures.items():
        print(f"- {model} could not be exported: {reason}")
    if given.json:
        content = {
            "schema": _SCHEMA,
            "compared": "PyTorch FP32 and one exported ONNX file per model in ONNX Runtime, on the CPU",
            "tolerance": str(EXACT),
            "environment": here,
            "models": [dataclasses.asdict(extent) for extent in extents],
            "failures": failures,
            "rows": [row.to_dict() for row in rows],
            "cells": [result.to_dict() for result in results],
        }
        write_json(given.json, content)
        print(f"\n{given.json}")
    return int(bool(failures) or any(row.status != "ok" for row in rows))


if __name__ == "__main__":
    with report_errors():
        sys.exit(main())
