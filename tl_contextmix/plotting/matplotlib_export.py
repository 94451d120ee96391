"""Panels as matplotlib figures, for papers; needs ``pip install tl-contextmix[figures]``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tl_contextmix.errors import ContextMixError, bad, four_parts
from tl_contextmix.plotting.panels import Heatmap, Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_figure(
    panels: Sequence[Panel], panel: int, *, sheet: int | str | None, fonts: Sequence[str]
) -> Figure:
    """Returns one of some panels as a figure; see `Shown.figure`.

    Raises:
        InvalidInput: If there is no such panel, sheet or font.
        ContextMixError: If matplotlib is not installed.
    """
    chosen = _one_sheet(_one_panel(panels, panel), sheet)
    if find_spec("matplotlib") is None:
        raise ContextMixError(
            four_parts(
                "a figure needs the package matplotlib",
                "none installed",
                "matplotlib 3.11 or later",
                'Install it: pip install "tl-contextmix[figures]". show() needs nothing.',
            )
        )
    from tl_contextmix.plotting.matplotlib_figures import draw

    return draw(chosen, fonts)


def _one_panel(panels: Sequence[Panel], wanted: object) -> Panel:
    titles = "; ".join(f"{place} {panel.title}" for place, panel in enumerate(panels[:12]))
    place = _place(
        "panel",
        wanted,
        len(panels),
        f"an integer from {-len(panels)} to {len(panels) - 1}",
        f"They are: {titles}{' ...' if len(panels) > 12 else ''}.",
    )
    return panels[place]


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
    raise bad(f"there is no such {kind}", repr(wanted), expected, remedy)
