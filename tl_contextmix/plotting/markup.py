"""The pieces every picture on a page is put together from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from tl_contextmix.plotting.display_text import escape, prose


def figure(kind: str, title: str, caption: str, body: Sequence[str], *, wide: bool = False) -> str:
    """Returns a panel: heading, how to read it, and what there is to see.

    Args:
        kind: Its CSS class.
        title: Heading.
        caption: How to read it.
        body: HTML of what follows; empty pieces are dropped.
        wide: Whether it takes the full width of the page.
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


def sheets(names: Sequence[str], bodies: Sequence[str]) -> str:
    """Returns one of several bodies at a time, with a list to choose from.

    The script of the page unhides the one chosen; without it the first is there to see.
    """
    if len(bodies) == 1:
        return bodies[0]
    options = "".join(
        f'<option value="{index}">{escape(name)}</option>' for index, name in enumerate(names)
    )
    stack = "".join(
        f'<div class="sheet"{"" if index == 0 else " hidden"}><h4>{escape(name)}</h4>{body}</div>'
        for index, (name, body) in zip(count(), zip(names, bodies, strict=True))
    )
    chooser = f'<label class="chooser">Show <select data-sheets>{options}</select></label>'
    return f'<div class="sheets">{chooser}{stack}</div>'
