"""Tables and coloured sentences, in HTML of our own."""

from __future__ import annotations

import math

from tl_contextmix.plotting import colors, markup
from tl_contextmix.plotting.circuitsvis_source import Charts, topk_samples
from tl_contextmix.plotting.display_text import NOTHING, decimals, label, number, rounded
from tl_contextmix.plotting.panels import Cell, ColoredText, Samples, Table

ROW_LIMIT = 500
TEXT_LENGTH = 160
NARROW_COLUMNS = 5


def draw_table(panel: Table, charts: Charts) -> str:
    """Returns the HTML of a table; the first `ROW_LIMIT` rows of a longer one."""
    head = "".join(f'<th scope="col">{label(name)}</th>' for name in panel.columns)
    scales = [_largest([row[index] for row in panel.rows]) for index in range(len(panel.columns))]
    lines = []
    for row in panel.rows[:ROW_LIMIT]:
        cells = [
            _cell(cell, scale, signed=name in panel.signed)
            for cell, scale, name in zip(row, scales, panel.columns, strict=True)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    remark = ""
    if not panel.rows:
        remark = "There is nothing to show: the table has no rows."
    elif len(panel.rows) > ROW_LIMIT:
        remark = f"The first {ROW_LIMIT} of {len(panel.rows):,} rows."
    body = [markup.scroll(table, panel.title), markup.note(remark)]
    wide = len(panel.columns) > NARROW_COLUMNS
    return markup.figure("table", panel.title, panel.caption, body, wide=wide)


def draw_text(panel: ColoredText, charts: Charts) -> str:
    """Returns the HTML of a sentence with a number under every token."""
    largest = _largest(list(panel.values))
    places = decimals(largest)
    words = []
    for token, value in zip(panel.tokens, panel.values, strict=True):
        data = f' data-value="{rounded(value)!r}"' if math.isfinite(value) else ""
        name = colors.cell_class(value, largest)
        shown = number(value, places)
        words.append(
            f'<span class="word"{data}><span class="{name}">{label(token)}</span>'
            f"<small>{shown}</small></span>"
        )
    unit = f"; {panel.unit}" if panel.unit else ""
    legend = f"Deepest colour: {number(largest, places)}{unit}"
    body = [f'<p class="sentence" dir="auto">{" ".join(words)}</p>', markup.note(legend)]
    return markup.figure("text", panel.title, panel.caption, body, wide=True)


def draw_samples(panel: Samples, charts: Charts) -> str:
    """Returns the HTML of several texts: CircuitsVis, and the numbers within reach of a keyboard.

    CircuitsVis colours by value / largest and shows nothing of a text without a positive number:
    such texts are drawn here.
    """
    cells = sum(map(len, panel.tokens))
    finite = all(math.isfinite(value) for row in panel.values for value in row)
    positive = all(row and max(row) > 0 for row in panel.values)
    texts = [
        draw_text(ColoredText(text, "", tokens, values, panel.unit), charts)
        for text, tokens, values in zip(panel.labels, panel.tokens, panel.values, strict=True)
    ]
    if not texts:
        body = [markup.note("There is nothing to show: no texts.")]
    elif finite and positive and charts.fits(cells):
        element = charts.add("TopkSamples", topk_samples(panel), cells)
        chart = f'<div class="scroll"><div class="cv single" id="{element}"></div></div>'
        body = [chart, markup.details("Numbers", "".join(texts))]
    else:
        body = texts
    return markup.figure("samples", panel.title, panel.caption, body, wide=True)


def _cell(cell: Cell, largest: float, *, signed: bool) -> str:
    if cell is None:
        return f'<td class="number">{NOTHING}</td>'
    if isinstance(cell, bool):
        return f"<td>{'yes' if cell else 'no'}</td>"
    if isinstance(cell, str):
        return f"<td>{label(cell, TEXT_LENGTH)}</td>"
    places = 0 if isinstance(cell, int) else decimals(largest)
    value = float(cell)
    shown = number(value, places, signed=signed)
    name = f"number {colors.cell_class(value, largest)}" if signed else "number"
    data = f' data-value="{rounded(value)!r}"' if math.isfinite(value) else ""
    return f'<td class="{name}"{data}>{shown}</td>'


def _largest(cells: list[Cell] | list[float]) -> float:
    numbers = [abs(cell) for cell in cells if isinstance(cell, (int, float))]
    return float(max((value for value in numbers if math.isfinite(value)), default=0.0))
