"""Curves as inline SVG: lines with a mark of their own at each label, and their intervals."""

from __future__ import annotations

import math

from tl_contextmix.plotting import chart_axes, colors, markup
from tl_contextmix.plotting.chart_axes import Axis
from tl_contextmix.plotting.circuitsvis_source import Charts
from tl_contextmix.plotting.display_text import decimals, rounded
from tl_contextmix.plotting.panels import Curves

# Colour is not the only thing that tells curves apart.
_DASHES = ("none", "6 3", "2 3", "8 3 2 3")


def draw(panel: Curves, charts: Charts) -> str:
    """Returns the HTML of some curves with their numbers as a table."""
    if not panel.labels or not panel.series:
        empty = markup.note("There is nothing to show: there are no curves.")
        return markup.figure("curves", panel.title, panel.caption, [empty])
    wide = any(low < high for ends in panel.intervals for low, high in ends)
    bands = markup.note("Shaded: intervals.") if wide else ""
    body = [chart_axes.key(panel), picture(panel), bands, chart_axes.numbers(panel)]
    return markup.figure("curves", panel.title, panel.caption, body)


def picture(panel: Curves) -> str:
    """Returns the curves as one SVG element."""
    values = [value for _, series in panel.series for value in series]
    ends = [end for series in panel.intervals for pair in series for end in pair]
    axis = Axis.over(values + ends, zero=False)
    marks = [_band(panel, index, axis) for index in range(len(panel.intervals))]
    marks += [_curve(panel, index, axis) for index in range(len(panel.series))]
    if axis.low <= 0 <= axis.high:
        marks.insert(0, chart_axes.line("zero", axis.y(0.0)))
    return chart_axes.drawing(panel, axis, marks, "curves")


def _x(panel: Curves, place: int) -> float:
    return round(chart_axes.LEFT + chart_axes.group_width(panel) * (place + 0.5), 1)


def _curve(panel: Curves, index: int, axis: Axis) -> str:
    _, values = panel.series[index]
    places = decimals(max(abs(axis.low), abs(axis.high)))
    colour = colors.series(index)
    path, pen = [], "M"
    points = []
    for place, value in enumerate(values):
        if math.isnan(value):
            pen = "M"
            continue
        x, y = _x(panel, place), axis.y(value)
        path.append(f"{pen}{x} {y}")
        pen = "L"
        data = f' data-value="{rounded(value)!r}"' if math.isfinite(value) else ""
        title = chart_axes.series_name(panel, index, place, places)
        points.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"{data}>{title}</circle>')
    dash = _DASHES[index // len(colors.SERIES) % len(_DASHES)]
    line = (
        f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="2" '
        f'stroke-dasharray="{dash}"/>'
    )
    return line + "".join(points)


def _band(panel: Curves, index: int, axis: Axis) -> str:
    pieces = []
    for stretch in _stretches(panel.intervals[index]):
        upper = [f"{_x(panel, place)} {axis.y(high)}" for place, _, high in stretch]
        lower = [f"{_x(panel, place)} {axis.y(low)}" for place, low, _ in reversed(stretch)]
        pieces.append(f"M{'L'.join(upper + lower)}Z")
    return f'<path d="{"".join(pieces)}" fill="{colors.series(index)}" fill-opacity="0.15"/>'


def _stretches(ends: tuple[tuple[float, float], ...]) -> list[list[tuple[int, float, float]]]:
    """Returns the runs of neighbouring labels whose interval has both ends."""
    found: list[list[tuple[int, float, float]]] = [[]]
    for place, (low, high) in enumerate(ends):
        if math.isnan(low) or math.isnan(high):
            found.append([])
        else:
            found[-1].append((place, low, high))
    return [stretch for stretch in found if stretch]
