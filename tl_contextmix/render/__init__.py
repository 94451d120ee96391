"""Panels in, HTML out: pages that show the results of this package, offline."""

from tl_contextmix.render.page import Page, Section, require_writable

__all__ = ["Page", "Section", "require_writable"]
