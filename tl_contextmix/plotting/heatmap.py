"""Maps over tokens: their numbers go to the page, and `maps.js` draws them there.

CircuitsVis draws the square ones as well, on the reader's choice. It has one list of tokens for
both axes, which it counts from 0, no way to show what is no number, and no choice of scale.
"""

from __future__ import annotations

import base64
import json
import zlib

import numpy as np

from tl_contextmix.plotting import markup, stills, tables
from tl_contextmix.plotting.circuitsvis_source import CHART_CELLS, Charts
from tl_contextmix.plotting.display_text import shorten, visible
from tl_contextmix.plotting.panels import Heatmap

# Of a longer table nobody reads every number; the page then lists the largest.
TABLE_SIDE = 40
NARROW = 7
# What is left of a number: 13 binary digits, about four decimal ones.
_DROPPED_BITS = 10


def draw(panel: Heatmap, charts: Charts) -> str:
    """Returns the HTML of a stack of maps."""
    if not panel.values.numel():
        note = markup.note("There is nothing to show: the map has no cells.")
        return markup.figure("heatmap", panel.title, panel.caption, [note])
    charts.maps += 1
    payload = json.dumps(_payload(panel, charts), ensure_ascii=False, separators=(",", ":"))
    # Nothing between "<" and ">" may end the element; JSON reads the escape as the character.
    data = f'<script type="application/json">{payload.replace("<", chr(92) + "u003c")}</script>'
    still = "" if charts.framed else f"<noscript>{stills.fallback(panel)}</noscript>"
    table = markup.scroll(tables.grid(panel.table()), f"{panel.title}, the largest numbers")
    numbers = markup.details("The largest numbers", table)
    if not panel.survey.top:
        numbers = markup.note("There is nothing to show: no cell has a number.")
    body = [f'<div class="map">{data}{still}</div>', _remark(panel), numbers]
    wide = len(panel.columns) > NARROW
    return markup.figure("heatmap", panel.title, panel.caption, body, wide=wide)


def height_of(panel: Heatmap) -> int:
    """Returns about how high a map is on a page."""
    return 330 + 34 * min(TABLE_SIDE, len(panel.rows))


def for_circuitsvis(panel: Heatmap) -> bool:
    """Returns whether CircuitsVis can draw a map, too."""
    finite = not panel.survey.nan and not panel.survey.infinite
    return panel.whole and finite and panel.values.numel() <= CHART_CELLS


def _payload(panel: Heatmap, charts: Charts) -> dict[str, object]:
    """Returns what the page knows of a map."""
    seen = panel.survey
    sheets, rows, columns = seen.pixels.shape
    payload: dict[str, object] = {
        "sheets": [_text(name) for name in panel.sheets],
        "layers": [*panel.layers],
        "heads": [_text(name) for name in panel.heads],
        "rows": [*map(visible, panel.rows)],
        "columns": [*map(visible, panel.columns)],
        "rowPositions": [*panel.row_positions],
        "columnPositions": [*panel.column_positions],
        "tokens": [*panel.tokens],
        "sides": [[_text(name), length] for name, length in panel.sides],
        "unit": _text(panel.unit) if panel.unit else "",
        "block": seen.block,
        "shape": [sheets, rows, columns],
        "cells": packed(panel),
    }
    if for_circuitsvis(panel):
        charts.wanted = True
        payload["causal"] = panel.causal
    return payload


def _text(text: str) -> str:
    """Returns foreign text as the page's script puts it there: as text, never as markup."""
    return shorten(visible(" ".join(text.split()) or text), 60)


def packed(panel: Heatmap) -> str:
    """Returns the numbers of a map, and which cells are hidden, in as few characters as it takes.

    They are 32-bit numbers rounded to about four decimal digits, first bytes first, deflated.
    """
    seen = panel.survey
    # Where pixels stand for single cells, hidden ones have no number there.
    values = seen.pixels.to("cpu").float().numpy().ravel()
    bits = values.view(np.uint32).astype(np.uint64)
    half, kept = 1 << (_DROPPED_BITS - 1), (0xFFFFFFFF << _DROPPED_BITS) & 0xFFFFFFFF
    rounded = (bits + half) & kept
    # The largest numbers there are would be rounded to infinity.
    fits = np.isfinite(values) & (rounded & 0x7F800000 != 0x7F800000)
    bits = np.where(fits, rounded, bits).astype("<u4")
    planes = bits.view(np.uint8).reshape(-1, 4).T[::-1].tobytes()
    hidden = b"" if seen.hidden is None else seen.hidden.numpy().astype(np.uint8).tobytes()
    return base64.b64encode(zlib.compress(planes + hidden, 9)).decode()


def _remark(panel: Heatmap) -> str:
    block = panel.survey.block
    if block == 1:
        return ""
    return markup.note(
        f"{panel.values.numel():,} cells: drawn is one for {block} by {block}, the number among "
        "them that is farthest from zero. Fewer sheets or positions are drawn cell by cell."
    )
