"""What is left of a page where scripts and frames are stripped: pictures and tables.

Viewers of notebooks that nobody has trusted yet, and those of code hosts, keep images and tables
and drop everything that could act. What is drawn here needs no script and no stylesheet. It is
written as SVG and not drawn with matplotlib: twelve labelled maps take matplotlib two seconds and
its import most of another, and a notebook needs them each time a result is shown.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

from tl_contextmix.plotting import colors, graph, png, scales, series_charts, tables
from tl_contextmix.plotting.display_text import LABEL_LENGTH, cells, escape, prose
from tl_contextmix.plotting.panels import Bars, Graph, Heatmap, Panel
from tl_contextmix.plotting.survey import coarse

SHEETS = 12
ROWS = 30
_WIDTH = 900
_SHEET = (200, 320)  # side of a sheet that is aimed at, and the most pixels it has
_CELL = (3, 24)  # smallest and largest side of a cell
_CHAR = 6.2
_SCALE = 168  # where the words beside the scale begin
_GAP = 18
_HEAD = 34


def picture(panel: Panel) -> str | None:
    """Returns a panel as one SVG element; None for tables and texts, and where nothing is drawn."""
    if isinstance(panel, Bars):
        return series_charts.picture(panel)
    if isinstance(panel, Heatmap) and panel.values.numel():
        return _maps(panel)
    if isinstance(panel, Graph) and panel.nodes:
        return graph.picture(panel)
    return None


def fallback(panel: Panel) -> str:
    """Returns a panel as HTML that survives where scripts, frames and styles do not."""
    drawn = picture(panel)
    if drawn is not None:
        source = "data:image/svg+xml;base64," + base64.b64encode(drawn.encode()).decode()
        return f'<p><img src="{source}" alt="{prose(panel.title)}" style="max-width:100%"></p>'
    table = panel.table()
    return f"<p><b>{prose(panel.title)}</b></p>{tables.grid(table, limit=ROWS)}"


def _maps(panel: Heatmap) -> str:
    """Returns the sheets of a map side by side, tokens on both axes, the scale above them."""
    pixels = panel.survey.pixels
    block = math.ceil(max(pixels.shape[1:]) / _SHEET[1])
    sheets = [coarse(sheet, block) for sheet in scales.depths(pixels)[:SHEETS]]
    rows, columns = sheets[0].shape
    side = max(rows, columns)
    cell = 1 if side * _CELL[0] > _SHEET[1] else max(_CELL[0], min(_CELL[1], _SHEET[0] // side))
    block *= panel.survey.block
    # One name for each row and column of pixels.
    names = [
        cells(panel.names(axis)[::block], lambda token: escape(token, LABEL_LENGTH))
        for axis in ("rows", "columns")
    ]
    left, below = (max(map(len, axis)) * _CHAR for axis in names)
    wide = left + 8 + columns * cell + _GAP
    high = 16 + rows * cell + below * 0.75 + 12
    across = min(len(sheets), max(1, int(_WIDTH // wide)))
    pieces = []
    for index, sheet in enumerate(sheets):
        down, right = divmod(index, across)
        corner = round(right * wide + left + 8, 1), round(down * high + _HEAD + 16, 1)
        source = png.data_uri(sheet, cell)
        size = f'width="{columns * cell}" height="{rows * cell}"'
        pieces.append(_sheet(panel.sheets[index], source, size, corner, names, cell))
    _, high_end = scales.ends(panel.survey.low, panel.survey.high)
    # The last column label leans out to the left, the scale and its unit run along the top.
    width = max(across * wide, _SCALE + 8 + len(high_end + _scale_words(panel)) * _CHAR, 560.0)
    height = math.ceil(len(sheets) / across) * high + _HEAD
    name = escape(f"{' '.join(panel.title.split())}, map")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" font-family="{colors.FONT}" '
        f'font-size="11" fill="{colors.INK}" aria-label="{name}">'
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f"{_scale(panel)}{''.join(pieces)}</svg>"
    )


def _sheet(
    name: str,
    source: str,
    size: str,
    corner: tuple[float, float],
    names: Sequence[Sequence[str]],
    cell: int,
) -> str:
    x, y = corner
    rows, columns = names
    every = math.ceil(11 / cell)  # labels that would overlap are omitted
    pieces = [
        f'<text x="{x}" y="{y - 5}" font-weight="600">{escape(name, 30)}</text>',
        f'<image x="{x}" y="{y}" {size} href="{source}"/>',
        f'<rect x="{x}" y="{y}" {size} fill="none" stroke="{colors.GRID}"/>',
    ]
    for place in range(0, len(rows), every):
        at = y + (place + 0.5) * cell + 4
        pieces.append(f'<text x="{x - 4:.1f}" y="{at:.1f}" text-anchor="end">{rows[place]}</text>')
    for place in range(0, len(columns), every):
        at, base = x + (place + 0.5) * cell + 4, y + len(rows) * cell + 10
        pieces.append(
            f'<text transform="translate({at:.1f} {base:.1f}) rotate(-48)" text-anchor="end">'
            f"{columns[place]}</text>"
        )
    return "".join(pieces)


def _scale(panel: Heatmap) -> str:
    low, high = scales.ends(panel.survey.low, panel.survey.high)
    ends = ("#fff", colors.POSITIVE)
    stops = (colors.NEGATIVE, *ends) if panel.survey.signed else ends
    steps = "".join(
        f'<stop offset="{place / (len(stops) - 1)}" stop-color="{colour}"/>'
        for place, colour in enumerate(stops)
    )
    return (
        f'<defs><linearGradient id="scale">{steps}</linearGradient></defs>'
        f'<text x="66" y="16" text-anchor="end">{low}</text>'
        f'<rect x="72" y="6" width="90" height="12" fill="url(#scale)" stroke="{colors.GRID}"/>'
        f'<text x="{_SCALE}" y="16">{high}{_scale_words(panel)}</text>'
    )


def _scale_words(panel: Heatmap) -> str:
    """Returns what stands after the largest number of the scale."""
    unit = f" {escape(panel.unit)}" if panel.unit else ""
    unit += f" · {ranks}" if (ranks := scales.describe_ranks(panel.survey.pixels)) else ""
    rest = len(panel.sheets) - SHEETS
    return unit + (f" · the first {SHEETS} of {len(panel.sheets)} sheets" if rest > 0 else "")
