"""A page of panels: one self-contained HTML document that needs no network and makes no request."""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting import (
    circuitsvis_source,
    colors,
    graph,
    heatmap,
    markup,
    notebooks,
    plain_text,
    series_charts,
    stills,
    tables,
)
from tl_contextmix.plotting.circuitsvis_source import Charts
from tl_contextmix.plotting.display_text import label, prose
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

# A new kind of picture is one class in `panels` and one row here: how it is drawn on a page, and
# about how high it is there, which the frame of a notebook cannot ask the page inside it.
DRAW: dict[type, tuple[Callable[[Any, Charts], str], Callable[[Any], int]]] = {
    Heatmap: (heatmap.draw, heatmap.height_of),
    Bars: (series_charts.draw, lambda _: 420),
    Curves: (series_charts.draw, lambda _: 440),
    Table: (tables.draw_table, lambda panel: 110 + 27 * len(panel.rows)),
    ColoredText: (tables.draw_text, lambda _: 190),
    Samples: (tables.draw_samples, lambda _: 760),
    Graph: (graph.draw, graph.height_of),
}

# A browser should not have to draw a thousand sentences because somebody asked for one look.
PANELS = 60
STILLS = 6
_FRAME_LIMIT = 900


@dataclass(frozen=True)
class Opening:
    """Where the maps of a section open: where its finding points.

    Attributes:
        layer: Number of the layer.
        target: Position of the token that is marked, or None.
        head: Label of the head, or None.
    """

    layer: int
    target: int | None = None
    head: str | None = None


@dataclass(frozen=True)
class Section:
    """Panels that belong together.

    Attributes:
        title: Heading.
        text: One short paragraph on how to read them and what they are not.
        panels: What there is to see.
        citation: Where the method comes from.
        finding: One sentence on what there is to be seen in these numbers.
        opens: The layer and the token that maps open at; None: the first layer.
    """

    title: str
    text: str
    panels: tuple[Panel, ...]
    citation: str = ""
    finding: str = ""
    opens: Opening | None = None


@dataclass(frozen=True)
class Page:
    """Panels on a page of their own, for a notebook, a file or a browser.

    The same panels give the same bytes, always.

    Attributes:
        panels: Shown first, under no heading but the page's.
        title: Heading of the page.
        facts: What the page is about, as names and values under the heading.
        sections: Shown after the panels, each with a heading.
        notes: What there is to know before anything is read, under the facts.
    """

    panels: tuple[Panel, ...]
    title: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    sections: tuple[Section, ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        count = len(self._all_panels())
        return f"Page({self.title!r}, {count} panel{'' if count == 1 else 's'})"

    def text(self) -> str:
        """Returns the page as plain text: titles, and the numbers that stand out."""
        parts = [self.title, *self.notes, *map(plain_text.describe, self._all_panels())]
        return "\n\n".join(parts).strip()

    def html(self) -> str:
        """Returns the page as one complete document."""
        return self._document(framed=False)

    def _document(self, *, framed: bool) -> str:
        """Returns the page; in the frame of a notebook CircuitsVis comes from around it."""
        charts = Charts(framed=framed)
        body = self._body(charts)
        scripts = [resource("page.js")] + [resource("maps.js")] * bool(charts.maps)
        allowed = [*scripts, circuitsvis_source.script()] if charts.wanted else scripts
        return document(self.title, f"{body}\n{_data(charts)}", scripts, policy(allowed))

    def _repr_html_(self) -> str:
        # The frame keeps our styles from the notebook's and CircuitsVis's globals from other
        # outputs, so that the same page can be shown twice; its sandbox has scripts and no more.
        # What stands beside it survives where a viewer strips frames.
        name = prose(self.title) or "tl_contextmix"
        left = "".join(map(stills.fallback, self._all_panels()[:STILLS]))
        height = 120 + sum(DRAW[type(panel)][1](panel) for panel in self._all_panels())
        document = self._document(framed=True)
        return (
            f'{notebooks.HIDE_STILL}<iframe title="{name}" sandbox="allow-scripts" '
            f'style="width:100%;height:{min(_FRAME_LIMIT, height)}px;border:0;resize:vertical;'
            f'overflow:auto" srcdoc="{escape(document)}"></iframe>'
            f'<div class="tl-contextmix-still">{left}</div>'
            f"<details><summary>{name} as text</summary>"
            f"<pre>{escape(self.text())}</pre></details>"
            f"{notebooks.scripts(document)}"
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """Returns what hosts choose from: HTML, text, and for those without HTML a picture."""
        bundle = {"text/html": self._repr_html_(), "text/plain": self.text()}
        picture = next(filter(None, map(stills.picture, self._all_panels()[:STILLS])), None)
        return bundle if picture is None else {**bundle, "image/svg+xml": picture}

    def save(self, path: str | Path) -> Path:
        """Writes the page to a file; returns its path.

        Raises:
            InvalidInput: If the file cannot be written.
        """
        path = Path(path)
        with _named(path):
            # Bytes: a translated line ending would break the hashes in the head of the page.
            path.write_bytes(self.html().encode())
        return path

    def open(self) -> Path:
        """Writes the page to a temporary file and opens it in the browser; returns its path."""
        path = self.save(Path(tempfile.mkdtemp(prefix="tl_contextmix-")) / "page.html")
        webbrowser.open(path.as_uri())
        return path

    def _all_panels(self) -> tuple[Panel, ...]:
        return self.panels + tuple(panel for part in self.sections for panel in part.panels)

    def _body(self, charts: Charts) -> str:
        facts = "".join(
            f"<div><dt>{prose(name)}</dt><dd>{label(value, 120)}</dd></div>"
            for name, value in self.facts
        )
        pieces = [f"<header><h1>{prose(self.title)}</h1>"] if self.title else ["<header>"]
        pieces.append(f'<dl class="facts">{facts}</dl>' if facts else "")
        pieces += map(markup.note, self.notes)
        pieces.append(f"{_contents(self.sections)}</header>\n<main>")
        if self.panels:
            pieces.append(_panels(self.panels, charts, None))
        for index, section in enumerate(self.sections):
            pieces.append(_section(section, index, charts))
        drawn = f" with CircuitsVis {version('circuitsvis')}" * charts.wanted
        foot = (
            f"Made by tl_contextmix{drawn}. This page is complete in itself and makes no request."
        )
        pieces.append(f"</main>\n<footer>{foot}</footer>")
        return "\n".join(piece for piece in pieces if piece)


def require_writable(path: str | Path) -> None:
    """Checks that a page can be written, before the work of making it; leaves files as they are.

    Raises:
        InvalidInput: If the file cannot be written.
    """
    path = Path(path)
    with _named(path):
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise InvalidInput(
            "the page cannot be written",
            f"{str(path)!r} ({getattr(error, 'strerror', None) or error})",
            "the name of a file in a folder that exists",
            "Give another path.",
        ) from error


def _panels(panels: Sequence[Panel], charts: Charts, opens: Opening | None) -> str:
    drawn = "\n".join(DRAW[type(panel)][0](panel, charts) for panel in panels[:PANELS])
    left = f"The first {PANELS} of {len(panels):,} panels; ask for a part of the result."
    rest = markup.note(left) if len(panels) > PANELS else ""
    start = "" if opens is None else f' data-opens="{escape(json.dumps(vars(opens)))}"'
    return f'<div class="panels"{start}>\n{drawn}\n</div>{rest}'


def _section(section: Section, index: int, charts: Charts) -> str:
    pieces = [
        f'<section id="section-{index}" aria-labelledby="heading-{index}">',
        f'<h2 id="heading-{index}">{prose(section.title)}</h2>',
        _paragraph("finding", section.finding),
        _paragraph("reading", section.text),
        _panels(section.panels, charts, section.opens),
        _paragraph("citation", section.citation),
        "</section>",
    ]
    return "\n".join(piece for piece in pieces if piece)


def _paragraph(kind: str, text: str) -> str:
    return f'<p class="{kind}">{prose(text)}</p>' if text else ""


def _contents(sections: Sequence[Section]) -> str:
    if len(sections) < 2:
        return ""
    # With their findings, the headings are the whole story in a few lines.
    items = "".join(
        f'<li><a href="#section-{index}">{prose(section.title)}</a> {prose(section.finding)}</li>'
        for index, section in enumerate(sections)
    )
    return f'<nav aria-label="Contents"><ol>{items}</ol></nav>'


def _data(charts: Charts) -> str:
    """Returns the elements with what CircuitsVis draws, and with its program, packed."""
    pieces = []
    if charts.drawn:
        pieces.append(f'<script type="application/json" id="charts">{charts.data()}</script>')
    if charts.wanted:
        program = "" if charts.framed else circuitsvis_source.packed()
        pieces.append(f'<script type="text/plain" id="circuitsvis">{program}</script>')
    return "\n".join(pieces)


def policy(scripts: Sequence[str], *others: str) -> str:
    """Returns the policy under which nothing but these very scripts runs and nothing is fetched."""
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts) or "'none'"
    listed = (
        "default-src 'none'",
        f"script-src {hashes}",
        "style-src 'unsafe-inline'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        *others,
    )
    return "; ".join(listed)


def document(title: str, body: str, scripts: Sequence[str], allowed: str, style: str = "") -> str:
    """Returns a complete document in the style of all pages; ``allowed`` is its `policy`."""
    rules = resource("page.css") + colors.stylesheet() + style
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{allowed}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{prose(title) or 'tl_contextmix'}</title>",
            f"<style>\n{rules}\n</style>\n</head>",
            f"<body>\n{body}",
            *(f"<script>{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        ]
    )


@cache
def resource(name: str) -> str:
    """Returns a script or a stylesheet of this folder."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


@cache
def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
