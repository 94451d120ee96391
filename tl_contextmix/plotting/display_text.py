"""How text and numbers appear on a page: nothing a token holds can act, hide or mislead.

A vocabulary is foreign text. ``<s>`` must not become a tag, a line break must not vanish, and a
direction control must not turn the label beside it around.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import TypeGuard

from tl_contextmix.plotting.panels import Cell, Place

LABEL_LENGTH = 24
NOTHING = "–"

_WORD_JOINER = "\u2060"
# Joiners that emoji, Persian and Indic scripts need inside a word; the rest of their category
# is invisible or changes the direction of the text around it.
_HARMLESS_FORMAT = {"\u200c", "\u200d"}
_SYMBOLS = {"\n": "⏎", "\t": "⇥"}
# Letters, marks and symbols that every font draws as nothing.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
_DOTTED_CIRCLE = "◌"


def visible(text: str) -> str:
    r"""Returns the text with every character that would not be seen written out.

    Line breaks become ``⏎``, tabs ``⇥``, an empty text ``∅``, spaces at either end ``·``; other
    controls, unusual spaces, direction controls and lone surrogates become ``\uXXXX``. A mark that
    would sit on the character before the text sits on a dotted circle.
    """
    if not text:
        return "∅"
    body = text.strip(" ")
    if not body:
        return "·" * len(text)
    start = len(text) - len(text.lstrip(" "))
    end = len(text) - start - len(body)
    inside = "".join(
        # A joiner is seen by what it does to its neighbours; at an end it does nothing.
        code_of(character)
        if character in _HARMLESS_FORMAT and place in (0, len(body) - 1)
        else _visible_character(character)
        for place, character in enumerate(body)
    )
    seat = _DOTTED_CIRCLE if unicodedata.category(inside[0]).startswith("M") else ""
    return "·" * start + seat + inside + "·" * end


def shorten(text: str, length: int = LABEL_LENGTH) -> str:
    """Returns the text cut to a length, the cut marked by ``…``."""
    return text if len(text) <= length else text[: length - 1] + "…"


def escape(text: str, length: int | None = None) -> str:
    """Returns foreign text for our own HTML, in an element or in a quoted attribute."""
    shown = visible(text)
    return html.escape(shown if length is None else shorten(shown, length), quote=True)


def data(value: float) -> str:
    """Returns the attribute with which an element carries its number; nothing for no number."""
    return f' data-value="{rounded(value)!r}"' if math.isfinite(value) else ""


def prose(text: str) -> str:
    """Returns a title or a sentence as HTML, on one line."""
    line = " ".join(text.split())
    return escape(line) if line else ""


def label(token: str, length: int = LABEL_LENGTH) -> str:
    """Returns a token as an element: cut to a length, the whole of it on hover."""
    shown = visible(token)
    title = f' title="{html.escape(shown)}"' if len(shown) > length else ""
    # <bdi> keeps a right-to-left token from moving its neighbours.
    return f"<bdi{title}>{html.escape(shorten(shown, length))}</bdi>"


def for_circuitsvis(token: str) -> str:
    """Returns a token for CircuitsVis, which puts text into the page unescaped.

    Escaping is no help there: the same text is also drawn on canvases and in tooltips, which
    would show ``&lt;``. A WORD JOINER after ``<`` and ``&`` takes up no room and leaves nothing
    that could be read as a tag or as an entity.
    """
    shown = shorten(visible(token))
    return shown.replace("<", "<" + _WORD_JOINER).replace("&", "&" + _WORD_JOINER)


def rounded(value: float) -> float:
    """Returns a finite number with four significant decimals; the page gets no longer ones."""
    return float(f"{value:.4g}") + 0.0  # + 0.0 turns -0.0 into 0.0


def decimals(largest: float) -> int | None:
    """Returns how many decimals show three digits of the largest number; None is scientific."""
    if largest == 0:
        return 2
    power = math.floor(math.log10(largest))
    return max(0, 2 - power) if -4 <= power < 6 else None


def number(value: float, places: int | None, *, signed: bool = False) -> str:
    """Returns a number, NaN or an infinity as text, with decimals as `decimals` returns them."""
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        text = "∞"
    else:
        text = f"{abs(value):.2e}" if places is None else f"{abs(value):.{places}f}"
    if value < 0 and text.strip("0.") != "":
        return "−" + text
    return "+" + text if signed and value > 0 else text


def largest(cells: Iterable[object]) -> float:
    """Returns the largest absolute value of the cells that are finite numbers; 0 without any."""
    sizes = (abs(cell) for cell in cells if is_number(cell))
    return float(max(filter(math.isfinite, sizes), default=0.0))


def is_number(cell: object) -> TypeGuard[float]:
    """Returns whether a cell holds a number; yes and no are none."""
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)


def cells(column: Sequence[Cell], text: Callable[[str], str], *, signed: bool = False) -> list[str]:
    """Returns the cells of a column as text, with as many decimals as the largest number needs."""
    places = decimals(largest(cell for cell in column if isinstance(cell, float)))

    def shown(cell: Cell) -> str:
        if cell is None:
            return NOTHING
        if isinstance(cell, bool):
            return "yes" if cell else "no"
        if isinstance(cell, Place):
            return text(cell.token) + (f" ({cell.position})" if cell.position >= 0 else "")
        if isinstance(cell, str):
            return text(cell)
        return number(float(cell), 0 if isinstance(cell, int) else places, signed=signed)

    return [shown(cell) for cell in column]


def _visible_character(character: str) -> str:
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    category = unicodedata.category(character)
    hidden = category in ("Cc", "Cs", "Zl", "Zp") or (category == "Zs" and character != " ")
    hidden |= category == "Cf" and character not in _HARMLESS_FORMAT
    code = ord(character)
    # Unicode says that these will never be characters; XML has no place for them.
    hidden |= code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    return code_of(character) if hidden or character in _BLANK else character


def code_of(character: str) -> str:
    r"""Returns a character as its number, for example ``\u200d``."""
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
