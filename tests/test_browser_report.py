"""The whole report in a real browser; its pictures are those of README and docs.

``TL_CONTEXTMIX_SCREENSHOTS=docs/images python -m pytest tests/test_browser_report.py`` takes them.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from browser import opened, require_browser, screenshot
from maps_on_pages import numbers, readable

import tl_contextmix as cm
from tl_contextmix.plotting import Page
from tl_contextmix.plotting.panels import Bars, ColoredText, Graph, Heatmap, Panel, Samples, Table
from tl_contextmix.reporting import write_report

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def model() -> Any:
    require_browser()
    return cm.load_demo("causal-lm")


@pytest.fixture(scope="module")
def written(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path]:
    """What ``tl-contextmix report`` writes, and the file."""
    pages = []
    save = Page.save

    def kept(page: Page, path: Path) -> Path:
        pages.append(page)
        return save(page, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Page, "save", kept)
        path = write_report(path=tmp_path_factory.mktemp("report") / "report.html")
    return pages[0], path


@pytest.fixture(scope="module")
def report(written: tuple[Page, Path]) -> Page:
    return written[0]


@pytest.fixture(scope="module")
def saved(written: tuple[Page, Path]) -> Path:
    return written[1]


def numbers_of(panel: Panel) -> list[float]:
    """Every finite number that a panel has to show, in the order of the page; maps have a table."""
    if isinstance(panel, Bars):
        found = [value for _, series in panel.series for value in series]
    elif isinstance(panel, Table):
        cells = [cell for row in panel.rows for cell in row]
        found = [cell for cell in cells if isinstance(cell, (int, float)) and cell is not True]
    elif isinstance(panel, ColoredText):
        found = [*panel.values]
    elif isinstance(panel, Graph):
        found = [dot.value for dot in panel.nodes]
    else:
        assert isinstance(panel, Samples)
        found = [value for values in panel.values for value in values]
    return [float(value) for value in found if math.isfinite(value)]


@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (1280, True), (400, False), (400, True)]
)
def test_the_report_is_painted_quiet_and_fits(browser, report, saved, width, dark, tmp_path):
    with opened(browser, saved, width=width, dark=dark) as seen:
        seen.wait()
        assert seen.problems() == []
        assert seen.page.locator("section > h2").count() == len(report.sections) >= 7
        if width == 1280:
            name = f"report{'-dark' if dark else ''}"
            path = screenshot(seen, name, tmp_path, height=1330)
            assert 20_000 < path.stat().st_size < 300_000


def test_numbers_of_the_report_are_those_of_the_results(browser, report, saved):
    panels = [panel for section in report.sections for panel in section.panels]
    with opened(browser, saved) as seen:
        seen.wait()
        articles = seen.page.locator(".panels > article")
        assert articles.count() == len(panels)
        compared = 0
        for place, panel in enumerate(panels):
            article = articles.nth(place)
            if isinstance(panel, Heatmap):
                rows = numbers(article.locator(".map"), len(panel.sheets))
                found = [value for row in rows for value in row]
                expected = [value for row in readable(panel) for value in row]
            else:
                found = article.locator("[data-value]").evaluate_all(
                    "nodes => nodes.map((node) => +node.dataset.value)"
                )
                expected = numbers_of(panel)
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-9), panel.title
            compared += len(found)
        assert compared > 500


def test_every_map_and_list_of_the_report_answers(browser, report, saved):
    with opened(browser, saved) as seen:
        seen.wait()
        maps = seen.page.locator(".map").filter(has=seen.page.locator(".thumbs button"))
        assert maps.count() >= 4
        for place in range(maps.count()):
            button = maps.nth(place).locator(".thumbs button").last
            button.click()
            name = button.get_attribute("aria-label").removeprefix("Show ")
            assert maps.nth(place).get_attribute("data-ready") == name
        for summary in seen.page.locator("summary:visible").all():
            summary.click()
        for link in seen.page.locator("nav a").all():
            link.click()
            target = link.get_attribute("href")
            assert seen.page.locator(target).is_visible()
        seen.page.mouse.move(0, 0)
        assert seen.problems() == []


def test_the_report_prints_on_white(browser, saved):
    with opened(browser, saved, dark=True) as seen:
        seen.wait()
        seen.page.emulate_media(media="print")
        ground = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = seen.page.evaluate("getComputedStyle(document.body).color")
        assert (ground, ink) == ("rgb(255, 255, 255)", "rgb(27, 31, 36)")
        assert seen.page.locator("nav").is_visible(), "the summary"
        assert not seen.page.locator(".bar").first.is_visible()
        paper = seen.page.pdf(format="A4", print_background=True)
        assert len(re.findall(rb"/Type\s*/Page\b", paper)) <= 6


def test_the_report_opens_where_its_finding_points(browser, report, saved):
    mixing = next(one for one in report.sections if one.opens is not None)
    with opened(browser, saved) as seen:
        seen.wait()
        section = seen.page.locator("section", has_text=mixing.finding)
        ready = section.locator(".map").evaluate_all("nodes => nodes.map((n) => n.dataset.ready)")
        assert ready[:4] == ["layer 2", "layer 2", "layer 2", "0 to 2"]
        assert section.locator(".words [aria-pressed=true]").text_content() == "·cabinet"
        # The sentence stands above the maps.
        top = [section.locator(name).first.bounding_box()["y"] for name in (".words", ".map")]
        assert top[0] < top[1]


def test_a_map_for_the_readme(browser, model, tmp_path):
    maps = cm.attention_norms(model, "the keys to the cabinet are", at="block_out").normalize()
    with opened(browser, maps.show().save(tmp_path / "map.html"), width=760) as seen:
        seen.wait()
        seen.page.locator(".thumbs button").nth(2).click()
        assert seen.page.locator(".map").get_attribute("data-ready") == "layer 2"
        seen.page.mouse.move(0, 0)
        seen.wait()
        path = screenshot(seen, "map", tmp_path)
        assert 10_000 < path.stat().st_size < 300_000
        assert seen.problems() == []
