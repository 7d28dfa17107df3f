"""A benchmark's results as JSON, as a Markdown table, as a chart and as an HTML page."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import PARTS, Measurement
from workloads import Workload

from maskrcnn.files import atomic_path, write_json
from maskrcnn.runtime.html import page, table, text
from maskrcnn.runtime.html import row as cells_row

# Charts as SVG text, which a browser, a Markdown page and an HTML report all show. Needs nothing but Python.

COLOURS = ("#1565c0", "#c62828", "#2e7d32", "#ef6c00", "#6a1b9a", "#00838f", "#827717", "#4e342e", "#37474f")
WIDTH, HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 250, 30, 50  # margins; the names stand in the right one
_TICKS = 5


@dataclass(frozen=True)
class Series:
    """Points of one name; joined by a line where there are several."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """One axis: its title, and whether it counts in powers."""

    title: str
    logarithmic: bool = False


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """An SVG of all series; points that cannot be shown (not finite, not positive on a logarithmic axis) are left out.

    Raises:
        ValueError: when no point is left.
    """
    shown = [Series(s.name, [p for p in s.points if _can_be_shown(p, x, y)]) for s in series]
    points = [point for s in shown for point in s.points]
    if not points:
        raise ValueError("found: a chart without a point; expected: at least one; fix: leave the chart out")
    across = _Scale.of([p[0] for p in points], x, _LEFT, WIDTH - _RIGHT)
    along = _Scale.of([p[1] for p in points], y, HEIGHT - _BOTTOM, _TOP)
    parts = [*_frame(title, across, along)]
    for number, each in enumerate(shown):
        parts += _drawn(each, COLOURS[number % len(COLOURS)], number, across, along)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12">{"".join(parts)}</svg>\n'
    )


def _can_be_shown(point: tuple[float, float], x: Axis, y: Axis) -> bool:
    return all(
        math.isfinite(value) and (value > 0 or not axis.logarithmic) for value, axis in zip(point, (x, y), strict=True)
    )


@dataclass(frozen=True)
class _Scale:
    """From values to pixels."""

    axis: Axis
    low: float
    high: float
    start_px: float
    end_px: float

    @classmethod
    def of(cls, values: Sequence[float], axis: Axis, start_px: float, end_px: float) -> _Scale:
        low, high = min(values), max(values)
        if axis.logarithmic:
            return cls(axis, low / 1.1, high * 1.1, start_px, end_px)
        margin = 0.05 * (high - low) or max(abs(high), 1.0) * 0.05
        return cls(axis, low - margin, high + margin, start_px, end_px)

    def px(self, value: float) -> float:
        low, high = (math.log(v) if self.axis.logarithmic else v for v in (self.low, self.high))
        at = math.log(value) if self.axis.logarithmic else value
        return self.start_px + (at - low) / (high - low) * (self.end_px - self.start_px)

    def ticks(self) -> list[float]:
        """Round numbers inside the range."""
        if self.axis.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 300 else (1,)
            return [v for p in powers for s in steps if self.low <= (v := s * 10.0**p) <= self.high]
        rough = (self.high - self.low) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        return [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _frame(title: str, across: _Scale, along: _Scale) -> list[str]:
    right, bottom, below = WIDTH - _RIGHT, HEIGHT - _BOTTOM, html.escape(across.axis.title)
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="18" font-weight="600">{html.escape(title)}</text>',
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#444"/>',
        f'<text x="{(_LEFT + right) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{below}</text>',
        f'<text transform="translate(16 {(_TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(along.axis.title)}</text>",
    ]
    for tick in across.ticks():
        x = across.px(tick)
        parts.append(f'<path d="M{x:.1f} {bottom}v5" stroke="#444"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in along.ticks():
        y = along.px(tick)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#eee"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    return parts


def _drawn(series: Series, colour: str, number: int, across: _Scale, along: _Scale) -> list[str]:
    """A line, its points, and the name in the list at the right."""
    pixels = [(across.px(x), along.px(y)) for x, y in series.points]
    name, at = html.escape(series.name), _TOP + 10 + 18 * number
    parts = []
    if len(pixels) > 1:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in pixels)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    for (x, y), (a, b) in zip(pixels, series.points, strict=True):
        label = f"<title>{name}: {a:.4g}, {b:.4g}</title>"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">{label}</circle>')
    if pixels:
        left = WIDTH - _RIGHT + 16
        parts.append(f'<circle cx="{left}" cy="{at}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + 10}" y="{at + 4}">{name}</text>')
    return parts


# A benchmark's results as one HTML page that needs nothing beside it.

_STYLE = "<style>tr.peer td { color: #777 } tr.absent td { color: #aaa }</style>"


def name_of(row: Measurement) -> str:
    """A row without its batch and size, as charts name it."""
    return f"{row.model}, {row.backend} {row.precision}".strip()


def _ap_chart(rows: Sequence[Measurement]) -> str | None:
    """AP against latency at the smallest batch, as SVG; None without an AP.

    It is that of masks where there are any, else of keypoints, else of boxes.
    """
    measured = [row for row in rows if row.p50_ms is not None and row.box_ap is not None]
    if not measured:
        return None
    batch, size = min(row.batch for row in measured), measured[0].size
    kinds = ("mask", "keypoint", "box")
    kind = next(kind for kind in kinds if any(getattr(row, f"{kind}_ap") is not None for row in measured))
    series = [
        Series(name_of(row), [(row.p50_ms / batch, getattr(row, f"{kind}_ap"))])
        for row in measured
        if row.batch == batch and row.size == size and getattr(row, f"{kind}_ap") is not None
    ]
    x = Axis("milliseconds per image, p50", logarithmic=True)
    return chart(f"AP against latency, batch {batch}", x, Axis(f"{kind} AP"), series)


def _split_section(rows: Sequence[Measurement]) -> str:
    """Where each row's time goes, as an HTML table; empty where nothing was split."""
    lines = []
    for row in rows:
        if row.split_ms:
            total = sum(row.split_ms.values())
            shares = ((row.split_ms.get(part), part) for part in PARTS)
            cells = [f"{ms:.2f} ms, {ms / total:.0%}" if ms is not None else "" for ms, _ in shares]
            lines.append(cells_row([f"{name_of(row)}, {_shape(row)}", *cells]))
    if not lines:
        return ""
    told = "Medians; decoding is not part of the latency above."
    return f"<h2>Where the time of a call goes</h2><p>{told}</p>{table(['', *PARTS], lines)}"


def html_page(
    title: str, heads: Sequence[str], cells: Sequence[Sequence[str]], rows: Sequence[Measurement], notes: Sequence[str]
) -> str:
    """The page: chart, table, split and what was measured where.

    Args:
        title: of the workload.
        heads: of the table's columns.
        cells: of the table, one line for each row.
        rows: what the cells show.
        notes: lines of text below.
    """
    picture = _ap_chart(rows) or "<p>No AP was measured.</p>"
    lines = [_line(row, line) for row, line in zip(rows, cells, strict=True)]
    told = "".join(f"<li>{text(note)}</li>" for note in notes)
    return page(
        title,
        [_STYLE, f"<h1>{text(title)}</h1>", picture, table(heads, lines), _split_section(rows), f"<ul>{told}</ul>"],
    )


def _line(row: Measurement, cells: Sequence[str]) -> str:
    kind = "peer" if row.peer else "absent" if row.p50_ms is None else ""
    inside = "".join(f"<td>{text(cell)}</td>" for cell in cells[:-1])
    return f'<tr class="{kind}">{inside}<td class="text">{text(cells[-1])}</td></tr>'


def _shape(row: Measurement) -> str:
    return f"{row.size + ', ' if row.size else ''}batch {row.batch}"


_SCHEMA = 2  # see results.schema.json
_TIMED = (
    "one call from decoded images in memory (uint8 RGB) to boxes, scores, labels and, where the model has them, masks "
    "pasted into the original image and encoded as COCO run lengths: preprocessing, inference and postprocessing, of "
    "torchvision's model as of ours"
)


def write_report(folder: Path, rows: Sequence[Measurement], workload: Workload, environment: dict[str, Any]) -> str:
    """Writes results.json, .md, .html and, where there is an AP, .svg, each whole or not at all; returns the table."""
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
    text = _markdown_table(rows)
    columns = _columns(rows)
    heads, cells = [name for name, _ in columns], [[show(row) for _, show in columns] for row in rows]
    picture, notes = _ap_chart(rows), [line.removeprefix("- ") for line in _notes(workload, environment)]
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


def _markdown_table(rows: Sequence[Measurement]) -> str:
    """The rows as a Markdown table, its columns of even width."""
    columns = _columns(rows)
    return aligned([name for name, _ in columns], [[show(row) for _, show in columns] for row in rows])


def _columns(rows: Sequence[Measurement]) -> list[tuple[str, Callable[[Measurement], str]]]:
    """Those that some row has something for."""
    shown = [(name, show) for name, show in _COLUMNS if any(show(row) for row in rows)]
    return [column for column in shown if column[0] != "size" or any(row.size for row in rows)]


def _split_table(rows: Sequence[Measurement]) -> str:
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
    split = _split_table(rows)
    lines = [f"# Benchmark: {workload.name}", "", text, ""]
    if has_picture:
        lines += ["![AP against latency](results.svg)", ""]
    if split:
        lines += ["Where the time of a call goes, milliseconds, medians of other calls:", "", split, ""]
    return "\n".join([*lines, *_notes(workload, environment), ""])


def _notes(workload: Workload, environment: dict[str, Any]) -> list[str]:
    return [
        f"- Timed: {_TIMED}. The calls of all rows of a size and batch take turns. Percentiles are nearest-rank "
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
