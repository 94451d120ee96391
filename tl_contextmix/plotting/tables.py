"""Tables and coloured sentences, in HTML of our own."""

from __future__ import annotations

import math
from functools import partial

from tl_contextmix.plotting import colors, markup
from tl_contextmix.plotting.circuitsvis_source import Charts
from tl_contextmix.plotting.display_text import (
    cells,
    data,
    decimals,
    is_number,
    label,
    largest,
    number,
)
from tl_contextmix.plotting.panels import ColoredText, Samples, Table

ROW_LIMIT = 500
TEXT_LENGTH = 160
NARROW_COLUMNS = 5


def draw_table(panel: Table, charts: Charts) -> str:
    """Returns the HTML of a table; the first `ROW_LIMIT` rows of a longer one."""
    empty = "" if panel.rows else markup.note("There is nothing to show: the table has no rows.")
    body = [markup.scroll(grid(panel, values=True), panel.title), empty]
    wide = len(panel.columns) > NARROW_COLUMNS
    return markup.figure("table", panel.title, panel.caption, body, wide=wide)


def grid(panel: Table, *, limit: int = ROW_LIMIT, values: bool = False) -> str:
    """Returns the rows of a table, which are readable without scripts and styles.

    Below a longer table there is a remark. With ``values`` the elements carry their numbers.
    """
    columns = []
    for index, name in enumerate(panel.columns):
        column = [row[index] for row in panel.rows]
        signed, scale = name in panel.signed, largest(column)
        # A column without a heading names the rows.
        tag = "td" if name else "th"
        opening = "<td" if name else '<th scope="row"'
        texts = cells(column[:limit], partial(label, length=TEXT_LENGTH), signed=signed)
        found = []
        for cell, text in zip(column, texts, strict=False):
            kind = ""
            if cell is None:
                kind = ' class="number"'
            elif is_number(cell):
                shade = f" {colors.cell_class(float(cell), scale)}" if signed else ""
                kind = f' class="number{shade}"{data(float(cell)) if values else ""}'
            found.append(f"{opening}{kind}>{text}</{tag}>")
        columns.append(found)
    head = "".join(
        f'<th scope="col">{label(name)}</th>' if name else "<td></td>" for name in panel.columns
    )
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in zip(*columns, strict=True))
    rest = f"The first {limit} of {len(panel.rows):,} rows." if len(panel.rows) > limit else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>{markup.note(rest)}"


def draw_text(panel: ColoredText, charts: Charts) -> str:
    """Returns the HTML of a sentence with a number under every token."""
    deepest = largest(panel.values)
    places = decimals(deepest)
    words = [
        f'<span class="word"{data(value)}><span class="{colors.cell_class(value, deepest)}">'
        f"{label(token)}</span><small>{number(value, places)}</small></span>"
        for token, value in zip(panel.tokens, panel.values, strict=True)
    ]
    unit = f"; {panel.unit}" if panel.unit else ""
    legend = f"Deepest colour: {number(deepest, places)}{unit}"
    body = [f'<p class="sentence" dir="auto">{" ".join(words)}</p>', markup.note(legend)]
    return markup.figure("text", panel.title, panel.caption, body, wide=True)


def draw_samples(panel: Samples, charts: Charts) -> str:
    """Returns the HTML of several texts: CircuitsVis, and the numbers within reach of a keyboard.

    CircuitsVis colours by value / largest and shows nothing of a text without a positive number:
    such texts are drawn here.
    """
    finite = all(math.isfinite(value) for row in panel.values for value in row)
    positive = all(row and max(row) > 0 for row in panel.values)
    body = [
        draw_text(ColoredText(text, "", tokens, values, panel.unit), charts)
        for text, tokens, values in zip(panel.labels, panel.tokens, panel.values, strict=True)
    ] or [markup.note("There is nothing to show: no texts.")]
    if panel.labels and finite and positive and (element := charts.add(panel)):
        # Unfolded until the chart is there: without scripts, or without CircuitsVis, it is not.
        chart = f'<div class="scroll" hidden><div class="cv single" id="{element}"></div></div>'
        body = [chart, markup.details("Numbers", "".join(body), unfolded=True)]
    return markup.figure("samples", panel.title, panel.caption, body, wide=True)
