"""The report of `benchmarks/run.py`: JSON, a Markdown table, a chart and an HTML page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measure import PARTS, Measurement, spread
from session import aligned, number
from timing import machine
from workloads import Workload

from maskrcnn.files import PAGE, FileKind, Output, atomic_path, write_json
from maskrcnn.runtime.html import page, table, text
from maskrcnn.runtime.html import row as cells_row
from maskrcnn.runtime.plots import line_chart

_SCHEMA = 2  # see results.schema.json
_TIMED = (
    "one call from decoded images in memory (uint8 RGB) to boxes, scores, labels and, where the model has them, masks "
    "pasted into the original image and encoded as COCO run lengths: preprocessing, inference and postprocessing, of "
    "torchvision's model as of ours"
)
_NOISY = 0.2  # spread of a row's calls above which the report warns
_MIN_AP_SPAN = 0.02  # of the chart's AP axis: smaller differences are noise of the validation set
_STYLE = "<style>tr.peer td, tr.absent td { color: var(--pale) }</style>"


_FILES = {  # by suffix; a chart is written beside its own results only
    "json": FileKind.starting_with("results of this benchmark", rb'\{\s*"schema": \d+,\s*"timed":'),
    "md": FileKind.starting_with("a page of this benchmark", b"# Benchmark: "),
    "html": PAGE,
    "svg": None,
}


def report_outputs(folder: Path) -> list[Output]:
    """The files of `write_report`, for `check_outputs`."""
    return [Output("--output", folder / f"results.{suffix}", kind) for suffix, kind in _FILES.items()]


def write_report(folder: Path, rows: Sequence[Measurement], workload: Workload, environment: dict[str, Any]) -> str:
    """Write results.json, .md, .html and, if AP was measured, .svg; return the Markdown table with its footnotes."""
    content = {
        "schema": _SCHEMA,
        "timed": _TIMED,
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
    reasons = [*dict.fromkeys(row.reason for row in rows if row.reason)]
    columns = [(name, show) for name, show in _COLUMNS if any(show(row) for row in rows)]
    heads = [*(name for name, _ in columns), "status"]
    cells = [[*(show(row) for _, show in columns), _status(row, reasons)] for row in rows]
    below = [f"[{number}] {reason}" for number, reason in enumerate(reasons, start=1)] + _warnings(rows)
    markdown = "\n".join([aligned(heads, cells), *(f"\n{line}" for line in below)])
    chart, notes = ap_chart(rows), _notes(workload, environment)
    files = {
        "md": _markdown_page(workload, markdown, _split_table(rows), notes, has_chart=chart is not None),
        "html": _html_page(f"Benchmark: {workload.name}", heads, cells, rows, chart, [*below, *notes]),
        "svg": chart,
    }
    for kind, content in files.items():
        if content is not None:
            with atomic_path(folder / f"results.{kind}") as draft:
                draft.write_text(content, encoding="utf-8")
    return markdown


def _markdown_page(workload: Workload, markdown: str, split: str, notes: Sequence[str], *, has_chart: bool) -> str:
    lines = [f"# Benchmark: {workload.name}", "", markdown, ""]
    if has_chart:
        lines += ["![AP against latency](results.svg)", ""]
    if split:
        lines += ["Time of the parts of a call, milliseconds, medians of other calls:", "", split, ""]
    return "\n".join([*lines, *notes, ""])


def _html_page(
    title: str,
    heads: Sequence[str],
    cells: Sequence[Sequence[str]],
    rows: Sequence[Measurement],
    chart: str | None,
    notes: Sequence[str],
) -> str:
    """A self-contained page: chart, table, parts of a call, and notes."""
    lines = []
    for row, (*values, status) in zip(rows, cells, strict=True):
        kind = "peer" if row.peer else "absent" if row.p50_ms is None else ""
        inside = "".join(f"<td>{text(value)}</td>" for value in values)
        lines.append(f'<tr class="{kind}">{inside}<td class="text">{text(status)}</td></tr>')
    listed = "".join(f"<li>{text(note.removeprefix('- '))}</li>" for note in notes)
    chart = chart or "<p>No AP was measured.</p>"
    return page(
        title,
        [_STYLE, f"<h1>{text(title)}</h1>", chart, table(heads, lines), _split_section(rows), f"<ul>{listed}</ul>"],
    )


def _name(row: Measurement) -> str:
    return f"{row.model}, {row.backend} {row.precision}".strip()


def ap_chart(rows: Sequence[Measurement]) -> str | None:
    """AP of masks, else of keypoints, else of boxes, against latency at the smallest batch size; None without AP."""
    measured = [row for row in rows if row.p50_ms is not None and row.box_ap is not None]
    if not measured:
        return None
    batch, size = min(row.batch for row in measured), measured[0].size
    kinds = ("mask", "keypoint", "box")
    kind = next(kind for kind in kinds if any(getattr(row, f"{kind}_ap") is not None for row in measured))
    points = {
        _name(row): [(row.p50_ms / batch, getattr(row, f"{kind}_ap"))]
        for row in measured
        if row.batch == batch and row.size == size and getattr(row, f"{kind}_ap") is not None
    }
    title = f"AP against latency, batch {batch}"
    return line_chart(
        title,
        "milliseconds per image, median (logarithmic)",
        f"{kind} AP (COCO, IoU 0.50 to 0.95)",
        points,
        log_x=True,
        y_span=_MIN_AP_SPAN,
        labels_at_points=True,
        size_in=(8.0, 4.8),
    )


def _split_section(rows: Sequence[Measurement]) -> str:
    """HTML table of the parts of each row's call; empty if none was measured."""
    lines = []
    for row in (row for row in rows if row.split_ms):
        total = sum(row.split_ms.values())
        cells = [
            f"{ms:.2f} ms, {ms / total:.0%}" if (ms := row.split_ms.get(part)) is not None else "" for part in PARTS
        ]
        lines.append(cells_row([f"{_name(row)}, {row.size + ', ' if row.size else ''}batch {row.batch}", *cells]))
    note = "Medians; decoding is not part of the latency above."
    return f"<h2>Time of the parts of a call</h2><p>{note}</p>{table(['', *PARTS], lines)}" if lines else ""


def _split_table(rows: Sequence[Measurement]) -> str:
    """Markdown table of the milliseconds of each part of a call; empty if none was measured."""
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


def _notes(workload: Workload, environment: dict[str, Any]) -> list[str]:
    return [
        f"- Timed: {_TIMED}. The calls of all rows of one size and batch size are interleaved. Percentiles are "
        "nearest-rank samples, p90 of 10 calls or more, p99 of 100 or more; spread: interquartile range / median.",
        "- × torchvision: torchvision's p50 in eager PyTorch divided by the row's, at the same size and batch size; "
        "× tv ONNX: the same for its legacy export in ONNX Runtime. Above 1 the row is faster.",
        "- Δ: difference from the reference, PyTorch FP32. AP is measured image by image.",
        "- Inexact: half precision or integers whose detections differ from the reference beyond the tolerance.",
        "- Memory, with --memory: peak of a process with this row only, Python and libraries included; model MB is the "
        "part added by opening the file and two calls.",
        *[f"- {note}" for note in workload.notes],
        *machine(environment),
    ]


def _status(row: Measurement, reasons: Sequence[str]) -> str:
    """The status with the number of the footnote that has its reason."""
    return f"{row.status} [{reasons.index(row.reason) + 1}]" if row.reason else row.status


def _warnings(rows: Sequence[Measurement]) -> list[str]:
    """A line if the calls of a row differ so much in time that small ratios say nothing."""
    noisiest = max(rows, key=lambda row: spread(row.latencies_ms), default=None)
    if noisiest is None or spread(noisiest.latencies_ms) <= _NOISY:
        return []
    most = spread(noisiest.latencies_ms)
    return [
        f"Warning: a noisy machine. The calls of {_name(noisiest)} spread by {most:.0%} around their median; "
        "smaller differences between rows are noise. Stop other programs, or raise --repeat."
    ]


def _spread_column(row: Measurement) -> str:
    return f"{spread(row.latencies_ms):.0%}" if len(row.latencies_ms) >= 4 else ""


_COLUMNS: list[tuple[str, Callable[[Measurement], str]]] = [
    ("model", lambda row: row.model),
    ("backend", lambda row: row.backend),
    ("precision", lambda row: row.precision),
    ("size", lambda row: row.size),
    ("batch", lambda row: str(row.batch)),
    ("calls", lambda row: str(row.samples or "")),
    ("p50 ms", number("p50_ms", ".1f")),
    ("spread", _spread_column),
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
]
