"""Every kind of panel in a real browser: painted, true to its numbers, usable, and silent."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from browser import Seen, executable, launched, opened, require_browser, screenshot
from hand_built import random_map
from hostile import HOSTILE
from PIL import Image
from test_render import WORD_JOINER, heatmap, hostile_panels, samples, stripped

from tl_contextmix.plotting import Page
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as running:
        yield running


def square() -> Heatmap:
    values = torch.linspace(0.1, 1, 75).reshape(3, 5, 5).tril()
    values[:, 3, 1] = 0
    return heatmap(values, rows=WORDS, columns=WORDS, causal=True, title="square")


def rectangular() -> Heatmap:
    values = torch.linspace(-1, 1, 40).reshape(2, 5, 4)
    return heatmap(values, rows=WORDS, columns=WORDS[:4], title="rectangular")


BARS = Bars("bars", "caption", ("a", "b"), (("up", (1.0, 2.0)), ("down", (-1.0, -0.5))), "nats")
CURVES = Curves("curves", "", ("a", "b", "c"), (("s", (0.5, -1.0, 2.0)),), "nats")
TABLE = Table("table", "", ("token", "change"), (("<s>", 0.5), ("b", -1.0)), ("change",))
TEXT = ColoredText("text", "", WORDS, (0.0, 0.5, -1.0, 0.25, 1.0), "ratio")


def pixel(seen: Seen, selector: str, row: int, column: int, count: int) -> tuple[int, ...]:
    """The colour in the middle of a cell of a map that fills a canvas."""
    return tuple(
        seen.page.eval_on_selector(
            selector,
            """(canvas, [row, column, count]) => {
              const at = (place, size) => Math.floor(((place + 0.5) / count) * size);
              const x = at(column, canvas.width), y = at(row, canvas.height);
              return [...canvas.getContext('2d').getImageData(x, y, 1, 1).data.slice(0, 3)];
            }""",
            [row, column, count],
        )
    )


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
                # The picture of a large map names its rows when it is pointed at.
                found = whole in text or shorten(whole) in text or kind == "picture"
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
            assert zero == "rgb(255, 255, 255)", "zero is white"
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
    panels = (square(), rectangular(), BARS, CURVES, TABLE, TEXT)
    with opened(browser, Page(panels).save(tmp_path / "page.html")) as seen:
        seen.wait()
        lower = torch.ones(5, 5).tril().bool()
        expected = [
            square().values[:, lower].flatten().tolist(),
            rectangular().values.flatten().tolist(),
            [1.0, 2.0, -1.0, -0.5],
            [0.5, -1.0, 2.0],
            [0.5, -1.0],
            list(TEXT.values),
        ]
        for place, numbers in enumerate(expected):
            found = seen.values(f"article:nth-of-type({place + 1})")
            assert found == pytest.approx(numbers, rel=1e-3, abs=1e-9)
        # Bars and curves are as high as their numbers.
        heights = seen.page.eval_on_selector_all(
            "rect[data-value]", "nodes => nodes.map((n) => n.getBoundingClientRect().height)"
        )
        assert heights[1] / heights[0] == pytest.approx(2, rel=0.02)


def test_colours_of_a_canvas_are_those_of_the_numbers(browser, tmp_path):
    with opened(browser, Page((square(),)).save(tmp_path / "page.html")) as seen:
        seen.wait()
        thumb = ".cv canvas >> nth=2"  # of the last sheet, which holds the largest number
        assert pixel(seen, thumb, 4, 4, 5) == pytest.approx(BLUE, abs=3)
        assert pixel(seen, thumb, 3, 1, 5) == pytest.approx((255, 255, 255), abs=3)
        masked = pixel(seen, thumb, 0, 4, 5)
        assert max(masked) - min(masked) < 3, "what cannot be read is grey"
        assert masked[0] < 240
        shades = [pixel(seen, thumb, row, 0, 5)[0] for row in range(5)]
        assert shades == sorted(shades, reverse=True), "larger is deeper"


# ---- pointer and keyboard


def test_small_maps_are_chosen_by_pointer_and_by_keyboard(browser, tmp_path):
    with opened(browser, Page((square(),)).save(tmp_path / "page.html")) as seen:
        seen.wait()
        zoomed = seen.page.locator(".cv h3", has_text="Zoomed")
        assert "layer 0" in zoomed.text_content()
        seen.page.locator(".cv [role=button]").nth(1).hover()
        zoomed.filter(has_text="layer 1").wait_for(timeout=5000)
        seen.page.mouse.move(0, 0)
        button = seen.page.locator(".cv [role=button]").nth(2)
        assert button.get_attribute("aria-label") == "Show layer 2"
        button.focus()
        seen.page.keyboard.press("Enter")
        zoomed.filter(has_text="layer 2").wait_for(timeout=5000)
        assert seen.errors == []


def test_pointing_at_a_cell_tells_its_value(browser, tmp_path):
    with opened(browser, Page((square(),)).save(tmp_path / "page.html")) as seen:
        seen.wait()
        canvas = seen.page.locator(".cv canvas").last
        canvas.scroll_into_view_if_needed()
        before = canvas.evaluate("node => node.toDataURL()")
        box = canvas.bounding_box()
        seen.page.mouse.move(box["x"] + 0.55 * box["width"], box["y"] + 0.45 * box["height"])
        seen.page.wait_for_function(
            "old => [...document.querySelectorAll('.cv canvas')].at(-1).toDataURL() !== old",
            arg=before,
            timeout=5000,
        )


def test_sheets_are_chosen_from_a_list(browser, tmp_path):
    with opened(browser, Page((rectangular(),)).save(tmp_path / "page.html")) as seen:
        shown = "() => [...document.querySelectorAll('.sheet')].map((n) => !n.hidden)"
        assert seen.page.evaluate(shown) == [True, False]
        seen.page.locator("select").focus()
        seen.page.keyboard.press("ArrowDown")
        assert seen.page.evaluate(shown) == [False, True]
        assert seen.page.locator(".sheet:visible h4").text_content() == "layer 1"
        told = seen.page.locator(".sheet:visible td[data-value]").all_text_contents()
        numbers = [float(text.replace("−", "-")) for text in told]
        assert numbers == pytest.approx(rectangular().values[1].flatten().tolist(), abs=0.006)


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
        assert table.is_visible()
        seen.page.keyboard.press("Tab")
        focused = "document.activeElement.closest('details') !== null"
        assert seen.page.evaluate(focused), "the table can be scrolled by keyboard"


def test_pictures_of_large_maps_name_the_cell_and_its_value(browser, tmp_path):
    values = torch.linspace(-1, 1, 50 * 60).reshape(1, 50, 60)
    values[0, 10, 20] = math.nan
    with opened(browser, Page((heatmap(values),)).save(tmp_path / "page.html")) as seen:
        image = seen.page.locator("figure.grid img")
        image.scroll_into_view_if_needed()
        box = image.bounding_box()
        for row, column in ((40, 30), (10, 20), (3, 59)):
            seen.page.mouse.move(
                box["x"] + (column + 0.5) / 60 * box["width"],
                box["y"] + (row + 0.5) / 50 * box["height"],
            )
            told = seen.page.locator("figcaption").text_content()
            assert told.startswith(f"row t{row} ({row}), column t{column} ({column}): ")
            value = float(values[0, row, column])
            if math.isnan(value):
                assert told.endswith("no number")
            else:
                about = float(told.split("about ")[1])
                assert about == pytest.approx(value, rel=0.06, abs=0.001)


def test_pictures_name_the_stretches_of_input_that_a_pixel_stands_for(
    browser, tmp_path, monkeypatch
):
    monkeypatch.setattr("tl_contextmix.plotting.survey.PIXELS", 13 * 15)
    values = torch.rand(1, 50, 60) / 1000
    values[0, 49, 57], values[0, 1, 2] = -1.0, 0.0048
    positions = {"row_positions": tuple(range(7, 57)), "column_positions": tuple(range(60))}
    with opened(browser, Page((heatmap(values, **positions),)).save(tmp_path / "p.html")) as seen:
        image = seen.page.locator("figure.grid img")
        image.scroll_into_view_if_needed()
        box = image.bounding_box()
        for place, told in (
            ((12, 14), "row t48 (55) to t49 (56), column t56 (56) to t59 (59): farthest from 0 "),
            ((0, 0), "row t0 (7) to t3 (10), column t0 (0) to t3 (3): farthest from 0 "),
        ):
            x, y = (place[1] + 0.5) / 15 * box["width"], (place[0] + 0.5) / 13 * box["height"]
            seen.page.mouse.move(box["x"] + x, box["y"] + y)
            shown, about = seen.page.locator("figcaption").text_content().split("about ")
            assert shown == told
            assert float(about) == pytest.approx(-1.0 if place[0] else 0.0048, rel=0.1)


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


def test_of_too_many_cells_the_means_are_drawn_quickly(browser, tmp_path):
    result = random_map(1, 12, 12, 32, causal=True)
    with opened(browser, result.show().save(tmp_path / "page.html")) as seen:
        seen.wait()
        assert seen.page.locator(".cv canvas").count() == 12 + 1
        assert "the mean of the sheets of each group, layer 0 to layer 11" in (
            seen.page.locator("article").text_content()
        )
        assert seen.page.locator("figure.grid").count() == 144
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
            frame.wait_for_function("document.querySelectorAll('.cv canvas').length === 3")
            assert frame.locator("h1").text_content() == "ContextMap"
        assert not seen.page.locator(".tl-contextmix-still").first.is_visible()
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 1280
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


def test_a_chart_that_is_never_drawn_is_seen(browser, tmp_path):
    text = Page((square(),)).html().replace("var CircuitsVis=", "var Gone=")
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
    assert data is not None
    assert base64.b64decode(data[1]).decode() == shown["image/svg+xml"]
