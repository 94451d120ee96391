"""Pages as they are read back: what is on them, that it is safe, and that it is always the same."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import struct
import sys
import types
import xml.etree.ElementTree as ElementTree
import zlib
from html.parser import HTMLParser
from typing import Any

import hostile
import pytest
import torch
import unchecked
from torch.utils import _pytree as pytree
from watched import Watched

from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting import Page, Section, notebooks
from tl_contextmix.plotting import circuitsvis_source as circuitsvis_library
from tl_contextmix.plotting import page as page_module
from tl_contextmix.plotting import stills as still
from tl_contextmix.plotting.display_text import for_circuitsvis, number, visible
from tl_contextmix.plotting.panels import (
    Bars,
    ColoredText,
    Curves,
    Dot,
    Graph,
    Heatmap,
    Panel,
    Place,
    Samples,
    Table,
)
from tl_contextmix.plotting.scales import depths
from tl_contextmix.plotting.survey import survey

pytestmark = pytest.mark.once

WORD_JOINER = "\u2060"
# What no tokenizer says but a caller might: half a character.
HOSTILE = (*hostile.HOSTILE, "\ud800")


class Parsed(HTMLParser):
    """A document as a browser would take it apart."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._script: dict[str, str | None] | None = None
        self._skip = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes an opening tag."""
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs)
        self._skip = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        """Takes a closing tag."""
        self._script, self._skip = None, False

    def handle_data(self, data: str) -> None:
        """Takes text."""
        if self._script is not None:
            self.scripts.append((self._script, data))
        elif not self._skip:
            self.text += data

    def programs(self) -> list[str]:
        """Scripts that run."""
        return [body for attrs, body in self.scripts if attrs.get("type") is None]

    def charts(self) -> list[dict[str, Any]]:
        """What CircuitsVis is asked to draw."""
        data = [body for attrs, body in self.scripts if attrs.get("type") == "application/json"]
        # A graph's is no list.
        return next((found for found in map(json.loads, data) if isinstance(found, list)), [])

    def maps(self) -> list[dict[str, Any]]:
        """What there is on each map; under ``values`` its numbers, NaN where there is none."""
        found = []
        for attrs, body in self.scripts:
            told = json.loads(body) if attrs.get("type") == "application/json" else None
            if isinstance(told, dict) and "cells" in told:
                found.append({**told, **unpacked(told)})
        return found

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every element of a kind."""
        return [attrs for name, attrs in self.tags if name == tag]

    def ids(self) -> list[str | None]:
        """All ids."""
        return [attrs["id"] for _, attrs in self.tags if "id" in attrs]

    def values(self) -> list[float]:
        """All numbers that elements carry."""
        return [float(attrs["data-value"] or "") for _, attrs in self.tags if "data-value" in attrs]


def unpacked(told: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """The numbers of a map on a page, and which of its cells are hidden."""
    data = torch.frombuffer(
        bytearray(zlib.decompress(base64.b64decode(told["cells"]))), dtype=torch.uint8
    )
    shape = told["shape"]
    count, size = math.prod(shape), math.prod(shape[1:])
    words = data[: 4 * count].view(4, count).flip(0).T.contiguous()
    hidden = data[4 * count :].view(shape[1:]).bool() if len(data) == 4 * count + size else None
    return {"values": words.view(torch.float32).view(shape), "hidden": hidden}


def heatmap(values: torch.Tensor, **changes: Any) -> Heatmap:
    sheet, row, column = values.shape
    options: dict[str, Any] = {
        "title": "map",
        "caption": "caption",
        "values": values,
        "sheets": tuple(f"layer {index}" for index in range(sheet)),
        "rows": tuple(f"t{index}" for index in range(row)),
        "columns": tuple(f"t{index}" for index in range(column)),
        "unit": "norm",
    }
    return Heatmap(**(options | changes))


def parse(*panels: Panel) -> Parsed:
    return Parsed(Page(panels, title="page").html())


def hostile_panels() -> dict[str, Panel]:
    n = len(HOSTILE)
    square = torch.linspace(-1, 1, 2 * n * n).reshape(2, n, n)
    wide = torch.rand(2, n, n + 1)
    tall = torch.rand(1, 120, n)
    numbers = tuple(float(index) for index in range(n))
    title = HOSTILE[3]
    return {
        "circuitsvis": heatmap(square, rows=HOSTILE, columns=HOSTILE, sheets=HOSTILE[2:4]),
        "numbers": heatmap(wide, rows=HOSTILE, columns=(*HOSTILE, "a"), sheets=HOSTILE[2:4]),
        "picture": heatmap(tall, columns=HOSTILE, sheets=(HOSTILE[3],), unit=HOSTILE[2]),
        "bars": Bars(title, HOSTILE[2], HOSTILE, ((HOSTILE[2], numbers),), HOSTILE[3]),
        "curves": Curves(
            title,
            HOSTILE[2],
            HOSTILE,
            ((HOSTILE[2], numbers),),
            HOSTILE[3],
            (tuple((value - 1, value + 1) for value in numbers),),
        ),
        "table": Table(
            title, HOSTILE[2], ("t", HOSTILE[2]), tuple(zip(HOSTILE, numbers, strict=True)), ("t",)
        ),
        "text": ColoredText(title, HOSTILE[2], HOSTILE, numbers, HOSTILE[3]),
        "graph": Graph(
            title,
            HOSTILE[2],
            tuple(map(Place, HOSTILE, range(n))),
            HOSTILE,
            tuple(
                Dot(text, i, i, float(i - 2), ((HOSTILE[3], text),))
                for i, text in enumerate(HOSTILE)
            ),
            torch.linspace(-1, 1, n * n).reshape(n, n).tril(-1),
            HOSTILE[3],
        ),
        "samples": Samples(
            title, HOSTILE[2], HOSTILE[3], HOSTILE[2:4], (HOSTILE,) * 2, (numbers,) * 2, HOSTILE[2]
        ),
    }


# ---- the document


def test_document_is_complete_and_fetches_nothing():
    page = Page(
        (heatmap(torch.rand(2, 3, 3)),),
        title="A title",
        facts=(("Text", "the keys"),),
        sections=(
            Section("First", "How to read it.", (heatmap(torch.rand(1, 2, 3)),), "A. Author 2024"),
            Section("Second", "How to read this.", ()),
        ),
    )
    text = page.html()
    parsed = Parsed(text)
    assert text.startswith("<!DOCTYPE html>")
    assert text.endswith("</html>\n")
    for part in ("A title", "the keys", "First", "How to read it.", "A. Author 2024", "Second"):
        assert part in parsed.text
    assert [attrs["href"] for attrs in parsed.all("a")] == ["#section-0", "#section-1"]
    assert {"section-0", "section-1"} <= set(parsed.ids())
    for _, attrs in parsed.tags:
        for name in ("src", "href", "srcset", "action"):
            assert not (attrs.get(name) or "").startswith(("http", "//"))
    assert not re.search(r"\bhttps?:", text.replace(circuitsvis_library.script(), ""))
    assert "sourceMappingURL" not in text


def test_library_is_embedded_once_and_only_where_it_is_used():
    library = circuitsvis_library.packed()
    assert zlib.decompress(base64.b64decode(library)).decode() == circuitsvis_library.script()
    many = Page(tuple(heatmap(torch.rand(2, 3, 3)) for _ in range(5))).html()
    assert many.count(library) == 1
    none = Page((Bars("bars", "", ("a",), (("s", (1.0,)),)),)).html()
    assert library not in none
    assert len(none) < 60_000
    # It can draw no map between two texts.
    assert library not in Page((heatmap(torch.rand(2, 3, 4)),)).html()


def test_policy_allows_the_scripts_of_the_page_and_nothing_else():
    parsed = parse(heatmap(torch.rand(2, 3, 3)))
    policies = [a for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    policy = policies[0]["content"] or ""
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    hashes = [
        "'sha256-" + base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() + "'"
        for body in (*parsed.programs(), circuitsvis_library.script())
    ]
    assert len(hashes) == 3
    assert directives["default-src"] == "'none'"
    assert directives["script-src"].split() == hashes
    assert directives["style-src"] == "'unsafe-inline'"
    assert directives["img-src"] == "data:"
    # A browser hashes what it read, and it reads "\r\n" as "\n".
    assert all("\r" not in body for body in parsed.programs())
    # No handler in an attribute: the policy would block it.
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]


def test_same_panels_give_the_same_bytes():
    values = torch.rand(2, 3, 3)
    first, second = (Page((heatmap(values.clone()),), title="t") for _ in range(2))
    assert first.html() == second.html() == first.html()
    assert first._repr_html_() == second._repr_html_()


def test_ids_are_unique_even_for_equal_panels():
    panel = samples((0.5, 2.0), (1.0, 3.0))
    parsed = parse(panel, panel, panel)
    assert len(set(parsed.ids())) == len(parsed.ids())
    elements = [chart["element"] for chart in parsed.charts()]
    assert len(set(elements)) == 3
    assert set(elements) <= set(parsed.ids())


def test_every_kind_of_panel_can_be_drawn_and_described():
    kinds = set(page_module.DRAW)
    assert kinds == {type(panel) for panel in hostile_panels().values()}
    for panel in hostile_panels().values():
        assert Page((panel,)).text().isprintable() or "\n" in Page((panel,)).text()


# ---- hostile text


@pytest.mark.parametrize("kind", hostile_panels())
def test_hostile_text_is_neutralised(kind):
    panel = hostile_panels()[kind]
    page = Page((panel,), title=HOSTILE[3], facts=((HOSTILE[2], HOSTILE[3]),))
    text = page.html()
    text.encode()  # A lone surrogate must not be left.
    parsed = Parsed(text)
    assert not [attrs for attrs in parsed.all("img") if "onerror" in attrs]
    assert not parsed.all("s")
    assert not parsed.all("textarea")
    mapped = kind in ("circuitsvis", "numbers", "picture")
    assert len(parsed.programs()) == 1 + mapped
    assert not [body for body in parsed.programs() if body.startswith("alert")]
    for character in ("\u202e", "\u2067", "\ud800"):
        assert character not in parsed.text
        assert character not in text
    # In the data of maps "<" is written as its number.
    programs = re.sub(r"<script>.*?</script>|<style.*?</style>", "", text, flags=re.DOTALL)
    assert "<img src=x" not in programs
    # The frame of a notebook holds the page as one attribute.
    notebook = Parsed(page._repr_html_())
    left = {"style", "iframe", "div", "p", "b", "bdi", "img", "details", "summary", "pre"}
    left |= {"table", "thead", "tbody", "tr", "th", "td", "script"}
    assert {tag for tag, _ in notebook.tags} <= left
    assert len(notebook.programs()) == 1, "the height of the frame"
    framed = notebook.all("iframe")[0]["srcdoc"] or ""
    assert framed == re.sub(
        "<noscript>.*?</noscript>", "", text.replace(circuitsvis_library.packed(), "")
    )
    assert all((attrs["src"] or "").startswith("data:image/svg") for attrs in notebook.all("img"))
    assert not [name for _, attrs in notebook.tags for name in attrs if name.startswith("on")]
    for picture in map(still.picture, [panel]):
        ElementTree.fromstring(picture or "<none/>")


@pytest.mark.parametrize("kind", ["bars", "curves", "table", "text"])
def test_own_drawings_show_every_token_as_text(kind):
    parsed = parse(hostile_panels()[kind])
    for token in ("<s>", "</s>", "&lt;", "⏎", "⇥", "∅", "\\u202eevil", "שלום", "😀", "\\ud800"):
        assert token in parsed.text
    for token in ("◌\u0301", "\\u200d", "\\u3164", "\\ufffe", "e\u0301\u0302"):
        assert token in parsed.text
    if kind not in ("bars", "curves"):
        assert "x" * 24 not in parsed.text or kind == "table"


def test_long_tokens_are_cut_and_whole_on_hover():
    parsed = parse(hostile_panels()["text"])
    assert "x" * 23 + "…" in parsed.text
    assert "x" * 24 not in parsed.text
    assert "x" * 120 in [attrs.get("title") for attrs in parsed.all("bdi")]


@pytest.mark.parametrize("kind", ["circuitsvis", "numbers", "picture"])
def test_maps_have_every_token_as_text(kind):
    (told,) = parse(hostile_panels()[kind]).maps()
    assert told["columns"][: len(HOSTILE)] == [visible(token) for token in HOSTILE]


def test_data_cannot_end_its_script_element():
    text = Page((hostile_panels()["circuitsvis"], hostile_panels()["samples"])).html()
    for part in text.split('<script type="application/json"')[1:]:
        data = part.split(">", 1)[1].split("</script>")[0]
        assert "<" not in data
        assert json.loads(data)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the", "the"),
        (" the", "·the"),
        ("  ", "··"),
        ("a b ", "a b·"),
        ("\r\n", "\\u000d⏎"),
        ("\x00\x1b\x7f", "\\u0000\\u001b\\u007f"),
        ("\u200b\ufeff\u00ad\u2066", "\\u200b\\ufeff\\u00ad\\u2066"),
        ("\u00a0x\u3000", "\\u00a0x\\u3000"),
        ("\u2028", "\\u2028"),
        ("\U000e0001", "\\U000e0001"),
        ("👩‍💻 می‌خواهم", "👩‍💻 می‌خواهم"),
        ("é", "é"),
        ("\u0301", "◌\u0301"),
        (" \u0301", "·◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("\u200d", "\\u200d"),
        ("\u200cx\u200d", "\\u200cx\\u200d"),
        ("\u3164\uffa0\u2800", "\\u3164\\uffa0\\u2800"),
        ("\ufdd0\U0001ffff", "\\ufdd0\\U0001ffff"),
    ],
)
def test_visible_writes_out_what_cannot_be_seen(text, shown):
    assert visible(text) == shown


def test_for_circuitsvis_keeps_the_text():
    assert for_circuitsvis("<s>&") == f"<{WORD_JOINER}s>&{WORD_JOINER}"


# ---- heat maps


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", [4, 5])
def test_maps_reach_the_page_as_they_are(causal, side):
    values = torch.rand(3, 4, side) * 7
    values = values.tril() if causal else values
    layers, tokens = (0, 1, 4), ("rows", "columns")
    panel = heatmap(values, causal=causal, layers=layers, tokens=tokens)
    parsed = parse(panel)
    (told,) = parsed.maps()
    torch.testing.assert_close(told["values"].nan_to_num(0.0), values, rtol=1e-4, atol=0)
    assert told["sheets"] == ["layer 0", "layer 1", "layer 2"]
    assert (told["layers"], told["tokens"]) == ([0, 1, 4], ["rows", "columns"])
    assert (told["rows"], told["columns"]) == ([*panel.rows], [*panel.columns])
    assert told["block"] == 1
    hidden = torch.ones(4, side).triu(1).bool()
    assert (told["hidden"] is not None) is causal
    assert not causal or torch.equal(told["hidden"], hidden)
    # CircuitsVis has one list of tokens for both axes.
    assert told.get("causal") == (causal if side == 4 else None)


def test_numbers_keep_four_digits_whatever_their_size():
    values = torch.logspace(-30, 30, 60).reshape(1, 6, 10) * torch.tensor([-1.0, 1.0]).repeat(5)
    (told,) = parse(heatmap(values)).maps()
    torch.testing.assert_close(told["values"], values, rtol=7e-5, atol=0)
    assert len(told["cells"]) < 5 * values.numel()


def test_maps_of_any_dtype_and_with_gradients():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        values = torch.rand(1, 2, 2, requires_grad=True).to(dtype)
        (told,) = parse(heatmap(values)).maps()
        torch.testing.assert_close(told["values"], values.detach().float(), rtol=1e-4, atol=0)


def test_what_is_no_number_is_told_from_what_is_hidden():
    values = torch.tensor([[[1.0, 0.0], [math.inf, math.nan]]])
    parsed = parse(heatmap(values, causal=True))
    (told,) = parsed.maps()
    assert told["values"].isnan().tolist() == [[[False, True], [False, True]]]
    assert told["hidden"].tolist() == [[False, True], [False, False]]
    assert told["values"][0, 1, 0] == math.inf
    assert "causal" not in told, "CircuitsVis cannot show it"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_panels_of_one_strange_number_are_drawn(value):
    full = torch.full((1, 50, 50), value)
    panels = (
        heatmap(full),
        heatmap(full[:, :3, :2]),
        Bars("bars", "", ("a",), (("s", (value,)),)),
        Table("table", "", ("a",), ((value,),), ("a",)),
        ColoredText("text", "", ("a",), (value,)),
    )
    page = Page(panels)
    assert "nan" not in Parsed(page.html()).text.lower()
    assert page.text()


def test_empty_panels_say_so():
    panels = (
        heatmap(torch.zeros(1, 0, 0)),
        heatmap(torch.zeros(0, 2, 2)),
        heatmap(torch.full((1, 2, 2), torch.nan)),
        Bars("bars", "", (), ()),
        Curves("curves", "", (), ()),
        Table("table", "", ("a",), ()),
        ColoredText("text", "", (), ()),
    )
    page = Page(panels)
    assert Parsed(page.html()).text.count("There is nothing to show") >= 5
    assert page.text().count("There is nothing to show") == len(panels)


def test_circuitsvis_is_asked_for_no_more_than_it_can_draw():
    side = 100
    within = circuitsvis_library.CHART_CELLS // side**2
    (told,) = parse(heatmap(torch.rand(within, side, side))).maps()
    assert "causal" in told
    parsed = parse(heatmap(torch.rand(within + 1, side, side)))
    assert "causal" not in parsed.maps()[0]
    assert circuitsvis_library.packed() not in Page((heatmap(torch.rand(6, 100, 100)),)).html()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lowest", [-1.0, 0.0])
def test_of_very_many_cells_one_has_the_number_farthest_from_zero(causal, lowest, monkeypatch):
    monkeypatch.setattr("tl_contextmix.plotting.survey.PIXELS", 2 * 50 * 60 // 9)
    values = torch.rand(2, 50, 61, dtype=torch.float64) * (1 - lowest) + lowest
    if causal:
        values = values.tril()
    values[0, 20:30, :9] = math.nan
    values[1, 40, 3] = math.inf
    panel = heatmap(values, causal=causal, columns=tuple(f"c{i}" for i in range(61)))
    size = 4
    for sheet, pixels in zip(values, panel.survey.pixels, strict=True):
        for row, line in enumerate(pixels):
            for column, pixel in enumerate(line):
                rows, columns = row * size, column * size
                cells = [
                    float(sheet[i, j])
                    for i in range(rows, min(50, rows + size))
                    for j in range(columns, min(61, columns + size))
                    if not (causal and j > i) and not math.isnan(sheet[i, j])
                ]
                expected = max(cells, key=abs, default=math.nan)
                assert float(pixel) == pytest.approx(expected, nan_ok=True), (row, column)
    parsed = parse(panel)
    assert "6,100 cells: drawn is one for 4 by 4" in parsed.text
    (told,) = parsed.maps()
    assert (told["shape"], told["block"]) == ([2, 13, 16], 4)
    torch.testing.assert_close(
        told["values"], panel.survey.pixels.float(), rtol=1e-4, atol=0, equal_nan=True
    )


def read_png(data: bytes, height: int, width: int) -> torch.Tensor:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert data[at + 8 + length : at + 12 + length] == struct.pack(
            ">I", zlib.crc32(kind + body)
        )
        chunks[kind] = body
        at += 12 + length
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (width, height)
    assert len(chunks[b"PLTE"]) == 3 * 256
    pixels = torch.tensor(list(zlib.decompress(chunks[b"IDAT"]))).reshape(height, width + 1)
    assert not pixels[:, 0].any()
    return pixels[:, 1:]


# ---- colours


def test_colours_follow_ranks():
    cells = torch.tensor([[0.0, 1e-9, -1e-3], [1.0, math.nan, math.inf], [1e-3, 5.0, -1e3]])
    found = depths(cells)
    # Seven numbers count; two share a place.
    expected = [0, (1 / 6) ** 2, -((3 / 6) ** 2), (4 / 6) ** 2, math.nan, math.inf]
    expected += [(3 / 6) ** 2, (5 / 6) ** 2, -1.0]
    assert found.flatten().tolist() == pytest.approx(expected, nan_ok=True)
    assert not depths(torch.zeros(2, 2)).any()


def test_large_maps_list_their_largest_numbers():
    values = torch.zeros(2, 50, 50)
    values[1, 30, 7] = -3.0
    parsed = parse(heatmap(values))
    assert "layer 1t30 (30)t7 (7)−3.00" in parsed.text


def test_showing_looks_once_and_needs_the_memory_of_a_sheet(monkeypatch):
    # Once per sheet and in float64, 144 heads over 512 tokens took 13 seconds and a gigabyte.
    monkeypatch.setattr("tl_contextmix.plotting.survey.PIXELS", 10_000)
    values = torch.rand(40, 99, 100)
    looks = []
    monkeypatch.setattr(
        "tl_contextmix.plotting.panels.survey", lambda *given: looks.append(1) or survey(*given)
    )
    sizes: list[int] = []

    def see(func: Any, args: Any, made: Any) -> None:
        sizes.extend(one.numel() for one in pytree.tree_leaves(made) if hasattr(one, "numel"))

    with Watched(see):
        Page((heatmap(values),))._repr_mimebundle_()
    assert len(looks) == 1
    assert max(sizes) < values.numel() / 10  # the picture of a sheet is larger than it
    assert sum(sizes) < 25 * values.numel()


# ---- positions


def test_a_window_has_the_positions_of_the_input():
    values = torch.linspace(-1, 1, 12).reshape(1, 3, 4)
    words = ("the", "keys", "are")
    panel = heatmap(
        values,
        rows=words,
        columns=(*words, "."),
        row_positions=(104, 105, 107),
        column_positions=(0, 104, 105, 107),
    )
    page = Page((panel,))
    for text in (
        parse(panel).text,
        page.text(),
        Parsed(
            base64.b64decode(Parsed(page._repr_html_()).all("img")[0]["src"][26:]).decode()
        ).text,
    ):
        assert "are (107)" in text
        assert "(2)" not in text
    (told,) = parse(panel).maps()
    assert told["rowPositions"] == [104, 105, 107]
    assert told["columnPositions"] == [0, 104, 105, 107]
    square = heatmap(torch.rand(1, 3, 3).tril(), rows=words, columns=words, causal=True)
    assert "causal" in parse(square).maps()[0]
    window = {"row_positions": (1, 2, 4), "column_positions": (1, 2, 4)}
    moved = dataclasses.replace(square, **window)
    # CircuitsVis counts from 0: it would name other positions.
    (told,) = parse(moved).maps()
    assert "causal" not in told
    assert int(told["hidden"].sum()) == 3
    late = dataclasses.replace(square, row_positions=(4, 5, 6), column_positions=(5, 6, 7))
    assert late.hidden.sum() == 6
    with pytest.raises(InvalidInput, match="cannot be built: got 2; expected 3"):
        dataclasses.replace(square, row_positions=(4, 5))


def test_signed_maps_have_zero_in_the_middle_everywhere():
    values = torch.tensor([[[-2.0, 0.0], [0.5, 1.0]]])
    panel = heatmap(values)
    picture = still.picture(panel) or ""
    stops = re.findall(r'offset="([\d.]+)" stop-color="([^"]+)"', picture)
    assert stops == [("0.0", "#b2182b"), ("0.5", "#fff"), ("1.0", "#2166ac")]
    assert "−2.00" in Page((panel,)).text().splitlines()[2]
    stops = re.findall(r'stop-color="([^"]+)"', still.picture(heatmap(values.abs())) or "")
    assert stops == ["#fff", "#2166ac"]


def test_a_new_kind_of_picture_is_a_class_and_a_row(monkeypatch):
    @dataclasses.dataclass(frozen=True, eq=False)
    class Clock(Panel):
        hour: int

        def table(self) -> Table:
            return Table(self.title, "", ("hour",), ((self.hour,),))

    row = (lambda panel, charts: f"<article>{panel.hour} o'clock</article>", lambda panel: 100)
    monkeypatch.setitem(page_module.DRAW, Clock, row)
    page = Page((Clock("A clock", "", 7),))
    assert "7 o'clock" in Parsed(page.html()).text
    assert page.text() == "A clock\n  hour\n     7"
    assert len(Parsed(stripped(page._repr_html_())).all("td")) == 1


# ---- bars, tables, sentences


def test_bars_stand_on_zero_and_hold_their_numbers():
    series = (("up", (1.0, 2.0)), ("down", (-1.0, -0.5)))
    parsed = parse(Bars("bars", "caption", ("a", "b"), series, "nats"))
    assert parsed.values() == [1.0, 2.0, -1.0, -0.5]
    boxes = [(float(a["y"] or ""), float(a["height"] or "")) for a in parsed.all("rect")]
    zero = boxes[0][0] + boxes[0][1]
    assert [y + height for y, height in boxes[:2]] == pytest.approx([zero, zero], abs=0.1)
    assert [y for y, _ in boxes[2:]] == pytest.approx([zero, zero], abs=0.1)
    assert boxes[1][1] == pytest.approx(2 * boxes[0][1], abs=0.2)
    assert parsed.all("svg")[0]["role"] == "img"
    assert parsed.all("svg")[0]["aria-label"]
    assert "nats" in parsed.text
    # The numbers are also in a table, for those who cannot see the bars.
    assert parsed.text.count("−0.50") >= 2


def test_curves_hold_their_numbers_and_intervals():
    series = (("up", (1.0, 2.0, math.nan, 4.0)), ("down", (-1.0, math.inf, 0.5, 0.25)))
    ends = (((0.5, 1.5), (1.5, 2.5), (math.nan, math.nan), (3.0, 5.0)), ((-1.0, 1.0),) * 4)
    panel = Curves("curves", "caption", ("a", "b", "c", "d"), series, "nats", ends)
    parsed = parse(panel)
    assert parsed.values() == [1.0, 2.0, 4.0, -1.0, 0.5, 0.25]
    band, other, line, _ = (attrs["d"] or "" for attrs in parsed.all("path"))
    assert (line.count("M"), line.count("L")) == (2, 1)  # a gap where there is no number
    assert (band.count("Z"), other.count("Z")) == (2, 1)
    heights = [float(attrs["cy"] or "") for attrs in parsed.all("circle")]
    assert heights[2] < heights[1] < heights[0] < heights[3]
    for part in ("up", "down", "nats", "up, from", "0.501.50", "Shaded: intervals.", "∞"):
        assert part in parsed.text
    with pytest.raises(InvalidInput, match="panel 'curves' cannot be built"):
        Curves("curves", "", ("a",), (("s", (1.0,)),), "", (((0.0, 1.0), (0.0, 1.0)),))


def test_curves_need_not_reach_zero():
    near = parse(Curves("c", "", ("a", "b"), (("s", (100.0, 101.0)),)))
    heights = [float(attrs["cy"] or "") for attrs in near.all("circle")]
    assert heights[0] - heights[1] > 100
    same = parse(Curves("c", "", ("a", "b"), (("s", (5.0, 5.0)),)))
    assert len({attrs["cy"] for attrs in same.all("circle")}) == 1


@pytest.mark.parametrize("kind", [Curves, Bars])
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-16, -1e-3, 5e-324, -5e-324, 1e300])
def test_numbers_that_are_all_one_have_a_scale(kind: type[Bars], value: float):
    for other in (value, value + math.ulp(value), value - math.ulp(value)):
        parsed = parse(kind("c", "", ("a", "b"), (("s", (value, other)),)))
        assert 2 <= len([one for one in parsed.all("line") if one["class"] == "tick"]) <= 6


def test_many_bars_fit():
    values = tuple(math.sin(index) for index in range(200))
    parsed = parse(Bars("bars", "", tuple(f"layer {i}" for i in range(200)), (("s", values),)))
    right = max(float(a["x"] or "") + float(a["width"] or "") for a in parsed.all("rect"))
    assert right <= 560
    assert len(parsed.all("rect")) == 200


def test_tables_colour_signed_columns_only():
    rows = (("a", 1, 2.0, None), ("b", -1, -1.0, 0.5))
    parsed = parse(Table("t", "", ("name", "n", "change", "score"), rows, ("change",)))
    classes = [attrs.get("class") for attrs in parsed.all("td")]
    assert classes == [
        None,
        "number",
        "number p20",
        "number",
        None,
        "number",
        "number n10",
        "number",
    ]
    assert "+2.00" in parsed.text
    assert "−1.00" in parsed.text
    assert parsed.values() == [1, 2.0, -1, -1.0, 0.5]


def test_tables_say_yes_and_no():
    table = Table("t", "", ("name", "known"), (("a", True), ("b", False)))
    assert [line.split()[-1] for line in Page((table,)).text().splitlines()[-2:]] == ["yes", "no"]
    assert "<td>yes</td>" in Page((table,)).html()
    assert "<td>no</td>" in Page((table,)).html()


def test_long_tables_are_cut_with_a_note():
    parsed = parse(Table("t", "", ("n",), tuple((index,) for index in range(1000))))
    assert len(parsed.all("tr")) == 501
    assert "The first 500 of 1,000 rows" in parsed.text


def test_sentences_show_a_number_under_every_token():
    parsed = parse(ColoredText("t", "", (" the", " keys"), (0.25, -0.5), "ratio"))
    assert parsed.values() == [0.25, -0.5]
    assert "·keys−0.500" in parsed.text
    assert "ratio" in parsed.text


@pytest.mark.parametrize(
    ("value", "places", "signed", "text"),
    [
        (0.5, 2, True, "+0.50"),
        (-0.5, 2, True, "−0.50"),
        (0.0, 2, True, "0.00"),
        (-0.001, 2, False, "0.00"),
        (1e-9, None, False, "1.00e-09"),
        (math.nan, 2, True, "–"),
        (math.inf, 2, True, "+∞"),
        (-math.inf, 2, False, "−∞"),
    ],
)
def test_numbers_as_text(value, places, signed, text):
    assert number(value, places, signed=signed) == text


# ---- notebooks, files


def test_notebook_output_is_one_frame_and_the_numbers_as_text():
    page = Page((heatmap(torch.eye(3)[None]),), title="A <title>")
    bundle = page._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain", "image/svg+xml"}
    assert bundle["text/html"] == page._repr_html_()
    parsed = Parsed(bundle["text/html"] * 2)
    frames = parsed.all("iframe")
    assert len(frames) == 2
    assert not parsed.ids()  # Ids live inside the frames, each a document of its own.
    assert len(set(parsed.programs())) == 1, "the height of frames"
    for frame in frames:
        assert frame["sandbox"] == "allow-scripts"
        assert frame["title"] == "A <title>"
        assert "src" not in frame
    for text in (bundle["text/plain"], parsed.text):
        assert "  layer 0  t0 (0)  t0 (0)   1.00" in text


def test_a_notebook_gets_circuitsvis_with_the_first_cell_that_can_use_it(monkeypatch):
    page, library = Page((heatmap(torch.eye(3)[None]),)), circuitsvis_library.packed()
    bars = Page((Bars("bars", "", ("a",), (("s", (1.0,)),)),))
    monkeypatch.setattr(notebooks, "_brought_by", [])
    run: list[tuple[str, int] | None] = [None]
    monkeypatch.setattr(notebooks, "_run", lambda: run[0])

    def brings(shown: Page, cell: str, count: int) -> bool:
        run[0] = (cell, count)
        return library in shown._repr_html_()

    assert library not in page._repr_html_(), "no notebook, nobody to share it with"
    assert not brings(bars, "a", 1)
    assert brings(page, "b", 2)
    assert not brings(page, "b", 2), "once in a cell"
    assert not brings(page, "c", 3)
    # Run again, a cell loses what it brought.
    assert not brings(page, "c", 4)
    assert brings(page, "b", 5)


def test_a_cell_is_known_by_its_kernel(monkeypatch):
    shell = types.SimpleNamespace(
        kernel=object(), execution_count=7, get_parent=lambda: {"metadata": {"cellId": "x"}}
    )
    ipython = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert notebooks._run() == ("x", 7)
    shell.get_parent = dict
    assert notebooks._run() == (7, 7)
    shell.kernel = None
    assert notebooks._run() is None


def stripped(markup: str) -> str:
    """What a viewer leaves of an output that nobody has trusted."""
    for tag in ("script", "style", "iframe"):
        markup = re.sub(rf"<{tag}\b.*?</{tag}>", "", markup, flags=re.DOTALL)
    return markup


@pytest.mark.parametrize("kind", hostile_panels())
def test_a_picture_or_a_table_is_left_where_scripts_are_stripped(kind):
    panel = hostile_panels()[kind]
    parsed = Parsed(stripped(Page((panel,), title="A <title>")._repr_html_()))
    pictured = isinstance(panel, (Heatmap, Bars, Graph))
    assert len(parsed.all("img")) == pictured
    assert len(parsed.all("table")) == (not pictured)
    assert HOSTILE[3] in parsed.text  # in the numbers as text, whatever else is dropped


def test_the_picture_that_is_left_holds_the_map():
    values = torch.linspace(-2, 2, 18).reshape(2, 3, 3)
    markup = still.picture(heatmap(values, rows=("<s>", " the", "&"), columns=("<s>", " the", "&")))
    assert markup is not None
    drawn = ElementTree.fromstring(markup)
    texts = [node.text for node in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("<s>") == texts.count("·the") == texts.count("&") == 4
    assert {"layer 0", "layer 1", "−2.00"} <= set(texts)
    assert "2.00 norm · colour by rank: half of the numbers are below 1.06" in texts
    images = list(drawn.iter("{http://www.w3.org/2000/svg}image"))
    for sheet, image in zip(depths(values), images, strict=True):
        side = int(image.attrib["width"]) // 3
        data = base64.b64decode(image.attrib["href"].split(",")[1])
        indices = read_png(data, 3 * side, 3 * side)[side // 2 :: side, side // 2 :: side]
        steps = (sheet * 126).round()
        assert torch.equal(indices, (steps + 126).to(torch.int64))


def test_the_words_beside_the_scale_of_a_still_fit():
    panel = dataclasses.replace(
        heatmap(torch.eye(2)[None]), unit="cosine distance / sum of the row"
    )
    drawn = ElementTree.fromstring(still.picture(panel) or "")
    (words,) = (
        node
        for node in drawn.iter("{http://www.w3.org/2000/svg}text")
        if "colour by" in (node.text or "")
    )
    # 11 pixels high, so that a letter is 5.5 to 6 wide.
    end = float(words.attrib["x"]) + 6 * len(words.text or "")
    assert 560 < end <= float(drawn.attrib["width"])


def test_a_frame_hides_the_picture_and_nothing_else_does():
    markup = Page((heatmap(torch.eye(3)[None]),))._repr_html_()
    rule = "<style>iframe[srcdoc]+.tl-contextmix-still{display:none}</style>"
    assert markup.startswith(rule + "<iframe")
    assert '</iframe><div class="tl-contextmix-still">' in markup


def test_of_very_many_panels_the_first_are_drawn_and_the_page_says_so():
    panel = ColoredText("t", "", ("a",), (1.0,))
    parsed = parse(*[panel] * 1000)
    assert len(parsed.all("article")) == 60
    assert "The first 60 of 1,000 panels" in parsed.text


def test_repr_is_short():
    assert repr(Page((heatmap(torch.eye(3)[None]),), title="t")) == "Page('t', 1 panel)"


def test_save_writes_the_page(tmp_path):
    page = Page((heatmap(torch.eye(3)[None]),), title="ünïcode")
    path = page.save(tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    assert path.read_bytes() == page.html().encode()
    assert page.save(str(tmp_path / "again.html")).exists()
    with pytest.raises(InvalidInput, match="folder that exists"):
        page.save(tmp_path / "missing" / "page.html")
    with pytest.raises(InvalidInput, match="cannot be written"):
        page.save(tmp_path)


def test_open_shows_a_saved_page(monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr(page_module.webbrowser, "open", opened.append)
    page = Page((), title="t")
    path = page.open()
    assert opened == [path.as_uri()]
    assert path.read_text(encoding="utf-8") == page.html()


def test_importing_render_does_not_import_circuitsvis():
    code = (
        "import sys, tl_contextmix.plotting as r; "
        "r.Page(()).html(); print('circuitsvis' in sys.modules, 'pandas' in sys.modules)"
    )
    assert unchecked.run("-c", code).split() == ["False", "False"]


# Samples


def samples(*values: tuple[float, ...]) -> Samples:
    tokens = tuple(tuple(HOSTILE[: len(row)]) for row in values)
    labels = tuple(f"text {index}" for index in range(len(values)))
    return Samples("Triggers", "How to read.", "L1.2", labels, tokens, values, "coefficient")


def test_samples_go_to_circuitsvis_with_their_numbers_beside_them():
    page = Parsed(Page((samples((0.5, 2.0), (-1.0, 3.0)),)).html())
    (chart,) = page.charts()
    assert chart["component"] == "TopkSamples"
    assert chart["props"]["activations"] == [[[[0.5, 2.0], [-1.0, 3.0]]]]
    shown = chart["props"]["tokens"][0][0]
    assert all("<" not in token.replace("<\u2060", "") for row in shown for token in row)


@pytest.mark.parametrize("values", [(0.0, -1.0), (float("nan"), 1.0)])
def test_samples_that_circuitsvis_would_hide_are_drawn_here(values):
    page = Page((samples((0.5, 2.0), values),))
    assert Parsed(page.html()).charts() == []
    assert page.html().count('class="word"') == 4
    assert "nothing to show" in Page((samples(),)).html()
    assert "text 0" in str(page._repr_mimebundle_()["text/plain"])
