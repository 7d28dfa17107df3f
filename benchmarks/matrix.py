"""How far an exported file is from PyTorch: every architecture, several batch and image sizes, all kinds of images.

    python benchmarks/matrix.py
    python benchmarks/matrix.py --quick
    python benchmarks/matrix.py --model maskrcnn_resnet101_fpn --model fasterrcnn_resnet50_fpn:detectron2

Each model is exported once, and this one file runs in ONNX Runtime what the model runs in PyTorch, both on the CPU:
batches of 1, 2 and 5 of four sizes, with ordinary images, empty ones and empty slots, and crowded ones, whose
outputs are full. Weights are random (see `matrix_models`). By default version 1 and Detectron2's conventions, one of
which concerns bottlenecks only, have a ResNet-50 and the other architectures a ResNet-18, so that two cores need
minutes; other depths are named with `--model`. The exit code is 1 when any cell is beyond `EXACT` of
`maskrcnn.runtime.compare`, and when the outputs of a kind are not as they should be.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arguments import numbers, size_hw
from matrix_cells import BATCHES, SIZES_HW, Cell, cells
from matrix_models import matrix_model, variant_config
from matrix_report import Result, compare_cell, failed, summary, table
from progress import Progress
from report import machine
from timing import environment

from maskrcnn.errors import UserError, told_to_the_user
from maskrcnn.export.exporter import export_onnx
from maskrcnn.files import write_json
from maskrcnn.runtime.backend import Backend
from maskrcnn.runtime.compare import EXACT
from maskrcnn.runtime.onnxruntime_backend import OnnxRuntimeBackend
from maskrcnn.runtime.torch_backend import TorchBackend

SCHEMA = 1
MODELS = (
    "maskrcnn_resnet18_fpn_small",
    "maskrcnn_resnet18_fpn",
    "maskrcnn_resnet18_fpn_v2",
    "fasterrcnn_resnet18_fpn",
    "fasterrcnn_resnet18_fpn_v2",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn:detectron2",
)


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much of the matrix is computed."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    sizes_hw: tuple[tuple[int, int], ...]


FULL = Extent(models=MODELS, batches=BATCHES, sizes_hw=SIZES_HW)
QUICK = Extent(
    models=("maskrcnn_resnet18_fpn_small", "fasterrcnn_resnet18_fpn"),
    batches=(1, 2),
    sizes_hw=((160, 192), (320, 224), (64, 1344)),
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


def export_and_compare(variant: str, extent: Extent, progress: Progress) -> list[Result]:
    """The results of one model, in files that are gone afterwards.

    Raises:
        UserError: where it cannot be exported.
    """
    progress.say(f"{variant}: weights")
    model = matrix_model(variant, extent.sizes_hw)
    with tempfile.TemporaryDirectory(prefix="maskrcnn-matrix-") as folder:
        progress.say(f"{variant}: export")
        path = Path(folder) / "model.onnx"
        export_onnx(model, path)
        other = OnnxRuntimeBackend(path, providers=["CPUExecutionProvider"])
        combinations = cells(extent.batches, extent.sizes_hw)
        return compare_model(variant, TorchBackend(model, device="cpu"), other, combinations, progress)


def run(extent: Extent, progress: Progress) -> tuple[list[Result], dict[str, str]]:
    """The results of all models, and for those that could not be exported why."""
    results: list[Result] = []
    failures: dict[str, str] = {}
    for variant in extent.models:
        try:
            results += export_and_compare(variant, extent, progress)
        except UserError as error:
            failures[variant] = error.came
            progress.say(f"{variant}: {error.came}")
    return results, failures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", action="append", help="of maskrcnn.config.MODELS, with :detectron2 for its conventions; repeatable")
    add("--batch", type=numbers, help=f"batch sizes, by default {','.join(map(str, FULL.batches))}")
    add("--size", type=size_hw, action="append", help="height×width of the images, as 480x640; repeatable")
    add("--quick", action="store_true", help="two models, batches of 1 and 2, smaller images")
    add("--json", type=Path, help="file to write the results to, with machine and versions")
    return parser.parse_args(arguments)


def content(extent: Extent, results: Sequence[Result], failures: dict[str, str], here: dict) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "schema": SCHEMA,
        "compared": "PyTorch FP32 and one exported ONNX file per model in ONNX Runtime, on the CPU",
        "tolerance": str(EXACT),
        "batches": list(extent.batches),
        "sizes_hw": [list(size) for size in extent.sizes_hw],
        "environment": here,
        "failures": failures,
        "rows": [row.to_dict() for row in summary(results)],
        "cells": [result.to_dict() for result in results],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares, prints the table, and returns the exit code."""
    given = parse(arguments)
    plan = QUICK if given.quick else FULL
    extent = Extent(
        models=tuple(given.model or plan.models),
        batches=given.batch or plan.batches,
        sizes_hw=tuple(given.size or plan.sizes_hw),
    )
    for variant in extent.models:
        variant_config(variant)  # a wrong name ends the command before an hour's work
    results, failures = run(extent, Progress())
    rows, here = summary(results), environment()
    print("\n" + "\n".join([table(rows), "", f"- Tolerance: {EXACT}.", *machine(here)]))
    for variant, reason in failures.items():
        print(f"- {variant} could not be exported: {reason}")
    if given.json:
        write_json(given.json, content(extent, results, failures, here))
        print(f"\n{given.json}")
    return int(bool(failures) or any(failed(row) for row in rows))


if __name__ == "__main__":
    with told_to_the_user():
        sys.exit(main())
