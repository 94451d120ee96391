"""CircuitsVis on our pages: its script once, and the properties of its charts.

Those of maps are made on the page (`maps.js`), from the numbers that are there. CircuitsVis's own
Python functions are not used. They repeat the 1.3 MB script for every chart, ask the network which
version of it to show, put tokens into the page as markup, and leave bounds and masking to defaults
that hide data (an unbounded zero is invisible, an unmasked map loses half its cells).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tl_contextmix.plotting.display_text import for_circuitsvis, rounded
from tl_contextmix.plotting.panels import Samples

# CircuitsVis needs about 0.1 ms of browser time for each cell. The page draws one chart after the
# other, so that a chart may keep the reader waiting for five seconds and the page for fifteen.
CHART_CELLS = 50_000
PAGE_CELLS = 150_000


class Charts:
    """What a page has for CircuitsVis to draw, as it is collected.

    Attributes:
        drawn: Charts it draws at once: the element it draws into, its component, its properties.
        wanted: Whether it may be asked for more: maps, whose numbers are on the page.
        maps: How many maps the page has.
        framed: Whether the page stands in a notebook, with stills beside it.
    """

    def __init__(self, *, framed: bool = False) -> None:
        self.framed = framed
        self.drawn: list[dict[str, object]] = []
        self.wanted = False
        self.maps = 0
        self._cells_left = PAGE_CELLS

    def add(self, panel: Samples) -> str:
        """Takes texts in; returns the id of the element they need, empty where the page is slow."""
        cells = sum(map(len, panel.tokens))
        if cells > min(CHART_CELLS, self._cells_left):
            return ""
        props = {
            "tokens": [[[[for_circuitsvis(token) for token in row] for row in panel.tokens]]],
            "activations": [[[[rounded(value) for value in row] for row in panel.values]]],
            "zerothDimensionName": "Memory",
            "firstDimensionName": "Texts",
            "zerothDimensionLabels": [for_circuitsvis(panel.name)],
            "firstDimensionLabels": [for_circuitsvis(panel.unit)],
        }
        digest = hashlib.sha1(json.dumps(props).encode(), usedforsecurity=False).hexdigest()
        element = f"cv-{digest[:12]}-{len(self.drawn)}"
        self.drawn.append({"element": element, "component": "TopkSamples", "props": props})
        self.wanted = True
        self._cells_left -= cells
        return element

    def data(self) -> str:
        """Returns all charts as JSON that can stand in a script element."""
        text = json.dumps(self.drawn, separators=(",", ":"), allow_nan=False)
        return text.replace("<", "\\u003c")


@cache
def script() -> str:
    """Returns the CircuitsVis program, ready to stand in a script element of a page."""
    found = find_spec("circuitsvis")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("circuitsvis is not installed", name="circuitsvis")
    path = Path(found.origin).parent / "dist" / "cdn" / "iife.js"
    program = path.read_text(encoding="utf-8")
    program = re.sub(r"^//# sourceMappingURL=.*$", "", program, flags=re.MULTILINE)
    return re.sub(r"</(?=script)", r"<\\/", program, flags=re.IGNORECASE).strip()


@cache
def packed() -> str:
    """Returns the program as a third of its size, in characters that any document can hold."""
    return base64.b64encode(zlib.compress(script().encode(), 9)).decode()
