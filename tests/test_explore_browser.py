"""The page of ``tl-contextmix explore`` in a real browser; what it is served is in test_explore."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from browser import OVERFLOWING, PALE, Seen, screenshot
from hostile import HOSTILE
from test_explore import ask, served
from zoo_refused import REFUSED

from tl_contextmix.exploring import one_at_a_time, question_form
from tl_contextmix.exploring.limits import Limits
from tl_contextmix.exploring.one_at_a_time import Explorer
from tl_contextmix.exploring.typed_questions import TypedQuestion

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def address(causal: Any) -> Iterator[str]:
    with served(Explorer(causal, Limits(causal)), question_form.form(causal)) as found:
        yield found


@contextmanager
def window(
    browser: Any, address: str, *, width: int = 1280, dark: bool = False
) -> Iterator[tuple[Any, list[str]]]:
    """A window on an address, and everything that must not happen in it."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
    )
    page, wrong = context.new_page(), []
    own = address.partition("#")[0]

    def asked(request: Any) -> None:
        if not request.url.startswith((own, "data:", "blob:")):
            wrong.append(f"request: {request.url}")

    def answered(dialog: Any) -> None:
        wrong.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("request", asked)
    page.on("dialog", answered)
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("console", lambda told: wrong.append(told.text) if told.type == "error" else None)
    page.goto(address)
    try:
        yield page, wrong
    finally:
        context.close()


def explained(page: Any) -> Any:
    """The frame with the answer, once it is there and drawn."""
    page.locator("#status", has_text=re.compile("^Done after")).wait_for(timeout=60_000)
    frame = page.frames[1]
    frame.locator("footer").wait_for()
    for index in range(frame.locator(".map").count()):
        frame.locator(".map").nth(index).and_(frame.locator("[data-ready]")).wait_for()
    return frame


def problems(page: Any) -> list[str]:
    return [
        f"{name} {node}"
        for frame in page.frames
        for name, script in (("overflow", OVERFLOWING), ("pale", PALE))
        for node in frame.evaluate(script)
    ]


@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (400, True)], ids=["wide and light", "narrow and dark"]
)
def test_a_text_is_typed_and_explained(browser, address, width, dark, tmp_path):
    with window(browser, address, width=width, dark=dark) as (page, wrong):
        # By keyboard alone, the labels say where.
        page.get_by_label("Text").focus()
        page.keyboard.press("Control+A")
        page.keyboard.type("the keys to the old cabinet")
        page.keyboard.press("Tab")
        page.keyboard.type(" are")
        page.keyboard.press("Tab")
        page.keyboard.type(" is")
        assert page.evaluate("document.activeElement.id") == "foil"
        page.keyboard.press("Enter")
        frame = explained(page)
        assert page.get_by_role("status").text_content().startswith("Done after")
        found = frame.locator("header dd").first.text_content()
        assert found == "the keys to the old cabinet"
        assert "The page asks why “are” rather than “is”" in frame.locator("main").text_content()
        # Linked: a token clicked in the answer is in the address of the page.
        frame.locator(".words button", has_text="keys").first.click()
        page.wait_for_url(re.compile("place=layer"))
        assert "target=+are&foil=+is" in page.url
        likely = page.locator("#likely option").evaluate_all("all => all.map((one) => one.value)")
        assert " are" in likely
        assert problems(page) == []
        name = "explore-narrow-dark" if width == 400 else "explore"
        assert screenshot(Seen(page), name, tmp_path, height=900).stat().st_size > 20_000
        with page.expect_download() as download:
            page.get_by_text("Save the page").click()
        saved = Path(download.value.path()).read_text(encoding="utf-8")
        assert "the keys to the old cabinet" in saved
        assert wrong == []


def test_an_address_brings_its_question_back(browser, address):
    asked = "text=the%20keys%20to%20the%20cabinet&target=%20are&show=mixing,attention"
    place = quote("layer=1&target=2")
    with window(browser, f"{address}#{asked}&place={place}") as (page, wrong):
        frame = explained(page)
        assert page.get_by_label("Target", exact=True).input_value() == " are"
        headings = frame.locator("section > h2").all_text_contents()
        assert len(headings) == 2
        ready = frame.locator(".map").first.get_attribute("data-ready")
        assert ready == "layer 1"
        assert frame.locator(".words [aria-pressed=true]").first.text_content() == "·keys"
        assert page.locator("#methods").get_attribute("open") is not None
        # Another address in the same window asks what it says, and no more.
        page.goto(f"{address}#text=the%20key&show=mixing")
        page.wait_for_function("document.getElementById('target').value === ''", timeout=5_000)
        page.locator("#status", has_text=re.compile("^Done after")).wait_for()
        assert page.evaluate("location.hash") == "#text=the+key&show=mixing"
        assert wrong == []


def test_hostile_texts_are_texts(browser, address):
    rough = [*HOSTILE, "\0", "\u202e\u2066<b>", "'\"><svg onload=alert(1)>", "\ud800"]
    with window(browser, address) as (page, wrong):
        for name in ("prediction", "components"):
            page.locator(f"[value={name}]").uncheck()
        done = 0
        for some in _fours(rough):
            page.evaluate(
                "([id, text]) => document.getElementById(id).value = text",
                ["text", "the keys " + " ".join(some)],
            )
            page.evaluate("document.getElementById('status').textContent = ''")
            page.get_by_role("button", name="Explain").click()
            status = page.get_by_role("status")
            page.locator("#status", has_text=re.compile(" after |Not asked")).wait_for()
            told = status.text_content()
            done += told.startswith("Done")
            if not told.startswith("Done"):
                # Too many tokens, or none that can be read: said as text.
                assert page.locator("#explanation").text_content()
                assert "Traceback" not in page.locator("#explanation").text_content()
        assert done >= 3
        # What is refused is told with what was typed.
        rejected = "<img src=x onerror=alert(1)> \ud800"
        page.evaluate("text => document.getElementById('text').value = text", rejected)
        page.get_by_role("button", name="Explain").click()
        page.get_by_role("alert").filter(has_text="<img src=x onerror=alert(1)>").wait_for()
        assert page.locator("#explanation *").count() == 0
        assert problems(page) == []
        assert wrong == []


def _fours(some: list[str]) -> list[list[str]]:
    return [some[start : start + 4] for start in range(0, len(some), 4)]


def test_stop_and_limits_and_busy_are_said(browser, causal, monkeypatch):
    explorer = Explorer(causal, Limits(causal))
    real = one_at_a_time.answered

    def slow(asked: Any, question: TypedQuestion, begin: Any) -> Any:
        begin("maps")
        for _ in range(3000 if question.text == "slow" else 0):
            torch.zeros(1).add(1)
            time.sleep(0.01)
        return real(asked, question, begin)

    monkeypatch.setattr(one_at_a_time, "answered", slow)
    with (
        served(explorer, question_form.form(causal)) as address,
        window(browser, address) as (page, wrong),
        window(browser, f"{address}#show=prediction") as (other, others),
    ):
        page.get_by_label("Text").fill("slow")
        page.get_by_role("button", name="Explain").click()
        page.locator("#status", has_text="Step 1 of 5: maps.").wait_for()
        assert page.get_by_role("progressbar").is_visible()
        other.get_by_role("button", name="Explain").click()
        other.get_by_role("alert").wait_for()
        assert "answers another question" in other.get_by_role("alert").text_content()
        page.get_by_role("button", name="Stop").click()
        page.locator("#status", has_text="Stopped after").wait_for(timeout=10_000)
        assert page.get_by_role("button", name="Stop").is_disabled()
        explorer.limits.flops = 1e6
        other.get_by_role("button", name="Explain").click()
        other.locator("#status", has_text="Not answered").wait_for(timeout=60_000)
        assert "--max-flops" in other.get_by_role("alert").text_content()
        # A window that is closed wants no answer.
        explorer.limits.flops = 1e13
        page.get_by_role("button", name="Explain").click()
        page.locator("#status", has_text="Step 1 of 5: maps.").wait_for()
        page.goto("about:blank")
        end = time.monotonic() + 10
        while explorer._under_way is not None and time.monotonic() < end:
            time.sleep(0.02)
        assert explorer._under_way is None
        # The browser prints what is refused, with its number.
        assert [told for told in (*wrong, *others) if "409" not in told] == []


def test_a_refused_model_is_a_page(browser):
    case = next(one for one in REFUSED if one.family == "mamba")
    refused = question_form.form(case.build())
    with served(None, refused) as address, window(browser, address, width=400) as (page, wrong):
        assert re.search(case.match, page.get_by_role("alert").text_content())
        assert page.locator("form").count() == 0
        assert problems(page) == []
        assert wrong == []
        assert ask(address, "calls", b"{}")[0] == 404


def test_the_command_serves_a_page_until_it_is_interrupted(browser):
    command = [sys.executable, "-m", "tl_contextmix", "explore", "masked-lm", "--no-browser"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as running:
        address = running.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", address)
        with window(browser, address) as (page, wrong):
            assert "[MASK]" in page.get_by_label("Text").input_value()
            page.get_by_role("button", name="Explain").click()
            assert "What does the model predict?" in explained(page).locator("main").text_content()
            running.send_signal(signal.SIGINT)
            assert running.wait(timeout=20) == 0
            assert wrong == []
        assert running.stdout.read() == "Ctrl-C ends it.\n"
        assert running.stderr.read() == ""
