"""Pages in a real browser: opened without a network, looked at, asked what is wrong with them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# Sandboxes need rights that containers do not have; the rest keeps the browser to itself.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Every canvas of the page whose pixels are all of one colour, or were never drawn.
UNPAINTED = """() => [...document.querySelectorAll('canvas:not(.thumb)')].filter((canvas) => {
  if (!canvas.getClientRects().length) return false;
  if (!canvas.width || !canvas.height) return true;
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const seen = new Set();
  for (let at = 0; at < data.length; at += 4)
    if (data[at + 3]) seen.add((data[at] << 16) | (data[at + 1] << 8) | data[at + 2]);
  return seen.size < 2;
}).length"""
# Maps that are not drawn yet, and charts whose texts are not there.
WAITING = """() => {
  const maps = document.querySelectorAll('.map:not([data-ready])').length;
  const data = document.getElementById('charts');
  // Without CircuitsVis, of a notebook that did not bring it, pages draw their texts themselves.
  const library = document.getElementById('circuitsvis');
  if (!data || !(library?.textContent || window.CircuitsVis)) return maps;
  return maps + JSON.parse(data.textContent).filter(({element}) =>
    !document.getElementById(element).querySelector('.colored-tokens')).length;
}"""
PAINTED = f"() => ({WAITING})() === 0 && ({UNPAINTED})() === 0"
# What sticks out of the window and cannot be scrolled to inside an element of its own.
OVERFLOWING = """() => {
  const wide = document.documentElement.clientWidth;
  const clipped = (node) => {
    for (let up = node.parentElement; up && up !== document.body; up = up.parentElement)
      if (getComputedStyle(up).overflowX !== 'visible') return true;
    return false;
  };
  const found = [...document.body.querySelectorAll('*')]
    .filter((node) => node.getBoundingClientRect().right > wide + 1 && !clipped(node))
    .map((node) => `${node.tagName} .${node.className}`);
  if (document.documentElement.scrollWidth > wide) found.push('the page');
  return found;
}"""
# Text whose contrast to the ground below it is less than 4.5, WCAG's level AA.
PALE = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (rgb) => {
    const part = rgb.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const ground = (node) => {
    for (let up = node; up; up = up.parentElement) {
      const style = getComputedStyle(up);
      if (style.backgroundImage !== 'none') return null;
      const colour = parse(style.backgroundColor);
      if (colour.length === 3 || colour[3] > 0.99) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll('main *, header *, footer *')) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !node.getClientRects().length || node.closest('svg, .cv, select')) continue;
    const below = ground(node);
    if (!below) continue;
    const pair = [light(parse(getComputedStyle(node).color)), light(below)].sort((a, b) => b - a);
    if ((pair[0] + 0.05) / (pair[1] + 0.05) < 4.5)
      found.push(`${node.tagName}.${node.className}: ${node.textContent.slice(0, 30)}`);
  }
  return found;
}"""


@dataclass
class Seen:
    """A page and everything it did.

    Attributes:
        page: Playwright's page.
        errors: Errors it printed or threw.
        dialogs: Dialogs it opened.
        requests: Addresses it asked for, its own document left out.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def wait(self, timeout: float = 20_000) -> None:
        """Waits until everything is drawn."""
        self.page.wait_for_function(PAINTED, timeout=timeout)

    def problems(self) -> list[str]:
        """Everything that must not be on any page of ours."""
        found = [f"error: {text}" for text in self.errors]
        found += [f"dialog: {text}" for text in self.dialogs]
        found += [f"request: {address}" for address in self.requests]
        found += [f"overflow: {node}" for node in self.page.evaluate(OVERFLOWING)]
        found += [f"pale: {node}" for node in self.page.evaluate(PALE)]
        unpainted = self.page.evaluate(UNPAINTED)
        return found + ([f"unpainted: {unpainted} canvases"] if unpainted else [])

    def values(self, selector: str) -> list[float]:
        """The numbers that elements carry, in the order of the page."""
        return self.page.eval_on_selector_all(
            f"{selector} [data-value]", "nodes => nodes.map((n) => Number(n.dataset.value))"
        )


def executable() -> str | None:
    """The Chromium of the system, or None."""
    named = os.environ.get("TL_CONTEXTMIX_CHROMIUM")
    if named:
        return named
    names = ("/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


def require_browser() -> str:
    """The Chromium to test with; skips, or fails where one is promised, if there is none."""
    found = executable()
    if found is None:
        why = "no Chromium: install one, or name it in TL_CONTEXTMIX_CHROMIUM"
        if os.environ.get("TL_CONTEXTMIX_EXPECT_BROWSER") == "1":
            pytest.fail(f"{why} (TL_CONTEXTMIX_EXPECT_BROWSER is 1)")
        pytest.skip(why)
    return found


@contextmanager
def launched() -> Iterator[Any]:
    """A running browser."""
    path = require_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield running
        running.close()


@contextmanager
def opened(
    browser: Any, path: Path, *, width: int = 1280, dark: bool = False, **options: Any
) -> Iterator[Seen]:
    """A file in a window of its own, offline; every request is written down and refused."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if dark else "light",
        offline=True,
        **options,
    )
    own = path.as_uri()
    seen = Seen(context.new_page())

    def routed(route: Any) -> None:
        if route.request.url.split("#")[0] == own:
            route.continue_()
        else:
            seen.requests.append(route.request.url)
            route.abort()

    def answered(dialog: Any) -> None:
        seen.dialogs.append(dialog.message)
        dialog.dismiss()

    context.route("**/*", routed)
    seen.page.on("dialog", answered)
    seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
    seen.page.on(
        "console", lambda told: seen.errors.append(told.text) if told.type == "error" else None
    )
    seen.page.goto(own)
    try:
        yield seen
    finally:
        context.close()


def screenshot(seen: Seen, name: str, folder: Path, *, height: int | None = None) -> Path:
    """Takes a picture for README and docs, where TL_CONTEXTMIX_SCREENSHOTS says, else here."""
    target = Path(os.environ.get("TL_CONTEXTMIX_SCREENSHOTS", folder))
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{name}.png"
    width = seen.page.viewport_size["width"]
    clip = {"x": 0, "y": 0, "width": width, "height": height} if height else None
    seen.page.screenshot(path=path, full_page=True, **({"clip": clip} if clip else {}))
    return path
