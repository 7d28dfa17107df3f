"""Building blocks of self-contained HTML pages: images and style are embedded."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
table { border-collapse: collapse } td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child, td.text { text-align: left } th { font-weight: 600 }
.images { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0 } .wide { overflow-x: auto }
.images.large img { max-width: min(46vw, 900px); width: 100% } pre { white-space: pre-wrap }
"""
_JPEG_QUALITY = 88


def page(title: str, parts: Iterable[str]) -> str:
    """A page from the parts of its body."""
    head = '<meta charset="utf-8"><meta name="generator" content="maskrcnn">'
    head += f"<title>{text(title)}</title><style>{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def text(value: str) -> str:
    """Escaped text."""
    return html.escape(value)


def table(heads: Sequence[str], rows: Iterable[str]) -> str:
    """A table from column names and rows of HTML; a wide one scrolls."""
    head = "".join(f"<th>{text(name)}</th>" for name in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def row(cells: Iterable[str]) -> str:
    """A row of text cells."""
    return f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in cells)}</tr>"


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
