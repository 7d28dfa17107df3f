"""Our training step compared with the step of torchvision's reference script, in one run from the same weights.

    python benchmarks/train.py --batch 2 --precision fp32,bf16

measures Mask R-CNN ResNet-50 at 800×1088 and the small default model at 128×128, on generated images or on those of
`--data`: latency, memory, synchronisations, stages, and the rate of the data loader. Before anything is timed, both
trainers' losses on the first batch must agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from resources import call_in_new_process
from session import Progress, aligned, number, numbers, one_line, size_hw
from timing import Samples, environment, machine, percentile, time_in_turns
from trainers import (
    NO_AUGMENTATION,
    OURS,
    SPLIT,
    THEIRS,
    OurTrainer,
    Trainer,
    Work,
    compared_losses,
    generated_dataset,
    make_work,
    trainers_on,
    write_weights,
)

from maskrcnn.config import TrainConfig, to_dict
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.layouts import find_split
from maskrcnn.errors import UserError, report_errors
from maskrcnn.files import Output, check_outputs, write_json
from maskrcnn.model import detector
from maskrcnn.settings import assignments, merged
from maskrcnn.training.distributed import choose_device
from maskrcnn.training.loader import training_loader
from maskrcnn.training.recipe import SHAPES_SIZE_PX, SMALL_MODEL, training_config
from maskrcnn.training.samples import TrainingSamples

_RESNET50 = "maskrcnn_resnet50_fpn"
_RESNET50_SIZE_HW = (800, 1088)
_COCO_CLASSES = 80
_POOL = 4  # different batches
_MEMORY_STEPS = 3
_MEMORY_LIMIT_S = 1800
_PIPELINE_S = 5.0
_LEARNING_RATE = 1e-3  # with random weights, larger ones diverge
_PRECISIONS = ("fp32", "bf16", "fp16")
_SCHEMA = 1
_TIMED = (
    "one optimizer step, from a batch of resized images in host memory: transfer, forward, losses, backward and "
    "update. Ours takes object masks as crops; torchvision's takes them at image size, as its reference script does, "
    "and resizes images and masks once more inside the model, to the same size"
)


@dataclass(frozen=True, kw_only=True)
class _TrainingRow:
    """Results of one trainer in one precision."""

    trainer: str
    precision: str
    status: str  # "ok" or "not run"
    reason: str = ""
    steps: int = 0
    p50_s: float | None = None
    p90_s: float | None = None
    images_per_s: float | None = None
    times_torchvision: float | None = None  # median over rounds of torchvision's latency / this latency
    times_torchvision_p10: float | None = None
    times_torchvision_p90: float | None = None
    peak_memory_mb: float | None = None
    synchronisations: int | None = None  # per step; None on a CPU


@dataclass(frozen=True, kw_only=True)
class _TrainingReport:
    """Results of one model on one workload."""

    model: str
    workload: str
    size_hw: tuple[int, int]  # of the first batch, padded
    batch: int
    objects_per_image: float
    device: str
    batch_norm: str
    trainable_stages: int
    losses: dict[str, dict[str, float]]  # of both trainers on the first batch, before timing
    rows: tuple[_TrainingRow, ...]
    stages_ms: dict[str, dict[str, float]]  # median of each stage of our step, by precision
    workers: int
    pipeline_images_per_s: float | None
    notes: tuple[str, ...] = ()


def _as_markdown(report: _TrainingReport) -> str:
    """Format a report: its table, the loss comparison, the stages of our step and the data loader's rate."""
    height, width = report.size_hw
    sums = " and ".join(f"{name} {losses['sum']:.4f}" for name, losses in report.losses.items())
    lines = [
        f"## {report.model}, {report.batch} × {height}×{width}, {report.device}",
        "",
        aligned([name for name, _ in _COLUMNS], [[show(row) for _, show in _COLUMNS] for row in report.rows]),
        "",
        f"- Workload: {report.workload}, {report.objects_per_image:.1f} objects per image; batch norm "
        f"{report.batch_norm}, {report.trainable_stages} of 5 backbone stages train.",
        f"- Loss of the first batch with the same weights and fixed batch norm: {sums or 'not computed'}.",
    ]
    for precision, stages in report.stages_ms.items():
        parts = ", ".join(f"{name} {ms:.0f} ms ({ms / sum(stages.values()):.0%})" for name, ms in stages.items())
        lines.append(f"- Stages of our step in {precision}, one after another: {parts}.")
    if report.pipeline_images_per_s is not None:
        rate = f"{report.pipeline_images_per_s:.1f} images/s with {report.workers} worker(s)"
        lines.append(f"- Our data loader alone: {rate}.")
    return "\n".join([*lines, *(f"- {note}" for note in report.notes), ""])


def _page(reports: Sequence[_TrainingReport], environment: dict[str, Any]) -> str:
    """All reports, with notes and machine."""
    notes = [
        f"- Timed: {_TIMED}.",
        "- The trainers' steps are interleaved. × torchvision: torchvision's latency divided by the row's in the same "
        "round, its median, and in brackets the 10th and 90th percentile. Above 1 the row is faster.",
        "- Peak memory, measured in a separate process: on a CPU the growth since before the model is made, on a GPU "
        "the memory allocated by PyTorch. Synchronisations: times per step that the host waits for the GPU.",
        *machine(environment),
    ]
    return "\n".join(["# Training step", "", *(_as_markdown(report) for report in reports), *notes, ""])


def _ratio(row: _TrainingRow) -> str:
    if row.times_torchvision is None:
        return ""
    return f"{row.times_torchvision:.2f} ({row.times_torchvision_p10:.2f}–{row.times_torchvision_p90:.2f})"


_COLUMNS: list[tuple[str, Callable[[_TrainingRow], str]]] = [
    ("trainer", lambda row: row.trainer),
    ("precision", lambda row: row.precision),
    ("steps", lambda row: str(row.steps or "")),
    ("p50 s", number("p50_s", ".3f")),
    ("p90 s", number("p90_s", ".3f")),
    ("images/s", number("images_per_s", ".2f")),
    ("× torchvision", _ratio),
    ("peak MB", number("peak_memory_mb", ".0f")),
    ("syncs", number("synchronisations", "d")),
    ("status", lambda row: f"{row.status}: {row.reason}".replace("|", "/") if row.reason else row.status),
]


def _wait(device: torch.device) -> None:
    """Wait for all queued work of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synchronisations(run: Callable[[], Any], device: torch.device) -> int | None:
    """Count synchronisations of host and GPU in a call, with PyTorch's sync debug mode; None on a CPU."""
    if device.type != "cuda":
        return None
    _wait(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing cuda operation" in str(warning.message).lower() for warning in caught)


def stages_ms(trainer: OurTrainer, work: Work, repeat: int) -> dict[str, float]:
    """Measure the median milliseconds of each stage of our step.

    The device is synchronised after each stage, so on a GPU their sum exceeds the latency of the step.
    """
    marks: list[tuple[str, float]] = []

    def mark(name: str) -> None:
        _wait(trainer.device)
        marks.append((name, time.perf_counter()))

    rounds: dict[str, list[float]] = {}
    with _marked(trainer, mark):
        for _ in range(repeat):
            marks.clear()
            mark("start")
            trainer.run(work)
            mark("averages and statistics")
            for (_, before), (name, after) in itertools.pairwise(marks):
                rounds.setdefault(name, []).append(1000 * (after - before))
    return {name: percentile(values, 50) for name, values in rounds.items()}


@contextmanager
def _marked(trainer: OurTrainer, mark: Callable[[str], None]) -> Iterator[None]:
    """Call `mark` at the end of each stage of the trainer's step within the context."""

    def marking(function: Callable[..., Any], name: str, before: str | None = None) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if before:
                mark(before)
            result = function(*arguments, **named)
            mark(name)
            return result

        return wrapped

    model, optimizer = trainer.model, trainer.optimizer
    patches = [
        mock.patch.object(model, "features", marking(model.features, "backbone and FPN", "transfer and layout")),
        mock.patch.object(model.rpn, "forward", marking(model.rpn.forward, "RPN head")),
        mock.patch.object(detector, "rpn_losses", marking(detector.rpn_losses, "RPN losses")),
        mock.patch.object(model.rpn, "proposals", marking(model.rpn.proposals, "proposals")),
        mock.patch.object(detector, "roi_losses", marking(detector.roi_losses, "RoI heads and losses")),
        mock.patch.object(optimizer, "step", marking(optimizer.step, "optimizer", "backward and clipping")),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def pipeline_images_per_s(config: TrainConfig, seconds: float) -> float:
    """Measure images per second of our data loader with `config.workers`, for about `seconds` after the first batch."""
    dataset = CocoDataset.load(config.data, config.train_split, images=config.images or None)
    samples = TrainingSamples(dataset, config.model.preprocessing, augment=NO_AUGMENTATION, seed=config.seed)
    loader, sampler = training_loader(samples, batch_size=config.batch_size, workers=config.workers, pin_memory=False)
    images, start = 0, None
    while True:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            now = time.perf_counter()
            if start is None:
                start = now
                continue
            images += len(batch.image_ids)
            if now - start > seconds:
                return images / (now - start)
        sampler.epoch += 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", action="append", help=f"model name, repeatable; default: {_RESNET50} and {SMALL_MODEL}")
    add("--size", type=size_hw, help="size of generated images, height×width; default: 800x1088, small model 128x128")
    add("--batch", type=numbers, default=(2,), help="batch sizes, such as 2,4; default: 2")
    add("--precision", default="fp32,bf16", help=f"comma-separated, of {','.join(_PRECISIONS)}; default: fp32,bf16")
    add("--steps", type=int, default=20, help="measured steps per trainer; default: 20")
    add("--warmup", type=int, default=2, help="unmeasured steps before them; default: 2")
    add("--data", type=Path, help="COCO-format dataset instead of generated images")
    add("--split", default=SPLIT, help=f"split of --data; default: {SPLIT}")
    add(
        "--set",
        dest="settings",
        action="append",
        default=[],
        help="training setting, such as batch_norm=train; repeatable",
    )
    add("--workers", type=int, default=1, help="processes of the data loader; affects its rate only; default: 1")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--no-memory", action="store_true", help="do not measure peak memory, which needs a process per trainer")
    add("--json", type=Path, help="JSON file for the results")
    add("--markdown", action="store_true", help="print a Markdown page with notes and machine")
    given = parser.parse_args(arguments)
    given.precision = given.precision.split(",")
    if unknown := set(given.precision) - set(_PRECISIONS):
        parser.error(f"--precision {', '.join(unknown)}: expected {', '.join(_PRECISIONS)}")
    return given


def main(arguments: Sequence[str] | None = None) -> list[_TrainingReport]:
    """Measure every model at every batch size and print the tables."""
    given = parse(arguments)
    check_outputs([Output("--json", given.json, None)] if given.json else [], [given.data])
    progress = Progress()
    reports = []
    for model in given.model or [_RESNET50, SMALL_MODEL]:
        for batch_size in given.batch:
            with tempfile.TemporaryDirectory(prefix="maskrcnn-train-benchmark-") as folder:
                config = configuration(given, model, batch_size, Path(folder))
                reports.append(_measure(config, given, Path(folder) / "weights.safetensors", progress))
            if not given.markdown:
                print(_as_markdown(reports[-1]))
    stamp = environment()
    if given.markdown:
        print(_page(reports, stamp))
    if given.json:
        content = [dataclasses.asdict(report) for report in reports]
        write_json(given.json, {"schema": _SCHEMA, "timed": _TIMED, "environment": stamp, "reports": content})
    return reports


def configuration(given: argparse.Namespace, model: str, batch_size: int, folder: Path) -> TrainConfig:
    """Configuration of both trainers: as torchvision's reference trains on COCO; for the small model as ours does."""
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


def _measure(config: TrainConfig, given: argparse.Namespace, weights: Path, progress: Progress) -> _TrainingReport:
    device = choose_device(config.device)
    work = make_work(config, _POOL, pinned=device.type == "cuda")
    write_weights(config, work[0], device, weights)
    losses, rows, stages, notes = {}, [], {}, []
    for precision in given.precision:
        kinds = trainers_on(device, precision)
        trainers = {name: make(config, weights, device, precision) for name, make in kinds.items()}
        try:
            losses = losses or compared_losses(trainers[OURS], trainers[THEIRS], work[0])
        except ValueError as error:
            rows += [_TrainingRow(trainer=n, precision=precision, status="not run", reason=str(error)) for n in kinds]
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
    return _TrainingReport(
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
    """Interleaved latencies of the trainers' steps; the samples hold an exception of a trainer."""

    def call(trainer: Trainer) -> Callable[[int], None]:
        def step(turn: int) -> None:
            trainer.run(work[turn % len(work)])
            _wait(device)

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


def _row(name: str, precision: str, samples: dict[str, Samples], images: int) -> _TrainingRow:
    own, theirs = samples[name], samples[THEIRS]
    if own.error is not None:
        return _TrainingRow(trainer=name, precision=precision, status="not run", reason=one_line(own.error))
    ratios = {}
    if theirs.error is None:
        values = [b / a for a, b in zip(own.latencies_ms, theirs.latencies_ms, strict=True)]
        ratios = {
            "times_torchvision": percentile(values, 50),
            "times_torchvision_p10": percentile(values, 10),
            "times_torchvision_p90": percentile(values, 90),
        }
    return _TrainingRow(
        trainer=name,
        precision=precision,
        status="ok",
        steps=len(own.latencies_ms),
        p50_s=own.percentile_ms(50) / 1000,
        p90_s=own.percentile_ms(90) / 1000,
        images_per_s=own.per_second(images),
        **ratios,
    )


def _with_syncs(row: _TrainingRow, trainer: Trainer, work: Work, device: torch.device) -> _TrainingRow:
    if row.status != "ok":
        return row
    return replace(row, synchronisations=synchronisations(lambda: trainer.run(work), device))


def _with_memory(row: _TrainingRow, config: TrainConfig, weights: Path, notes: list[str]) -> _TrainingRow:
    if row.status != "ok":
        return row
    task = {"config": to_dict(config), "weights": str(weights), "trainer": row.trainer, "precision": row.precision}
    try:
        peak = call_in_new_process("trainers:peak_memory_mb", {**task, "steps": _MEMORY_STEPS}, _MEMORY_LIMIT_S)
        reason = "this system does not report it"
    except RuntimeError as error:
        peak, reason = None, str(error)
    if peak is None:
        notes.append(f"no peak memory of {row.trainer} in {row.precision}: {reason}")
    return replace(row, peak_memory_mb=peak)


if __name__ == "__main__":
    with report_errors():
        main()
