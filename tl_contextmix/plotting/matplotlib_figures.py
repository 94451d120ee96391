"""Panels drawn with matplotlib, without pyplot: nothing global is changed and nothing is kept."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Drawn
from matplotlib.rcsetup import cycler
from matplotlib.text import Text

from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting import colors, graph, matplotlib_tables
from tl_contextmix.plotting.display_text import cells, largest, number
from tl_contextmix.plotting.matplotlib_fonts import SIZE, Lettering
from tl_contextmix.plotting.panels import (
    Bars,
    ColoredText,
    Curves,
    Graph,
    Heatmap,
    Panel,
    Samples,
    Table,
)

_SIDE = (1.1, 4.5)  # smallest and largest side of a map, in inches
_PAGE = 7.2  # inches of text across a page: panels stand side by side within it
_GAP = 0.12  # inches below a map or a chart of several
_LONGEST = 200  # inches
_NAME = 0.16  # inches for the name of an axis
_LABELLED = 48  # tokens on an axis; of more, only some are named
_MESH = 20_000  # cells that are drawn as vectors; more are drawn as one picture
_TURNED: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
# What files say about when they were written; omitted, so that they are always the same.
_UNDATED = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "svgz": {"Date": None}}


class PaperFigure(Figure):
    """A figure that looks and is written the same, whatever style is set and whenever it is."""

    families: Sequence[str] = ()

    def savefig(self, fname: Any, **options: Any) -> None:
        """Writes the figure; ``format`` is that of the name if it is not given."""
        kind = options.get("format") or (
            Path(fname).suffix[1:].lower() if isinstance(fname, (str, Path)) else "png"
        )
        if kind in _UNDATED:
            options["metadata"] = {**_UNDATED[kind], **(options.get("metadata") or {})}
        with _style(self.families):
            super().savefig(fname, **options)

    def _repr_svg_(self) -> str:
        written = io.StringIO()
        self.savefig(written, format="svg")
        return written.getvalue()


def draw(panels: Sequence[Panel], fonts: Sequence[str], width: float | None = None) -> PaperFigure:
    """Returns panels as one figure; each `width` inches wide, or as wide as it needs."""
    shown = [*map(_drawn, panels)]
    lettering = Lettering(fonts, shown)
    with _style(lettering.families):
        figure = PaperFigure(layout="constrained")
        figure.families = lettering.families
        if len(shown) == 1:
            _DRAW[type(shown[0])](figure, shown[0], lettering)
            figure.set_size_inches(*_scaled(figure, width))
        else:
            _several(figure, shown, lettering, width)
        _without_formulas(figure)
        # And then no more: each further time would move things by a hair, and files would differ.
        for _ in range(1 if len(shown) == 1 else 2):  # the layout of parts converges
            figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def _several(
    figure: Figure, panels: Sequence[Panel], lettering: Lettering, width: float | None
) -> None:
    """Draws panels below each other; maps and charts side by side where the page has room."""
    sizes = []
    for panel in panels:
        alone = Figure()  # only to see how large it is
        _DRAW[type(panel)](alone, panel, lettering)
        wide, high = _scaled(alone, width)
        sizes.append((wide, high if _is_text(panel) else high + _GAP))
    rows = _rows(panels, [wide for wide, _ in sizes])
    heights = [max(sizes[place][1] for place in row) for row in rows]
    whole = max(sum(sizes[place][0] for place in row) for row in rows)
    if sum(heights) > _LONGEST:
        raise InvalidInput(
            "a figure of all panels would be too long",
            f"{sum(heights):.0f} inches for {len(panels)} panels",
            f"at most {_LONGEST} inches, the longest page of a PDF",
            "Choose with panel=, or select fewer sentences.",
        )
    figure.set_size_inches(whole, sum(heights))
    grid = figure.add_gridspec(len(rows), 1, height_ratios=heights)
    for line, row in enumerate(rows):
        widths = [sizes[place][0] for place in row]
        spare = whole - sum(widths)
        ratios = [*widths, spare] if spare > 1e-6 else widths
        cells = grid[line].subgridspec(1, len(ratios), width_ratios=ratios)
        for column, place in enumerate(row):
            part: Any = _Part(figure.add_subfigure(cells[column]), sizes[place])
            _DRAW[type(panels[place])](part, panels[place], lettering)


def _rows(panels: Sequence[Panel], widths: Sequence[float]) -> list[list[int]]:
    """Returns which panels stand side by side; a table or a text has a line of its own."""
    rows: list[list[int]] = []
    for place, panel in enumerate(panels):
        before = [] if not rows or _is_text(panel) else rows[-1]
        used = sum(widths[other] for other in before)
        if before and not _is_text(panels[before[-1]]) and used + widths[place] <= _PAGE:
            before.append(place)
        else:
            rows.append([place])
    return rows


def _is_text(panel: Panel) -> bool:
    return isinstance(panel, (Table, ColoredText, Samples))


def _scaled(figure: Figure, width: float | None) -> tuple[float, float]:
    wide, high = map(float, figure.get_size_inches())
    return (wide, high) if width is None else (width, high * width / wide)


def draw_into(axes: Axes, panel: Panel, fonts: Sequence[str]) -> None:
    """Draws a panel into axes of a figure of somebody else's, whose size and layout stay."""
    drawn = _drawn(panel)
    lettering = Lettering(fonts, [drawn])
    holder = _Holder(axes)
    with _style(lettering.families):
        _DRAW[type(drawn)](cast(Figure, holder), drawn, lettering)
        _without_formulas(axes)


class _Part:
    """Stands for a figure where a part of one is drawn into, which cannot change its size."""

    def __init__(self, part: SubFigure, size: tuple[float, float]) -> None:
        self._part, self._height = part, size[1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def set_size_inches(self, *size: float) -> None:
        """Leaves the size as it is: the same was found before."""

    def set_layout_engine(self, engine: str) -> None:
        """Leaves the layout to the whole figure; axes at a place of their own keep it."""

    def get_figheight(self) -> float:
        """Returns the height of the part, in inches."""
        return self._height


class _Holder:
    """Stands for a figure where there is room for one picture, in axes that are there."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.figure: Any = axes.get_figure()

    def set_size_inches(self, *size: float) -> None:
        """Leaves the size as it is."""

    def get_figheight(self) -> float:
        """Returns the height of the axes, in inches."""
        return self.figure.get_figheight() * self.axes.get_position().height

    def subplots(self, *count: int, **options: Any) -> Any:
        """Returns the axes; for a stack of maps as the only one of a grid."""
        return numpy.array([[self.axes]]) if options else self.axes

    def colorbar(self, drawn: Any, **options: Any) -> Any:
        """Adds a colour bar beside the axes."""
        return self.figure.colorbar(drawn, **{**options, "ax": self.axes})

    def suptitle(self, text: str, **options: Any) -> None:
        """Writes the title above the axes."""
        self.axes.set_title(text, **options)


def _drawn(panel: Panel) -> Panel:
    return panel if type(panel) in _DRAW else panel.table()


def _without_formulas(artist: Any) -> None:
    # matplotlib reads `$` as the beginning of a formula.
    for text in artist.findobj(Text):
        text.set_parse_math(False)


def _style(families: Sequence[str]) -> Any:
    own = {
        "font.family": list(families),
        "font.size": SIZE,
        "axes.titlesize": SIZE,
        "axes.linewidth": 0.6,
        "axes.prop_cycle": cycler(color=colors.SERIES),
        "savefig.dpi": 300,
        "pdf.fonttype": 42,  # journals ask for fonts that can be edited
        "svg.hashsalt": "tl_contextmix",
        "text.parse_math": False,
    }
    return style.context(["default", own])


def _heatmap(figure: Figure, panel: Heatmap, lettering: Lettering) -> None:
    sheets, rows, columns = panel.values.shape
    largest = panel.survey.largest or 1.0
    scale = Normalize(-largest if panel.survey.signed else 0.0, largest)
    side = [min(_SIDE[1], max(_SIDE[0], 0.26 * count)) for count in (columns, rows)]
    across = min(sheets, max(1, int(7 / (side[0] + 0.2)))) or 1
    down = math.ceil(sheets / across) or 1
    across = math.ceil(sheets / down) or 1
    names = [cells(panel.names(axis), lettering.shown) for axis in ("rows", "columns")]
    left, below = (
        max((lettering.width(name, SIZE) for name in axis), default=0.0) for axis in names
    )
    figure.set_size_inches(
        across * (side[0] + 0.15) + left + 0.9 + _NAME * bool(panel.axes[0]),
        down * (side[1] + 0.25) + 0.75 * below + 0.5 + _NAME * bool(panel.axes[1]),
    )
    redundant = sheets == 1 and panel.sheets[0] in (
        *panel.axes,
        panel.unit,
        *panel.title.split(", "),
    )
    headings = ("",) if redundant else panel.sheets
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    mesh = None
    for index, axes in enumerate(grid.flat):
        axes.set_visible(index < sheets)
        if index < sheets:
            mesh = _sheet(axes, panel, panel.values[index].detach().cpu().double(), scale)
            axes.set_title(lettering.prose(headings[index]), pad=3)
    _token_axis(grid[0, 0], "y", names[0])
    _token_axis(grid[0, 0], "x", names[1])
    if mesh is not None:
        shrink = min(1.0, 2.2 / figure.get_figheight())
        bar = figure.colorbar(mesh, ax=grid, shrink=shrink, pad=0.02)
        bar.set_label(lettering.prose(panel.unit))
        bar.outline.set_linewidth(0.4)  # type: ignore[union-attr]
    for axes in grid[:, 0]:
        axes.set_ylabel(lettering.prose(panel.axes[0]))
    for axes in grid[-1]:
        axes.set_xlabel(lettering.prose(panel.axes[1]))
    figure.suptitle(lettering.prose(panel.title), fontsize=SIZE + 1)


def _sheet(axes: Axes, panel: Heatmap, sheet: Any, scale: Normalize) -> Any:
    ends = ["white", colors.POSITIVE]
    ends = [colors.NEGATIVE, *ends] if panel.survey.signed else ends
    shades = LinearSegmentedColormap.from_list("tl_contextmix", ends).with_extremes(
        bad=colors.MASKED if panel.hidden is not None else colors.NOTHING,
        over=colors.INFINITE,
        under=colors.INFINITE,
    )
    if panel.hidden is not None:
        sheet = sheet.masked_fill(panel.hidden, math.nan)
    # matplotlib takes what is infinite for missing; beyond the scale it has a colour of its own.
    beyond = 2 * float(scale.vmax or 1.0)
    sheet = sheet.nan_to_num(nan=math.nan, posinf=beyond, neginf=-beyond)
    mesh = axes.pcolormesh(
        sheet.numpy(), cmap=shades, norm=scale, rasterized=sheet.numel() > _MESH, linewidth=0
    )
    for edge in accumulate(length for _, length in panel.sides[:-1]):
        axes.axvline(edge, color="black", linewidth=0.6)
    rows, columns = sheet.shape
    axes.set_aspect("equal" if columns < 5 * rows and rows < 5 * columns else "auto")
    axes.tick_params(length=0, pad=2)
    return mesh


def _token_axis(axes: Axes, name: str, tokens: Sequence[str]) -> None:
    every = math.ceil(len(tokens) / _LABELLED) or 1
    labels = tokens[::every]
    ticks = [place * every + 0.5 for place in range(len(labels))]
    if name == "y":
        axes.set_yticks(ticks, labels)
        axes.invert_yaxis()  # shared, so once is enough
        return
    upright = all(len(label) <= 2 for label in labels)
    figure = axes.get_figure()
    assert figure is not None
    # Those of a grid share their ticks; others of the same figure are none of ours.
    for one in axes.get_shared_x_axes().get_siblings(axes):
        one.set_xticks(ticks, labels, **({} if upright else _TURNED))


def _chart(figure: Figure, panel: Bars, lettering: Lettering) -> Axes:
    width = min(7.0, max(3.2, 0.45 * len(panel.labels) + 1.2))
    every = math.ceil(len(panel.labels) / _LABELLED) or 1
    places = range(0, len(panel.labels), every)
    start = f"{panel.axis} " if panel.axis else ""
    # "layer 0", "layer 1" below an axis that is named "layer" need their numbers only.
    named = all(label.startswith(start) for label in panel.labels)
    labels = [
        lettering.shown(panel.labels[place].removeprefix(start) if named else panel.labels[place])
        for place in places
    ]
    longest = max((lettering.width(label, SIZE) for label in labels), default=0.0)
    turned = (longest + 0.1) * len(labels) > width - 0.6
    height = 2.4 + _NAME * bool(panel.axis)
    names = [lettering.width(lettering.shown(name), SIZE) for name, _ in panel.series]
    legend_width = 0.5 + max(names) if _crowded(panel) else 0.0
    figure.set_size_inches(width + legend_width, height + (0.75 * longest if turned else 0.0))
    axes = figure.subplots()
    axes.set_title(lettering.prose(panel.title), fontsize=SIZE + 1)
    axes.set_ylabel(lettering.prose(panel.unit))
    axes.set_xlabel(lettering.prose(panel.axis))
    axes.set_xticks(list(places), labels, **(_TURNED if turned else {}))
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _bars(figure: Figure, panel: Bars, lettering: Lettering) -> None:
    axes = _chart(figure, panel, lettering)
    width = 0.8 / max(1, len(panel.series))
    for index, (name, values) in enumerate(panel.series):
        finite = [value if math.isfinite(value) else 0.0 for value in values]
        left = [place - 0.4 + width * (index + 0.5) for place in range(len(values))]
        colour, text = colors.series(index), lettering.shown(name)
        axes.bar(left, finite, width * 0.92, color=colour, label=text)
        for at, value in zip(left, values, strict=True):
            if not math.isfinite(value):
                axes.text(at, 0, number(value, 0), ha="center", va="bottom")
    axes.axhline(0, color=colors.ZERO_LINE, linewidth=0.6)
    _legend(figure, axes, panel)


def _curves(figure: Figure, panel: Curves, lettering: Lettering) -> None:
    axes = _chart(figure, panel, lettering)
    places = range(len(panel.labels))
    for index, (name, values) in enumerate(panel.series):
        colour = colors.series(index)
        finite = [value if math.isfinite(value) else math.nan for value in values]
        axes.plot(places, finite, "o-", color=colour, markersize=3, label=lettering.shown(name))
        if panel.intervals:
            low, high = zip(*panel.intervals[index], strict=True)
            axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    _legend(figure, axes, panel)


def _graph(figure: Figure, panel: Graph, lettering: Lettering) -> None:
    columns = cells(panel.columns, lettering.shown)
    below = max((lettering.width(name, SIZE) for name in columns), default=0.0)
    names = [lettering.shown(name) for name in panel.rows]
    left = max((lettering.width(name, SIZE) for name in names), default=0.0)
    unit = 0.9 / graph.COLUMN  # inches for a pixel of the page
    wide, high = graph.COLUMN * len(columns), graph.ROW * len(panel.rows)
    figure.set_size_inches(
        wide * unit + left + 0.4 + _NAME * bool(panel.axes[0]),
        high * unit + 0.75 * below + 0.7 + _NAME * bool(panel.axes[1]),
    )
    axes = figure.subplots()
    at = graph.places(panel)
    drawn = panel.largest_edges(graph.EDGES)
    for source, target, value in reversed(drawn):
        ends = at[source], *graph.curve(at[source], at[target]), at[target]
        line = PathPatch(
            Drawn(ends, [Drawn.MOVETO, *[Drawn.CURVE4] * 3]),
            facecolor="none",
            edgecolor=colors.POSITIVE if value > 0 else colors.NEGATIVE,
            linewidth=0.6 * graph.thickness(value, abs(drawn[0][2])),
            linestyle="-" if value > 0 else (0, (4, 3)),
            alpha=0.45,
        )
        axes.add_patch(line)
    most = largest(dot.value for dot in panel.nodes)
    for dot, (x, y) in zip(panel.nodes, at, strict=True):
        size = 2 * graph.radius(dot.value, most) * unit * 72
        shape, colour = ("s", colors.NEGATIVE) if dot.value < 0 else ("o", colors.POSITIVE)
        axes.plot([x], [y], shape, color=colour, markersize=size, markeredgewidth=0)
    for index in graph.named(panel):
        axes.annotate(
            lettering.shown(panel.nodes[index].label),
            at[index],
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=SIZE - 2,
        )
    axes.set_xlim(graph.LEFT, graph.LEFT + wide)
    axes.set_ylim(graph.TOP + high, graph.TOP)
    middles = [graph.LEFT + (place + 0.5) * graph.COLUMN for place in range(len(columns))]
    axes.set_xticks(middles, columns, **_TURNED)
    heights = [graph.TOP + (high - (place + 0.5) * graph.ROW) for place in range(len(panel.rows))]
    axes.set_yticks(heights, names)
    axes.set_ylabel(lettering.prose(panel.axes[0]))
    axes.set_xlabel(lettering.prose(panel.axes[1]))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(lettering.prose(panel.title), fontsize=SIZE + 1)


def _crowded(panel: Bars) -> bool:
    """Whether a legend would stand on what is drawn."""
    return len(panel.series) > (3 if isinstance(panel, Curves) else 1)


def _legend(figure: Figure | _Holder, axes: Axes, panel: Bars) -> None:
    if len(panel.series) > 1:
        # Beside the chart only where the layout makes room for it.
        outside = _crowded(panel) and not isinstance(figure, _Holder)
        place: Any = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if outside else {}
        axes.legend(frameon=False, fontsize=SIZE - 1, **place)


_DRAW: dict[type, Callable[[Figure, Any, Lettering], None]] = {
    Heatmap: _heatmap,
    Bars: _bars,
    Curves: _curves,
    Table: matplotlib_tables.table,
    ColoredText: matplotlib_tables.text,
    Samples: matplotlib_tables.samples,
    Graph: _graph,
}
