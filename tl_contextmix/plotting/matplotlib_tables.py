"""Tables and coloured texts as matplotlib figures: text that stands where it is put."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tl_contextmix.plotting import colors
from tl_contextmix.plotting.display_text import cells, decimals, is_number, largest, number
from tl_contextmix.plotting.matplotlib_fonts import SIZE, Lettering
from tl_contextmix.plotting.panels import ColoredText, Samples, Table

_ROW = 0.2  # inches
_WORDS = 0.45  # inches, a line of words with the numbers below
_LINE = 6.5
_PAD = 0.1
_HEADING = 0.25


def table(figure: Figure, panel: Table, lettering: Lettering) -> None:
    """Draws a table; columns that are signed are coloured."""
    columns = [[row[index] for row in panel.rows] for index in range(len(panel.columns))]
    texts = [
        [lettering.shown(name), *cells(column, partial(lettering.shown, length=60))]
        for name, column in zip(panel.columns, columns, strict=True)
    ]
    widths = [max(lettering.width(text, SIZE) for text in each) + 2 * _PAD for each in texts]
    axes = _paper(figure, panel.title, sum(widths), _ROW * (len(panel.rows) + 1), lettering)
    left = 0.0
    for name, column, lines, width in zip(panel.columns, columns, texts, widths, strict=True):
        deepest, right = largest(column), bool(column) and all(map(is_number, column))
        x, side = (left + width - _PAD, "right") if right else (left + _PAD, "left")
        for line, (cell, text) in enumerate(zip([None, *column], lines, strict=True)):
            ink: Any = colors.INK
            if name in panel.signed and is_number(cell):
                ink = _box(axes, (left, _ROW * line, width, _ROW), float(cell), deepest)
            axes.text(x, _ROW * (line + 0.5), text, ha=side, va="center_baseline", color=ink)
        left += width
    axes.plot([0, left], [_ROW, _ROW], color=colors.INK, linewidth=0.6)


def text(figure: Figure, panel: ColoredText, lettering: Lettering) -> None:
    """Draws a sentence, the number of each token below it."""
    title = f"{panel.title} [{panel.unit}]" if panel.unit else panel.title
    _texts(figure, title, [(panel.tokens, panel.values)], lettering)


def samples(figure: Figure, panel: Samples, lettering: Lettering) -> None:
    """Draws several texts on one scale, each beginning a line."""
    title = f"{panel.title}: {panel.name}" + (f" [{panel.unit}]" if panel.unit else "")
    _texts(figure, title, list(zip(panel.tokens, panel.values, strict=True)), lettering)


def _texts(
    figure: Figure,
    title: str,
    texts: Sequence[tuple[Sequence[str], Sequence[float]]],
    lettering: Lettering,
) -> None:
    deepest = largest(value for _, values in texts for value in values)
    words, top = [], 0.0
    for tokens, values in texts:
        left = 0.0
        for token, value in zip(tokens, values, strict=True):
            shown, figure_text = lettering.shown(token), number(value, decimals(deepest))
            width = max(lettering.width(shown, SIZE), lettering.width(figure_text, SIZE - 2)) + _PAD
            if left and left + width > _LINE:
                left, top = 0.0, top + _WORDS
            words.append((shown, figure_text, value, (left, top, width, _WORDS / 2)))
            left += width + 0.03
        top += _WORDS
    wide = max((left + width for *_, (left, _, width, _) in words), default=1.0)
    axes = _paper(figure, title, wide, max(top, _WORDS), lettering)
    for shown, figure_text, value, (left, above, width, height) in words:
        ink = _box(axes, (left, above, width, height), value, deepest)
        middle = left + width / 2
        axes.text(middle, above + height / 2, shown, ha="center", va="center_baseline", color=ink)
        below = above + 1.4 * height
        axes.text(middle, below, figure_text, ha="center", va="center", fontsize=SIZE - 2)


def _paper(figure: Figure, title: str, width: float, height: float, lettering: Lettering) -> Axes:
    """Returns a sheet measured in inches from its upper left corner."""
    heading = lettering.prose(title)
    width = max(width, lettering.width(heading, SIZE + 1))
    wide, high = width + 2 * _PAD, height + 2 * _PAD + _HEADING
    figure.set_layout_engine("none")
    figure.set_size_inches(wide, high)
    axes = figure.add_axes((_PAD / wide, _PAD / high, width / wide, height / high))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    top = 1 - (_PAD + _HEADING / 2) / high
    figure.text(_PAD / wide, top, heading, fontsize=SIZE + 1, va="center")
    return axes


def _box(axes: Axes, place: tuple[float, float, float, float], value: float, deepest: float) -> Any:
    """Draws the coloured ground of a number; returns the colour that is read on it."""
    left, top, width, height = place
    paper: Any = colors.NOTHING
    ink: Any = colors.INK
    if math.isinf(value):
        paper = colors.INFINITE
    elif not math.isnan(value):
        shade = colors.shade(value / deepest if deepest else 0.0)
        paper, ink = colors.as_hex(shade), colors.ink_on(shade)
    ground = Rectangle((left, top), width, height, facecolor=paper, edgecolor="white")
    axes.add_patch(ground)
    return ink
