"""Shapes of annotation tools as polygons (x, y, x, y, …) in pixels, where pixel 0 reaches from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from maskrcnn.data.convert.faults import BadEntry

_SAGITTA_PX = 0.05  # most that a chord of a circle's polygon lies inside the circle
_FEWEST, _MOST = 16, 720  # corners of such a polygon


def polygon(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """A polygon of the x and the y of its corners."""
    return [value for point in zip(xs, ys, strict=True) for value in point]


def rectangle(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    """The rectangle between two opposite corners."""
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def ellipse(cx: float, cy: float, rx: float, ry: float, turn: float = 0.0) -> list[float]:
    """A polygon around an ellipse's centre with corners on it, 0.05 px at most off.

    Args:
        cx, cy: centre.
        rx, ry: half axes, positive.
        turn: of the first half axis from x towards y, radian.
    """
    radius = max(rx, ry)
    count = math.pi / math.acos(max(1 - _SAGITTA_PX / radius, -1)) if radius > _SAGITTA_PX else _FEWEST
    count = min(max(math.ceil(count), _FEWEST), _MOST)
    points = []
    for k in range(count):
        along, across = rx * math.cos(2 * math.pi * k / count), ry * math.sin(2 * math.pi * k / count)
        points.append(round(cx + along * math.cos(turn) - across * math.sin(turn), 3))
        points.append(round(cy + along * math.sin(turn) + across * math.cos(turn), 3))
    return points


def number(value: Any, where: str) -> float:
    """The value, which must be a finite number.

    Raises:
        BadEntry: otherwise.
    """
    if type(value) in (int, float) and math.isfinite(value):
        return value
    raise BadEntry("malformed shape", f"{where}: {value!r}", "a number", "correct the file")


def positive(value: Any, where: str) -> float:
    """The value, which must be a positive number."""
    if number(value, where) > 0:
        return value
    raise BadEntry("malformed shape", f"{where}: {value!r}", "a positive number", "correct the file")
