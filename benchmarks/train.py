"""Our training step beside the step of torchvision's reference script, in one run and from the same weights.

    python benchmarks/train.py --batch 2 --precision fp32,bf16

measures Mask R-CNN ResNet-50 at 800×1088 and the small default model at 128×128, on images drawn for the purpose, or
on those of `--data`. Before anything is timed, both trainers' losses on the first batch must agree.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arguments import numbers, size_hw
from measure import one_line
from progress import Progress
from timing import Samples, environment, percentile, time_in_turns
from train_measure import peak_memory_mb, pipeline_images_per_s, stages_ms, synchronisations, wait
from train_report import TrainingReport, TrainingRow, as_json, as_markdown, page
from train_workload import SPLIT, Work, generated_dataset, make_work
from trainers import OURS, THEIRS, TRAINERS, Trainer, compared_losses, write_weights

from maskrcnn.config import TrainConfig
from maskrcnn.data.coco import CocoDataset, find_split
from maskrcnn.errors import told_to_the_user
from maskrcnn.files import write_json
from maskrcnn.options import assignments, merged
from maskrcnn.recipes import SHAPES_SIZE_PX, SMALL_MODEL, training_config
from maskrcnn.training.device import choose_device

_RESNET50 = "maskrcnn_resnet50_fpn"
_RESNET50_SIZE_HW = (800, 1088)
_COCO_CLASSES = 80
_POOL = 4  # different batches
_MEMORY_STEPS = 3
_PIPELINE_S = 5.0
_LEARNING_RATE = 1e-3  # random weights do not stand more for long
_PRECISIONS = ("fp32", "bf16", "fp16")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", action="append", help=f"repeatable; default {_RESNET50} and {SMALL_MODEL}")
    add("--size", type=size_hw, help="of generated images, height×width; default 800x1088, small model 128x128")
    add("--batch", type=numbers, default=(2,), help="batch sizes, as 2,4")
    add("--precision", default="fp32,bf16", help=f"among {','.join(_PRECISIONS)}")
    add("--steps", type=int, default=20, help="measured steps of each trainer")
    add("--warmup", type=int, default=2, help="steps before them")
    add("--data", type=Path, help="dataset in COCO layout instead of generated images")
    add("--split", default=SPLIT, help="split of --data")
    add("--set", dest="settings", action="append", default=[], help="setting of training, as batch_norm=train")
    add("--workers", type=int, default=1, help="data loading processes, of which only the data's rate depends")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--no-memory", action="store_true", help="leave the peak memory out: it takes a process for each trainer")
    add("--json", type=Path, help="write everything there")
    add("--markdown", action="store_true", help="print a whole page, with notes and machine")
    given = parser.parse_args(arguments)
    given.precision = given.precision.split(",")
    if unknown := set(given.precision) - set(_PRECISIONS):
        parser.error(f"precision {', '.join(unknown)}: expected some of {', '.join(_PRECISIONS)}")
    return given


def main(arguments: Sequence[str] | None = None) -> list[TrainingReport]:
    """Measures every model at every batch size and prints a table of each."""
    given = parse(arguments)
    progress = Progress()
    reports = []
    for model in given.model or [_RESNET50, SMALL_MODEL]:
        for batch_size in given.batch:
            with tempfile.TemporaryDirectory(prefix="maskrcnn-train-benchmark-") as folder:
                config = _configuration(given, model, batch_size, Path(folder))
                reports.append(_measure(config, given, Path(folder) / "weights.safetensors", progress))
            if not given.markdown:
                print(as_markdown(reports[-1]))
    stamp = environment()
    if given.markdown:
        print(page(reports, stamp))
    if given.json:
        write_json(given.json, as_json(reports, stamp))
    return reports


def _configuration(given: argparse.Namespace, model: str, batch_size: int, folder: Path) -> TrainConfig:
    """How both train: for torchvision's models as its reference trains on COCO, for the small one as ours does."""
    is_small = model == SMALL_MODEL
    size = given.size or ((SHAPES_SIZE_PX,) * 2 if is_small else _RESNET50_SIZE_HW)
    settings: dict[str, Any] = {
        "model": {"name": model},
        "batch_size": batch_size,
        "learning_rate": _LEARNING_RATE,
        "clip_gradient_norm": 0.0,
        "device": given.device,
        "workers": given.workers,
        "batch_norm": "train" if is_small else "frozen",
        "trainable_stages": 5 if is_small else 3,
    }
    if given.data is None:
        classes = 3 if is_small else _COCO_CLASSES
        root, split = generated_dataset(folder / "data", _POOL * batch_size, size, classes), SPLIT
        settings["model"]["preprocessing"] = {"min_size_px": min(size), "max_size_px": max(size)}
    else:
        root, split = given.data, find_split(given.data, given.split)
    dataset = CocoDataset.load(root, split)
    return training_config(dataset, dataset, merged(settings, assignments(given.settings)))


def _measure(config: TrainConfig, given: argparse.Namespace, weights: Path, progress: Progress) -> TrainingReport:
    device = choose_device(config.device)
    work = make_work(config, _POOL, pinned=device.type == "cuda")
    write_weights(config, work[0], device, weights)
    losses, rows, stages, notes = {}, [], {}, []
    for precision in given.precision:
        trainers = {name: make(config, weights, device, precision) for name, make in TRAINERS.items()}
        try:
            losses = losses or compared_losses(trainers[OURS], trainers[THEIRS], work[0])
        except ValueError as error:
            rows += [TrainingRow(trainer=n, precision=precision, status="not run", reason=str(error)) for n in TRAINERS]
            continue
        samples = _timed(trainers, work, given, device, progress, f"{config.model.name}, {precision}")
        measured = [_row(name, precision, samples, config.batch_size) for name in trainers]
        if device.type == "cuda":
            measured = [_with_syncs(row, trainers[row.trainer], work[0], device) for row in measured]
        if measured[0].status == "ok":
            stages[precision] = stages_ms(trainers[OURS], work[0], min(given.steps, 5))
        del trainers
        if not given.no_memory:
            measured = [_with_memory(row, config, weights, notes) for row in measured]
        rows += measured
    valid = work[0].batch.valid
    return TrainingReport(
        model=config.model.name,
        workload=f"{Path(config.data).name} {config.train_split}" if given.data else "generated shapes",
        size_hw=tuple(work[0].batch.images.shape[2:]),
        batch=config.batch_size,
        objects_per_image=float(valid.sum()) / len(valid),
        device=device.type,
        batch_norm=config.batch_norm,
        trainable_stages=config.trainable_stages,
        losses=losses,
        rows=tuple(rows),
        stages_ms=stages,
        workers=config.workers,
        pipeline_images_per_s=pipeline_images_per_s(config, min(_PIPELINE_S, 0.5 * given.steps)),
        notes=tuple(notes),
    )


def _timed(
    trainers: dict[str, Trainer],
    work: Sequence[Work],
    given: argparse.Namespace,
    device: torch.device,
    progress: Progress,
    title: str,
) -> dict[str, Samples]:
    """Latencies of both trainers' steps, which take turns; what a trainer raises is in its samples."""

    def call(trainer: Trainer) -> Callable[[int], None]:
        def step(turn: int) -> None:
            trainer.run(work[turn % len(work)])
            wait(device)

        return step

    calls = {name: call(trainer) for name, trainer in trainers.items()}
    title = f"{title}: {given.steps} steps of each trainer, batch {len(work[0].images)}"
    with progress.steps(title, total=len(calls) * (given.steps + given.warmup)) as stepper:
        samples = time_in_turns(calls, repeat=given.steps, warmup=given.warmup, progress=lambda name: stepper.advance())
    for name, trainer in trainers.items():
        if samples[name].error is None:
            try:
                trainer.check()
            except FloatingPointError as error:
                samples[name] = Samples((), error)
    return samples


def _row(name: str, precision: str, samples: dict[str, Samples], images: int) -> TrainingRow:
    own, theirs = samples[name], samples[THEIRS]
    if own.error is not None:
        return TrainingRow(trainer=name, precision=precision, status="not run", reason=one_line(own.error))
    ratios = {}
    if theirs.error is None:
        values = [b / a for a, b in zip(own.latencies_ms, theirs.latencies_ms, strict=True)]
        ratios = {
            "times_torchvision": percentile(values, 50),
            "times_torchvision_p10": percentile(values, 10),
            "times_torchvision_p90": percentile(values, 90),
        }
    return TrainingRow(
        trainer=name,
        precision=precision,
        status="ok",
        steps=len(own.latencies_ms),
        p50_s=own.percentile_ms(50) / 1000,
        p90_s=own.percentile_ms(90) / 1000,
        images_per_s=own.per_second(images),
        **ratios,
    )


def _with_syncs(row: TrainingRow, trainer: Trainer, work: Work, device: torch.device) -> TrainingRow:
    if row.status != "ok":
        return row
    return replace(row, synchronisations=synchronisations(lambda: trainer.run(work), device))


def _with_memory(row: TrainingRow, config: TrainConfig, weights: Path, notes: list[str]) -> TrainingRow:
    if row.status != "ok":
        return row
    found = peak_memory_mb(config, weights, row.trainer, row.precision, _MEMORY_STEPS)
    if isinstance(found, str):
        notes.append(f"no peak memory of {row.trainer} in {row.precision}: {found}")
        return row
    return replace(row, peak_memory_mb=found)


if __name__ == "__main__":
    with told_to_the_user():
        main()
