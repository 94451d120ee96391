"""Panels in, pages and figures out: offline, deterministic, safe with any text."""

from tl_contextmix.render.page import Page, Section, require_writable
from tl_contextmix.render.paper import draw_figure

__all__ = ["Page", "Section", "draw_figure", "require_writable"]
