"""A benchmark's results as JSON and as a Markdown table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measure import Measurement
from workloads import Workload

from maskrcnn.files import atomic_path, write_json

SCHEMA = 1
TIMED = (
    "one call from decoded images in memory (uint8 RGB) to boxes, scores, labels and, where the model has them, masks "
    "pasted into the original image and encoded as COCO run lengths: preprocessing, inference and postprocessing, of "
    "torchvision's model as of ours"
)


def write_report(folder: Path, rows: Sequence[Measurement], workload: Workload, environment: dict[str, Any]) -> str:
    """Writes results.json and results.md, each whole or not at all, and returns the table."""
    content = {
        "schema": SCHEMA,
        "timed": TIMED,
        "workload": {
            "name": workload.name,
            "batches": list(workload.batches),
            "repeat": workload.repeat,
            "notes": list(workload.notes),
        },
        "environment": environment,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_json(folder / "results.json", content)
    text = table(rows)
    with atomic_path(folder / "results.md") as draft:
        draft.write_text(_page(text, workload, environment), encoding="utf-8")
    return text


def table(rows: Sequence[Measurement]) -> str:
    """The rows as a Markdown table, its columns of even width."""
    with_onnx = any(row.times_torchvision_onnx for row in rows)
    columns = [column for column in _COLUMNS if with_onnx or column[0] != "× tv ONNX"]
    for kind in ("box", "mask"):
        if not any(getattr(row, f"{kind}_ap") is not None for row in rows):
            columns = [column for column in columns if f"{kind} AP" not in column[0]]
    return aligned([name for name, _ in columns], [[show(row) for _, show in columns] for row in rows])


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
    ("Δ box AP", number("box_ap_difference", "+.4f")),
    ("Δ mask AP", number("mask_ap_difference", "+.4f")),
    ("status", _status),
]


def _page(text: str, workload: Workload, environment: dict[str, Any]) -> str:
    lines = [
        f"# Benchmark: {workload.name}",
        "",
        text,
        "",
        f"- Timed: {TIMED}. The calls of all rows of a batch size take turns. Percentiles are nearest-rank samples.",
        "- × torchvision: torchvision's p50 in eager PyTorch divided by the row's, at the same batch size; "
        "× tv ONNX: likewise its legacy export in ONNX Runtime. Above 1 the row is faster.",
        "- Δ: difference to the reference, PyTorch FP32. AP is measured image by image.",
        "- Inexact: half precision whose detections depart from the reference beyond the tolerance.",
        *[f"- {note}" for note in workload.notes],
        *machine(environment),
        "",
    ]
    return "\n".join(lines)


def machine(environment: dict[str, Any]) -> list[str]:
    """What `timing.environment` says, as two items of a list."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return [
        f"- Machine: {environment['cpu']}, {environment['cores']} cores, "
        f"{environment['torch_threads']} PyTorch threads, {environment['memory_gb']} GB, "
        f"GPU: {environment['gpu'] or 'none'}; {environment['system']}, Python {environment['python']}",
        f"- Versions: {versions}; commit {environment['commit'] or 'unknown'}; {environment['date']}",
    ]
