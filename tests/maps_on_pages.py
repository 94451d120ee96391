"""What the browser's script shows of a map, for tests of pages."""

from __future__ import annotations

import math
from typing import Any

import torch

# Every name and number that a canvas is asked to write.
LISTEN = """() => {
  window.written = [];
  const write = CanvasRenderingContext2D.prototype.fillText;
  CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
    window.written.push(text);
    return write.call(this, text, ...rest);
  };
}"""


def point(page: Any, holder: Any, row: int, column: int) -> str:
    """Moves a map's reader to a cell, by keyboard; returns what it says."""
    canvas = holder.locator("canvas.zoom")
    canvas.focus()
    for key, count in (("ArrowUp", 200), ("ArrowLeft", 200)):
        canvas.evaluate(
            """(node, [key, count]) => {
              for (let i = 0; i < count; i++)
                node.dispatchEvent(new KeyboardEvent("keydown", {key}));
            }""",
            [key, count],
        )
    for key, count in (("ArrowDown", row), ("ArrowRight", column)):
        for _ in range(count):
            page.keyboard.press(key)
    return holder.locator(".telling").text_content()


def numbers(holder: Any, sheets: int) -> list[list[float]]:
    """The numbers of every sheet, as the page's own table lists them."""
    details = holder.locator("details").first
    if not details.evaluate("node => node.open"):
        details.locator("summary").click()
    found = []
    for sheet in range(sheets):
        if sheets > 1:
            holder.locator(".thumbs button").nth(sheet).click()
        holder.page.wait_for_function(
            "([holder, sheet]) => holder.querySelector('details h4')?.textContent ==="
            " (holder.querySelectorAll('.thumbs button span')[sheet]?.textContent"
            " ?? holder.querySelector('details h4')?.textContent ?? null)",
            arg=[holder.element_handle(), sheet],
        )
        found.append(
            details.locator("td[data-value]").evaluate_all(
                "nodes => nodes.map((node) => Number(node.dataset.value))"
            )
        )
    return found


def readable(panel: Any) -> list[list[float]]:
    """The finite numbers of every sheet that are not hidden."""
    values = panel.values.double()
    if panel.hidden is not None:
        values = values.masked_fill(panel.hidden, math.nan)
    return [sheet[torch.isfinite(sheet)].tolist() for sheet in values]
