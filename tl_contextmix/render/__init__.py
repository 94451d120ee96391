"""Panels in, HTML out: pages that show the results of this package, offline."""

from tl_contextmix.render.page import Page, Section

__all__ = ["Page", "Section"]
