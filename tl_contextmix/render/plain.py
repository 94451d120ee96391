"""Panels as plain text, for terminals and for notebook viewers that run no scripts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tl_contextmix.panels import Bars, Cell, ColoredText, Heatmap, Panel, Samples, Table
from tl_contextmix.render.heatmap import largest_of, top_cells
from tl_contextmix.render.text import NOTHING, decimals, number, shorten, visible

LINES = 10


def describe(panel: Panel) -> str:
    """Returns the title of a panel and the numbers that stand out."""
    lines = _LINES[type(panel)](panel)
    shown = lines[:LINES] + ([f"  … {len(lines) - LINES} more"] if len(lines) > LINES else [])
    return "\n".join([panel.title, *shown])


def aligned(columns: tuple[str, ...], rows: tuple[tuple[Cell, ...], ...]) -> list[str]:
    """Returns a table as lines of text, numbers to the right, the heading first."""
    texts = [tuple(map(visible, columns)), *(tuple(map(_text, row)) for row in rows)]
    widths = [max(len(text) for text in column) for column in zip(*texts, strict=True)]
    numeric = [
        bool(column) and all(isinstance(cell, (int, float)) for cell in column)
        for column in (tuple(row[index] for row in rows) for index in range(len(columns)))
    ]
    return [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in texts
    ]


def _text(cell: Cell) -> str:
    if cell is None:
        return NOTHING
    if isinstance(cell, float):
        return number(cell, decimals(abs(cell)) if abs(cell) < float("inf") else 0)
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return visible(cell) if isinstance(cell, str) else str(cell)


def _heatmap(panel: Heatmap) -> list[str]:
    places = decimals(largest_of(panel))
    lines = []
    for sheet, row, column in top_cells(panel):
        value = number(float(panel.values[sheet, row, column]), places)
        pair = f"{_token(panel.columns[column])} ({column}) -> {_token(panel.rows[row])} ({row})"
        lines.append(f"  {visible(panel.sheets[sheet])}: {pair} {value}")
    return lines


def _bars(panel: Bars) -> list[str]:
    columns = ("", *(name for name, _ in panel.series))
    rows = tuple(
        (word, *(float(values[place]) for _, values in panel.series))
        for place, word in enumerate(panel.labels)
    )
    return ["  " + line.replace("∅", " ", 1) for line in aligned(columns, rows)]


def _table(panel: Table) -> list[str]:
    return ["  " + line for line in aligned(panel.columns, panel.rows)]


def _colored_text(panel: ColoredText) -> list[str]:
    return [
        f"  {_token(token)} {_text(float(value))}"
        for token, value in zip(panel.tokens, panel.values, strict=True)
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
    Bars: _bars,
    Table: _table,
    ColoredText: _colored_text,
    Samples: _samples,
}
