"""Bar charts as inline SVG, readable without colour, script or pointer."""

from __future__ import annotations

import math

from tl_contextmix.plotting import chart_axes, colors, markup
from tl_contextmix.plotting.chart_axes import Axis
from tl_contextmix.plotting.circuitsvis_source import Charts
from tl_contextmix.plotting.display_text import decimals, number, rounded
from tl_contextmix.plotting.panels import Bars

_LABELLED_BARS = 14


def draw(panel: Bars, charts: Charts) -> str:
    """Returns the HTML of a bar chart with its numbers beside it as a table."""
    if not panel.labels or not panel.series:
        empty = markup.note("There is nothing to show: the chart has no bars.")
        return markup.figure("bars", panel.title, panel.caption, [empty])
    body = [chart_axes.key(panel), picture(panel), chart_axes.numbers(panel)]
    return markup.figure("bars", panel.title, panel.caption, body)


def picture(panel: Bars) -> str:
    """Returns the bars as one SVG element."""
    axis = Axis.over([value for _, values in panel.series for value in values], zero=True)
    marks = [mark for index in range(len(panel.series)) for mark in _series(panel, index, axis)]
    marks.append(chart_axes.line("zero", axis.y(0.0)))
    return chart_axes.drawing(panel, axis, marks, "bar chart")


def _series(panel: Bars, index: int, axis: Axis) -> list[str]:
    _, values = panel.series[index]
    group = chart_axes.group_width(panel)
    width = group * 0.8 / len(panel.series)
    printed = len(panel.labels) * len(panel.series) <= _LABELLED_BARS
    places = decimals(max(abs(axis.low), abs(axis.high)))
    pieces = []
    for place, value in enumerate(values):
        left = chart_axes.LEFT + group * (place + 0.1) + width * index
        title = chart_axes.series_name(panel, index, place, places)
        pieces.append(_bar(left, width, value, axis, colors.series(index), title))
        if printed or not math.isfinite(value):
            y = axis.y(value if value == value else 0.0) + (-4 if not value < 0 else 12)
            x = round(left + width / 2, 1)
            pieces.append(
                f'<text class="value" x="{x}" y="{y}" font-size="10.5" text-anchor="middle">'
                f"{number(value, places)}</text>"
            )
    return pieces


def _bar(left: float, width: float, value: float, axis: Axis, colour: str, title: str) -> str:
    height = value if value == value else 0.0
    ends = sorted((axis.y(height), axis.y(0.0)))
    data = f' data-value="{rounded(value)!r}"' if math.isfinite(value) else ""
    return (
        f'<rect x="{left + 1:.1f}" y="{ends[0]}" width="{max(1.0, width - 2):.1f}" '
        f'height="{ends[1] - ends[0]:.1f}" fill="{colour}"{data}>{title}</rect>'
    )
