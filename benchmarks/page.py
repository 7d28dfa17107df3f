"""A benchmark's results as one HTML page that needs nothing beside it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from chart import Axis, Series, chart
from measure import Measurement
from splits import PARTS

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
table { border-collapse: collapse } td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child, td.text { text-align: left } th { font-weight: 600 } .wide { overflow-x: auto }
tr.peer td { color: #777 } tr.absent td { color: #aaa }
"""


def name_of(row: Measurement) -> str:
    """A row without its batch and size, as charts name it."""
    return f"{row.model}, {row.backend} {row.precision}".strip()


def ap_chart(rows: Sequence[Measurement]) -> str | None:
    """AP (of masks where there are any) against latency at the smallest batch, as SVG; None without an AP."""
    measured = [row for row in rows if row.p50_ms is not None and row.box_ap is not None]
    if not measured:
        return None
    batch, size = min(row.batch for row in measured), measured[0].size
    masks = any(row.mask_ap is not None for row in measured)
    series = [
        Series(name_of(row), [(row.p50_ms / batch, row.mask_ap if masks else row.box_ap)])
        for row in measured
        if row.batch == batch and row.size == size and (row.mask_ap is not None or not masks)
    ]
    x = Axis("milliseconds per image, p50", logarithmic=True)
    return chart(f"AP against latency, batch {batch}", x, Axis("mask AP" if masks else "box AP"), series)


def split_bars(rows: Sequence[Measurement]) -> str:
    """Where each row's time goes, as an HTML table."""
    split = [row for row in rows if row.split_ms]
    if not split:
        return ""
    head = "".join(f"<th>{part}</th>" for part in PARTS)
    lines = []
    for row in split:
        total = sum(row.split_ms.values())
        cells = "".join(
            f"<td>{row.split_ms[part]:.2f} ms, {row.split_ms[part] / total:.0%}</td>"
            if part in row.split_ms
            else "<td></td>"
            for part in PARTS
        )
        lines.append(f"<tr><td>{_text(f'{name_of(row)}, {_shape(row)}')}</td>{cells}</tr>")
    return (
        "<h2>Where the time of a call goes</h2><p>Medians; decoding is not part of the latency above.</p>"
        f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'
    )


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
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    lines = "".join(_line(row, line) for row, line in zip(rows, cells, strict=True))
    body = (
        f"<h1>{_text(title)}</h1>{picture}"
        f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'
        f"{split_bars(rows)}<ul>{''.join(f'<li>{_text(note)}</li>' for note in notes)}</ul>"
    )
    top = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{top}</head><body>{body}</body></html>\n'


def _line(row: Measurement, cells: Sequence[str]) -> str:
    kind = "peer" if row.peer else "absent" if row.p50_ms is None else ""
    inside = "".join(f"<td>{_text(cell)}</td>" for cell in cells[:-1])
    return f'<tr class="{kind}">{inside}<td class="text">{_text(cells[-1])}</td></tr>'


def _shape(row: Measurement) -> str:
    return f"{row.size + ', ' if row.size else ''}batch {row.batch}"


def _text(value: Any) -> str:
    return html.escape(str(value))
