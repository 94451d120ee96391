"""Every kind of panel in a real browser: painted, true to its numbers, usable, and silent."""

from __future__ import annotations

import base64
import io
import math
import re
from html import escape
from typing import Any

import pytest
import torch
from browser import Seen, executable, opened, require_browser, screenshot
from hand_built import random_map
from hostile import HOSTILE
from maps_on_pages import LISTEN, numbers, point, readable
from PIL import Image
from test_render import WORD_JOINER, heatmap, hostile_panels, samples, stripped

from tl_contextmix.plotting import Opening, Page, Section, circuitsvis_source, notebooks
from tl_contextmix.plotting.display_text import shorten, visible
from tl_contextmix.plotting.panels import (
    Bars,
    ColoredText,
    Curves,
    Dot,
    Graph,
    Heatmap,
    Place,
    Table,
)

pytestmark = pytest.mark.newest
WORDS = ("<s>", " the", " keys", " are", "</s>")
BLUE = (0x21, 0x66, 0xAC)


def square() -> Heatmap:
    values = torch.linspace(0.1, 1, 75).reshape(3, 5, 5).tril()
    values[:, 3, 1] = 0
    return heatmap(values, rows=WORDS, columns=WORDS, causal=True, title="square")


def rectangular() -> Heatmap:
    values = torch.linspace(-1, 1, 40).reshape(2, 5, 4)
    return heatmap(values, rows=WORDS, columns=WORDS[:4], title="rectangular")


def window(layers: tuple[int, ...] = (0, 1, 3)) -> Heatmap:
    """The last tokens of a longer text."""
    values = torch.logspace(-6, 0, len(layers) * 25).reshape(len(layers), 5, 5).tril()
    return heatmap(
        values,
        title="window",
        rows=WORDS,
        columns=WORDS,
        causal=True,
        sheets=tuple(f"layer {layer}" for layer in layers),
        layers=layers,
        tokens=("rows", "columns"),
        row_positions=(104, 105, 106, 108, 110),
        column_positions=(104, 105, 106, 108, 110),
    )


MAPS = ("circuitsvis", "numbers", "picture")
BARS = Bars("bars", "caption", ("a", "b"), (("up", (1.0, 2.0)), ("down", (-1.0, -0.5))), "nats")
CURVES = Curves("curves", "", ("a", "b", "c"), (("s", (0.5, -1.0, 2.0)),), "nats")
TABLE = Table("table", "", ("token", "change"), (("<s>", 0.5), ("b", -1.0)), ("change",))
TEXT = ColoredText("text", "", WORDS, (0.0, 0.5, -1.0, 0.25, 1.0), "ratio")


# ---- what no page may do


@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (400, True)], ids=["wide and light", "narrow and dark"]
)
def test_every_panel_with_hostile_text(browser, width, dark, tmp_path):
    panels = hostile_panels()
    path = Page(tuple(panels.values()), title=HOSTILE[3]).save(tmp_path / "page.html")
    with opened(browser, path, width=width, dark=dark) as seen:
        seen.wait()
        assert seen.problems() == []
        articles = seen.page.locator(".panels > article")
        assert articles.count() == len(panels)
        for index, kind in enumerate(panels):
            text = articles.nth(index).evaluate("node => node.textContent").replace(WORD_JOINER, "")
            for token in HOSTILE:
                whole = visible(token)
                # Maps have their names on canvases; tests/test_render.py reads their data.
                found = whole in text or shorten(whole) in text or kind in MAPS
                assert found, (kind, token)
        for tag in ("s", "textarea", "img[onerror]"):
            assert seen.page.locator(tag).count() == 0
        # Nothing disappears: each token takes up room.
        boxes = seen.page.eval_on_selector_all(
            "article.text .word > span",
            "nodes => nodes.map((n) => n.getBoundingClientRect().width)",
        )
        assert len(boxes) >= len(HOSTILE)
        assert min(boxes) > 8


def test_pages_are_quiet_at_either_width_in_either_scheme(browser, tmp_path):
    path = Page((square(), rectangular(), BARS, CURVES, TABLE, TEXT)).save(tmp_path / "page.html")
    for width, dark in ((1280, True), (400, False)):
        with opened(browser, path, width=width, dark=dark) as seen:
            seen.wait()
            assert seen.problems() == []
            ground = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", ground))) < 200) is dark
            zero = seen.page.eval_on_selector(
                "article.text .word .zero", "node => getComputedStyle(node).backgroundColor"
            )
            assert zero == ("rgb(22, 27, 33)" if dark else "rgb(255, 255, 255)")
            screenshot(seen, f"panels-{'dark' if dark else 'light'}-{width}", tmp_path)


# ---- a graph


def graph() -> Graph:
    """Two tokens, a head that reads both, a block against it, and the answer."""
    dots = (
        Dot("embed", 0, 0, 1.5),
        Dot("embed", 1, 0, -0.5),
        Dot("L0H1", 1, 1, 1.25, (("promotes", "' are', '<b>'"),)),
        Dot("L0 mlp", 1, 2, -0.25),
        Dot("answer", 1, 3, 1.0),
    )
    edges = torch.zeros(5, 5)
    edges[2, 0], edges[2, 1], edges[3, 1] = 1.5, -0.25, -0.25
    edges[4, 2], edges[4, 3] = 1.25, -0.25
    columns, rows = (Place("<s>", 0), Place(" keys", 1)), ("embed", "L0 attn", "L0 mlp", "answer")
    return Graph("graph", "caption", columns, rows, dots, edges, "nats")


def test_a_graph_is_explored_by_pointer_and_by_keyboard(browser, tmp_path):
    path = Page((graph(),)).save(tmp_path / "page.html")
    for width, dark in ((1280, False), (400, True)):
        with opened(browser, path, width=width, dark=dark) as seen:
            assert seen.problems() == []
            page = seen.page
            dots, lines = page.locator("svg .node"), page.locator("svg .edges path")
            assert seen.values("svg .node:first-of-type, article svg") == [
                1.5,
                -0.5,
                1.25,
                -0.25,
                1,
            ]
            assert lines.count() == 5
            assert page.locator("svg rect").count() == 2, "squares are below zero"
            dots.nth(2).hover()
            assert {line.get_attribute("data-edge") for line in lines.all()} == {
                "0 2",
                "1 2",
                "2 4",
            }
            dots.nth(2).click()
            told = page.locator(".detail").inner_text()
            assert "L0H1" in told
            assert "' are', '<b>'" in told
            assert told.count("+1.25") == 4, "effect, sum in, edge and sum out"
            # It stays when the pointer leaves; Escape lets go.
            page.mouse.move(2, 2)
            assert lines.count() == 3
            assert "faded" in dots.nth(3).get_attribute("class")
            page.keyboard.press("Escape")
            assert page.locator(".detail").inner_text() == ""
            # One stop for the tab key, arrows from there: along the largest edge, to the next node.
            dots.nth(0).focus()
            page.keyboard.press("ArrowUp")
            focused = "document.activeElement.getAttribute('aria-label')"
            assert page.evaluate(focused).startswith("L0H1")
            page.keyboard.press("ArrowRight")
            assert page.evaluate(focused).startswith("L0 mlp")
            page.keyboard.press("ArrowDown")
            assert page.evaluate(focused).startswith("embed, ·keys")
            page.keyboard.press("Enter")
            assert "·keys (1)" in page.locator(".detail").inner_text()
            assert page.locator("svg [tabindex='0']").count() == 1
            page.keyboard.press("Escape")
            page.locator("input[type=range]").fill("2")
            page.evaluate("document.activeElement.blur()")
            assert page.locator("svg .node:not(.gone)").count() == 2
            assert "2 of 5" in page.locator(".chooser").inner_text()
            screenshot(seen, f"graph-{width}", tmp_path)


def test_a_graph_is_there_without_scripts(browser, tmp_path):
    path = Page((graph(),)).save(tmp_path / "page.html")
    with opened(browser, path, java_script_enabled=False) as seen:
        assert seen.page.locator("svg .node").count() == 5
        assert seen.page.locator("svg .edges path").count() == 5
        assert seen.page.locator("details td").first.text_content() is not None


# ---- numbers and colours


def test_numbers_on_the_page_are_those_of_the_arrays(browser, tmp_path):
    panels = (square(), rectangular(), window(), BARS, CURVES, TABLE, TEXT)
    with opened(browser, Page(panels).save(tmp_path / "page.html")) as seen:
        seen.wait()
        for place, panel in enumerate(panels[:3]):
            holder = seen.page.locator(".map").nth(place)
            for found, expected in zip(
                numbers(holder, len(panel.sheets)), readable(panel), strict=True
            ):
                assert found == pytest.approx(expected, rel=1e-4)
        expected = [[1.0, 2.0, -1.0, -0.5], [0.5, -1.0, 2.0], [0.5, -1.0], list(TEXT.values)]
        for place, values in enumerate(expected, start=4):
            found = seen.values(f"article:nth-of-type({place})")
            assert found == pytest.approx(values, rel=1e-3, abs=1e-9)
        # Bars and curves are as high as their numbers.
        heights = seen.page.eval_on_selector_all(
            "rect[data-value]", "nodes => nodes.map((n) => n.getBoundingClientRect().height)"
        )
        assert heights[1] / heights[0] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("panel", [window(), rectangular()], ids=["window", "rectangle"])
def test_what_is_pointed_at_is_told_as_the_array_has_it(browser, panel, tmp_path):
    with opened(browser, Page((panel,)).save(tmp_path / "page.html")) as seen:
        seen.wait()
        holder = seen.page.locator(".map")
        places = {
            "rows": panel.places("rows"),
            "columns": panel.places("columns"),
        }
        for sheet, row, column in ((0, 4, 1), (1, 2, 2), (1, 4, 3)):
            holder.locator(".thumbs button").nth(sheet).click()
            names = []
            for axis, at in (("rows", row), ("columns", column)):
                token, position = places[axis][at]
                names.append(visible(token) + (f" ({position})" if panel.tokens else ""))
            told = point(seen.page, holder, row, column)
            assert told.startswith(f"row {names[0]}, column {names[1]}: ")
            value = float(panel.values[sheet, row, column])
            exact = float(holder.locator(".telling").get_attribute("data-value"))
            assert exact == pytest.approx(value, rel=1e-4)
            shown = told.split(": ")[1].split(" norm")[0].replace("−", "-")
            assert float(shown) == pytest.approx(value, rel=5e-3)
            share = value / float(panel.values[sheet, row].abs().sum())
            assert float(told.split("; ")[1].split(" %")[0]) == pytest.approx(100 * share, rel=1e-2)
            # The pointer says the same.
            box = holder.locator("canvas.zoom").bounding_box()
            at = holder.locator("canvas.zoom").evaluate("node => [node.clientWidth]")
            assert box["width"] >= at[0]
        told = point(seen.page, holder, 0, 4 if panel.causal else 3)
        assert told.endswith("later token, cannot be read") is panel.causal
        seen.page.mouse.move(2, 2)
        seen.page.evaluate("document.activeElement.blur()")
        assert "Point at a cell" in holder.locator(".telling").text_content()
        assert seen.problems() == []


def test_the_pointer_reads_the_cell_below_it(browser, tmp_path):
    panel = window()
    with opened(browser, Page((panel,)).save(tmp_path / "page.html")) as seen:
        seen.wait()
        canvas = seen.page.locator("canvas.zoom")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        # Cells end 8 pixels before the canvas does, and are 58 by 34.
        left = box["x"] + box["width"] - 8 - 5 * 58
        for row, column in ((4, 0), (3, 3), (2, 1)):
            seen.page.mouse.move(left + (column + 0.5) * 58, box["y"] + (row + 0.5) * 34)
            value = float(seen.page.locator(".telling").get_attribute("data-value"))
            assert value == pytest.approx(float(panel.values[0, row, column]), rel=1e-4)
            told = seen.page.locator(".telling").text_content()
            assert f"({panel.row_positions[row]}), column" in told


def test_colours_are_those_of_the_scale(browser, tmp_path):
    with opened(browser, Page((window((0,)),)).save(tmp_path / "page.html")) as seen:
        seen.wait()

        def colours() -> list[tuple[int, ...]]:
            found = seen.page.evaluate(
                """() => {
                  const canvas = document.querySelector('canvas.zoom');
                  const left = canvas.width - 8 - 5 * 58, found = [];
                  for (let row = 0; row < 5; row++) for (let column = 0; column <= row; column++)
                    found.push([...canvas.getContext('2d').getImageData(
                      left + column * 58 + 4, row * 34 + 4, 1, 1).data.slice(0, 3)]);
                  return found;
                }"""
            )
            return [tuple(one) for one in found]

        values = window((0,)).values[0]
        cells = values[torch.ones(5, 5).tril().bool()]
        for scale, depth in (
            ("rank", lambda v: float((cells <= v).double().mean()) ** 2),
            ("log", lambda v: max(0.0, math.log(v / cells[0]) / math.log(1 / cells[0]))),
            ("value", lambda v: v / float(cells.max())),
            ("share", None),
        ):
            seen.page.get_by_label("Colour by").select_option(scale)
            if depth is None:
                shares = (values / values.sum(1, keepdim=True))[torch.ones(5, 5).tril().bool()]
                rest = values / values.sum(1, keepdim=True)
                top = float(rest[1:].max())
                expected = [min(1.0, float(one) / top) for one in shares]
            else:
                expected = [min(1.0, depth(float(one))) for one in cells]
            shades = [tuple(round(255 + (end - 255) * share) for end in BLUE) for share in expected]
            for found, wanted in zip(colours(), shades, strict=True):
                assert found == pytest.approx(wanted, abs=3), scale
        assert "beyond the scale, up to 1" in seen.page.locator(".legend").text_content()


def test_the_first_token_can_be_left_out(browser, tmp_path):
    values = torch.full((1, 4, 4), 0.01).tril()
    values[0, :, 0] = 1
    panel = heatmap(
        values, causal=True, tokens=("rows", "columns"), rows=WORDS[:4], columns=WORDS[:4]
    )
    with opened(browser, Page((panel,)).save(tmp_path / "page.html")) as seen:
        seen.wait()
        seen.page.get_by_label("Colour by").select_option("value")
        legend = seen.page.locator(".legend")
        assert "4 cells beyond the scale, up to 1" in legend.text_content()
        seen.page.get_by_label("hide the first token").check()
        assert "without the first token" in legend.text_content()
        assert "beyond" not in legend.text_content()
        assert "1, left out" in point(seen.page, seen.page.locator(".map"), 2, 0)
        assert "0.01 norm; 33.3 % of its row" in point(seen.page, seen.page.locator(".map"), 3, 2)


# ---- one choice for all maps


def linked(tmp_path: Any) -> Any:
    late = window((1, 3))
    page = Page(
        (),
        sections=(
            Section("One", "", (window(), late, rectangular()), opens=Opening(3, 108)),
            Section("Two", "", (window(),)),
        ),
    )
    return page.save(tmp_path / "page.html")


def shown(seen: Seen) -> list[str]:
    return seen.page.eval_on_selector_all(".map", "nodes => nodes.map((n) => n.dataset.ready)")


def test_one_choice_of_layer_drives_all_maps_of_a_section(browser, tmp_path):
    with opened(browser, linked(tmp_path)) as seen:
        seen.wait()
        assert shown(seen) == ["layer 3", "layer 3", "layer 0", "layer 0"], "where the finding is"
        assert seen.page.locator(".words button[aria-pressed=true]").all_text_contents() == [
            "·are",
            "·are",
        ]
        seen.page.locator(".map").nth(0).locator(".thumbs button").nth(1).click()
        assert shown(seen) == ["layer 1", "layer 1", "layer 0", "layer 0"]
        seen.page.locator(".bar").nth(0).locator("select").first.select_option("layer 0")
        # The second map has no layer 0, and stays.
        assert shown(seen) == ["layer 0", "layer 1", "layer 0", "layer 0"]
        assert seen.page.url.endswith("#layer=0&target=108")
        seen.page.locator(".bar").nth(1).locator("select").first.select_option("layer 3")
        assert shown(seen) == ["layer 0", "layer 1", "layer 0", "layer 3"]
        # A link to a section is none to a layer.
        seen.page.locator("nav a").nth(1).click()
        assert shown(seen) == ["layer 0", "layer 1", "layer 0", "layer 3"]
        assert seen.problems() == []


def test_a_token_is_marked_in_every_map(browser, tmp_path):
    with opened(browser, linked(tmp_path)) as seen:
        seen.wait()
        marked = """() => [...document.querySelectorAll('canvas.zoom')].map((canvas) => {
          const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
          let count = 0;
          for (let at = 0; at < data.length; at += 4)
            count += data[at] === 0xb3 && data[at + 1] === 0x5c && data[at + 2] === 0;
          return count > 300;
        })"""
        assert seen.page.evaluate(marked) == [True, True, False, True]
        seen.page.locator(".words button", has_text="·are").first.click()
        assert seen.page.evaluate(marked) == [False] * 4
        # A cell marks the token of its row; Escape lets go.
        canvas = seen.page.locator("canvas.zoom").nth(3)
        point(seen.page, seen.page.locator(".map").nth(3), 1, 0)
        seen.page.keyboard.press("Enter")
        assert seen.page.evaluate(marked) == [True, True, False, True]
        assert "target=105" in seen.page.url
        canvas.press("Escape")
        assert seen.page.evaluate(marked) == [False] * 4


def test_a_link_opens_a_layer_and_a_token(browser, tmp_path):
    path = linked(tmp_path)
    with opened(browser, path) as seen:
        seen.page.goto(f"{path.as_uri()}#layer=1&target=106")
        seen.page.reload()
        seen.wait()
        assert shown(seen) == ["layer 1", "layer 1", "layer 0", "layer 1"]
        pressed = seen.page.locator(".words button[aria-pressed=true]").first
        assert pressed.get_attribute("data-position") == "106"
        assert seen.requests == []


# ---- CircuitsVis


def test_circuitsvis_colours_by_the_scale_and_reads_out_the_numbers(browser, tmp_path):
    panel = square()
    with opened(browser, Page((panel, window())).save(tmp_path / "page.html")) as seen:
        seen.wait()
        seen.page.evaluate(LISTEN)
        seen.page.get_by_label("Drawn by").select_option("circuitsvis")
        seen.page.wait_for_function("() => document.querySelectorAll('.cv canvas').length === 4")
        # It counts positions from 0: a window is not for it.
        assert seen.page.locator(".map canvas.zoom:visible").count() == 1
        thumb = seen.page.locator(".cv canvas").nth(2)
        assert thumb.evaluate(
            """canvas => {
              const at = (place) => Math.floor((place + 0.5) / 5 * canvas.width);
              return [...canvas.getContext('2d').getImageData(at(4), at(4), 1, 1).data.slice(0, 3)];
            }"""
        ) == pytest.approx(BLUE, abs=3), "the largest has the deepest colour"
        zoom = seen.page.locator(".cv canvas").last
        zoom.scroll_into_view_if_needed()
        box = zoom.bounding_box()
        for x, y in ((0.3, 0.7), (0.5, 0.6), (0.28, 0.5)):
            seen.page.evaluate("window.written = []")
            seen.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
            seen.page.wait_for_function("() => written.some((text) => text.startsWith('Val'))")
            written = seen.page.evaluate("written")
            at = next(text for text in written if re.fullmatch(r"\(\d, \d\)", text))
            row, column = map(int, at[1:-1].split(", "))
            told = next(text for text in written if text.startswith("Val: "))[5:]
            assert float(told) == pytest.approx(float(panel.values[0, row, column]), rel=1e-3)
        # A layer chosen there is chosen everywhere.
        seen.page.locator(".cv [role=button]").nth(2).click()
        seen.page.locator(".cv h3", has_text="layer 2 Zoomed").wait_for(timeout=5000)
        assert seen.problems() == []


def test_circuitsvis_gets_text_that_is_no_markup(browser, tmp_path):
    panel = hostile_panels()["circuitsvis"]
    assert isinstance(panel, Heatmap)
    with opened(browser, Page((panel,)).save(tmp_path / "page.html")) as seen:
        seen.wait()
        seen.page.evaluate(
            """() => tlContextmix.circuitsvis().then((library) => {
              const render = library.render;
              const asked = [];
              window.asked = asked;
              window.CircuitsVis = {...library, AttentionHeads: library.AttentionHeads,
                render: (...given) => { asked.push(given); return render(...given); }};
            })"""
        )
        seen.page.get_by_label("Drawn by").select_option("circuitsvis")
        seen.page.wait_for_function("() => window.asked.length > 0")
        tokens = seen.page.evaluate("asked[0][2].tokens")
        for text, token in zip(tokens, panel.rows, strict=True):
            assert not re.search(r"[<&](?!\u2060)", text)
            plain = re.sub("[\u2060\u2068\u2069]", "", text)
            assert plain == shorten(visible(token))
        seen.page.wait_for_timeout(300)
        assert seen.problems() == []


# ---- pointer and keyboard


def test_small_maps_are_chosen_by_pointer_and_by_keyboard(browser, tmp_path):
    with opened(browser, Page((square(),)).save(tmp_path / "page.html")) as seen:
        seen.wait()
        seen.page.locator(".thumbs button").nth(1).click()
        assert shown(seen) == ["layer 1"]
        button = seen.page.locator(".thumbs button").nth(2)
        assert button.get_attribute("aria-label") == "Show layer 2"
        button.focus()
        seen.page.keyboard.press("Enter")
        assert shown(seen) == ["layer 2"]
        assert button.get_attribute("aria-pressed") == "true"
        assert seen.errors == []


@pytest.mark.parametrize("panel", [square(), BARS, CURVES], ids=["map", "bars", "curves"])
def test_numbers_are_within_reach_of_a_keyboard(browser, panel, tmp_path):
    with opened(browser, Page((panel,)).save(tmp_path / "page.html")) as seen:
        seen.wait()
        table = seen.page.locator("details table").first
        assert not table.is_visible()
        for _ in range(20):
            seen.page.keyboard.press("Tab")
            if seen.page.evaluate("document.activeElement.tagName") == "SUMMARY":
                break
        seen.page.keyboard.press("Enter")
        table.wait_for(state="visible")  # it is filled in once it is asked for
        seen.page.keyboard.press("Tab")
        focused = "document.activeElement.closest('details') !== null"
        assert seen.page.evaluate(focused), "the table can be scrolled by keyboard"


def test_large_maps_name_the_stretches_that_a_cell_stands_for(browser, tmp_path, monkeypatch):
    monkeypatch.setattr("tl_contextmix.plotting.survey.PIXELS", 13 * 15)
    values = torch.rand(1, 50, 60) / 1000
    values[0, 49, 57], values[0, 1, 2] = -1.0, 0.0048
    positions = {"row_positions": tuple(range(7, 57)), "column_positions": tuple(range(60))}
    panel = heatmap(values, tokens=("rows", "columns"), **positions)
    with opened(browser, Page((panel,)).save(tmp_path / "p.html")) as seen:
        seen.wait()
        holder = seen.page.locator(".map")
        told = point(seen.page, holder, 12, 14)
        assert told == (
            "row t48 (55) to t49 (56), column t56 (56) to t59 (59): farthest from 0 −1 norm"
        )
        told = point(seen.page, holder, 0, 0)
        assert told.startswith("row t0 (7) to t3 (10), column t0 (0) to t3 (3): farthest from 0 ")
        assert float(told.split("from 0 ")[1].split()[0]) == pytest.approx(0.0048, rel=1e-3)


def test_samples_show_their_texts_and_values(browser, tmp_path):
    panel = samples((0.5, 2.0, 0.25), (-1.0, 3.0))
    with opened(browser, Page((panel,)).save(tmp_path / "page.html")) as seen:
        seen.wait()
        rows = seen.page.locator(".cv .colored-tokens")
        texts = rows.all_text_contents()
        shown = ["".join(shorten(visible(one)) for one in row) for row in panel.tokens]
        cleaned = [text.replace(WORD_JOINER, "").replace("\u00a0", " ") for text in texts]
        assert cleaned == shown
        for row, values in enumerate(panel.values):
            for place, value in enumerate(values):
                rows.nth(row).locator("xpath=./*").nth(place).hover()
                told = f"() => document.querySelectorAll('.cv .colored-tokens')[{row}].textContent"
                seen.page.wait_for_function(f"({told})().includes('{value:g}')", timeout=5000)
                seen.page.mouse.move(0, 0)
        assert seen.problems() == []


def test_of_many_heads_each_is_drawn_quickly(browser, tmp_path):
    result = random_map(1, 12, 12, 32, causal=True)
    with opened(browser, result.show().save(tmp_path / "page.html")) as seen:
        seen.wait(timeout=5000)
        assert seen.page.locator(".thumbs button").count() == 144
        seen.page.locator(".thumbs button").nth(77).click()
        assert shown(seen) == ["L6H5"]
        assert seen.page.url.endswith("#layer=6&head=5")
        assert seen.problems() == []


# ---- notebooks


def test_a_result_shown_twice_in_a_notebook(browser, tmp_path):
    shown = random_map(1, 2, 1, 4)._repr_html_()
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!DOCTYPE html><meta charset=utf-8>{shown}<hr>{shown}", encoding="utf-8")
    with opened(browser, notebook) as seen:
        frames = [frame for frame in seen.page.frames if frame != seen.page.main_frame]
        assert len(frames) == 2
        for frame in frames:
            frame.wait_for_function(
                "() => document.querySelectorAll('.map[data-ready]').length === 1"
            )
            assert frame.locator("h1").text_content() == "Context map"
            # Nobody has brought CircuitsVis: it is not offered.
            assert frame.locator("select").count() == 2
        assert not seen.page.locator(".tl-contextmix-still").first.is_visible()
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 1280
        assert (seen.errors, seen.requests, seen.dialogs) == ([], [], [])


@pytest.mark.parametrize("late", [False, True])
def test_a_notebook_brings_circuitsvis_once_for_all_frames(browser, late, tmp_path):
    map, texts = random_map(1, 2, 1, 4), Page((samples((0.5, 2.0), (1.0, 3.0)),))
    library = notebooks._LIBRARY % circuitsvis_source.packed()
    cells = [map._repr_html_(), texts._repr_html_()]
    cells.insert(2 if late else 0, library)
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!DOCTYPE html><meta charset=utf-8>{''.join(cells)}", encoding="utf-8")
    with opened(browser, notebook) as seen:
        first, second = (frame for frame in seen.page.frames if frame != seen.page.main_frame)
        second.wait_for_function("() => document.querySelectorAll('.colored-tokens').length === 2")
        first.get_by_label("Drawn by").select_option("circuitsvis")
        first.wait_for_function("() => document.querySelectorAll('.cv canvas').length === 3")
        # Frames are as high as what is in them.
        for frame in (first, second):
            frame.wait_for_function(
                "() => document.documentElement.scrollHeight <= innerHeight + 1"
            )
        assert (seen.errors, seen.requests, seen.dialogs) == ([], [], [])


def test_a_frame_lets_no_other_program_in(browser, tmp_path):
    evil = """<script>addEventListener("message", ({data, source}) => {
      if (data.tl_contextmix === "is there") source.postMessage({tl_contextmix: "here"}, "*");
      if (data.tl_contextmix === "program please")
        source.postMessage({tl_contextmix: "program", program: "alert(1)"}, "*");
    })</script>"""
    notebook = tmp_path / "notebook.html"
    shown = Page((samples((0.5, 2.0), (1.0, 3.0)),))._repr_html_()
    notebook.write_text(f"<!DOCTYPE html><meta charset=utf-8>{evil}{shown}", encoding="utf-8")
    with opened(browser, notebook) as seen:
        seen.page.wait_for_timeout(500)
        assert seen.dialogs == []
        frame = seen.page.frames[1]
        assert frame.locator(".word").first.is_visible(), "the page's own drawing stays"


# What is documented of hosts that cannot be run here. Colab puts each output into a frame of
# another origin, so that cells cannot reach each other, and fits the frame to its content. VS Code
# puts all outputs into one webview, whose policy lets inline scripts run and nothing be fetched.
_COLAB = '<iframe sandbox="allow-scripts" style="width:100%;height:1500px" srcdoc="{}"></iframe>'
_VS_CODE = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    'child-src data: blob:">'
)


@pytest.mark.parametrize("host", ["colab", "vs code"])
def test_a_result_is_seen_in_the_frames_of_other_hosts(browser, host, tmp_path):
    map, texts = random_map(1, 2, 1, 4), Page((samples((0.5, 2.0), (1.0, 3.0)),))
    library = notebooks._LIBRARY % circuitsvis_source.packed()
    # The cell that brought CircuitsVis is reached by the others in one host, not in the other.
    cells = [library + map._repr_html_(), texts._repr_html_()]
    if host == "colab":
        head = f"<!DOCTYPE html><meta charset=utf-8>{_VS_CODE}"
        cells = [_COLAB.format(escape(head + cell, quote=True)) for cell in cells]
    page = tmp_path / "notebook.html"
    head = _VS_CODE if host == "vs code" else ""
    page.write_text(f"<!DOCTYPE html><meta charset=utf-8>{head}{''.join(cells)}", encoding="utf-8")
    with opened(browser, page) as seen:
        # Frames in frames in Colab: of each cell, ours is the one inside, once it is there.
        while len(seen.page.frames) < 1 + (4 if host == "colab" else 2):
            seen.page.wait_for_timeout(10)
        inner = [frame for frame in seen.page.frames if not frame.child_frames][:2]
        inner[0].wait_for_function("() => document.querySelector('.map[data-ready]')")
        words = ".word" if host == "colab" else ".colored-tokens"
        inner[1].wait_for_function(f"() => document.querySelector('{words}')?.textContent.trim()")
        for frame in inner:
            frame.wait_for_function(
                "() => document.documentElement.scrollHeight <= innerHeight + 1"
            )
            outer = frame.parent_frame
            assert not outer.locator(".tl-contextmix-still").first.is_visible()
        assert (seen.errors, seen.requests, seen.dialogs) == ([], [], [])


def test_where_scripts_are_stripped_a_picture_is_left(browser, tmp_path):
    shown = stripped(random_map(1, 2, 1, 4)._repr_html_())
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!DOCTYPE html><meta charset=utf-8>{shown}", encoding="utf-8")
    with opened(browser, notebook, java_script_enabled=False) as seen:
        picture = seen.page.locator(".tl-contextmix-still img")
        assert picture.is_visible()
        image = Image.open(io.BytesIO(picture.screenshot())).convert("RGB")
        colours = {colour for _, colour in image.getcolors(1 << 24) or []}
        assert len(colours) > 20
        assert BLUE in colours
        assert seen.requests == []


# ---- the checks themselves


BROKEN = {
    "request: ": '<img src="http://example.org/picture.png">',
    "error: ": "<script>throw new Error('broken')</script>",
    "overflow: ": "<div style='width:3000px'>wide</div>",
    "unpainted: ": "<canvas width=20 height=20></canvas>",
    "dialog: ": "<script>alert('hello')</script>",
    "pale: ": "<main><p style='color:#bbb'>pale</p></main>",
}


@pytest.mark.parametrize("problem", BROKEN)
def test_what_is_wrong_is_seen(browser, problem, tmp_path):
    path = tmp_path / "broken.html"
    path.write_text(f"<!DOCTYPE html><body>{BROKEN[problem]}", encoding="utf-8")
    with opened(browser, path) as seen:
        seen.page.wait_for_timeout(200)
        assert [text for text in seen.problems() if text.startswith(problem)]
    path.write_text("<!DOCTYPE html><body><main><p>nothing</p></main>", encoding="utf-8")
    with opened(browser, path) as seen:
        assert seen.problems() == []


def test_a_map_that_is_never_drawn_is_seen(browser, tmp_path):
    text = Page((square(),)).html().replace("function drawZoom(", "function drawNothing(")
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    with opened(browser, path) as seen:
        with pytest.raises(Exception, match="Timeout"):
            seen.wait(timeout=1500)
        assert seen.errors, "the policy lets no changed script run"


@pytest.mark.parametrize("policy", [True, False])
def test_the_policy_stops_what_would_run(browser, policy, tmp_path):
    """A page that forgot to escape: the policy is a second wall, and there is something to stop."""
    text = Page((TEXT,)).html().replace("ratio", "<img src=x onerror=alert(1)>")
    if not policy:
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    with opened(browser, path) as seen:
        seen.page.wait_for_timeout(300)
        assert bool(seen.dialogs) is not policy


@pytest.mark.parametrize("promised", ["0", "1"])
def test_without_a_browser_tests_skip_or_fail_as_promised(promised, monkeypatch):
    monkeypatch.setattr("browser.executable", lambda: None)
    monkeypatch.setenv("TL_CONTEXTMIX_EXPECT_BROWSER", promised)
    outcome = {"0": pytest.skip.Exception, "1": pytest.fail.Exception}[promised]
    with pytest.raises(outcome, match="no Chromium: install one"):
        require_browser()


def test_a_browser_can_be_named(monkeypatch):
    monkeypatch.setenv("TL_CONTEXTMIX_CHROMIUM", "/somewhere/chrome")
    assert executable() == "/somewhere/chrome"


def test_pictures_of_stills_are_pictures():
    shown = random_map(1, 2, 1, 4)._repr_mimebundle_()
    data = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', shown["text/html"])
    assert base64.b64decode(data[1]).decode() == shown["image/svg+xml"]
