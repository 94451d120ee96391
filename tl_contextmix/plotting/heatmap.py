"""Maps over tokens: CircuitsVis where it is good, a table of numbers or a picture where not."""

from __future__ import annotations

import html
import json
from dataclasses import replace

import torch

from tl_contextmix.plotting import colors, markup, png, tables
from tl_contextmix.plotting.circuitsvis_source import Charts, attention_heads
from tl_contextmix.plotting.display_text import (
    cells,
    data,
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
NARROW_SIDE = 24
NARROW_TABLE = 7
WIDEST = 860
CELL_WIDTH = 58


def draw(panel: Heatmap, charts: Charts) -> str:
    """Returns the HTML of a stack of maps."""
    wide = True
    if not panel.values.numel():
        wide, body = False, [markup.note("There is nothing to show: the map has no cells.")]
    elif _is_for_circuitsvis(panel, charts):
        wide = len(panel.rows) > NARROW_SIDE
        body = [_legend(panel), _interactive(panel, charts), _numbers(panel)]
    elif _is_small(panel):
        wide = len(panel.columns) > NARROW_TABLE
        body = [_legend(panel), _tables(panel)]
    else:
        remark = markup.note(_picture_remark(panel))
        body = [_means(panel, charts), remark, _legend(panel), _pictures(panel), _numbers(panel)]
    return markup.figure("heatmap", panel.title, panel.caption, body, wide=wide)


def height_of(panel: Heatmap) -> int:
    """Returns about how high a map is on a page."""
    return 230 + (width_of(panel) if panel.whole else 28 * min(TABLE_SIDE, len(panel.rows)))


def width_of(panel: Heatmap) -> int:
    """Returns how wide a CircuitsVis map of some tokens is drawn, at most; it is as high."""
    return min(WIDEST, 150 + CELL_WIDTH * len(panel.rows))


def _is_for_circuitsvis(panel: Heatmap, charts: Charts) -> bool:
    # It has one list of tokens for both axes, which it counts from 0, and no way to show what is
    # no number.
    if not charts.fits(panel.values.numel()) or not panel.whole:
        return False
    return not panel.survey.nan and not panel.survey.infinite


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


def _means(panel: Heatmap, charts: Charts) -> str:
    """Returns the means of groups of sheets of a map with too many cells."""
    names = tuple(dict.fromkeys(panel.groups))
    if not names or not charts.fits(len(names) * len(panel.rows) * len(panel.columns)):
        return ""
    groups = [[i for i, one in enumerate(panel.groups) if one == name] for name in names]
    values = torch.stack([panel.values[group].double().mean(0) for group in groups])
    part = replace(panel, values=values, sheets=names, groups=())
    if not _is_for_circuitsvis(part, charts):
        return ""
    why = (
        f"{panel.values.numel():,} cells are too many to draw one by one. Drawn here: the mean of "
        f"the sheets of each group, {names[0]} to {names[-1]}."
    )
    return markup.note(why) + _legend(part) + _interactive(part, charts)


def _legend(panel: Heatmap) -> str:
    seen = panel.survey
    if not seen.finite:
        return ""
    pieces = [_scale(panel)]
    if panel.unit:
        pieces.append(f'<span class="unit">{prose(panel.unit)}</span>')
    for shown, kind, told in (
        (panel.hidden is not None, "masked", "later token, cannot be read"),
        (seen.nan, "nothing", "no number"),
        (seen.infinite, "infinite", "infinite"),
    ):
        pieces.append(f'<i class="{kind}"></i><span>{told}</span>' if shown else "")
    return f'<p class="legend">{"".join(pieces)}</p>'


def _scale(panel: Heatmap) -> str:
    if panel.survey.largest == 0:
        return "<span>every number is 0</span>"
    low, high = scale_ends(panel)
    kind = "signed" if panel.survey.signed else "positive"
    return f'<span>{low}</span><i class="{kind}"></i><span>{high}</span>'


def scale_ends(panel: Heatmap) -> tuple[str, str]:
    """Returns the numbers at the ends of the scale of a map; 0 or white is in its middle."""
    seen = panel.survey
    places = decimals(seen.largest)
    low = number(-seen.largest, places) if seen.signed else "0"
    return low, number(seen.largest, places)


def _numbers(panel: Heatmap) -> str:
    """Returns the numbers behind the colours, within reach of a keyboard."""
    if _is_small(panel):
        return markup.details("Numbers", _tables(panel))
    table = markup.scroll(tables.grid(panel.table()), f"{panel.title}, the largest numbers")
    return markup.details("The largest numbers", table)


def _tables(panel: Heatmap) -> str:
    bodies = [
        markup.scroll(_table(panel, sheet), f"{panel.title}, {name}")
        for sheet, name in zip(panel.values, panel.sheets, strict=True)
    ]
    return markup.sheets(panel.sheets, bodies)


def _table(panel: Heatmap, sheet: torch.Tensor) -> str:
    rows, columns = (cells(panel.names(axis), label) for axis in ("rows", "columns"))
    head = "".join(f'<th scope="col">{token}</th>' for token in columns)
    sides = "".join(
        f'<th scope="colgroup" colspan="{length}">{prose(name)}</th>'
        for name, length in panel.sides
        if length
    )
    above = f'<tr class="sides"><td></td>{sides}</tr>' if sides else ""
    lines = [f"<thead>{above}<tr><td></td>{head}</tr></thead>"]
    hidden = torch.zeros(sheet.shape) if panel.hidden is None else panel.hidden
    for token, values, masked in zip(rows, sheet.tolist(), hidden.tolist(), strict=True):
        row = "".join(
            '<td class="masked"></td>' if later else _cell(value, panel.survey.largest)
            for value, later in zip(values, masked, strict=True)
        )
        lines.append(f'<tr><th scope="row">{token}</th>{row}</tr>')
    return f'<table class="heat">{"".join(lines)}</table>'


def _cell(value: float, largest: float) -> str:
    shown = number(value, decimals(largest))
    return f'<td class="{colors.cell_class(value, largest)}"{data(value)}>{shown}</td>'


def _pictures(panel: Heatmap) -> str:
    seen = panel.survey
    bodies = [
        _picture(panel, sheet, name) for sheet, name in zip(seen.pixels, panel.sheets, strict=True)
    ]
    # The script of the page reads these to name the cell under the pointer and its number.
    told = {
        **{
            axis: cells(panel.places(axis), lambda token: shorten(visible(token)))
            for axis in ("rows", "columns")
        },
        "block": seen.block,
        "largest": rounded(seen.largest),
        "steps": png.STEPS,
        "colours": [int.from_bytes(bytes(shade), "big") for shade in png.palette()],
    }
    axes = html.escape(json.dumps(told, ensure_ascii=False, separators=(",", ":")))
    return f'<div class="pictures" data-axes="{axes}">{markup.sheets(panel.sheets, bodies)}</div>'


def _picture(panel: Heatmap, sheet: torch.Tensor, name: str) -> str:
    rows, columns = sheet.shape
    described = f"{panel.title}, {name}: {len(panel.rows)} rows by {len(panel.columns)} columns"
    source = png.data_uri(sheet, panel.survey.largest)
    return (
        f'<figure class="grid"><img src="{source}" alt="{escape(described)}" '
        f'width="{columns}" height="{rows}"><figcaption>Point at a cell.</figcaption></figure>'
    )


def _picture_remark(panel: Heatmap) -> str:
    block = panel.survey.block
    pixel = (
        "one pixel per cell."
        if block == 1
        else f"one pixel for {block} by {block} cells: it has the colour of the number among them "
        "that is farthest from zero. Fewer sheets or positions are drawn cell by cell."
    )
    return (
        f"All {panel.values.numel():,} cells, {pixel} Rows run from top to bottom, columns from "
        "left to right."
    )
