"""Graphs of nodes over tokens and layers, as inline SVG that needs no script to be read.

The script of the page lets it be explored: pointing at a node, or walking there with the arrow
keys, shows its edges; a click or Enter keeps it and lists them. CircuitsVis' bundle holds d3 but
does not give it away, and places on a grid need no layout: both sides are written here.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence

from tl_contextmix.plotting import colors, markup, tables
from tl_contextmix.plotting.circuitsvis_source import Charts
from tl_contextmix.plotting.display_text import (
    cells,
    data,
    decimals,
    escape,
    largest,
    number,
    rounded,
    visible,
)
from tl_contextmix.plotting.panels import Graph

COLUMN, ROW, LEFT, BOTTOM, TOP = 84, 34, 92, 74, 12
_RADIUS = (2.5, 9.0)
EDGES = 60
"""How many edges are drawn where none are asked for."""
_NAMED = 16
_TEXT = 14


def height_of(panel: Graph) -> int:
    """Returns about how high the panel is on a page."""
    return 360 + ROW * len(panel.rows)


def places(panel: Graph) -> list[tuple[float, float]]:
    """Returns where each node is drawn: those of one cell stand side by side."""
    inside = defaultdict(list)
    for index, dot in enumerate(panel.nodes):
        inside[dot.column, dot.row].append(index)
    result = [(0.0, 0.0)] * len(panel.nodes)
    for (column, row), some in inside.items():
        step = min(18.0, (COLUMN - 16) / len(some))
        for place, index in enumerate(some):
            x = LEFT + (column + 0.5) * COLUMN + (place - (len(some) - 1) / 2) * step
            y = TOP + (len(panel.rows) - row - 0.5) * ROW
            result[index] = round(x, 1), round(y, 1)
    return result


def radius(value: float, most: float) -> float:
    """Returns how large a node is drawn: its area is its size."""
    share = math.sqrt(min(1.0, abs(value) / most)) if most and math.isfinite(value) else 0.0
    return round(_RADIUS[0] + (_RADIUS[1] - _RADIUS[0]) * share, 1)


def named(panel: Graph) -> list[int]:
    """Returns the nodes whose names are written beside them."""
    return panel.ranked[:_NAMED]


def draw(panel: Graph, charts: Charts) -> str:
    """Returns the HTML of a graph, its nodes beside it as a table."""
    if not panel.nodes:
        body = [markup.note("There is nothing to show: the graph has no nodes.")]
        return markup.figure("graph", panel.title, panel.caption, body, wide=True)
    count, most = len(panel.nodes), largest(dot.value for dot in panel.nodes)
    chooser = (
        f'<label class="chooser">Nodes shown <input type="range" min="1" max="{count}" '
        f'value="{count}" data-graph-range> <output>{count} of {count}</output></label>'
    )
    hint = (
        '<p class="hint">Point at a node to see its edges; click it, or press Enter, to keep it. '
        "Arrow keys walk: left and right to the next node, up and down along the largest "
        "edge. Escape lets go.</p>"
    )
    numbers = markup.scroll(tables.grid(panel.table()), f"{panel.title}, numbers")
    body = [
        f'<div class="explored"><script type="application/json">{_data(panel)}</script>',
        chooser,
        markup.scroll(picture(panel), panel.title),
        markup.note(
            "Circles and solid lines above 0, squares and dashed lines below; areas and widths by "
            f"size, the largest node {number(most, decimals(most))} {panel.unit}. Drawn at first: "
            f"the {EDGES} largest edges."
        ),
        hint,
        '<div class="detail" aria-live="polite"></div></div>',
        markup.details("Numbers", numbers),
    ]
    return markup.figure("graph", panel.title, panel.caption, body, wide=True)


def _data(panel: Graph) -> str:
    """Returns names, facts and all edges as JSON that can stand in a script element."""
    at = cells(panel.columns, visible)
    nodes = [
        {
            "label": visible(dot.label),
            "at": at[dot.column],
            "value": rounded(dot.value) if math.isfinite(dot.value) else None,
            "facts": [[visible(name), visible(text)] for name, text in dot.facts],
        }
        for dot in panel.nodes
    ]
    edges = [
        [source, target, rounded(value)]
        for source, target, value in panel.largest_edges(panel.edges.numel())
    ]
    payload = {"nodes": nodes, "edges": edges, "ranked": panel.ranked, "drawn": EDGES}
    return json.dumps(payload, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def picture(panel: Graph) -> str:
    """Returns the graph as one SVG element."""
    width = LEFT + COLUMN * len(panel.columns) + 8
    height = TOP + ROW * len(panel.rows) + BOTTOM
    at = places(panel)
    name = escape(f"{' '.join(panel.title.split())}, graph")
    inside = "".join([*_axes(panel, width), _edges(panel, at), *_nodes(panel, at)])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="group" font-family="{colors.FONT}" '
        f'font-size="11" fill="{colors.INK}" aria-label="{name}">{inside}</svg>'
    )


def _axes(panel: Graph, width: int) -> list[str]:
    pieces = []
    for row, name in enumerate(panel.rows):
        y = TOP + (len(panel.rows) - row - 0.5) * ROW
        pieces.append(
            f'<line class="tick" x1="{LEFT}" x2="{width - 8}" y1="{y}" y2="{y}" '
            f'stroke="{colors.GRID}"/><text class="scale" x="{LEFT - 8}" y="{y + 4}" '
            f'text-anchor="end" fill="{colors.SOFT}">{escape(name, _TEXT)}</text>'
        )
    base = TOP + ROW * len(panel.rows) + 12
    for column, text in enumerate(cells(panel.columns, lambda token: escape(token, _TEXT))):
        x = LEFT + (column + 0.5) * COLUMN
        pieces.append(
            f'<text transform="translate({x:.1f} {base}) rotate(-35)" text-anchor="end">'
            f"{text}</text>"
        )
    return pieces


def curve(
    start: tuple[float, float], end: tuple[float, float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the two points that bend an edge; one within a row goes below it."""
    (x1, y1), (x2, y2) = start, end
    middle = (y1 + y2) / 2 if y1 != y2 else y1 + ROW / 2
    return (x1, round(middle, 1)), (x2, round(middle, 1))


def thickness(value: float, most: float) -> float:
    """Returns the width of an edge."""
    return round(0.4 + 4.6 * abs(value) / most, 2)


def _edges(panel: Graph, at: Sequence[tuple[float, float]]) -> str:
    drawn = panel.largest_edges(EDGES)
    most = abs(drawn[0][2]) if drawn else 1.0
    pieces = []
    for source, target, value in reversed(drawn):
        dash = ' stroke-dasharray="4 3"' if value < 0 else ""
        colour = colors.POSITIVE if value > 0 else colors.NEGATIVE
        ends = at[source], *curve(at[source], at[target]), at[target]
        begin, *others = (f"{x} {y}" for x, y in ends)
        pieces.append(
            f'<path data-edge="{source} {target}" d="M{begin}C{" ".join(others)}" '
            f'stroke="{colour}" stroke-width="{thickness(value, most)}"{dash}/>'
        )
    return f'<g class="edges" fill="none" stroke-opacity="0.45">{"".join(pieces)}</g>'


def _nodes(panel: Graph, at: Sequence[tuple[float, float]]) -> list[str]:
    most = largest(dot.value for dot in panel.nodes)
    digits, labelled = decimals(most), set(named(panel))
    names, pieces = cells(panel.columns, lambda token: escape(token)), []
    for index, (dot, (x, y)) in enumerate(zip(panel.nodes, at, strict=True)):
        size = radius(dot.value, most)
        value = number(dot.value, digits, signed=True)
        description = f"{escape(dot.label)}, {names[dot.column]}: {value}"
        shape = (
            f'<rect x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size:.1f}" '
            f'height="{2 * size:.1f}" fill="{colors.NEGATIVE}"/>'
            if dot.value < 0
            else f'<circle cx="{x}" cy="{y}" r="{size}" fill="{colors.POSITIVE}"/>'
        )
        label = ""
        if index in labelled:
            label = (
                f'<text x="{x}" y="{y - size - 2:.1f}" text-anchor="middle" font-size="9.5">'
                f"{escape(dot.label, _TEXT)}</text>"
            )
        pieces.append(
            f'<g class="node" role="button" aria-label="{description}" data-node="{index}"'
            f"{data(dot.value)}>{shape}{label}<title>{description}</title></g>"
        )
    return pieces
