"""What a training benchmark measured, as JSON and as a Markdown page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from report import aligned, machine, number

SCHEMA = 1
TIMED = (
    "one optimizer step, from a batch of resized images in the host's memory: transfer, forward, losses, backward and "
    "update. Ours takes object masks as crops; torchvision's takes them at image size, as its reference does, and "
    "resizes images and masks once more inside the model, to the size that they have"
)


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One trainer, in one precision."""

    trainer: str
    precision: str
    status: str  # "ok" or "not run"
    reason: str = ""
    steps: int = 0
    p50_s: float | None = None
    p90_s: float | None = None
    images_per_s: float | None = None
    times_torchvision: float | None = None  # median over rounds of torchvision's latency divided by this one's
    times_torchvision_p10: float | None = None
    times_torchvision_p90: float | None = None
    peak_memory_mb: float | None = None
    synchronisations: int | None = None  # per step; None on a CPU


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """One model on one workload."""

    model: str
    workload: str
    size_hw: tuple[int, int]  # of the first batch, padded
    batch: int
    objects_per_image: float
    device: str
    batch_norm: str
    trainable_stages: int
    losses: dict[str, dict[str, float]]  # of both trainers on the first batch, before timing
    rows: tuple[TrainingRow, ...]
    stages_ms: dict[str, dict[str, float]]  # of our step, by precision
    workers: int
    pipeline_images_per_s: float | None
    notes: tuple[str, ...] = ()


def as_json(reports: Sequence[TrainingReport], environment: dict[str, Any]) -> dict[str, Any]:
    """Everything, for a machine."""
    content = [dataclasses.asdict(report) for report in reports]
    return {"schema": SCHEMA, "timed": TIMED, "environment": environment, "reports": content}


def as_markdown(report: TrainingReport) -> str:
    """The table of a report, with what was checked before and what limits our step."""
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
        *(_stages(precision, stages) for precision, stages in report.stages_ms.items()),
    ]
    if report.pipeline_images_per_s is not None:
        rate = f"{report.pipeline_images_per_s:.1f} images/s with {report.workers} worker(s)"
        lines.append(f"- Our data loader by itself: {rate}.")
    return "\n".join([*lines, *(f"- {note}" for note in report.notes), ""])


def page(reports: Sequence[TrainingReport], environment: dict[str, Any]) -> str:
    """All reports with what was timed and where."""
    notes = [
        f"- Timed: {TIMED}.",
        "- The trainers take turns, step by step. × torchvision: torchvision's latency divided by the row's in the "
        "same round, its median, and in brackets the 10th and 90th percentile. Above 1 the row is faster.",
        "- Peak memory: in a process of its own; on a CPU its growth from before the model is made, on a GPU what "
        "PyTorch has allocated. Synchronisations: times per step that the host waits for the GPU.",
        *machine(environment),
    ]
    return "\n".join(["# Training step", "", *(as_markdown(report) for report in reports), *notes, ""])


def _stages(precision: str, stages: dict[str, float]) -> str:
    total = sum(stages.values())
    parts = ", ".join(f"{name} {value:.0f} ms ({value / total:.0%})" for name, value in stages.items())
    return f"- Stages of our step in {precision}, one after another: {parts}."


def _ratio(row: TrainingRow) -> str:
    if row.times_torchvision is None:
        return ""
    return f"{row.times_torchvision:.2f} ({row.times_torchvision_p10:.2f}–{row.times_torchvision_p90:.2f})"


_COLUMNS: list[tuple[str, Callable[[TrainingRow], str]]] = [
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
