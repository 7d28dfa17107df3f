"""A benchmark's results as one HTML page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence

from chart import Axis, Series, chart
from measure import Measurement
from splits import PARTS

from maskrcnn.runtime.html_parts import page, table, text
from maskrcnn.runtime.html_parts import row as cells_row

_STYLE = "<style>tr.peer td { color: #777 } tr.absent td { color: #aaa }</style>"


def name_of(row: Measurement) -> str:
    """A row without its batch and size, as charts name it."""
    return f"{row.model}, {row.backend} {row.precision}".strip()


def ap_chart(rows: Sequence[Measurement]) -> str | None:
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


def split_section(rows: Sequence[Measurement]) -> str:
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
    picture = ap_chart(rows) or "<p>No AP was measured.</p>"
    lines = [_line(row, line) for row, line in zip(rows, cells, strict=True)]
    told = "".join(f"<li>{text(note)}</li>" for note in notes)
    return page(
        title,
        [_STYLE, f"<h1>{text(title)}</h1>", picture, table(heads, lines), split_section(rows), f"<ul>{told}</ul>"],
    )


def _line(row: Measurement, cells: Sequence[str]) -> str:
    kind = "peer" if row.peer else "absent" if row.p50_ms is None else ""
    inside = "".join(f"<td>{text(cell)}</td>" for cell in cells[:-1])
    return f'<tr class="{kind}">{inside}<td class="text">{text(cells[-1])}</td></tr>'


def _shape(row: Measurement) -> str:
    return f"{row.size + ', ' if row.size else ''}batch {row.batch}"
