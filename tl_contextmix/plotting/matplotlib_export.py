"""Panels as matplotlib figures, for papers; needs ``pip install tl-contextmix[figures]``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tl_contextmix.errors import ContextMixError, InvalidInput
from tl_contextmix.plotting.panels import Bars, Graph, Heatmap, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_figure(
    panels: Sequence[Panel],
    panel: int | None,
    *,
    sheet: int | str | None,
    fonts: Sequence[str],
    ax: Axes | None = None,
    width: float | None = None,
) -> Figure:
    """Returns panels, all or one of them, as a figure; see `Shown.figure`.

    Raises:
        InvalidInput: If there is no such panel, sheet or font, or it does not fit into the axes, or
            the width.
        ContextMixError: If matplotlib is not installed.
    """
    chosen = [*panels]
    if panel is not None:
        expected = f"an integer from {-len(panels)} to {len(panels) - 1}"
        remedy = f"They are: {_listed(panels)}."
        chosen = [panels[_place("panel", panel, len(panels), expected, remedy)]]
    maps = [one for one in chosen if isinstance(one, Heatmap)] or chosen
    chosen = [_one_sheet(one, sheet) if one in maps else one for one in chosen]
    require_matplotlib()
    from tl_contextmix.plotting.matplotlib_figures import draw, draw_into

    for one in chosen:
        _require_place(one, ax, width)
    if ax is None:
        return draw(chosen, fonts, width)
    if len(chosen) > 1:
        raise InvalidInput(
            "one pair of axes holds one panel",
            f"{len(chosen)} panels",
            f"panel= with an integer from 0 to {len(chosen) - 1}",
            f"They are: {_listed(chosen)}.",
        )
    draw_into(ax, chosen[0], fonts)
    return ax.figure.figure


def require_matplotlib() -> None:
    """Raises ContextMixError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ContextMixError(
            "a figure needs the package matplotlib",
            "none installed",
            "matplotlib 3.11 or later",
            'Install it: pip install "tl-contextmix[figures]". show() needs nothing.',
        )


def _require_place(panel: Panel, ax: object, width: object) -> None:
    """Raises InvalidInput where a panel cannot be drawn into axes, or as wide as is asked."""
    if ax is None and width is None:
        return
    words = f"ax={type(ax).__name__}, width={width!r}"
    if not isinstance(panel, (Heatmap, Bars, Graph)):
        raise InvalidInput(
            "text stands where it is put",
            f"{words}, for a {type(panel).__name__}",
            "a map, bars, curves or a graph",
            "Leave ax= and width= out, or choose another panel.",
        )
    if ax is not None and isinstance(panel, Heatmap) and len(panel.sheets) > 1:
        raise InvalidInput(
            "one pair of axes holds one map",
            f"{len(panel.sheets)} maps",
            f"sheet= with a position or name of {list(panel.sheets[:6])}",
            "Draw them into axes of their own, one by one.",
        )
    number = isinstance(width, (int, float)) and not isinstance(width, bool) and 0 < width < 100
    if (ax is not None and width is not None) or (ax is None and not number):
        raise InvalidInput(
            "a figure cannot have this size",
            words,
            "ax=, or a width in inches above 0 and below 100",
            "Axes have the size that their figure gives them.",
        )
    if ax is not None and not hasattr(ax, "get_position"):
        raise InvalidInput(
            "this is no place to draw", words, "a matplotlib Axes", "plt.subplots() has one."
        )


def _listed(panels: Sequence[Panel]) -> str:
    titles = "; ".join(f"{place} {panel.title}" for place, panel in enumerate(panels[:12]))
    return f"{titles}{' ...' if len(panels) > 12 else ''}"


def _one_sheet(panel: Panel, wanted: object) -> Panel:
    if wanted is None:
        return panel
    names = panel.sheets if isinstance(panel, Heatmap) else ()
    expected = f"a position or name of {list(names)}" if names else "None: this is no map"
    wanted = names.index(wanted) if isinstance(wanted, str) and wanted in names else wanted
    place = _place(
        "sheet", wanted, len(names), expected, "Leave the argument out to draw all of it."
    )
    assert isinstance(panel, Heatmap)
    return panel.sheet(place)


def _place(kind: str, wanted: object, count: int, expected: str, remedy: str) -> int:
    if isinstance(wanted, int) and not isinstance(wanted, bool) and -count <= wanted < count:
        return wanted % count
    raise InvalidInput(f"there is no such {kind}", repr(wanted), expected, remedy)
