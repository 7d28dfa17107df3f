"""Latency and accuracy of every model file on every backend of this machine, compared with torchvision's model.

    python benchmarks/run.py

measures the newest run in `runs/`: its checkpoint, ONNX files and engines. `--workload resnet50` measures Mask R-CNN
ResNet-50 at fixed sizes instead, with random weights. A latency is only reported for a model whose detections agree
with PyTorch FP32; what cannot run has a row with the reason.

An interrupted run on a trained model is resumed; `--workload resnet50` makes its files again and so starts anew. With
`--compare`, `--max-latency` and `--min-ap`, for CI, a regression sets exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import (
    Artefacts,
    Contender,
    given_artefacts,
    newest_artefacts,
    our_contenders,
    peer_contenders,
    runs_on_gpu,
)
from measure import Measurement, measure, spread
from report import report_outputs, write_report
from session import Progress, Unfinished, count, numbers, sizes_hw
from timing import environment
from workloads import Workload, dataset_workload, resnet50_workload

from maskrcnn.errors import UserError, report_errors
from maskrcnn.files import check_outputs
from maskrcnn.weights.checkpoint import load_checkpoint

_RESNET50 = "resnet50"
_RESNET50_SIZES_HW = [(800, 1088)]
_DEFAULT_OUTPUT = Path("runs") / "benchmark"
_UNFINISHED = "unfinished.json"
_SLOWDOWN = 1.15  # allowed ratio of latencies, in addition to the spread of the samples
_AP_LOSS = 0.002
_KEY = ("model", "backend", "precision", "size", "batch")
_REQUIRED = {"model", "backend", "precision", "batch", "p50_ms"}  # keys of a row; older files have no size


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, action="append", default=[], help="file to measure, repeatable; default: the newest run")
    add("--data", type=Path, help="COCO-format dataset; default: the run's validation dataset")
    add("--split", help="split of --data; default: val")
    add("--batch", type=numbers, help="batch sizes, such as 1,4")
    add("--repeat", type=count, help="calls per model and batch size; default: 20, fewer on a slow machine")
    add("--max-images", "--images", type=count, metavar="N", help="maximum number of images for AP; default: all")
    add("--no-peers", action="store_true", help="do not measure torchvision's models")
    add("--gpu-only", action="store_true", help="leave out everything that runs on the CPU")
    add(
        "--checkpoint-only", action="store_true", help="measure the workload in PyTorch, without ONNX files and engines"
    )
    add("--compile", action="store_true", help="also measure both models with torch.compile, which takes minutes")
    add("--memory", action="store_true", help="also measure peak memory, each row in its own process")
    add("--output", type=Path, help="folder for the results; default: benchmark/ beside the model")
    add("--overwrite", action="store_true", help="replace files in --output that this benchmark did not write")
    add("--workload", choices=[_RESNET50], help="ResNet-50 with random weights instead of a trained model")
    add("--files", type=Path, help="folder to keep the workload's files in, for benchmarks/stages.py")
    add(
        "--size",
        type=sizes_hw,
        help="sizes to resize images to, such as 800x1088,800x1344, without AP; default for the workload: 800x1088",
    )
    add("--compare", type=Path, help="results.json of an earlier run; exit code 1 if a row has become worse")
    add("--max-latency", type=float, metavar="MS", help="exit code 1 if the p50 latency of a model exceeds this")
    add("--min-ap", type=float, metavar="AP", help="exit code 1 if the box AP of a model is below this")
    add("--afresh", action="store_true", help="do not resume an interrupted run")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    """Measure, write results.json, .md, .svg and .html, and print the table.

    Raises:
        SystemExit: with code 1 if a row exceeds a limit or has become worse.
    """
    given = parse(arguments)
    _check_options(given)
    # Read before measuring: the report may overwrite this file.
    before = read_results(given.compare) if given.compare else None
    progress = Progress()
    with _folder(given.files) as folder:
        artefacts, workload = _prepare(given, Path(folder), progress)
        output = given.output or _default_output(given, artefacts)
        files = (artefacts.checkpoint, *artefacts.onnx, *artefacts.engines)
        check_outputs(report_outputs(output), [*given.model, *files, given.data], overwrite=given.overwrite)
        contenders = our_contenders(artefacts, compiled=given.compile)
        if not given.no_peers and artefacts.checkpoint:
            model, example = load_checkpoint(artefacts.checkpoint), next(iter(workload.pools.values()))[0]
            contenders += peer_contenders(model, Path(folder), example, artefacts.checkpoint, compiled=given.compile)
        contenders = [each for each in contenders if not given.gpu_only or runs_on_gpu(each)]
        kept = _unfinished(given, output, contenders, workload, progress)
        rows, gpu = measure(contenders, workload, progress, memory=given.memory, kept=kept)
    machine = environment() | ({"gpu_watch": gpu} if gpu else {})
    table = write_report(output, rows, workload, machine)
    kept.finish()
    print(f"\n{table}\n\n{', '.join(str(output / f'results.{kind}') for kind in ('md', 'json', 'html'))}")
    failures = beyond_limits(rows, max_latency_ms=given.max_latency, min_ap=given.min_ap)
    if before is not None:
        worse, notes = regressions(rows, machine, before)
        print("\n".join(notes))
        failures += worse
    if failures:
        print("\n".join(["", "worse than allowed:", *failures]), file=sys.stderr)
        raise SystemExit(1)
    return rows


def _check_options(given: argparse.Namespace) -> None:
    """Refuse options that would have no effect or would fail after everything is measured."""
    workload = f"--workload {given.workload}" if given.workload else ""
    without_ap = workload or ("--size" if given.size else "")
    no_gpu = given.gpu_only and not torch.cuda.is_available()
    for is_refused, found, expected, fix in (
        (given.checkpoint_only and not workload, "--checkpoint-only without --workload", "--workload, whose files it "
         "leaves out", "pass a checkpoint with --model"),
        (workload and given.model, f"--model with {workload}", "one of them: the workload makes its files", "drop one"),
        (workload and given.max_images, f"--max-images with {workload}", "a model with an AP", "drop --max-images"),
        (without_ap and given.min_ap is not None, f"--min-ap with {without_ap}", "a measured AP", "drop one of them"),
        (workload and given.afresh, f"--afresh with {workload}", "a model; a workload is never resumed",
         "drop --afresh"),
        (given.split and not given.data, f"--split {given.split}", "the dataset of the split as well", "add --data"),
        (no_gpu, "--gpu-only", "a CUDA GPU that PyTorch can use", "drop --gpu-only; see `maskrcnn doctor`"),
    ):  # fmt: skip
        if is_refused:
            raise UserError(found, expected, fix)


def _unfinished(
    given: argparse.Namespace,
    output: Path,
    contenders: Sequence[Contender],
    workload: Workload,
    progress: Progress,
) -> Unfinished:
    """Results of an interrupted run of the same benchmark. Files that are made anew each time cannot be resumed."""
    path = output / _UNFINISHED if given.workload is None else None
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
        progress.say(f"resuming {path}: {kept.found} results (--afresh starts anew)")
    return kept


def _folder(kept: Path | None) -> contextlib.AbstractContextManager[str]:
    """The folder for files that the benchmark makes for itself."""
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
            checkpoint_only=given.checkpoint_only,
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


def beyond_limits(
    rows: Sequence[Measurement], *, max_latency_ms: float | None = None, min_ap: float | None = None
) -> list[str]:
    """Describe every row beyond a limit, peers excluded; a limit without any row to compare is exceeded, too.

    Args:
        rows: the measured rows.
        max_latency_ms: limit of the p50 latency; None: no limit.
        min_ap: limit of the box AP; None: no limit.
    """
    ours = [row for row in rows if not row.peer and row.p50_ms is not None]
    found = []
    for name, limit, values in (
        ("latency", max_latency_ms, [(row, row.p50_ms) for row in ours]),
        ("box AP", min_ap, [(row, row.box_ap) for row in ours if row.box_ap is not None]),
    ):
        if limit is None:
            continue
        if not values:
            found.append(f"{name}: no row to compare with the limit {limit:g}")
        for row, value in values:
            if value > limit if name == "latency" else value < limit:
                found.append(f"{_title(row)}: {name} {value:.4g}, limit {limit:g}")
    return found


def _title(row: Measurement) -> str:
    return f"{row.model} · {row.backend} {row.precision} · {row.size or 'own size'} · batch {row.batch}"


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json.

    Raises:
        UserError: if the file is missing or was not written by this benchmark.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        reason = "" if _is_results(content) else "no rows of latencies"
    except (OSError, ValueError) as error:
        reason = str(error)
    if reason:
        found = f"{path}: not results of this benchmark ({reason})"
        raise UserError(found, "a results.json", "pass one that `run.py` wrote")
    return content


def _is_results(content: Any) -> bool:
    rows, environment = (content.get(name) if isinstance(content, dict) else None for name in ("rows", "environment"))
    if not isinstance(rows, list) or not rows or not isinstance(environment, dict):
        return False
    return all(isinstance(row, dict) and row.keys() >= _REQUIRED for row in rows)


def regressions(
    rows: Sequence[Measurement], environment: dict[str, Any], before: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Compare rows with an earlier run's.

    Latencies are compared relative to torchvision's in the same run, which depends little on the machine and its load;
    without torchvision in both runs, in milliseconds if CPU and GPU are the same. A row is slower if it exceeds both
    `_SLOWDOWN` and the interquartile range of both runs' samples.

    Args:
        rows: the measured rows.
        environment: machine of the rows.
        before: content of the earlier results.json.

    Returns:
        One line per row that is slower or lost AP, and one line per other comparison.
    """
    known = {tuple(row.get(name) or "" for name in _KEY): row for row in before["rows"]}
    same_machine = all(environment.get(name) == before["environment"].get(name) for name in ("cpu", "gpu"))
    worse, notes = [], []
    for row in rows:
        then = known.get(tuple(getattr(row, name) or "" for name in _KEY))
        if then is None or row.p50_ms is None or then.get("p50_ms") is None:
            notes.append(f"{_title(row)}: not in both")
            continue
        if row.times_torchvision and then.get("times_torchvision"):
            factor, unit = then["times_torchvision"] / row.times_torchvision, "relative to torchvision"
        elif same_machine:
            factor, unit = row.p50_ms / then["p50_ms"], "milliseconds"
        else:
            notes.append(f"{_title(row)}: another machine and no torchvision to divide by")
            factor = None
        if factor is not None:
            noise = max(spread(row.latencies_ms), spread(then.get("latencies_ms") or ()))
            line = f"{_title(row)}: {factor:.2f} times the time ({unit}), noise {noise:.0%}"
            (worse if factor > max(_SLOWDOWN, 1 + noise) and not row.peer else notes).append(line)
        for name in ("box_ap", "mask_ap", "keypoint_ap"):
            now, was = getattr(row, name), then.get(name)
            if now is not None and was is not None and now < was - _AP_LOSS:
                worse.append(f"{_title(row)}: {name.replace('_ap', ' AP')} {now:.4f}, was {was:.4f}")
    return worse, notes


if __name__ == "__main__":
    with report_errors():
        main()
