"""Charts as SVG text, which a browser, a Markdown page and an HTML report all show. Needs nothing but Python."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

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
        raise ValueError("came: a chart without a point; expected: at least one; do: leave the chart out")
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
