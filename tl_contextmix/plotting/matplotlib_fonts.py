"""Text in figures: every token as itself, in fonts that have its characters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path

from tl_contextmix.errors import bad
from tl_contextmix.plotting.display_text import LABEL_LENGTH, code_of, shorten, visible

# Comes with matplotlib, so that a figure looks the same everywhere.
FIRST = "DejaVu Sans"
SIZE = 8.0  # of labels, in points


class Lettering:
    """The fonts of a figure, and text as it appears in them."""

    def __init__(self, fonts: Sequence[str]) -> None:
        self.families = [FIRST, *fonts]
        self._known = frozenset().union(*(_characters(name) for name in self.families))

    def shown(self, text: str, length: int | None = LABEL_LENGTH) -> str:
        """Returns a text with every character seen: those that no font has are written out."""
        seen = "".join(
            character if ord(character) in self._known else code_of(character)
            for character in visible(text)
        )
        return seen if length is None else shorten(seen, length)

    def prose(self, text: str) -> str:
        """Returns a title or a unit, on one line; nothing for an empty one."""
        line = " ".join(text.split())
        return self.shown(line, None) if line else ""

    def width(self, shown: str, size: float) -> float:
        """Returns how many inches a text of a size in points takes."""
        properties = FontProperties(family=self.families, size=size)
        width, _, _ = text_to_path.get_text_width_height_descent(shown, properties, ismath=False)
        return width / 72


@cache
def _characters(family: str) -> frozenset[int]:
    try:
        path = findfont(FontProperties(family=family), fallback_to_default=False)
    except ValueError as error:
        raise bad(
            "the figure cannot be drawn in this font",
            repr(family),
            "the name of an installed font",
            "matplotlib.font_manager.get_font_names() lists them.",
        ) from error
    return frozenset(get_font(path).get_charmap())
