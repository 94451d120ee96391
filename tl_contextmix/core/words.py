"""Groups sub-word tokens into words, and aggregates their scores."""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor

from tl_contextmix.core.pieces import has_parts, join_pieces, whole_characters
from tl_contextmix.errors import InvalidInput

Spans = Sequence[tuple[int, int]]
"""Stretches ``(start, stop)`` of positions."""
Times = Sequence[tuple[int | float, int | float]]
"""Stretches ``(start, stop)`` of time, in seconds."""

_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
# Apostrophes, hyphens and dots inside of words: typewriter's, typographic, wide, Hebrew, Catalan.
_JOINS = frozenset("'\u2019\uff07\u05f3\u05f4-\u2010\u2011\u00ad\u00b7")
# Emoji of several characters: joiners, skin tones, tags.
_JOINER = "\u200d"
_EXTENDS = re.compile("[\u200c\u200d\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")
_FLAG = re.compile("[\U0001f1e6-\U0001f1ff]")
_TERMINAL = frozenset(".!?\u2026\u3002\uff01\uff1f\u061f\u0964")
_CLOSERS = " \"')]}\u2019\u201d\u00bb\u300d"
_REMEDY = "Count positions from 0, special tokens included."


def find_words(pieces: Sequence[str], real: Sequence[bool], spaced: bool) -> list[tuple[int, int]]:
    """Returns the stretches ``(start, stop)`` of pieces that make up a word; see `Tokens.words`.

    Args:
        pieces: Text of each token, with its leading space or ``##``.
        real: Whether it is no padding.
        spaced: Whether a word begins with a space; else pieces that continue one with ``##``.
    """
    result: list[tuple[int, int]] = []
    word, before = "", ""
    for start, stop in whole_characters(pieces):
        piece = join_pieces(pieces[start:stop]) if real[start] else ""
        joins = _joins(word, before, piece) if spaced else word and piece.startswith("##")
        if joins:
            result[-1] = (result[-1][0], stop)
        elif real[start]:
            result.append((start, stop))
        # What is drawn on a character leaves it what it is: a letter or not.
        before = before + piece if joins and _extends(piece[0]) else piece
        word = word + piece if joins else piece
    return result


def is_mark(piece: str) -> bool:
    """Whether a token is a mark such as ``<s>`` or ``[MASK]``."""
    return bool(_MARK.fullmatch(piece.strip()))


def _joins(word: str, before: str, piece: str) -> bool:
    """Whether a piece without a mark of its own continues the word, whose last piece is given."""
    if not before or not piece or piece[0].isspace():
        return False
    if _MARK.fullmatch(before) or _MARK.fullmatch(piece):
        return False
    if before[-1].isspace():
        return word == " "  # a space that is a token belongs to what follows
    if _extends(piece[0]) or before[-1] == _JOINER:
        return True
    if _FLAG.match(piece) and _FLAG.match(before[-1]):
        return len(_FLAG.findall(word)) % 2 == 1
    return _inside(before.strip()) and _inside(piece)


def _extends(char: str) -> bool:
    """Whether a character is drawn on the one before it, or joined to it."""
    return unicodedata.category(char).startswith("M") or bool(_EXTENDS.match(char))


def _inside(piece: str) -> bool:
    if has_parts(piece):
        return False  # a character that is cut off may be anything
    return any(char.isalnum() for char in piece) or set(piece) <= _JOINS


def find_sentences(
    pieces: Sequence[str], words: Iterable[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Returns the stretches of pieces that make up a sentence; see `Tokens.spans`.

    Args:
        pieces: Text of each token.
        words: Stretches that are words, as `find_words` returns them.
    """
    result: list[tuple[int, int]] = []
    ends = True
    for start, stop in words:
        text = join_pieces(pieces[start:stop])
        bare = text.strip(_CLOSERS)
        mark = bool(_MARK.fullmatch(text.strip()))
        closes = not mark and not bare and "\n" not in text and ends and bool(result)
        if (ends and not closes) or mark:
            result.append((start, stop))
        else:
            result[-1] = (result[-1][0], stop)
        ends = mark or closes or bare[-1:] in _TERMINAL or "\n" in text
    return result


def find_text(
    pieces: Sequence[str], real: Sequence[bool], text: str, spaced: bool | None
) -> list[tuple[int, int]]:
    """Returns the stretches of pieces that read as a text does, none overlapping.

    As they are written, the leading space included; where none is, whatever their case and spaces.

    Args:
        pieces: Text of each token.
        real: Whether it is no padding.
        text: The text.
        spaced: See `join_pieces`.
    """
    for read in (str, _letters):
        wanted, result, start = read(text), list[tuple[int, int]](), 0
        while wanted and start < len(pieces):
            for stop in range(start + 1, len(pieces) + 1):
                if not real[start] or not real[stop - 1]:
                    break
                together = join_pieces(pieces[start:stop], spaced)
                joined = read(together)
                if joined == wanted and read(pieces[start]):
                    result.append((start, stop))
                    start = stop - 1
                # What ends within a character may still become it.
                if not has_parts(together) and (
                    len(joined) >= len(wanted) or not wanted.startswith(joined)
                ):
                    break
            start += 1
        if result:
            return result
    return []


def _letters(text: str) -> str:
    return "".join(text.replace("\u2581", " ").lower().split())


def require_spans(spans: Spans, length: int) -> list[tuple[int, int]]:
    """Returns stretches of positions, checked.

    Raises:
        InvalidInput: If there are none, or one covers no position of an axis of this length.
    """
    listed = [*spans] if isinstance(spans, Iterable) and not isinstance(spans, str) else []
    if not listed:
        raise InvalidInput(
            "no spans were given", repr(spans), "at least one (start, stop)", _REMEDY
        )
    return [_require_span(span, length) for span in listed]


def frames_of(times: object, per_second: int | float, length: int) -> list[tuple[int, int]]:
    """Returns stretches of frames, given those of time.

    A time is cut at the nearest frame, so that stretches without a gap have none; at least one
    frame is in each. A stretch may end a frame behind the last: convolutions leave out the end of a
    sound.

    Args:
        times: Pairs ``(start, stop)`` in seconds.
        per_second: Frames a second.
        length: How many frames there are.

    Raises:
        InvalidInput: If they are no times, or beyond the sound.
    """
    try:
        pairs = [(float(start), float(stop)) for start, stop in times]  # type: ignore[union-attr]
        found = [(round(start * per_second), round(stop * per_second)) for start, stop in pairs]
        fits = per_second > 0 and bool(pairs) and all(0 <= start < stop for start, stop in pairs)
    except (TypeError, ValueError, OverflowError):
        pairs, found, fits = [], [], False
    if not fits:
        raise InvalidInput(
            "these are no times",
            f"{times!r} at {per_second!r} frames a second",
            "pairs (start, stop) of seconds, with per_second above 0",
            "Take them from a forced alignment.",
        )
    # What begins within the last frame may be nearest to the one behind it.
    found = [
        (start - (start == length and first * per_second < length), stop)
        for (start, stop), (first, _) in zip(found, pairs, strict=True)
    ]
    found = [(start, max(stop, start + 1)) for start, stop in found]
    beyond = [n for n, (start, stop) in enumerate(found) if start >= length or stop > length + 1]
    if beyond:
        raise InvalidInput(
            "these times are beyond the sound",
            f"{pairs[beyond[0]]} with {length} frames, {per_second!r} a second",
            f"times up to {length / per_second:g} seconds",
            "Give the times of this sound, in seconds, and its frames a second.",
        )
    return [(start, min(stop, length)) for start, stop in found]


def _require_span(span: object, length: int) -> tuple[int, int]:
    try:
        ends = [*span] if not isinstance(span, str) else []  # type: ignore[misc]
        if any(isinstance(end, bool) for end in ends):
            raise TypeError
        start, stop = map(operator.index, ends)  # numpy's integers too
    except (TypeError, ValueError):
        start = stop = 0
    if not 0 <= start < stop <= length:
        raise InvalidInput(
            "this span covers no token",
            repr(span),
            f"two integers with 0 <= start < stop <= {length}",
            _REMEDY,
        )
    return start, stop


def merge(
    values: Tensor,
    spans: Sequence[Spans],
    how: Literal["sum", "mean", "max"],
    mask: Tensor | None = None,
) -> Tensor:
    """Returns numbers of words [batch ... word] from numbers of tokens [batch ... pos].

    Args:
        values: Numbers per token, 0 at padding.
        spans: Per row of the batch, which tokens each word has; rows with fewer words get zeros.
        how: What becomes of the numbers of a word's tokens.
        mask: True at real tokens [batch pos]: a mean leaves out the others. None: all are real.
    """
    longest = max(map(len, spans))
    result = values.new_zeros(*values.shape[:-1], longest)
    for row, stretches in enumerate(spans):
        for word, (start, stop) in enumerate(stretches):
            part = values[row, ..., start:stop]
            if how == "max":
                result[row, ..., word] = part.amax(-1)
                continue
            total = part.sum(-1)
            if how == "mean":
                real = stop - start if mask is None else int(mask[row, start:stop].sum())
                total = total / max(real, 1)
            result[row, ..., word] = total
    return result
