"""Building blocks of self-contained HTML pages: images and style are embedded."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --text: #222; --back: #fff; --line: #ddd }
:root { --good: #2e7d32; --bad: #c62828; --pale: #6b6b6b }
@media (prefers-color-scheme: dark) { :root { --text: #ddd; --back: #16181b; --line: #3a3d42 } a { color: #8ab4f8 }
:root { --good: #81c784; --bad: #ef9a9a; --pale: #999 } }
body { font: 15px/1.45 system-ui, sans-serif; margin: min(2rem, 4vw); color: var(--text); background: var(--back) }
body { overflow-wrap: anywhere } table { overflow-wrap: normal } svg, img { max-width: 100%; height: auto }
table { border-collapse: collapse } td, th { padding: .2rem .7rem; text-align: right }
td, th { border-bottom: 1px solid var(--line) } th { font-weight: 600; cursor: pointer }
td:first-child, th:first-child, td.text { text-align: left } svg { background: #fff; border-radius: 6px }
.images { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0 } .wide { overflow-x: auto }
.images.large figure { flex: 1 1 20rem; max-width: 900px } .images.large img { width: 100% }
pre { white-space: pre-wrap }
.key { color: #111; border-radius: 3px } .bar { display: inline-block; width: 12rem; height: .8rem }
"""
# Clicking a column name sorts the table: numbers in descending, texts in ascending order; a second click reverses it.
_SORT = """
document.querySelectorAll("th").forEach(head => head.addEventListener("click", () => {
  const rows = [...head.closest("table").rows].slice(1), column = head.cellIndex
  const value = row => row.cells[column].textContent.trim(), number = row => parseFloat(value(row))
  const numeric = rows.every(row => value(row) === "" || !isNaN(number(row)))
  const falls = head.dataset.falls = head.dataset.falls === undefined ? numeric : head.dataset.falls !== "true"
  const key = row => isNaN(number(row)) ? -Infinity : number(row)
  rows.sort((a, b) => numeric ? key(a) - key(b) : value(a).localeCompare(value(b)))
  if (falls) rows.reverse()
  rows.forEach(row => row.parentNode.append(row))
}))
"""
_JPEG_QUALITY = 88


def page(title: str, parts: Iterable[str]) -> str:
    """A page from the parts of its body."""
    head = '<meta charset="utf-8"><meta name="generator" content="maskrcnn">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{text(title)}</title><style>{_STYLE}</style>"
    body = f"{''.join(parts)}<script>{_SORT}</script>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def text(value: str) -> str:
    """Escaped text."""
    return html.escape(value)


def table(heads: Sequence[str], rows: Iterable[str]) -> str:
    """A table from column names and HTML rows; clicking a name sorts it, and a wide table scrolls."""
    head = "".join(f"<th>{text(name)}</th>" for name in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def row(cells: Iterable[str]) -> str:
    """A row of text cells."""
    return f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in cells)}</tr>"


def key(word: str, colour: tuple[int, int, int]) -> str:
    """A legend entry: a word on its colour."""
    return f'<span class="key" style="background:rgb{colour}">&nbsp;{text(word)}&nbsp;</span>'


def image_tag(image: Image.Image, caption: str, *, is_photo: bool = False) -> str:
    """An embedded image with its caption: PNG, or JPEG for photos."""
    buffer = io.BytesIO()
    if is_photo:
        image.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    else:
        image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    kind = "jpeg" if is_photo else "png"
    return (
        f'<figure><img alt="{text(caption)}" src="data:image/{kind};base64,{data}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )
