"""How text and numbers appear on a page: nothing a token holds can act, hide or mislead.

A vocabulary is foreign text. ``<s>`` must not become a tag, a line break must not vanish, and a
direction control must not turn the label beside it around.
"""

from __future__ import annotations

import html
import math
import unicodedata

LABEL_LENGTH = 24
NOTHING = "–"

_WORD_JOINER = "\u2060"
# Joiners that emoji, Persian and Indic scripts need inside a word; the rest of their category
# is invisible or changes the direction of the text around it.
_HARMLESS_FORMAT = {"\u200c", "\u200d"}
_SYMBOLS = {"\n": "⏎", "\t": "⇥"}


def visible(text: str) -> str:
    r"""Returns the text with every character that would not be seen written out.

    Line breaks become ``⏎``, tabs ``⇥``, an empty text ``∅``, spaces at either end ``·``; other
    controls, unusual spaces, direction controls and lone surrogates become ``\uXXXX``.
    """
    if not text:
        return "∅"
    body = text.strip(" ")
    if not body:
        return "·" * len(text)
    start = len(text) - len(text.lstrip(" "))
    end = len(text) - start - len(body)
    return "·" * start + "".join(map(_visible_character, body)) + "·" * end


def shorten(text: str, length: int = LABEL_LENGTH) -> str:
    """Returns the text cut to a length, the cut marked by ``…``."""
    return text if len(text) <= length else text[: length - 1] + "…"


def escape(text: str) -> str:
    """Returns foreign text for our own HTML, in an element or in a quoted attribute."""
    return html.escape(visible(text), quote=True)


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
    """Returns a number as text.

    Args:
        value: The number; NaN and infinities are named.
        places: Decimals, as `decimals` returns them.
        signed: Whether positive numbers carry a plus.
    """
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        text = "∞"
    else:
        text = f"{abs(value):.2e}" if places is None else f"{abs(value):.{places}f}"
    if value < 0 and text.strip("0.") != "":
        return "−" + text
    return "+" + text if signed and value > 0 else text


def _visible_character(character: str) -> str:
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    category = unicodedata.category(character)
    hidden = category in ("Cc", "Cs", "Zl", "Zp") or (category == "Zs" and character != " ")
    if category == "Cf":
        hidden = character not in _HARMLESS_FORMAT
    if not hidden:
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
