"""Colours of the pages: blue above zero, red below, the ground at zero.

Blue and red stay apart for every common kind of colour blindness. The scale is linear, like that
of CircuitsVis, so that a cell has the same colour whichever of the two drew it.
"""

from __future__ import annotations

import math

POSITIVE = "#2166ac"
NEGATIVE = "#b2182b"
NOTHING = "#d0d4d9"
INFINITE = "#e69f00"
MASKED = "#e9ebee"
# Okabe and Ito's colours, distinguishable with any colour vision; black is left to the text.
SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
LEVELS = 20
# Of drawings that also stand alone, without the stylesheet of the page.
INK = "#1b1f24"
SOFT = "#57606a"
GRID = "#e6e9ed"
ZERO_LINE = "#8b949e"
FONT = "system-ui, sans-serif"

_WHITE = (255, 255, 255)
# The same on a dark page: zero, above and below it, as in its maps (page.css).
_DARK = ("#161b21", "#8cc1f2", "#f2938c")

Rgb = tuple[int, int, int]


def shade(fraction: float, *, dark: bool = False) -> Rgb:
    """Returns the colour of a number from -1 to 1."""
    zero, above, below = _DARK if dark else (as_hex(_WHITE), POSITIVE, NEGATIVE)
    end = parse(above if fraction >= 0 else below)
    share = min(1.0, abs(fraction))
    red, green, blue = (
        round(ground + (colour - ground) * share)
        for ground, colour in zip(parse(zero), end, strict=True)
    )
    return red, green, blue


def series(index: int) -> str:
    """Returns the colour of a series; there are six, and the seventh has the first again."""
    return SERIES[index % len(SERIES)]


def cell_class(value: float, largest: float) -> str:
    """Returns the CSS class that colours a table cell, one of those in `stylesheet`."""
    if math.isnan(value):
        return "nothing"
    if math.isinf(value):
        return "infinite"
    level = round(LEVELS * min(1.0, abs(value) / largest)) if largest else 0
    return f"{'p' if value >= 0 else 'n'}{level}" if level else "zero"


def stylesheet() -> str:
    """Returns the rules behind `cell_class`, in both schemes."""
    dark = _rules(dark=True)
    return f"{_rules()}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}"


def _rules(*, dark: bool = False) -> str:
    names = {"zero": 0.0} | {
        f"{prefix}{level}": sign * level / LEVELS
        for sign, prefix in ((1, "p"), (-1, "n"))
        for level in range(1, LEVELS + 1)
    }
    papers = {name: shade(fraction, dark=dark) for name, fraction in names.items()}
    return "\n".join(
        f".{name}{{background:{as_hex(paper)};color:{ink_on(paper)}}}"
        for name, paper in papers.items()
    )


def ink_on(paper: Rgb) -> str:
    """Returns the colour of text that is read best on a ground, black or white."""
    # One of the two always has a contrast of 4.58 or more; a softer black has not.
    black, white = _contrast(paper, (0, 0, 0)), _contrast(paper, _WHITE)
    return "#000000" if black >= white else as_hex(_WHITE)


def as_hex(colour: Rgb) -> str:
    """Returns a colour as CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def parse(colour: str) -> Rgb:
    """Returns the three parts of a colour as CSS writes it."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _contrast(one: Rgb, other: Rgb) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: Rgb) -> float:
    """Returns the relative luminance of WCAG 2."""
    channels = [value / 255 for value in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
