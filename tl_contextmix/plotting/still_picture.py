"""What is left of a page where scripts and frames are stripped: pictures, tables and text.

Viewers of notebooks that nobody has trusted yet, and those of code hosts, keep images and tables
and drop everything that could act. What is drawn here needs no script and no stylesheet.
"""

from __future__ import annotations

import base64
import math

import torch

from tl_contextmix.plotting import bar_charts, colors, curve_charts, png
from tl_contextmix.plotting.display_text import LABEL_LENGTH, decimals, escape, number, prose
from tl_contextmix.plotting.heatmap import range_of
from tl_contextmix.plotting.panels import Bars, ColoredText, Curves, Heatmap, Panel, Samples, Table

SHEETS = 12
ROWS = 30
_WIDTH = 900
_SHEET = 200
_CELL = (3, 24)  # smallest and largest side of a cell
_CHAR = 6.2
_GAP = 18
_HEAD = 34


def picture(panel: Panel) -> str | None:
    """Returns a panel as one SVG element; None for tables and texts, and where nothing is drawn."""
    if isinstance(panel, Bars) and panel.labels and panel.series:
        return (
            curve_charts.picture(panel) if isinstance(panel, Curves) else bar_charts.picture(panel)
        )
    if isinstance(panel, Heatmap) and panel.values.numel():
        return _maps(panel)
    return None


def fallback(panel: Panel) -> str:
    """Returns a panel as HTML that survives where scripts, frames and styles do not."""
    drawn = picture(panel)
    if drawn is not None:
        source = "data:image/svg+xml;base64," + base64.b64encode(drawn.encode()).decode()
        return f'<p><img src="{source}" alt="{prose(panel.title)}" style="max-width:100%"></p>'
    if isinstance(panel, Table):
        return _table(panel.title, panel.columns, panel.rows)
    if isinstance(panel, ColoredText):
        rows = tuple(zip(panel.tokens, panel.values, strict=True))
        return _table(panel.title, ("token", panel.unit), rows)
    if isinstance(panel, Samples):
        texts = map("".join, panel.tokens)
        rows = tuple(zip(panel.labels, texts, strict=True))
        return _table(panel.title, ("", "text"), rows)
    return ""


def _table(title: str, columns: tuple[str, ...], rows: tuple[tuple[object, ...], ...]) -> str:
    head = "".join(f"<th>{escape(name) if name else ''}</th>" for name in columns)
    lines = [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:ROWS]]
    rest = f"<p>… {len(rows) - ROWS:,} more rows</p>" if len(rows) > ROWS else ""
    return (
        f"<p><b>{prose(title)}</b></p><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>{rest}"
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        finite = abs(value) if math.isfinite(value) else 0.0
        return f'<td align="right">{number(value, decimals(finite))}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td align="right">{value}</td>'
    return f"<td>{'–' if value is None else escape(str(value), 80)}</td>"


def _maps(panel: Heatmap) -> str:
    """Returns the sheets of a map side by side, tokens on both axes, the scale above them."""
    shown = panel.values[:SHEETS].detach().cpu().double()
    if panel.causal:
        later = torch.ones(shown.shape[1:], dtype=torch.bool).triu(1)
        shown = shown.masked_fill(later, math.nan)
    rows, columns = shown.shape[1:]
    cell = max(_CELL[0], min(_CELL[1], _SHEET // max(rows, columns)))
    left = _longest(panel.rows) * _CHAR + 8
    below = _longest(panel.columns) * _CHAR * 0.75 + 12
    wide, high = left + columns * cell + _GAP, 16 + rows * cell + below
    across = max(1, int(_WIDTH // wide))
    pieces, ends = [], range_of(panel)
    largest = max(-ends[0], ends[1])
    for index, sheet in enumerate(shown):
        x = round(index % across * wide + left, 1)
        y = round(index // across * high + _HEAD + 16, 1)
        pieces.append(_sheet(panel, index, png.data_uri(sheet, largest, cell), (x, y), cell))
    across = min(across, len(shown))
    # The last column label leans out to the left, the scale and its unit run along the top.
    width = max(across * wide, 420.0)
    height = math.ceil(len(shown) / across) * high + _HEAD
    name = escape(f"{' '.join(panel.title.split())}, map")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" font-family="{colors.FONT}" '
        f'font-size="11" fill="{colors.INK}" aria-label="{name}">'
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f"{_scale(panel, largest, ends[0] < 0)}{''.join(pieces)}</svg>"
    )


def _longest(tokens: tuple[str, ...]) -> int:
    return max(len(escape(token, LABEL_LENGTH)) for token in tokens)


def _sheet(panel: Heatmap, index: int, source: str, corner: tuple[float, float], cell: int) -> str:
    x, y = corner
    rows, columns = len(panel.rows), len(panel.columns)
    every = math.ceil(11 / cell)  # labels that would overlap are left out
    pieces = [
        f'<text x="{x}" y="{y - 5}" font-weight="600">{escape(panel.sheets[index], 30)}</text>',
        f'<image x="{x}" y="{y}" width="{columns * cell}" height="{rows * cell}" href="{source}"/>',
        f'<rect x="{x}" y="{y}" width="{columns * cell}" height="{rows * cell}" fill="none" '
        f'stroke="{colors.GRID}"/>',
    ]
    for place in range(0, rows, every):
        at = y + (place + 0.5) * cell + 4
        word = escape(panel.rows[place], LABEL_LENGTH)
        pieces.append(f'<text x="{x - 4:.1f}" y="{at:.1f}" text-anchor="end">{word}</text>')
    for place in range(0, columns, every):
        at, base = x + (place + 0.5) * cell + 4, y + rows * cell + 10
        word = escape(panel.columns[place], LABEL_LENGTH)
        pieces.append(
            f'<text transform="translate({at:.1f} {base:.1f}) rotate(-48)" text-anchor="end">'
            f"{word}</text>"
        )
    return "".join(pieces)


def _scale(panel: Heatmap, largest: float, signed: bool) -> str:
    low = number(-largest, decimals(largest)) if signed else "0"
    stops = (colors.NEGATIVE, "#fff", colors.POSITIVE) if signed else ("#fff", colors.POSITIVE)
    steps = "".join(
        f'<stop offset="{place / (len(stops) - 1)}" stop-color="{colour}"/>'
        for place, colour in enumerate(stops)
    )
    unit = f" {escape(panel.unit)}" if panel.unit else ""
    rest = len(panel.sheets) - SHEETS
    more = f" · the first {SHEETS} of {len(panel.sheets)} sheets" if rest > 0 else ""
    return (
        f'<defs><linearGradient id="scale">{steps}</linearGradient></defs>'
        f'<text x="66" y="16" text-anchor="end">{low}</text>'
        f'<rect x="72" y="6" width="90" height="12" fill="url(#scale)" stroke="{colors.GRID}"/>'
        f'<text x="168" y="16">{number(largest, decimals(largest))}{unit}{more}</text>'
    )
