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
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arguments import numbers, size_hw
from matrix_cells import BATCHES, SIZES_HW, Cell, cells
from matrix_models import matrix_model, variant_config
from matrix_report import Result, compare_cell, summary, table
from progress import Progress
from report import machine
from timing import environment

from maskrcnn.errors import UserError, told_to_the_user
from maskrcnn.export.exporter import export_onnx
from maskrcnn.files import write_json
from maskrcnn.runtime.backend import Backend
from maskrcnn.runtime.onnxruntime_backend import OnnxRuntimeBackend
from maskrcnn.runtime.torch_backend import TorchBackend
from maskrcnn.runtime.verification.compare import EXACT

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Which cells are computed of a model."""

    model: str  # as `variant_config` takes it
    batches: tuple[int, ...] = BATCHES
    sizes_hw: tuple[tuple[int, int], ...] = SIZES_HW
    proposals: int | None = None  # per image; None: as the model has them


def _lighter(model: str) -> Extent:
    return Extent(model=model, sizes_hw=(*SIZES_HW[:-1], (320, 1344)), proposals=300)


FULL = (
    Extent(model="maskrcnn_resnet18_fpn_small"),
    _lighter("maskrcnn_resnet18_fpn"),
    _lighter("maskrcnn_resnet18_fpn_v2"),
    _lighter("fasterrcnn_resnet18_fpn"),
    _lighter("fasterrcnn_resnet18_fpn_v2"),
    _lighter("keypointrcnn_resnet50_fpn"),
    _lighter("maskrcnn_resnet50_fpn:detectron2"),
    _lighter("maskrcnn_resnet18_fpn:panet+crop"),
    _lighter("maskrcnn_resnet18_fpn:bifpn+pool"),
    Extent(model="maskrcnn_resnet50_fpn"),
)
QUICK = tuple(
    Extent(model=model, batches=(1, 2), sizes_hw=((160, 192), (320, 224), (64, 1344)))
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


def export_and_compare(extent: Extent, progress: Progress) -> list[Result]:
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


def run(extents: Sequence[Extent], progress: Progress) -> tuple[list[Result], dict[str, str]]:
    """The results of all models, and for those that could not be exported why."""
    results: list[Result] = []
    failures: dict[str, str] = {}
    for extent in extents:
        try:
            results += export_and_compare(extent, progress)
        except UserError as error:
            failures[extent.model] = error.came
            progress.say(f"{extent.model}: {error.came}")
    return results, failures


def planned(given: argparse.Namespace) -> list[Extent]:
    """What the command line asks for.

    Raises:
        UserError: for a model that there is not, before an hour's work.
    """
    plan = QUICK if given.quick else FULL
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
    add("--batch", type=numbers, help=f"batch sizes, by default {','.join(map(str, BATCHES))}")
    add("--size", type=size_hw, action="append", help="height×width of the images, as 480x640; repeatable")
    add("--quick", action="store_true", help="two models, batches of 1 and 2, smaller images")
    add("--json", type=Path, help="file to write the results to, with machine and versions")
    return parser.parse_args(arguments)


def content(
    extents: Sequence[Extent], results: Sequence[Result], failures: dict[str, str], here: dict[str, Any]
) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "schema": SCHEMA,
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
    extents = planned(given)
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
