"""How far an exported file is from PyTorch: every architecture, several batch and image sizes, all kinds of images.

    python benchmarks/matrix.py
    python benchmarks/matrix.py --quick
    python benchmarks/matrix.py --model maskrcnn_resnet101_fpn --model fasterrcnn_resnet50_fpn:detectron2

Each model is exported once, and this one file runs in ONNX Runtime what the model runs in PyTorch, both on the CPU:
batches of 1, 2 and 5 of four sizes, with ordinary images, empty ones and empty slots, and crowded ones, whose
outputs are full. Weights are random (see `matrix_models`).

So that two cores need about half an hour, only `maskrcnn_resnet50_fpn` and the small model are as named. The others
have a ResNet-18, but for Detectron2's conventions, one of which concerns bottlenecks only; they have 300 proposals,
and their longest images are narrower. What `--model` names is compared as it is. ResNet-50 in a batch of 5 needs
8 GB of memory.

The exit code is 1 when any cell is beyond `EXACT` of `maskrcnn.runtime.verification.compare`, and when a kind of
images has no outputs of its kind.
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
from random_weights import calibrated_state_dict
from report import aligned, machine
from session import Progress, numbers, size_hw
from timing import environment
from torch import Tensor

from maskrcnn.config import MODELS, NECKS, POOL_METHODS, ModelConfig, model_config
from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError, told_to_the_user
from maskrcnn.export.exporter import export_onnx
from maskrcnn.files import write_json
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime.backends.base import Backend
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.verification.compare import EXACT, Difference, compare_outputs, merge
from maskrcnn.weights.checkpoint import load_weights
from maskrcnn.weights.detectron2 import CONVENTIONS

# The inputs of the export matrix: batches of several sizes, with ordinary, crowded and empty images.

_BATCHES = (1, 2, 5)
# Small, landscape, portrait, and one with the longest side that the default preprocessing makes.
_SIZES_HW = ((160, 192), (480, 640), (640, 416), (800, 1344))
_GREY = 128
_TILE_PX = (32, 96)  # sides of the pictures that a crowded image is put together from
_TILES_ALONG = 5  # of them along the shorter side, within those limits
_LEAST_OBJECTS = 3  # of an ordinary image
_DRAWINGS = 20  # after which an image stays as it is; images of 32 px have no room for three
_PADDING_HW = (17, 40)  # how much smaller than its batch every other image is


class Kind(Enum):
    """What the images of a batch show."""

    ORDINARY = "ordinary"  # a few drawn shapes
    EMPTY = "empty"  # even grey images, and empty slots: images of size 0 × 0, all padding
    CROWDED = "crowded"  # hundreds of drawn shapes


@dataclass(frozen=True)
class Cell:
    """One combination of the matrix."""

    kind: Kind
    batch: int
    size_hw: tuple[int, int]  # of the batch's tensor, multiples of 32

    def __str__(self) -> str:
        return f"N={self.batch}, {self.size_hw[0]}×{self.size_hw[1]}"


def cells(batches: Sequence[int], sizes_hw: Sequence[tuple[int, int]]) -> list[Cell]:
    """Every kind, size and batch size."""
    return [Cell(kind, batch, size) for kind in Kind for size in sizes_hw for batch in batches]


def cell_feeds(cell: Cell) -> Iterator[dict[str, np.ndarray]]:
    """The detector's inputs for a cell: one batch, or two where one has no room for both kinds of empty images.

    Every other image is smaller than the tensor and padded, every other empty one an empty slot. Cells of other
    batch sizes have other images.
    """
    first = cell.batch * (cell.batch - 1) // 2
    starts = (0, 1) if cell.kind is Kind.EMPTY and cell.batch == 1 else (first,)
    for start in starts:
        yield _feeds(cell, range(start, start + cell.batch))


def _feeds(cell: Cell, indices: range) -> dict[str, np.ndarray]:
    images = np.zeros((cell.batch, 3, *cell.size_hw), np.float32)
    sizes = [_true_size(cell, index) for index in indices]
    for image, (height, width), index in zip(images, sizes, indices, strict=True):
        image[:, :height, :width] = picture(cell.kind, (height, width), index).transpose(2, 0, 1)
    return {"images": images, "image_sizes": np.array(sizes, np.int64)}


def _true_size(cell: Cell, index: int) -> tuple[int, int]:
    """Height and width of an image before padding."""
    if index % 2 == 0:
        return cell.size_hw
    return (0, 0) if cell.kind is Kind.EMPTY else tuple(np.subtract(cell.size_hw, _PADDING_HW).tolist())


@lru_cache(maxsize=256)
def picture(kind: Kind, size_hw: tuple[int, int], index: int) -> np.ndarray:
    """One image, uint8 `[H, W, 3]`, not to be written to; the same arguments give the same image."""
    if kind is Kind.EMPTY:
        image = np.full((*size_hw, 3), _GREY, np.uint8)
    elif kind is Kind.ORDINARY:
        image = _with_objects(np.random.default_rng((0, index)), size_hw)
    else:
        image = _mosaic(np.random.default_rng((1, index)), size_hw)
    image.flags.writeable = False
    return image


def _with_objects(rng: np.random.Generator, size_hw: tuple[int, int]) -> np.ndarray:
    """Drawn shapes, at least three."""
    for _ in range(_DRAWINGS):
        image, objects = shapes_image(rng, size_hw)
        if len(objects) >= _LEAST_OBJECTS:
            break
    return image


def _mosaic(rng: np.random.Generator, size_hw: tuple[int, int]) -> np.ndarray:
    """Many small pictures of shapes side by side, cut at the right and the bottom."""
    side = int(np.clip(min(size_hw) // _TILES_ALONG, *_TILE_PX))
    rows, columns = (-(-length // side) for length in size_hw)
    tiles = [[shapes_image(rng, (side, side))[0] for _ in range(columns)] for _ in range(rows)]
    return np.ascontiguousarray(np.block([[[tile] for tile in row] for row in tiles])[: size_hw[0], : size_hw[1]])


# The models of the export matrix: every architecture, with random weights that tell the kinds of images apart.
#
# Calibrated random weights (`random_weights`) find about as many objects in an even grey image as in a crowded one.
# Here the background's row of the last layer is fitted, by least squares on what the layer sees of other images of
# each kind, so that even grey is background, drawn shapes give some detections and crowds fill the output.

# What may stand after a model's name and a colon, several of them with "+" between.
_VARIANTS: dict[str, dict[str, Any]] = {
    "detectron2": CONVENTIONS,
    **{neck: {"neck": neck} for neck in NECKS},
    **{method: {"pool_method": method} for method in POOL_METHODS},
}
CLASSES = 90  # COCO's count of labels, as torchvision's weights have
_CALIBRATION_IMAGES = 4
_CALIBRATION_SIZE_HW = (320, 416)
_OTHER_IMAGES = 1000  # index from which on pictures are used for fitting: the matrix has the ones before
_FITTED_SIZES = 3  # the smallest: the others take longer
_RIDGE = 1e-1  # of the mean square of a feature
_CLASS_GAIN = 2.0  # how much the classes' logits are spread, so that some scores are high
_STRENGTH = 5.0  # logits of background between an ordinary and a grey image, and a crowded and an ordinary one


def variant_config(variant: str) -> ModelConfig:
    """The configuration of a model's name, which may end in variants, as `:detectron2` or `:panet+crop`.

    Raises:
        UserError: for a name that is not in `maskrcnn.config.MODELS`, and a variant that there is not.
    """
    name, changes = _parsed(variant)
    return model_config(
        name,
        class_names=tuple(f"class_{label}" for label in range(1, CLASSES + 1)),
        category_ids=tuple(range(1, CLASSES + 1)),
        **changes,
    )


def _parsed(variant: str) -> tuple[str, dict[str, Any]]:
    """A model's name and the fields that its variants change."""
    name, _, endings = variant.partition(":")
    chosen = endings.split("+") if endings else []
    if name not in MODELS or not set(chosen) <= _VARIANTS.keys():
        expected = f"one of {', '.join(MODELS)}, perhaps with :{', :'.join(_VARIANTS)}"
        raise UserError(f"model {variant!r}", expected, "name one")
    return name, {field: value for ending in chosen for field, value in _VARIANTS[ending].items()}


def matrix_model(variant: str, sizes_hw: Sequence[tuple[int, int]], proposals: int | None = None) -> MaskRCNN:
    """A model of the matrix with its weights, which are the same every time.

    Args:
        variant: as `variant_config` takes it.
        sizes_hw: of the images that it is to see; the smaller ones are fitted to.
        proposals: per image, by default the model's own number.
    """
    config = variant_config(variant)
    config = dataclasses.replace(config, proposals=proposals or config.proposals)
    images = [picture(Kind.ORDINARY, _CALIBRATION_SIZE_HW, _OTHER_IMAGES + k) for k in range(_CALIBRATION_IMAGES)]
    short, long = min(_CALIBRATION_SIZE_HW), max(_CALIBRATION_SIZE_HW)
    # torchvision's model is what is calibrated: it has no other conventions, but the same tensors, given the neck.
    weights = calibrated_state_dict(
        config.name, CLASSES + 1, images, 0, min_size_px=short, max_size_px=long, neck=config.neck
    )
    model = MaskRCNN(config)
    load_weights(model, for_pixels_of(config, weights), "calibrated weights")
    tell_kinds_apart(model.eval(), sorted(sizes_hw, key=math.prod)[:_FITTED_SIZES])
    return model


def for_pixels_of(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model with the default preprocessing for one that divides pixels by other deviations."""
    name = "backbone.body.conv1.weight"
    factor = torch.tensor(config.preprocessing.std) / torch.tensor(ModelConfig().preprocessing.std)
    return weights | {name: weights[name] * factor.view(1, 3, 1, 1)}


@torch.no_grad()
def tell_kinds_apart(model: MaskRCNN, sizes_hw: Sequence[tuple[int, int]], images: int = 1) -> None:
    """Fits the background's logit: high in even grey images, low in crowded ones, in between in ordinary ones.

    Args:
        model: whose last layer of the box head is changed in place.
        sizes_hw: of the images it is fitted on.
        images: so many of each kind and size.
    """
    target = {Kind.EMPTY: 1.0, Kind.ORDINARY: 0.0, Kind.CROWDED: -1.0}
    fitted, others = ([_OTHER_IMAGES + 2 * k + part for k in range(images)] for part in (0, 1))
    seen = [(kind, rows) for kind in Kind for rows in _embeddings(model, kind, sizes_hw, fitted)]
    inputs = torch.cat([rows for _, rows in seen]).double()
    wanted = torch.cat([torch.full((len(rows),), target[kind]) for kind, rows in seen]).double()
    mean, level = inputs.mean(dim=0), wanted.mean()
    moved = inputs - mean
    square = moved.T @ moved
    square.diagonal().add_(_RIDGE * square.diagonal().mean())
    row = torch.linalg.solve(square, moved.T @ (wanted - level))
    layer = model.roi_heads.box_predictor.cls_score
    layer.weight[1:] *= _CLASS_GAIN
    layer.bias[1:] *= _CLASS_GAIN
    layer.weight[0] = _STRENGTH * row
    layer.bias[0] = _STRENGTH * (level - mean @ row)
    fresh = _embeddings(model, Kind.ORDINARY, sizes_hw, others)  # those that were fitted are told apart too well
    layer.bias[0] += _shift([layer(rows) for rows in fresh], model.config)


def _embeddings(
    model: MaskRCNN, kind: Kind, sizes_hw: Sequence[tuple[int, int]], indices: Sequence[int]
) -> Iterator[Tensor]:
    """What the last layer of the box head sees of each image's proposals, `[R, C]`."""
    caught: list[Tensor] = []
    hook = model.roi_heads.box_predictor.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        for size, index in itertools.product(sizes_hw, indices):
            image = torch.from_numpy(picture(kind, size, index).transpose(2, 0, 1)[None].copy()).float()
            stages: dict[str, Tensor] = {}
            model(image, torch.tensor([size]), stages)
            yield caught.pop()[stages["proposals"][0].any(dim=1)]  # rows of zeros are no proposals
    finally:
        hook.remove()


def _shift(logits: Sequence[Tensor], config: ModelConfig) -> float:
    """What to add to background so that the median image has as many scores as the output has rows.

    Some of them are then suppressed, and the output is not full.

    Args:
        logits: `[R, 1 + classes]` of each image.
        config: for the score threshold and the rows of the output.
    """
    low, high = -40.0, 40.0
    for _ in range(30):
        middle = (low + high) / 2
        shifted = [rows + torch.tensor([middle] + [0.0] * config.num_classes) for rows in logits]
        passing = [int((rows.softmax(dim=1)[:, 1:] > config.score_threshold).sum()) for rows in shifted]
        low, high = (middle, high) if statistics.median(passing) > config.detections else (low, middle)
    return high


# What the export matrix found: one result per cell, one row per model and kind of images.


@dataclass(frozen=True, kw_only=True)
class Result:
    """How far two backends were apart in one cell."""

    model: str
    cell: Cell
    difference: Difference
    full: int  # images whose output had no row left, in the reference
    partly: int  # images whose output had some rows

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON can hold it."""
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
    """The cells of one model and one kind of images together."""

    model: str
    kind: Kind
    cells: int
    difference: Difference
    full: int
    partly: int
    worst: Result  # the cell that needs the most of the tolerance
    beyond: int  # cells that are outside of it

    @property
    def status(self) -> str:
        """What is wrong, or ok."""
        if self.beyond:
            return f"{self.beyond} of {self.cells} cells beyond the tolerance"
        missing = {
            Kind.ORDINARY: self.partly == 0 and "no output that is partly full",
            Kind.EMPTY: self.difference.images_without_detections == 0 and "no empty output",
            Kind.CROWDED: self.full == 0 and "no full output",
        }
        return missing[self.kind] or "ok"

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON can hold it."""
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
    """The difference of two backends on the batches of a cell."""
    parts, full, partly = [], 0, 0
    for feeds in cell_feeds(cell):
        expected = reference(feeds)
        parts.append(compare_outputs(expected, other(feeds), EXACT))
        counts, rows = expected["num_detections"], expected["scores"].shape[1]
        full += int((counts == rows).sum())
        partly += int(((counts > 0) & (counts < rows)).sum())
    return Result(model=model, cell=cell, difference=merge(parts), full=full, partly=partly)


def summary(results: Sequence[Result]) -> list[Row]:
    """One row for each model and kind, in the order of the results."""
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
    """How much of `EXACT` a difference needs: above 1 it is outside; infinite for NaN and detections alone."""
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
    """The rows as a Markdown table."""
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
    """A difference's fields; NaN, which JSON does not have, as text."""
    return _without_nan(dataclasses.asdict(difference))


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    inner = {name: _without_nan(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {name: "NaN" if isinstance(v, float) and np.isnan(v) else v for name, v in inner.items()}


_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class _Extent:
    """Which cells are computed of a model."""

    model: str  # as `variant_config` takes it
    batches: tuple[int, ...] = _BATCHES
    sizes_hw: tuple[tuple[int, int], ...] = _SIZES_HW
    proposals: int | None = None  # per image; None: as the model has them


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
    """The difference of two backends in every cell.

    Args:
        name: the model's, for the table.
        reference: PyTorch.
        other: the exported file.
        combinations: cells, those of a kind one after another.
        progress: hears of every cell.
    """
    results = []
    for cell in combinations:
        results.append(compare_cell(name, reference, other, cell))
        if progress:
            progress.say(f"  {cell.kind.value}, {cell}: {results[-1].difference}")
    return results


def export_and_compare(extent: _Extent, progress: Progress) -> list[Result]:
    """The results of one model, in files that are gone afterwards.

    Raises:
        UserError: where it cannot be exported.
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


def run(extents: Sequence[_Extent], progress: Progress) -> tuple[list[Result], dict[str, str]]:
    """The results of all models, and for those that could not be exported why."""
    results: list[Result] = []
    failures: dict[str, str] = {}
    for extent in extents:
        try:
            results += export_and_compare(extent, progress)
        except UserError as error:
            failures[extent.model] = error.found
            progress.say(f"{extent.model}: {error.found}")
    return results, failures


def _planned(given: argparse.Namespace) -> list[_Extent]:
    """What the command line asks for.

    Raises:
        UserError: for a model that there is not, before an hour's work.
    """
    plan = _QUICK if given.quick else FULL
    if given.model:
        first = plan[0]  # the batches and sizes of the whole matrix, or of the quick one
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
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", action="append", help="of maskrcnn.config.MODELS, also with :detectron2 or :panet+crop; repeatable")
    add("--batch", type=numbers, help=f"batch sizes, by default {','.join(map(str, _BATCHES))}")
    add("--size", type=size_hw, action="append", help="height×width of the images, as 480x640; repeatable")
    add("--quick", action="store_true", help="two models, batches of 1 and 2, smaller images")
    add("--json", type=Path, help="file to write the results to, with machine and versions")
    return parser.parse_args(arguments)


def content(
    extents: Sequence[_Extent], results: Sequence[Result], failures: dict[str, str], here: dict[str, Any]
) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "schema": _SCHEMA,
        "compared": "PyTorch FP32 and one exported ONNX file per model in ONNX Runtime, on the CPU",
        "tolerance": str(EXACT),
        "environment": here,
        "models": [dataclasses.asdict(extent) for extent in extents],
        "failures": failures,
        "rows": [row.to_dict() for row in summary(results)],
        "cells": [result.to_dict() for result in results],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares, prints the table, and returns the exit code."""
    given = parse(arguments)
    extents = _planned(given)
    results, failures = run(extents, Progress())
    rows, here = summary(results), environment()
    print("\n" + "\n".join([table(rows), "", f"- Tolerance: {EXACT}.", *machine(here)]))
    for model, reason in failures.items():
        print(f"- {model} could not be exported: {reason}")
    if given.json:
        write_json(given.json, content(extents, results, failures, here))
        print(f"\n{given.json}")
    return int(bool(failures) or any(row.status != "ok" for row in rows))


if __name__ == "__main__":
    with told_to_the_user():
        sys.exit(main())
