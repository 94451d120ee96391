"""Pieces of text that hold parts of characters, and text put together from them.

Byte-level tokenizers cut a character into several tokens. The label of such a token holds the bytes
as ``⟨E2 80⟩`` instead of U+FFFD, so that labels tell tokens apart and labels in a row are the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

_PARTS = re.compile(r"(?:⟨[89A-F][0-9A-F](?: [89A-F][0-9A-F])*⟩)+")
_ESCAPED = re.compile("[\udc80-\udcff]+")


def show_bytes(data: bytes) -> str:
    """Returns bytes as UTF-8 text, those that are no whole character as ``⟨E2 80⟩``."""
    text = data.decode("utf-8", "surrogateescape")
    return _ESCAPED.sub(lambda found: f"⟨{_bytes_of(found[0]).hex(' ').upper()}⟩", text)


def join_pieces(pieces: Sequence[str], spaced: bool | None = None) -> str:
    """Returns the text that labels in a row stand for, characters cut into several made whole.

    Args:
        pieces: The labels.
        spaced: Whether a word begins with its space (`Tokens.spaced`). If False, words are set
            apart by one, and those that begin with ``##`` continue the word before.
    """
    if spaced is False:
        pieces = [
            piece.removeprefix("##") if place and piece.startswith("##") else f" {piece}"
            for place, piece in enumerate(pieces)
        ]
        return "".join(pieces).removeprefix(" ")
    text = "".join(pieces)
    return _PARTS.sub(lambda found: show_bytes(_read(found[0])), text) if "⟨" in text else text


def has_parts(piece: str) -> bool:
    """Returns whether a label holds parts of characters, or U+FFFD in place of them."""
    return "\ufffd" in piece or bool(_PARTS.search(piece))


def replace_parts(piece: str) -> str:
    """Returns a label with U+FFFD in place of parts of characters."""
    return _PARTS.sub(lambda found: _read(found[0]).decode("utf-8", "replace"), piece)


def whole_characters(pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Returns the shortest stretches ``(start, stop)`` of labels that share no character."""
    if not any("⟨" in piece for piece in pieces):
        return [(place, place + 1) for place in range(len(pieces))]
    data = [_PARTS.sub(lambda found: _escape(_read(found[0])), piece) for piece in pieces]
    parts = [_bytes_of(piece) for piece in data]
    text = b"".join(parts).decode("utf-8", "surrogateescape")
    starts = {0, *accumulate(len(_bytes_of(character)) for character in text)}
    found: list[tuple[int, int]] = []
    for place, offset in enumerate(accumulate(map(len, parts[:-1]), initial=0)):
        start = place if offset in starts or not found else found.pop()[0]
        found.append((start, place + 1))
    return found


def _read(parts: str) -> bytes:
    return bytes.fromhex(re.sub("[⟨⟩]", " ", parts))


def _escape(data: bytes) -> str:
    return "".join(chr(0xDC00 + byte) for byte in data)


def _bytes_of(text: str) -> bytes:
    # Halves of surrogate pairs are no bytes, but a label may have them.
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
