"""A benchmark's results as JSON, as a Markdown table, as a chart and as an HTML page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measure import Measurement
from page import ap_chart, html_page
from splits import PARTS
from workloads import Workload

from maskrcnn.files import atomic_path, write_json

SCHEMA = 2  # see results.schema.json
TIMED = (
    "one call from decoded images in memory (uint8 RGB) to boxes, scores, labels and, where the model has them, masks "
    "pasted into the original image and encoded as COCO run lengths: preprocessing, inference and postprocessing, of "
    "torchvision's model as of ours"
)


def write_report(folder: Path, rows: Sequence[Measurement], workload: Workload, environment: dict[str, Any]) -> str:
    """Writes results.json, .md, .html and, where there is an AP, .svg, each whole or not at all; returns the table."""
    content = {
        "schema": SCHEMA,
        "timed": TIMED,
        "workload": {
            "name": workload.name,
            "sizes": [size for size in workload.pools if size],
            "batches": list(workload.batches),
            "repeat": workload.repeat,
            "notes": list(workload.notes),
        },
        "environment": environment,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_json(folder / "results.json", content)
    text = table(rows)
    columns = _columns(rows)
    heads, cells = [name for name, _ in columns], [[show(row) for _, show in columns] for row in rows]
    picture, notes = ap_chart(rows), [line.removeprefix("- ") for line in _notes(workload, environment)]
    pages = {
        "md": _page(text, rows, workload, environment, has_picture=picture is not None),
        "html": html_page(f"Benchmark: {workload.name}", heads, cells, rows, notes),
        "svg": picture,
    }
    for kind, content in pages.items():
        if content is not None:
            with atomic_path(folder / f"results.{kind}") as draft:
                draft.write_text(content, encoding="utf-8")
    return text


def table(rows: Sequence[Measurement]) -> str:
    """The rows as a Markdown table, its columns of even width."""
    columns = _columns(rows)
    return aligned([name for name, _ in columns], [[show(row) for _, show in columns] for row in rows])


def _columns(rows: Sequence[Measurement]) -> list[tuple[str, Callable[[Measurement], str]]]:
    """Those that some row has something for."""
    shown = [(name, show) for name, show in _COLUMNS if any(show(row) for row in rows)]
    return [column for column in shown if column[0] != "size" or any(row.size for row in rows)]


def split_table(rows: Sequence[Measurement]) -> str:
    """Where the time of a call goes, in milliseconds, as a Markdown table; empty where nothing was split."""
    split = [row for row in rows if row.split_ms]
    parts = [part for part in PARTS if any(part in row.split_ms for row in split)]
    lines = [
        [
            *(row.model, f"{row.backend} {row.precision}", row.size, str(row.batch)),
            *(f"{row.split_ms[part]:.2f}" if part in row.split_ms else "" for part in parts),
        ]
        for row in split
    ]
    return aligned(["model", "backend", "size", "batch", *parts], lines) if split else ""


def aligned(head: list[str], rows: Sequence[list[str]]) -> str:
    """A Markdown table, its columns of even width but for the last, whose texts are long."""
    widths = [max(len(line[k]) for line in (head, *rows)) for k in range(len(head))]
    widths[-1] = len(head[-1])
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def number(name: str, form: str) -> Callable[[Any], str]:
    """A column that shows a field of a row, and nothing where it is None."""

    def show(row: Any) -> str:
        value = getattr(row, name)
        return "" if value is None else format(value, form)

    return show


def _status(row: Measurement) -> str:
    text = f"{row.status}: {row.reason}" if row.reason else row.status
    return text.replace("|", "/")


_COLUMNS: list[tuple[str, Callable[[Measurement], str]]] = [
    ("model", lambda row: row.model),
    ("backend", lambda row: row.backend),
    ("precision", lambda row: row.precision),
    ("size", lambda row: row.size),
    ("batch", lambda row: str(row.batch)),
    ("calls", lambda row: str(row.samples or "")),
    ("p50 ms", number("p50_ms", ".1f")),
    ("p90 ms", number("p90_ms", ".1f")),
    ("p99 ms", number("p99_ms", ".1f")),
    ("images/s", number("images_per_s", ".2f")),
    ("× torchvision", number("times_torchvision", ".2f")),
    ("× tv ONNX", number("times_torchvision_onnx", ".2f")),
    ("box AP", number("box_ap", ".4f")),
    ("mask AP", number("mask_ap", ".4f")),
    ("keypoint AP", number("keypoint_ap", ".4f")),
    ("Δ box AP", number("box_ap_difference", "+.4f")),
    ("Δ mask AP", number("mask_ap_difference", "+.4f")),
    ("Δ keypoint AP", number("keypoint_ap_difference", "+.4f")),
    ("host MB", number("host_mb", ".0f")),
    ("model MB", number("model_mb", ".0f")),
    ("GPU MB", number("device_mb", ".0f")),
    ("file MB", number("file_mb", ".1f")),
    ("build s", number("build_s", ".1f")),
    ("status", _status),
]


def _page(
    text: str, rows: Sequence[Measurement], workload: Workload, environment: dict[str, Any], *, has_picture: bool
) -> str:
    split = split_table(rows)
    lines = [f"# Benchmark: {workload.name}", "", text, ""]
    if has_picture:
        lines += ["![AP against latency](results.svg)", ""]
    if split:
        lines += ["Where the time of a call goes, milliseconds, medians of other calls:", "", split, ""]
    return "\n".join([*lines, *_notes(workload, environment), ""])


def _notes(workload: Workload, environment: dict[str, Any]) -> list[str]:
    return [
        f"- Timed: {TIMED}. The calls of all rows of a size and batch take turns. Percentiles are nearest-rank "
        "samples.",
        "- × torchvision: torchvision's p50 in eager PyTorch divided by the row's, at the same size and batch; "
        "× tv ONNX: likewise its legacy export in ONNX Runtime. Above 1 the row is faster.",
        "- Δ: difference to the reference, PyTorch FP32. AP is measured image by image.",
        "- Inexact: half precision or integers whose detections depart from the reference beyond the tolerance.",
        "- Memory, with --memory: the most that a process with this row alone has held, Python and libraries included; "
        "model MB is what opening the file and two calls have added.",
        *[f"- {note}" for note in workload.notes],
        *machine(environment),
    ]


def machine(environment: dict[str, Any]) -> list[str]:
    """What `timing.environment` says, as two items of a list."""
    watched = environment.get("gpu_watch") or {}
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return [
        f"- Machine: {environment['cpu']}, {environment['cores']} cores, "
        f"{environment['torch_threads']} PyTorch threads, {environment['memory_gb']} GB, "
        f"GPU: {environment['gpu'] or 'none'}; {environment['system']}, Python {environment['python']}",
        f"- Versions: {versions}; commit {environment['commit'] or 'unknown'}; {environment['date']}",
        *([_watched(watched)] if watched else []),
    ]


def _watched(gpu: dict[str, Any]) -> str:
    """What the GPU did while it was timed."""
    reasons = ", ".join(gpu["throttled"]) or "not throttled"
    return (
        f"- GPU while timing: {gpu['sm_clock_mhz']:.0f} of {gpu['sm_clock_max_mhz']:.0f} MHz (lowest "
        f"{gpu['sm_clock_low_mhz']:.0f}), {gpu['temperature_c']:.0f} °C, {gpu['power_w']:.0f} W, {reasons}"
    )
