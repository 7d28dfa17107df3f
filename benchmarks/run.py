"""Latency and accuracy of every model file on every backend of this machine, beside torchvision's own model.

    python benchmarks/run.py

takes the newest run below `runs/`: its checkpoint, its ONNX file and its engines. `--workload resnet50` measures
Mask R-CNN ResNet-50 at fixed sizes instead, with random weights. A number is only printed for a model whose
detections agree with PyTorch FP32; what cannot run has a row that says why.

A run on a trained model that was broken off goes on where it stopped; `--workload resnet50` makes its files anew and so
begins again. `--compare`, `--max-latency` and `--min-ap` make exit code 1 of what became worse, for CI.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from contenders import (
    Artefacts,
    Contender,
    given_artefacts,
    newest_artefacts,
    on_gpu,
    our_contenders,
    peer_contenders,
)
from measure import Measurement, measure
from regressions import Before, Limits, beyond_limits, read_rows, regressions
from report import write_report
from session import FILE, Progress, Unfinished, count, numbers, sizes_hw
from timing import environment
from workloads import Workload, dataset_workload, resnet50_workload

from maskrcnn.errors import UserError, told_to_the_user
from maskrcnn.weights.checkpoint import load_checkpoint

_RESNET50 = "resnet50"
_RESNET50_SIZES_HW = [(800, 1088)]
_DEFAULT_OUTPUT = Path("runs") / "benchmark"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, action="append", default=[], help="file to measure, repeatable; default: newest run")
    add("--data", type=Path, help="dataset in COCO layout; default: what the run was validated on")
    add("--split", help="split of --data; default val")
    add("--batch", type=numbers, help="batch sizes, as 1,4")
    add("--repeat", type=count, help="measured calls of each model and batch size; default 20, fewer on a slow machine")
    add("--max-images", "--images", type=count, metavar="N", help="most images to evaluate on; default all")
    add("--no-peers", action="store_true", help="leave torchvision out")
    add("--gpu-only", action="store_true", help="leave OpenVINO and the workload's 8-bit files out: they are for CPUs")
    add("--compile", action="store_true", help="ours and torchvision's by torch.compile too, which takes minutes")
    add("--memory", action="store_true", help="measure peak memory too, each row in a process of its own")
    add("--output", type=Path, help="folder for the results; default: beside the model")
    add("--workload", choices=[_RESNET50], help="random ResNet-50 instead of a trained model")
    add("--files", type=Path, help="folder to keep the workload's files in, for benchmarks/stages.py")
    add(
        "--size",
        type=sizes_hw,
        help="to resize images to, as 800x1088,800x1344; no AP then; the workload's default is 800x1088",
    )
    add("--compare", type=Path, help="an older results.json, which is read at once; exit code 1 if a row became worse")
    add("--max-latency", type=float, metavar="MS", help="exit code 1 if the p50 of a row of ours exceeds it")
    add("--min-ap", type=float, metavar="AP", help="exit code 1 if the box AP of a row of ours is below it")
    add("--afresh", action="store_true", help="do not go on with a run that was broken off")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    """Measures, writes results.json, .md, .svg and .html, and prints the table.

    Raises:
        SystemExit: with code 1 when a row is beyond a limit or became worse.
    """
    given = parse(arguments)
    _check_options(given)
    # Before anything is measured: the report may take the place of the very file that is to be compared with.
    before = read_rows(given.compare) if given.compare else None
    progress = Progress()
    with _folder(given.files) as folder:
        artefacts, workload = _prepare(given, Path(folder), progress)
        output = given.output or _default_output(given, artefacts)
        contenders = our_contenders(artefacts, compiled=given.compile)
        contenders = on_gpu(contenders) if given.gpu_only else contenders
        if not given.no_peers and artefacts.checkpoint:
            model, example = load_checkpoint(artefacts.checkpoint), next(iter(workload.pools.values()))[0]
            contenders += peer_contenders(model, Path(folder), example, artefacts.checkpoint, compiled=given.compile)
        kept = _unfinished(given, output, contenders, workload, progress)
        rows, gpu = measure(contenders, workload, progress, memory=given.memory, kept=kept)
    machine = environment() | ({"gpu_watch": gpu} if gpu else {})
    table = write_report(output, rows, workload, machine)
    kept.finish()
    print(f"\n{table}\n\n{', '.join(str(output / f'results.{kind}') for kind in ('md', 'json', 'html'))}")
    _hold_to_limits(given, rows, machine, before)
    return rows


def _check_options(given: argparse.Namespace) -> None:
    """That no option would be without effect, or is known to fail once everything is measured.

    Raises:
        UserError: naming the first that would.
    """
    kind = f"--workload {given.workload}" if given.workload else ""
    no_ap = kind or ("--size" if given.size else "")
    no_gpu = given.gpu_only and not torch.cuda.is_available()
    for is_idle, came, expected, do in (
        (kind and given.model, f"--model with {kind}", "one of them: the workload makes its files", "drop one"),
        (kind and given.max_images, f"--max-images with {kind}", "a model with an AP", "drop --max-images"),
        (no_ap and given.min_ap is not None, f"--min-ap with {no_ap}", "a measured AP", "drop one of them"),
        (kind and given.afresh, f"--afresh with {kind}", "a model; the workload always begins anew", "drop --afresh"),
        (given.split and not given.data, f"--split {given.split}", "the dataset of the split, too", "add --data"),
        (no_gpu, "--gpu-only", "a CUDA GPU that PyTorch can use", "drop --gpu-only; see `maskrcnn doctor`"),
    ):
        if is_idle:
            raise UserError(came, expected, do)


def _unfinished(
    given: argparse.Namespace,
    output: Path,
    contenders: Sequence[Contender],
    workload: Workload,
    progress: Progress,
) -> Unfinished:
    """What a broken run of the same benchmark left. Files that are made anew each time cannot be gone on with."""
    path = output / FILE if given.workload is None else None
    if given.afresh and path is not None:
        path.unlink(missing_ok=True)
    machine = environment()
    key = {
        "workload": [workload.name, list(workload.pools), list(workload.batches), workload.repeat, given.max_images],
        "contenders": [contender.fingerprint() for contender in contenders if not contender.peer],
        "peers": not given.no_peers,
        "machine": [machine[name] for name in ("cpu", "gpu", "torch_threads", "versions", "commit")],
    }
    kept = Unfinished(path, key)
    if kept.found:
        progress.say(f"going on with {path}: {kept.found} results (--afresh begins anew)")
    return kept


def _hold_to_limits(
    given: argparse.Namespace, rows: Sequence[Measurement], machine: dict, before: Before | None
) -> None:
    failures = beyond_limits(rows, Limits(given.max_latency, given.min_ap))
    if before is not None:
        worse, told = regressions(rows, machine, before)
        print("\n".join(told))
        failures += worse
    if failures:
        print("\n".join(["", "worse than allowed:", *failures]), file=sys.stderr)
        raise SystemExit(1)


def _folder(kept: Path | None) -> contextlib.AbstractContextManager[str]:
    """Where files are made that the benchmark itself needs."""
    if kept is None:
        return tempfile.TemporaryDirectory(prefix="maskrcnn-benchmark-")
    kept.mkdir(parents=True, exist_ok=True)
    return contextlib.nullcontext(str(kept))


def _prepare(given: argparse.Namespace, folder: Path, progress: Progress) -> tuple[Artefacts, Workload]:
    if given.workload == _RESNET50:
        return resnet50_workload(
            folder,
            progress,
            sizes_hw=given.size or _RESNET50_SIZES_HW,
            data=given.data,
            split=given.split,
            batches=given.batch or (1,),
            repeat=given.repeat or 7,
            budget_s=None if given.repeat else 180.0,
            gpu_only=given.gpu_only,
        )
    artefacts = given_artefacts(given.model) if given.model else newest_artefacts()
    return artefacts, dataset_workload(
        artefacts,
        data=given.data,
        split=given.split,
        sizes_hw=given.size or (),
        batches=given.batch or (1, 4),
        repeat=given.repeat or 20,
        budget_s=None if given.repeat else 35.0,
        images=given.max_images,
    )


def _default_output(given: argparse.Namespace, artefacts: Artefacts) -> Path:
    if given.workload:
        return _DEFAULT_OUTPUT.with_name(f"benchmark-{given.workload}")
    files = [path for path in (artefacts.checkpoint, *artefacts.onnx, *artefacts.engines) if path]
    return files[0].parent / "benchmark" if files else _DEFAULT_OUTPUT


if __name__ == "__main__":
    with told_to_the_user():
        main()
