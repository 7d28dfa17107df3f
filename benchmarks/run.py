"""Latency and accuracy of every model file on every backend of this machine, beside torchvision's own model.

    python benchmarks/run.py

takes the newest run below `runs/`: its checkpoint, its ONNX file and its engines. `--workload resnet50` measures
Mask R-CNN ResNet-50 at a fixed size instead, with random weights. A number is only printed for a model whose
detections agree with PyTorch FP32; what cannot run has a row that says why.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from arguments import numbers, size_hw
from contenders import Artefacts, given_artefacts, newest_artefacts, our_contenders, peer_contenders
from measure import Measurement, measure
from progress import Progress
from report import write_report
from timing import environment
from workloads import Workload, dataset_workload, resnet50_workload

from maskrcnn.checkpoint import load_checkpoint
from maskrcnn.errors import told_to_the_user

RESNET50 = "resnet50"
DEFAULT_OUTPUT = Path("runs") / "benchmark"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, action="append", default=[], help="file to measure, repeatable; default: newest run")
    add("--data", type=Path, help="dataset in COCO layout; default: what the run was validated on")
    add("--split", help="split of --data; default val")
    add("--batch", type=numbers, help="batch sizes, as 1,4")
    add(
        "--repeat", type=int, help="measured calls of each model and batch size; default 20, or fewer on a slow machine"
    )
    add("--images", type=int, help="images to evaluate on; default all")
    add("--no-peers", action="store_true", help="leave torchvision out")
    add("--output", type=Path, help="folder for results.json and results.md; default: beside the model")
    add("--workload", choices=[RESNET50], help="random ResNet-50 instead of a trained model")
    add("--files", type=Path, help="folder to keep the workload's files in, for benchmarks/stages.py")
    add("--size", type=size_hw, default=(800, 1088), help="of the workload's images, height×width, as 800x1088")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    """Measures, writes results.json and results.md, and prints the table."""
    given = parse(arguments)
    progress = Progress()
    with _folder(given.files) as folder:
        artefacts, workload = _prepare(given, Path(folder), progress)
        contenders = our_contenders(artefacts)
        if not given.no_peers and artefacts.checkpoint:
            model = load_checkpoint(artefacts.checkpoint)
            contenders += peer_contenders(model, Path(folder), workload.pool[0])
        rows = measure(contenders, workload, progress)
    output = given.output or _default_output(given, artefacts)
    table = write_report(output, rows, workload, environment())
    print(f"\n{table}\n\n{output / 'results.json'} and {output / 'results.md'}")
    return rows


def _folder(kept: Path | None) -> contextlib.AbstractContextManager[str]:
    """Where files are made that the benchmark itself needs."""
    if kept is None:
        return tempfile.TemporaryDirectory(prefix="maskrcnn-benchmark-")
    kept.mkdir(parents=True, exist_ok=True)
    return contextlib.nullcontext(str(kept))


def _prepare(given: argparse.Namespace, folder: Path, progress: Progress) -> tuple[Artefacts, Workload]:
    if given.workload == RESNET50:
        return resnet50_workload(
            folder,
            progress,
            size_hw=given.size,
            data=given.data,
            split=given.split,
            batches=given.batch or (1,),
            repeat=given.repeat or 7,
            budget_s=None if given.repeat else 180.0,
        )
    artefacts = given_artefacts(given.model) if given.model else newest_artefacts()
    return artefacts, dataset_workload(
        artefacts,
        data=given.data,
        split=given.split,
        batches=given.batch or (1, 4),
        repeat=given.repeat or 20,
        budget_s=None if given.repeat else 35.0,
        images=given.images,
    )


def _default_output(given: argparse.Namespace, artefacts: Artefacts) -> Path:
    if given.workload:
        return DEFAULT_OUTPUT.with_name(f"benchmark-{given.workload}")
    files = [path for path in (artefacts.checkpoint, *artefacts.onnx, *artefacts.engines) if path]
    return files[0].parent / "benchmark" if files else DEFAULT_OUTPUT


if __name__ == "__main__":
    with told_to_the_user():
        main()
