"""Text in figures: every token as itself, in fonts that have its characters."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.font_manager import FontPath, FontProperties, findfont, fontManager, get_font
from matplotlib.textpath import text_to_path

from tl_contextmix.errors import InvalidInput
from tl_contextmix.plotting.display_text import LABEL_LENGTH, code_of, shorten, visible

# Comes with matplotlib, so that a figure looks the same everywhere.
FIRST = "DejaVu Sans"
SIZE = 8.0  # of labels, in points
_UPRIGHT = {"normal", "regular", "book", "medium", "roman", *range(350, 551)}
# No character is meant by the code alone: another font shows another one, or none.
_UNKNOWN = {"Co", "Cn", "Cs"}


class Lettering:
    """The fonts of a figure, and text as it appears in them.

    Args:
        fonts: Names of fonts to look in before those that are installed.
        content: What will be written, in tuples and dataclasses of any kind.
    """

    def __init__(self, fonts: Sequence[str], content: object = ()) -> None:
        self.families = [FIRST, *fonts]
        self._known = frozenset().union(*(_characters(name) for name in self.families))
        wanted = set().union(*map(visible, _texts(content)))
        lacking = {ord(one) for one in wanted if unicodedata.category(one) not in _UNKNOWN}
        for name, has in _found(frozenset(lacking - self._known)):
            self.families.append(name)
            self._known |= has

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
        raise InvalidInput(
            "the figure cannot be drawn in this font",
            repr(family),
            "the name of an installed font",
            "matplotlib.font_manager.get_font_names() lists them.",
        ) from error
    return frozenset(get_font(path).get_charmap())


def _texts(content: object) -> Iterator[str]:
    """Returns every text within tuples and dataclasses."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, (tuple, list)):
        for one in content:
            yield from _texts(one)
    elif dataclasses.is_dataclass(content):
        for field in dataclasses.fields(content):
            yield from _texts(getattr(content, field.name))


def _found(lacking: frozenset[int]) -> Iterator[tuple[str, frozenset[int]]]:
    """Returns installed fonts that have what is lacking, those with most of it first."""
    region = _region(lacking)
    while lacking:
        has = {name: lacking & known for name, known in _installed().items() if lacking & known}
        if not has:
            return
        # Of several alike a plain one, and always the same.
        plain = {name: ("sans" not in name.lower(), not name.endswith(region)) for name in has}
        best = min(has, key=lambda name: (-len(has[name]), *plain[name], name))
        yield best, has[best]
        lacking -= has[best]


def _region(characters: frozenset[int]) -> str:
    """Returns how fonts end that draw Han characters as a text does which has these."""
    if any(0x3040 <= one <= 0x30FF for one in characters):
        return "JP"
    return "KR" if any(0xAC00 <= one <= 0xD7A3 for one in characters) else "SC"


@cache
def _installed() -> dict[str, frozenset[int]]:
    """Returns the characters of each installed font that text can be set in."""
    own = Path(matplotlib.get_data_path())  # symbols and formulas, but for DejaVu Sans
    result: dict[str, frozenset[int]] = {}
    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.name, entry.fname)):
        plain = entry.style == entry.variant == "normal" and entry.weight in _UPRIGHT
        last = "last" in entry.name.lower() and "resort" in entry.name.lower()
        if plain and not last and entry.name not in result and own not in Path(entry.fname).parents:
            result[entry.name] = frozenset()
            with suppress(OSError, RuntimeError):  # moved or broken since matplotlib listed it
                font = get_font(FontPath(entry.fname, entry.index))
                if font.scalable:
                    result[entry.name] = frozenset(font.get_charmap())
    return result
