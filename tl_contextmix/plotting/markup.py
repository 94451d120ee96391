"""The pieces every picture on a page is put together from."""

from __future__ import annotations

from collections.abc import Sequence

from tl_contextmix.plotting.display_text import prose


def figure(kind: str, title: str, caption: str, body: Sequence[str], *, wide: bool = False) -> str:
    """Returns a panel: heading, how to read it, and what there is to see, without empty pieces.

    A wide one takes the full width of the page.
    """
    classes = f"panel {kind} wide" if wide else f"panel {kind}"
    caption_html = f'<p class="caption">{prose(caption)}</p>' if caption else ""
    pieces = [f"<h3>{prose(title)}</h3>", caption_html, *body]
    inside = "\n".join(piece for piece in pieces if piece)
    return f'<article class="{classes}">\n{inside}\n</article>'


def note(text: str) -> str:
    """Returns a remark on how the panel was drawn, or nothing for an empty one."""
    return f'<p class="note">{prose(text)}</p>' if text else ""


def scroll(body: str, name: str) -> str:
    """Returns content that may be wider than the page; the keyboard can scroll it too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{prose(name)}">{body}</div>'


def details(summary: str, body: str, *, unfolded: bool = False) -> str:
    """Returns content that is folded away until it is asked for, or can be folded away."""
    tag = "details open" if unfolded else "details"
    return f"<{tag}><summary>{prose(summary)}</summary>{body}</details>"
