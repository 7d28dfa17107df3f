"""Line charts as SVG text, for HTML pages and Markdown files; the only module that imports matplotlib."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from maskrcnn.errors import missing_library

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

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
_LABEL_STEP = 10  # distance in points between candidate label positions
_LEADER = {"arrowstyle": "-", "color": "#9e9e9e", "linewidth": 0.5}  # from a point to its label
_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "maskrcnn",  # the same chart gives the same bytes
    "text.parse_math": False,  # names may contain $
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[tuple[float, float]] | np.ndarray],
    *,
    log_x: bool = False,
    log_y: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    y_span: float = 0.0,
    markers: bool = True,
    labels_at_points: bool = False,
    size_in: tuple[float, float] = (5.5, 4.2),
) -> str:
    """Draws one line per series, with a legend on the right or names next to the points.

    Args:
        title: chart title.
        x_label: x axis label.
        y_label: y axis label.
        series: points (x, y) `[P, 2]` by series name, in legend order; colours repeat after ten. Points that cannot be
            drawn (not finite, or not positive on a logarithmic axis) are omitted, and so is a series without points.
        log_x: logarithmic x axis.
        log_y: logarithmic y axis.
        x_range: limits of the x axis (default: the data's).
        y_range: limits of the y axis (default: the data's).
        y_span: smallest extent of a linear y axis without `y_range`, so that noise does not fill it.
        markers: mark each point and list the values in the series' tooltip.
        labels_at_points: write each name next to the last point of its series instead of a legend.
        size_in: width and height of the plot in inches, without the legend.

    Returns:
        An `<svg>` element; written to a file, it is a complete SVG image.

    Raises:
        UserError: if matplotlib is not installed.
        ValueError: if no point can be drawn.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_library("matplotlib", "draw charts", "pip install matplotlib") from error

    drawn = {name: _drawable(points, log_x, log_y) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if len(points)}
    if not drawn:
        raise ValueError("found: a chart without a point; expected: at least one; fix: omit the chart")
    with rc_context(_SETTINGS):
        figure = Figure(figsize=size_in, dpi=72)  # SVG's resolution, so that text extents match those in the file
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
        axes.grid(color="#e0e0e0", linewidth=0.6)
        lines = []
        for number, points in enumerate(drawn.values()):
            (line,) = axes.plot(*points.T, color=_COLOURS[number % len(_COLOURS)], marker="o" if markers else "")
            line.set_gid(f"series-{number}")
            lines.append(line)
        points = np.concatenate(list(drawn.values()))
        if log_x:
            axes.set_xscale("log")
            _set_log_ticks(axes.xaxis, points[:, 0])
        if log_y:
            axes.set_yscale("log")
            _set_log_ticks(axes.yaxis, points[:, 1])
        if x_range is not None:
            axes.set_xlim(x_range)
        if y_range is not None:
            axes.set_ylim(y_range)
        elif not log_y and np.ptp(points[:, 1]) < y_span:
            middle = (points[:, 1].min() + points[:, 1].max()) / 2
            axes.set_ylim(middle - 0.6 * y_span, middle + 0.6 * y_span)
        if labels_at_points:
            _label_points(figure, axes, drawn)
        else:
            axes.legend(lines, list(drawn), loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, borderaxespad=0)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # without the XML declaration, which is not allowed inside HTML
    for number, (name, points) in enumerate(drawn.items()):
        values = [f"{x:.4g}, {y:.4g}" for x, y in points.tolist()] if markers else []
        tooltip = html.escape("\n".join([name, *values]))
        text = text.replace(f'<g id="series-{number}">', f"<g><title>{tooltip}</title>")
    return text


def _label_points(figure: Figure, axes: Axes, drawn: Mapping[str, np.ndarray]) -> None:
    """Writes each name next to its last point, without covering a point or another name."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # computes the limits of the axes
    ends = {name: points[-1] for name, points in drawn.items()}
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(drawn)}
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform([*ends.values()])]
    taken.append(Bbox.from_extents(-1e6, -1e6, axes.bbox.x0, 1e6))  # the y axis and its numbers
    rises = [0, *(sign * _LABEL_STEP * k for k in range(1, len(ends) + 1) for sign in (1, -1))]
    for name, end in sorted(ends.items(), key=lambda item: -item[1][1]):
        places = [(side, rise) for rise in rises for side in (1, -1)]
        for side, rise in places:
            label = axes.annotate(
                name,
                end,
                (7 * side, rise),
                color=colours[name],
                textcoords="offset points",
                horizontalalignment="left" if side > 0 else "right",
                verticalalignment="center",
                fontsize=8,
                arrowprops={**_LEADER, "relpos": (0 if side > 0 else 1, 0.5)} if rise else None,
            )
            label.get_window_extent()  # moves the text to its position
            extent = Text.get_window_extent(label).padded(1)  # without the line to the point
            if (side, rise) == places[-1] or not any(extent.overlaps(each) for each in taken):
                taken.append(extent)
                break
            label.remove()


def _drawable(points: Sequence[tuple[float, float]] | np.ndarray, log_x: bool, log_y: bool) -> np.ndarray:
    values = np.asarray(points, np.float64).reshape(-1, 2)
    is_drawable = np.isfinite(values) & ((values > 0) | ~np.array([log_x, log_y]))
    return np.compress(is_drawable.all(axis=1), values, axis=0)


def _set_log_ticks(axis: Axis, values: np.ndarray) -> None:
    """Ticks at 1, 2, 5, 10, … in plain numbers, or at powers of ten if the values span a factor of more than 300."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 300 * values.min() else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
