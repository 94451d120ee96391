"""What bar charts and curves share: a vertical axis, its grid, the key, the table of numbers.

Colours and sizes are attributes of the drawing, so that it also looks like itself as a picture of
its own; the stylesheet of the page overrides them in a dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tl_contextmix.plotting import colors, markup
from tl_contextmix.plotting.display_text import decimals, escape, label, number, prose
from tl_contextmix.plotting.panels import Bars, Curves

WIDTH = 560
HEIGHT = 260
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 20, 42
TICK_LENGTH = 10
_TICK_WIDTH = 62


@dataclass(frozen=True)
class Axis:
    """The vertical axis: round numbers that hold everything drawn.

    Attributes:
        low: Number at the bottom.
        high: Number at the top.
        step: From one line of the grid to the next.
    """

    low: float
    high: float
    step: float

    @classmethod
    def over(cls, values: Iterable[float], *, zero: bool) -> Axis:
        """Returns the axis for some numbers; what is not finite is left out.

        Args:
            values: The numbers.
            zero: Whether zero is on it, whatever they are.
        """
        finite = [value for value in values if math.isfinite(value)]
        finite += [0.0] if zero or not finite else []
        low, high = min(finite), max(finite)
        if low == high:
            return cls(min(0.0, low), max(0.0, high) or 1.0, (abs(low) or 1.0) / 2)
        rough = (high - low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        return cls(math.floor(low / step) * step, math.ceil(high / step) * step, step)

    def y(self, value: float) -> float:
        """Returns the height of a number on the page; infinities end at the border."""
        inside = min(self.high, max(self.low, value))
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
            f"{line('tick', self.y(tick))}"
            f'<text class="scale" x="{LEFT - 6}" y="{self.y(tick) + 4:.1f}" '
            f'text-anchor="end" fill="{colors.SOFT}">{number(tick, places)}</text>'
            for tick in ticks
        )


def group_width(chart: Bars) -> float:
    """Returns how much of the page each label has for itself."""
    return (WIDTH - LEFT - RIGHT) / len(chart.labels)


def line(kind: str, y: float) -> str:
    """Returns a horizontal line, of the grid (``"tick"``) or at zero (``"zero"``)."""
    colour = colors.GRID if kind == "tick" else colors.ZERO_LINE
    return (
        f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" '
        f'stroke="{colour}"/>'
    )


def drawing(chart: Bars, axis: Axis, marks: Iterable[str], kind: str) -> str:
    """Returns the chart as one SVG element.

    Args:
        chart: Its labels and its title.
        axis: Its vertical axis.
        marks: What is drawn.
        kind: What it is called, for those who cannot see it.
    """
    name = escape(f"{' '.join(chart.title.split())}, {kind}")
    inside = "".join([axis.grid(), _ticks(chart), *marks])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="{colors.FONT}" font-size="11.5" fill="{colors.INK}" '
        f'aria-label="{name}">{inside}</svg>'
    )


def _ticks(chart: Bars) -> str:
    group = group_width(chart)
    every = math.ceil(_TICK_WIDTH / group)
    return "".join(
        f'<text class="label" x="{LEFT + group * (place + 0.5):.1f}" y="{HEIGHT - 10}" '
        f'text-anchor="middle">{escape(word, TICK_LENGTH)}</text>'
        for place, word in enumerate(chart.labels)
        if place % every == 0
    )


def key(chart: Bars) -> str:
    """Returns which colour is which series, and the unit."""
    unit = f'<span class="unit">{prose(chart.unit)}</span>' if chart.unit else ""
    names = ""
    if len(chart.series) > 1:
        names = "".join(
            f'<i style="background:{colors.series(index)}"></i><span>{label(name)}</span>'
            for index, (name, _) in enumerate(chart.series)
        )
    return f'<p class="legend">{names}{unit}</p>' if names or unit else ""


def numbers(chart: Bars) -> str:
    """Returns the table of the numbers, within reach of a keyboard."""
    finite = [abs(v) for _, values in chart.series for v in values if math.isfinite(v)]
    places = decimals(max(finite, default=0.0))
    names = "".join(f'<th scope="col">{label(name)}</th>' for name, _ in chart.series)
    ends = chart.intervals if isinstance(chart, Curves) else ()
    lines = []
    for place, word in enumerate(chart.labels):
        cells = "".join(
            f'<td class="number">{number(values[place], places)}'
            f"{_between(ends[index][place], places) if ends else ''}</td>"
            for index, (_, values) in enumerate(chart.series)
        )
        lines.append(f'<tr><th scope="row">{label(word)}</th>{cells}</tr>')
    head = f"<thead><tr><td></td>{names}</tr></thead>"
    table = f"<table>{head}<tbody>{''.join(lines)}</tbody></table>"
    return markup.details("Numbers", markup.scroll(table, f"{chart.title}, numbers"))


def _between(ends: tuple[float, float], places: int | None) -> str:
    low, high = ends
    return f" <small>{number(low, places)} to {number(high, places)}</small>"


def series_name(chart: Bars, index: int, place: int, places: int | None) -> str:
    """Returns the tooltip of one number: its label, its series, the number."""
    name, values = chart.series[index]
    told = escape(f"{chart.labels[place]}, {name}: ")
    return f"<title>{told}{number(values[place], places)}</title>"
