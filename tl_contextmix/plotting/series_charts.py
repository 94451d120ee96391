"""Bars and curves as inline SVG, readable without colour, script or pointer.

Colours and sizes are attributes of the drawing, so that it also looks like itself as a picture of
its own; the stylesheet of the page overrides them in a dark scheme.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import groupby

from tl_contextmix.plotting import colors, markup, tables
from tl_contextmix.plotting.circuitsvis_source import Charts
from tl_contextmix.plotting.display_text import data, decimals, escape, label, number, prose
from tl_contextmix.plotting.panels import Bars, Curves

WIDTH = 560
HEIGHT = 260
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 20, 42
_TICK_LENGTH = 10
_TICK_WIDTH = 62
_LABELLED_BARS = 14
# Colour is not the only thing that tells curves apart.
_DASHES = ("none", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Axis:
    """The vertical axis: round numbers that hold everything drawn, and the step of its grid."""

    low: float
    high: float
    step: float

    @classmethod
    def of(cls, chart: Bars) -> Axis:
        """Returns the axis of a chart; what is not finite is omitted."""
        values = [value for _, series in chart.series for value in series]
        if isinstance(chart, Curves):
            values += [end for series in chart.intervals for ends in series for end in ends]
        finite = [value for value in values if math.isfinite(value)]
        # Bars stand on zero; curves may be far from it.
        finite += [] if finite and isinstance(chart, Curves) else [0.0]
        low, high = min(finite), max(finite)
        # Of numbers that are all one, or but for rounding, the scale begins or ends at zero.
        if high - low <= max(1e-12 * max(-low, high), sys.float_info.min):
            low, high = min(0.0, low), max(0.0, high)
            high = high if high - low > sys.float_info.min else 1.0
            return cls(low, high, (high - low) / 2)
        rough = (high - low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        return cls(math.floor(low / step) * step, math.ceil(high / step) * step, step)

    @property
    def places(self) -> int | None:
        """Decimals of the numbers on the drawing."""
        return decimals(max(abs(self.low), abs(self.high)))

    def y(self, value: float) -> float:
        """Returns the height of a number on the page; infinities end at the border, NaN at 0."""
        inside = min(self.high, max(self.low, 0.0 if math.isnan(value) else value))
        share = (self.high - inside) / (self.high - self.low)
        return round(TOP + share * (HEIGHT - TOP - BOTTOM), 1)

    def grid(self) -> str:
        """Returns its lines, each with its number."""
        places = decimals(self.step)
        # One digit says as much as three on round numbers.
        places = None if places is None else max(0, places - 2)
        count = round((self.high - self.low) / self.step)
        ticks = [self.low + index * self.step for index in range(count + 1)]
        return "".join(
            f"{_line('tick', self.y(tick), colors.GRID)}"
            f'<text class="scale" x="{LEFT - 6}" y="{self.y(tick) + 4:.1f}" '
            f'text-anchor="end" fill="{colors.SOFT}">{number(tick, places)}</text>'
            for tick in ticks
        )


def draw(panel: Bars, charts: Charts) -> str:
    """Returns the HTML of a chart with its numbers beside it as a table."""
    kind = "curves" if isinstance(panel, Curves) else "bars"
    drawn = picture(panel)
    if drawn is None:
        body = [markup.note(f"There is nothing to show: the chart has no {kind}.")]
        return markup.figure(kind, panel.title, panel.caption, body)
    ends = panel.intervals if isinstance(panel, Curves) else ()
    bands = any(low < high for series in ends for low, high in series)
    numbers = markup.scroll(tables.grid(panel.table()), f"{panel.title}, numbers")
    note = markup.note("Shaded: intervals.") if bands else ""
    body = [_key(panel), drawn, note, markup.details("Numbers", numbers)]
    return markup.figure(kind, panel.title, panel.caption, body)


def picture(panel: Bars) -> str | None:
    """Returns the chart as one SVG element; None if there is nothing to draw."""
    if not panel.labels or not panel.series:
        return None
    axis, count = Axis.of(panel), range(len(panel.series))
    zero = _line("zero", axis.y(0.0), colors.ZERO_LINE) if axis.low <= 0 <= axis.high else ""
    if isinstance(panel, Curves):
        marks = [_band(panel, index, axis) for index in range(len(panel.intervals))]
        marks = [zero, *marks, *(_curve(panel, index, axis) for index in count)]
    else:
        marks = [*(_bars(panel, index, axis) for index in count), zero]
    name = escape(f"{' '.join(panel.title.split())}, chart")
    inside = "".join([axis.grid(), _ticks(panel), *marks])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="{colors.FONT}" font-size="11.5" fill="{colors.INK}" '
        f'aria-label="{name}">{inside}</svg>'
    )


def _x(chart: Bars, place: float) -> float:
    """Returns where a label begins on the page; half a place further is its middle."""
    return round(LEFT + (WIDTH - LEFT - RIGHT) / len(chart.labels) * place, 1)


def _line(kind: str, y: float, colour: str) -> str:
    return (
        f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" '
        f'stroke="{colour}"/>'
    )


def _ticks(chart: Bars) -> str:
    every = math.ceil(_TICK_WIDTH * len(chart.labels) / (WIDTH - LEFT - RIGHT))
    return "".join(
        f'<text class="label" x="{_x(chart, place + 0.5)}" y="{HEIGHT - 10}" '
        f'text-anchor="middle">{escape(word, _TICK_LENGTH)}</text>'
        for place, word in enumerate(chart.labels)
        if place % every == 0
    )


def _key(chart: Bars) -> str:
    """Returns which colour is which series, and the unit."""
    unit = f'<span class="unit">{prose(chart.unit)}</span>' if chart.unit else ""
    names = [
        f'<i style="background:{colors.series(index)}"></i><span>{label(name)}</span>'
        for index, (name, _) in enumerate(chart.series)
    ]
    legend = "".join(names if len(names) > 1 else []) + unit
    return f'<p class="legend">{legend}</p>' if legend else ""


def _mark(chart: Bars, index: int, place: int, axis: Axis, shape: str) -> str:
    """Returns the mark of one number in the colour of its series, its tooltip inside."""
    name, values = chart.series[index]
    description = (
        f"{escape(f'{chart.labels[place]}, {name}')}: {number(values[place], axis.places)}"
    )
    tag = shape.split()[0]
    colour = f'fill="{colors.series(index)}"{data(values[place])}'
    return f"<{shape} {colour}><title>{description}</title></{tag}>"


def _bars(chart: Bars, index: int, axis: Axis) -> str:
    width = 0.8 / len(chart.series)
    printed = len(chart.labels) * len(chart.series) <= _LABELLED_BARS
    pieces = []
    for place, value in enumerate(chart.series[index][1]):
        left, right = (_x(chart, place + 0.1 + width * at) for at in (index, index + 1))
        top, bottom = sorted((axis.y(value), axis.y(0.0)))
        shape = (
            f'rect x="{left + 1:.1f}" y="{top}" width="{max(1.0, right - left - 2):.1f}" '
            f'height="{bottom - top:.1f}"'
        )
        pieces.append(_mark(chart, index, place, axis, shape))
        if printed or not math.isfinite(value):
            y = axis.y(value) + (12 if value < 0 else -4)
            pieces.append(
                f'<text class="value" x="{(left + right) / 2:.1f}" y="{y:.1f}" font-size="10.5" '
                f'text-anchor="middle">{number(value, axis.places)}</text>'
            )
    return "".join(pieces)


def _curve(chart: Curves, index: int, axis: Axis) -> str:
    path, pen, points = "", "M", []
    for place, value in enumerate(chart.series[index][1]):
        if math.isnan(value):
            pen = "M"
            continue
        x, y = _x(chart, place + 0.5), axis.y(value)
        path, pen = f"{path}{pen}{x} {y}", "L"
        points.append(_mark(chart, index, place, axis, f'circle cx="{x}" cy="{y}" r="4"'))
    dash = _DASHES[index // len(colors.SERIES) % len(_DASHES)]
    line = f'stroke="{colors.series(index)}" stroke-width="2" stroke-dasharray="{dash}"'
    return f'<path d="{path}" fill="none" {line}/>{"".join(points)}'


def _band(chart: Curves, index: int, axis: Axis) -> str:
    pieces = []
    ends = enumerate(chart.intervals[index])
    # Each run of neighbouring labels whose interval has both ends.
    for known, run in groupby(ends, lambda one: not any(map(math.isnan, one[1]))):
        stretch = [(_x(chart, place + 0.5), *map(axis.y, pair)) for place, pair in run]
        upper = [f"{x} {high}" for x, _, high in stretch]
        lower = [f"{x} {low}" for x, low, _ in reversed(stretch)]
        pieces += [f"M{'L'.join(upper + lower)}Z"] if known else []
    return f'<path d="{"".join(pieces)}" fill="{colors.series(index)}" fill-opacity="0.15"/>'
