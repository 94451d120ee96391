"""Panels as plain text, for terminals and for notebook viewers that run no scripts."""

from __future__ import annotations

from tl_contextmix.plotting.display_text import cells, is_number, shorten, visible
from tl_contextmix.plotting.panels import Panel, Table

LINES = 10
CELL = 60


def describe(panel: Panel) -> str:
    """Returns the title of a panel and the numbers that stand out."""
    table = panel.table()
    texts = _aligned(table) if table.rows else ["There is nothing to show."]
    lines = ["  " + line for line in texts]
    rest = [f"  … {len(lines) - 1 - LINES} more"] if len(lines) > LINES + 1 else []
    return "\n".join([panel.title, *lines[: LINES + 1], *rest])


def _aligned(table: Table) -> list[str]:
    """Returns a table as lines of text, numbers to the right, the heading first."""
    columns = []
    for index, name in enumerate(table.columns):
        column = [row[index] for row in table.rows]
        texts = [_text(name) if name else "", *cells(column, _text)]
        width = max(map(len, texts))
        right = bool(column) and all(map(is_number, column))
        columns.append([text.rjust(width) if right else text.ljust(width) for text in texts])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def _text(text: str) -> str:
    return shorten(visible(text), CELL)
