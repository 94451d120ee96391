"""Panels as plain text, for terminals and for notebook viewers that run no scripts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tl_contextmix.plotting.display_text import NOTHING, decimals, number, shorten, visible
from tl_contextmix.plotting.heatmap import largest_of, top_cells
from tl_contextmix.plotting.panels import (
    Bars,
    Cell,
    ColoredText,
    Curves,
    Heatmap,
    Panel,
    Samples,
    Table,
)

LINES = 10
CELL = 60


def describe(panel: Panel) -> str:
    """Returns the title of a panel and the numbers that stand out."""
    lines = _LINES[type(panel)](panel)
    shown = lines[:LINES] + ([f"  … {len(lines) - LINES} more"] if len(lines) > LINES else [])
    return "\n".join([panel.title, *shown])


def aligned(columns: tuple[str, ...], rows: tuple[tuple[Cell, ...], ...]) -> list[str]:
    """Returns a table as lines of text, numbers to the right, the heading first."""
    each = [[row[index] for row in rows] for index in range(len(columns))]
    texts = [
        [shorten(visible(name), CELL) if name else "", *_texts(cells)]
        for name, cells in zip(columns, each, strict=True)
    ]
    widths = [max(map(len, column)) for column in texts]
    numeric = [bool(cells) and all(map(_is_number, cells)) for cells in each]
    return [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in zip(*texts, strict=True)
    ]


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)


def _texts(cells: list[Cell]) -> list[str]:
    """Returns the cells of one column, its numbers with as many decimals as the largest needs."""
    sizes = [abs(cell) for cell in cells if isinstance(cell, float) and math.isfinite(cell)]
    places = decimals(max(sizes, default=0.0))
    return [_text(cell, places) for cell in cells]


def _text(cell: Cell, places: int | None) -> str:
    if cell is None:
        return NOTHING
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return number(cell, places)
    return shorten(visible(cell), CELL) if isinstance(cell, str) else str(cell)


def _heatmap(panel: Heatmap) -> list[str]:
    places = decimals(largest_of(panel))
    lines = []
    for sheet, row, column in top_cells(panel):
        value = number(float(panel.values[sheet, row, column]), places)
        pair = f"{_token(panel.columns[column])} ({column}) -> {_token(panel.rows[row])} ({row})"
        lines.append(f"  {visible(panel.sheets[sheet])}: {pair} {value}")
    return lines


def _series(panel: Bars) -> list[str]:
    columns = ("", *(name for name, _ in panel.series))
    rows = tuple(
        (word, *(float(values[place]) for _, values in panel.series))
        for place, word in enumerate(panel.labels)
    )
    return ["  " + line for line in aligned(columns, rows)]


def _table(panel: Table) -> list[str]:
    return ["  " + line for line in aligned(panel.columns, panel.rows)]


def _colored_text(panel: ColoredText) -> list[str]:
    numbers = _texts([float(value) for value in panel.values])
    return [
        f"  {_token(token)} {shown}" for token, shown in zip(panel.tokens, numbers, strict=True)
    ]


def _samples(panel: Samples) -> list[str]:
    return [
        f"  {visible(text)}: {visible(''.join(tokens))}"
        for text, tokens in zip(panel.labels, panel.tokens, strict=True)
    ]


def _token(token: str) -> str:
    return shorten(visible(token))


_LINES: dict[type, Callable[[Any], list[str]]] = {
    Heatmap: _heatmap,
    Bars: _series,
    Curves: _series,
    Table: _table,
    ColoredText: _colored_text,
    Samples: _samples,
}
