"""Panels in, pages and figures out: offline, deterministic, safe with any text."""

from tl_contextmix.plotting.matplotlib_export import draw_figure, require_matplotlib
from tl_contextmix.plotting.page import Opening, Page, Section, require_writable

__all__ = ["Opening", "Page", "Section", "draw_figure", "require_matplotlib", "require_writable"]
