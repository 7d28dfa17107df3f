"""Curves over the unit square as SVG, such as precision over recall."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from maskrcnn.runtime.html_parts import text

_COLOURS = (
    "#1565c0",
    "#c62828",
    "#2e7d32",
    "#6a1b9a",
    "#ef6c00",
    "#00838f",
    "#4e342e",
    "#ad1457",
    "#827717",
    "#37474f",
)
_SIDE_PX, _LEFT_PX, _TOP_PX, _LEGEND_PX, _LINE_PX = 300, 46, 26, 170, 17


def curves(title: str, across: str, along: str, lines: Mapping[str, np.ndarray]) -> str:
    """A plot with a legend; both axes reach from 0 to 1.

    Args:
        title, across, along: of the plot and its axes.
        lines: points `[P, 2]` by the name that the legend shows; colours repeat after ten.
    """
    height = max(_SIDE_PX + _TOP_PX + 40, _TOP_PX + _LINE_PX * len(lines) + 10)
    width = _LEFT_PX + _SIDE_PX + 16 + _LEGEND_PX
    parts = [f'<text x="{_LEFT_PX}" y="16" font-weight="600">{text(title)}</text>', *_frame(across, along)]
    for number, (name, points) in enumerate(lines.items()):
        colour, y = _COLOURS[number % len(_COLOURS)], _TOP_PX + 10 + _LINE_PX * number
        parts += [_line(points, colour), _legend(name, colour, y)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12">{"".join(parts)}</svg>'
    )


def _frame(across: str, along: str) -> list[str]:
    middle, bottom = _LEFT_PX + _SIDE_PX / 2, _TOP_PX + _SIDE_PX
    turned = f"translate(12 {_TOP_PX + _SIDE_PX / 2}) rotate(-90)"
    parts = [
        f'<text x="{middle}" y="{bottom + 34}" text-anchor="middle">{text(across)}</text>',
        f'<text transform="{turned}" text-anchor="middle">{text(along)}</text>',
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = _place(tick, tick)
        parts += [
            f'<path d="M{x:.0f} {_TOP_PX}V{bottom}M{_LEFT_PX} {y:.0f}h{_SIDE_PX}" stroke="#ddd"/>',
            f'<text x="{x:.0f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>',
            f'<text x="{_LEFT_PX - 6}" y="{y + 4:.0f}" text-anchor="end">{tick:g}</text>',
        ]
    return parts


def _line(points: np.ndarray, colour: str) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (_place(*point) for point in points.tolist()))
    return f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>' if path else ""


def _legend(name: str, colour: str, y: float) -> str:
    x = _LEFT_PX + _SIDE_PX + 16
    return (
        f'<path d="M{x} {y}h14" stroke="{colour}" stroke-width="3"/><text x="{x + 20}" y="{y + 4}">{text(name)}</text>'
    )


def _place(across: float, along: float) -> tuple[float, float]:
    """Pixels of a point of the unit square."""
    return _LEFT_PX + across * _SIDE_PX, _TOP_PX + (1 - along) * _SIDE_PX
