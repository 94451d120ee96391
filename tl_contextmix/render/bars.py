"""Bar charts as inline SVG, readable without colour, script or pointer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tl_contextmix.panels import Bars
from tl_contextmix.render import colors, markup
from tl_contextmix.render.library import Charts
from tl_contextmix.render.text import (
    decimals,
    escape,
    label,
    number,
    prose,
    rounded,
    shorten,
    visible,
)

_WIDTH = 560
_HEIGHT = 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 20, 42
_LABELLED_BARS = 14
_TICK_WIDTH = 62
_TICK_LENGTH = 10


def draw(panel: Bars, charts: Charts) -> str:
    """Returns the HTML of a bar chart with its numbers beside it as a table."""
    if not panel.labels or not panel.series:
        empty = markup.note("There is nothing to show: the chart has no bars.")
        return markup.figure("bars", panel.title, panel.caption, [empty])
    body = [_key(panel), _svg(panel), markup.details("Numbers", _table(panel))]
    return markup.figure("bars", panel.title, panel.caption, body)


@dataclass(frozen=True)
class _Axis:
    """The vertical axis: round numbers that hold every bar and zero."""

    low: float
    high: float
    step: float

    @classmethod
    def over(cls, values: list[float]) -> _Axis:
        low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
        if low == high:
            return cls(0.0, 1.0, 0.5)
        rough = (high - low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        return cls(math.floor(low / step) * step, math.ceil(high / step) * step, step)

    def ticks(self) -> list[float]:
        count = round((self.high - self.low) / self.step)
        return [self.low + index * self.step for index in range(count + 1)]

    def y(self, value: float) -> float:
        """Returns the height of a number on the page; infinities end at the border."""
        inside = min(self.high, max(self.low, value))
        share = (self.high - inside) / (self.high - self.low)
        return round(_TOP + share * (_HEIGHT - _TOP - _BOTTOM), 1)


def _svg(panel: Bars) -> str:
    finite = [value for _, values in panel.series for value in values if math.isfinite(value)]
    axis = _Axis.over(finite)
    pieces = [_grid(axis), _ticks(panel)]
    for index in range(len(panel.series)):
        pieces += _series(panel, index, axis)
    zero = axis.y(0.0)
    pieces.append(_line("zero", zero))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(f"{panel.title}, bar chart")}">{"".join(pieces)}</svg>'
    )


def _series(panel: Bars, index: int, axis: _Axis) -> list[str]:
    name, values = panel.series[index]
    group = _group_width(panel)
    width = group * 0.8 / len(panel.series)
    printed = len(panel.labels) * len(panel.series) <= _LABELLED_BARS
    largest = max(abs(axis.low), abs(axis.high))
    pieces = []
    for place, (word, value) in enumerate(zip(panel.labels, values, strict=True)):
        left = _LEFT + group * (place + 0.1) + width * index
        shown = number(value, decimals(largest))
        title = f"<title>{escape(f'{word}, {name}: ')}{shown}</title>"
        pieces.append(_bar(left, width, value, axis, index, title))
        if printed or not math.isfinite(value):
            y = axis.y(value if value == value else 0.0) + (-4 if not value < 0 else 12)
            x = round(left + width / 2, 1)
            pieces.append(f'<text class="value" x="{x}" y="{y}">{shown}</text>')
    return pieces


def _bar(left: float, width: float, value: float, axis: _Axis, index: int, title: str) -> str:
    height = value if value == value else 0.0
    ends = sorted((axis.y(height), axis.y(0.0)))
    colour = colors.SERIES[index % len(colors.SERIES)]
    data = f' data-value="{rounded(value)!r}"' if math.isfinite(value) else ""
    return (
        f'<rect x="{left + 1:.1f}" y="{ends[0]}" width="{max(1.0, width - 2):.1f}" '
        f'height="{ends[1] - ends[0]:.1f}" fill="{colour}"{data}>{title}</rect>'
    )


def _grid(axis: _Axis) -> str:
    places = decimals(axis.step)
    # One digit says as much as three on round numbers.
    places = None if places is None else max(0, places - 2)
    return "".join(
        f"{_line('tick', axis.y(tick))}"
        f'<text class="scale" x="{_LEFT - 6}" y="{axis.y(tick) + 4:.1f}">'
        f"{number(tick, places)}</text>"
        for tick in axis.ticks()
    )


def _line(kind: str, y: float) -> str:
    return f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'


def _ticks(panel: Bars) -> str:
    group = _group_width(panel)
    every = math.ceil(_TICK_WIDTH / group)
    return "".join(
        f'<text class="label" x="{_LEFT + group * (place + 0.5):.1f}" y="{_HEIGHT - 10}">'
        f"{escape(shorten(visible(word), _TICK_LENGTH))}</text>"
        for place, word in enumerate(panel.labels)
        if place % every == 0
    )


def _group_width(panel: Bars) -> float:
    return (_WIDTH - _LEFT - _RIGHT) / len(panel.labels)


def _key(panel: Bars) -> str:
    unit = f'<span class="unit">{prose(panel.unit)}</span>' if panel.unit else ""
    names = ""
    if len(panel.series) > 1:
        names = "".join(
            f'<i style="background:{colors.SERIES[index % len(colors.SERIES)]}"></i>'
            f"<span>{label(name)}</span>"
            for index, (name, _) in enumerate(panel.series)
        )
    return f'<p class="legend">{names}{unit}</p>' if names or unit else ""


def _table(panel: Bars) -> str:
    finite = [abs(v) for _, values in panel.series for v in values if math.isfinite(v)]
    places = decimals(max(finite, default=0.0))
    names = "".join(f'<th scope="col">{label(name)}</th>' for name, _ in panel.series)
    lines = []
    for place, word in enumerate(panel.labels):
        cells = "".join(
            f'<td class="number">{number(values[place], places)}</td>' for _, values in panel.series
        )
        lines.append(f'<tr><th scope="row">{label(word)}</th>{cells}</tr>')
    head = f"<thead><tr><td></td>{names}</tr></thead>"
    table = f"<table>{head}<tbody>{''.join(lines)}</tbody></table>"
    return markup.scroll(table, f"{panel.title}, numbers")
