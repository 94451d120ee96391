"""Maps over tokens: CircuitsVis where it is good, a table of numbers or a picture where not."""

from __future__ import annotations

import html
import json
import math
from dataclasses import replace

import torch

from tl_contextmix.plotting import colors, markup, png
from tl_contextmix.plotting.circuitsvis_source import Charts, attention_heads
from tl_contextmix.plotting.display_text import (
    decimals,
    escape,
    label,
    number,
    prose,
    rounded,
    shorten,
    visible,
)
from tl_contextmix.plotting.panels import Heatmap

# A table of numbers is read, not looked at; beyond these a picture says more and weighs less.
TABLE_SIDE = 40
TABLE_CELLS = 8_000
PICTURE_CELLS = 20_000_000
TOP_CELLS = 10
NARROW_SIDE = 24
NARROW_TABLE = 7
WIDEST = 860
CELL_WIDTH = 58
# Of a map with too many cells, the part that is drawn cell by cell.
PART_CELLS = 20_000
PART_SIDE = 8


def draw(panel: Heatmap, charts: Charts) -> str:
    """Returns the HTML of a stack of maps."""
    panel = replace(panel, values=panel.values.detach().cpu().double())
    if not panel.values.numel():
        empty = markup.note("There is nothing to show: the map has no cells.")
        return markup.figure("heatmap", panel.title, panel.caption, [empty])
    if _is_for_circuitsvis(panel) and charts.fits(panel.values.numel()):
        wide = len(panel.rows) > NARROW_SIDE
        body = [_legend(panel), _interactive(panel, charts), _numbers(panel)]
    elif _is_small(panel):
        wide = len(panel.columns) > NARROW_TABLE
        body = [_legend(panel), _tables(panel)]
    else:
        wide = True
        remark = markup.note(_picture_remark(panel))
        body = [_part(panel, charts), remark, _legend(panel), _pictures(panel), _numbers(panel)]
    return markup.figure("heatmap", panel.title, panel.caption, body, wide=wide)


def width_of(panel: Heatmap) -> int:
    """Returns how wide a CircuitsVis map of some tokens is drawn, at most; it is as high."""
    return min(WIDEST, 150 + CELL_WIDTH * len(panel.rows))


def largest_of(panel: Heatmap) -> float:
    """Returns the largest absolute value of a map, infinities and NaN left out."""
    low, high = range_of(panel)
    return max(-low, high)


def range_of(panel: Heatmap) -> tuple[float, float]:
    """Returns the lowest and highest value of a map, infinities and NaN left out, 0 if none is."""
    values = panel.values
    ends = values.aminmax() if values.numel() else ()
    if not all(end.isfinite() for end in ends):
        finite = values[values.isfinite()]
        ends = finite.aminmax() if finite.numel() else ()
    low, high = map(float, ends) if ends else (0.0, 0.0)
    return low, high


def top_cells(panel: Heatmap, k: int = TOP_CELLS) -> list[tuple[int, int, int]]:
    """Returns sheet, row and column of the largest absolute values, largest first."""
    sizes = panel.values.detach().cpu().double().abs()
    sizes = torch.where(sizes.isnan(), -1.0, sizes).flatten()
    found = sizes.topk(min(k, sizes.numel()))
    area = len(panel.rows) * len(panel.columns)
    return [
        (index // area, index % area // len(panel.columns), index % len(panel.columns))
        for size, index in zip(found.values.tolist(), found.indices.tolist(), strict=True)
        if size >= 0
    ]


def _is_for_circuitsvis(panel: Heatmap) -> bool:
    # It has one list of tokens for both axes, and no way to show what is no number.
    return panel.rows == panel.columns and bool(panel.values.isfinite().all())


def _is_small(panel: Heatmap) -> bool:
    side = max(len(panel.rows), len(panel.columns))
    return side <= TABLE_SIDE and panel.values.numel() <= TABLE_CELLS


def _interactive(panel: Heatmap, charts: Charts) -> str:
    element = charts.add("AttentionHeads", attention_heads(panel), panel.values.numel())
    size = f'style="max-width:{width_of(panel)}px"'
    if len(panel.sheets) == 1:
        return f'<div class="scroll"><div class="cv single" {size} id="{element}"></div></div>'
    hint = '<p class="hint">Point at a small map to see it large; click to keep it.</p>'
    return f'{hint}<div class="scroll"><div class="cv" {size} id="{element}"></div></div>'


def _part(panel: Heatmap, charts: Charts) -> str:
    """Returns the means of groups of sheets, or the last tokens, of a map with too many cells."""
    if not _is_for_circuitsvis(panel):
        return ""
    cells = panel.values.numel()
    why = f"{cells:,} cells are too many to draw one by one."
    names = tuple(dict.fromkeys(panel.groups))
    if names and charts.fits(len(names) * len(panel.rows) ** 2):
        part = replace(panel, values=_means(panel, names), sheets=names, groups=())
        what = f"Drawn here: the mean of the sheets of each group, {names[0]} to {names[-1]}."
    else:
        side = math.isqrt(PART_CELLS // len(panel.sheets))
        if side < PART_SIDE or not charts.fits(len(panel.sheets) * side**2):
            return ""
        tokens = panel.rows[-side:]
        values = panel.values[:, -side:, -side:]
        part = replace(panel, values=values, rows=tokens, columns=tokens)
        what = f"Drawn here: the last {side} of {len(panel.rows)} tokens."
    return markup.note(f"{why} {what}") + _legend(part) + _interactive(part, charts)


def _means(panel: Heatmap, names: tuple[str, ...]) -> torch.Tensor:
    groups = [[i for i, one in enumerate(panel.groups) if one == name] for name in names]
    return torch.stack([panel.values[group].mean(0) for group in groups])


def _legend(panel: Heatmap) -> str:
    if not panel.values.isfinite().any():
        return ""
    low, high = range_of(panel)
    pieces = [_scale(max(-low, high), signed=low < 0)]
    if panel.unit:
        pieces.append(f'<span class="unit">{prose(panel.unit)}</span>')
    if panel.causal:
        pieces.append('<i class="masked"></i><span>later token, cannot be read</span>')
    if panel.values.isnan().any():
        pieces.append('<i class="nothing"></i><span>no number</span>')
    if panel.values.isinf().any():
        pieces.append('<i class="infinite"></i><span>infinite</span>')
    return f'<p class="legend">{"".join(pieces)}</p>'


def _scale(largest: float, *, signed: bool) -> str:
    if largest == 0:
        return "<span>every number is 0</span>"
    places = decimals(largest)
    low = number(-largest, places) if signed else "0"
    kind = "signed" if signed else "positive"
    return f'<span>{low}</span><i class="{kind}"></i><span>{number(largest, places)}</span>'


def _numbers(panel: Heatmap) -> str:
    """Returns the numbers behind the colours, within reach of a keyboard."""
    if _is_small(panel):
        return markup.details("Numbers", _tables(panel))
    return markup.details("The largest numbers", _top_table(panel))


def _tables(panel: Heatmap) -> str:
    largest = largest_of(panel)
    bodies = [
        markup.scroll(_table(panel, sheet, largest), f"{panel.title}, {name}")
        for sheet, name in zip(panel.values, panel.sheets, strict=True)
    ]
    return markup.sheets(panel.sheets, bodies)


def _table(panel: Heatmap, sheet: torch.Tensor, largest: float) -> str:
    head = "".join(f'<th scope="col">{label(token)}</th>' for token in panel.columns)
    lines = [f"<thead><tr><td></td>{head}</tr></thead>"]
    for row, (token, values) in enumerate(zip(panel.rows, sheet.tolist(), strict=True)):
        readable = row + 1 if panel.causal else len(values)
        cells = [_cell(value, largest) for value in values[:readable]]
        cells += ['<td class="masked"></td>'] * len(values[readable:])
        lines.append(f'<tr><th scope="row">{label(token)}</th>{"".join(cells)}</tr>')
    return f'<table class="heat">{"".join(lines)}</table>'


def _cell(value: float, largest: float) -> str:
    finite = value == value and abs(value) != float("inf")
    data = f' data-value="{rounded(value)!r}"' if finite else ""
    shown = number(value, decimals(largest))
    return f'<td class="{colors.cell_class(value, largest)}"{data}>{shown}</td>'


def _pictures(panel: Heatmap) -> str:
    kept = _sheets_with_picture(panel)
    values = panel.values[:kept]
    if panel.causal:
        later = torch.ones(values.shape[1:], dtype=torch.bool).triu(1)
        values = values.masked_fill(later, float("nan"))
    names, largest = panel.sheets[:kept], largest_of(panel)
    bodies = [
        _picture(panel, sheet, name, largest) for sheet, name in zip(values, names, strict=True)
    ]
    tokens = {
        "rows": [shorten(visible(token)) for token in panel.rows],
        "columns": [shorten(visible(token)) for token in panel.columns],
        "largest": rounded(largest),
    }
    # The script of the page reads these to name the cell under the pointer.
    data = html.escape(json.dumps(tokens, ensure_ascii=False))
    return f'<div class="pictures" data-axes="{data}">{markup.sheets(names, bodies)}</div>'


def _picture(panel: Heatmap, sheet: torch.Tensor, name: str, largest: float) -> str:
    rows, columns = sheet.shape
    described = f"{panel.title}, {name}: {rows} rows by {columns} columns"
    source = png.data_uri(sheet, largest)
    return (
        f'<figure class="grid"><img src="{source}" alt="{escape(described)}" '
        f'width="{columns}" height="{rows}"><figcaption>Point at a cell.</figcaption></figure>'
    )


def _sheets_with_picture(panel: Heatmap) -> int:
    area = len(panel.rows) * len(panel.columns)
    return max(1, min(len(panel.sheets), PICTURE_CELLS // area))


def _picture_remark(panel: Heatmap) -> str:
    remark = (
        f"All {panel.values.numel():,} cells, one pixel per cell. Rows run from top to bottom, "
        "columns from left to right."
    )
    kept = _sheets_with_picture(panel)
    if kept < len(panel.sheets):
        remark += f" Only the first {kept} of {len(panel.sheets)} sheets are on this page."
    return remark


def _top_table(panel: Heatmap) -> str:
    places = decimals(largest_of(panel))
    lines = []
    for sheet, row, column in top_cells(panel):
        value = number(float(panel.values[sheet, row, column]), places)
        lines.append(
            f"<tr><td>{escape(panel.sheets[sheet])}</td>"
            f"<td>{label(panel.rows[row])} ({row})</td>"
            f"<td>{label(panel.columns[column])} ({column})</td>"
            f'<td class="number">{value}</td></tr>'
        )
    heads = ("sheet", "row", "column", "value")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return markup.scroll(table, f"{panel.title}, the largest numbers")
