"""Minimal pairs: sentences of which it is known what is right, and which words decide it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_contextmix.core.validation import FilePath
from tl_contextmix.errors import FileFormatError, InvalidInput, bad, four_parts
from tl_contextmix.results import Tokens

Stretch = tuple[int, int]
# Letters and digits with apostrophes or hyphens inside, or one mark of punctuation.
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[^\w\s]|_")


@dataclass(frozen=True)
class MinimalPair:
    """A right sentence and one that is wrong in one place, told apart by comparing them.

    Attributes:
        good: The right sentence.
        bad: The wrong one.
        cues: Words of the good sentence that decide the place, as stretches ``(start, stop)`` of
            its characters; empty where they are not known.
        lures: Words that tempt to the wrong answer, likewise.
    """

    good: str
    bad: str
    cues: tuple[Stretch, ...] = ()
    lures: tuple[Stretch, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.good, str) or not isinstance(self.bad, str):
            raise _no_pair(f"a {type(self.good).__name__} and a {type(self.bad).__name__}")
        good, wrong = self._difference()
        if good[0] == good[1] or wrong[0] == wrong[1]:
            raise _no_pair(f"{self.good!r} and {self.bad!r}")
        for spans in (self.cues, self.lures):
            if not isinstance(spans, (tuple, list)):
                raise _no_pair(f"a {type(spans).__name__} for its cues or lures")
        for span in (*self.cues, *self.lures):
            start, stop = _ends(span)
            inside = 0 <= start < stop <= len(self.good) and self.good[start:stop].strip()
            if not inside or (start < good[1] and good[0] < stop):
                raise bad(
                    "a cue is no other part of the sentence",
                    f"{span!r} in {self.good!r}",
                    f"characters (start, stop) with 0 <= start < stop <= {len(self.good)}, apart "
                    f"from those of {self.answer!r}",
                    "Count characters of the good sentence.",
                )

    @property
    def target(self) -> Stretch:
        """The characters of the good sentence that differ, whole words."""
        return self._difference()[0]

    @property
    def answer(self) -> str:
        """The right word or words."""
        return self.good[slice(*self.target)]

    @property
    def wrong_target(self) -> Stretch:
        """The characters of the wrong sentence that differ."""
        return self._difference()[1]

    @property
    def wrong(self) -> str:
        """The wrong word or words."""
        return self.bad[slice(*self.wrong_target)]

    @property
    def prefix(self) -> str:
        """What stands before the place: what a causal model is given."""
        return self.good[: self.target[0]].rstrip()

    def masked(self, mask: str) -> str:
        """Returns the good sentence with a mask in the place: what a masked model is given."""
        start, stop = self.target
        return self.good[:start] + mask + self.good[stop:]

    def _difference(self) -> tuple[Stretch, Stretch]:
        good, wrong = _words(self.good), _words(self.bad)
        texts = [self.good[slice(*word)] for word in good]
        others = [self.bad[slice(*word)] for word in wrong]
        shorter = min(len(texts), len(others))
        first = _common(texts, others, shorter)
        last = _common(texts[::-1], others[::-1], shorter - first)
        return _stretch(good[first : len(good) - last]), _stretch(wrong[first : len(wrong) - last])


def _no_pair(seen: str) -> InvalidInput:
    return bad(
        "this is no minimal pair",
        seen,
        "two sentences in one of which a word stands in the place of another",
        "Leave the pair out.",
    )


def _ends(span: Any) -> Stretch:
    """Returns start and stop of a stretch, or an empty one for anything else."""
    ends = [*span] if isinstance(span, (tuple, list)) else []
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    return (ends[0], ends[1]) if whole and len(ends) == 2 else (0, 0)


def _common(a: Sequence[str], b: Sequence[str], most: int) -> int:
    """Returns how many entries two lists have in common at their beginning."""
    return next((index for index in range(most) if a[index] != b[index]), most)


def _words(text: str) -> list[Stretch]:
    return [match.span() for match in _WORD.finditer(text)]


def _stretch(words: Sequence[Stretch]) -> Stretch:
    return (words[0][0], words[-1][1]) if words else (0, 0)


def load_minimal_pairs(path: FilePath) -> tuple[MinimalPair, ...]:
    """Reads minimal pairs from a local file with a JSON object per line.

    As BLiMP (Warstadt et al. 2020) has them: ``sentence_good`` and ``sentence_bad``; which word
    differs is found by comparing the two. Further fields may say what decides it: ``cues`` and
    ``lures``, lists of words of the good sentence, or of ``[start, stop]`` in its characters where
    a word occurs several times. All other fields are left alone; empty lines are skipped.

    Args:
        path: The file.

    Raises:
        InvalidInput: If there is no such file.
        FileFormatError: If a line holds anything else, naming the line.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, TypeError, ValueError) as error:
        raise bad(
            "the minimal pairs cannot be read",
            f"{path!r} ({getattr(error, 'strerror', None) or error})",
            "a file with a JSON object per line",
            "Give the path of a local file, such as one of BLiMP's.",
        ) from error
    path = Path(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _format(path, line, "bytes that are not UTF-8 text") from error
    # Not splitlines: a sentence may hold one of Unicode's further line ends.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise _format(path, 1, "an empty file")
    return tuple(_pair(path, number, line) for number, line in lines)


def _pair(path: Path, number: int, line: str) -> MinimalPair:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _format(path, number, f"{line[:40]!r}, which is not JSON") from error
    if not isinstance(found, Mapping):
        raise _format(path, number, f"{line[:40]!r}, which is not an object")
    good, wrong = (found.get(name) for name in ("sentence_good", "sentence_bad"))
    if not isinstance(good, str) or not isinstance(wrong, str):
        raise _format(path, number, f"the fields {sorted(map(str, found))}")
    try:
        cues, lures = (
            tuple(_place(good, word) for word in _listed(found.get(name, [])))
            for name in ("cues", "lures")
        )
        # A lone half of a character cannot be tokenised.
        (good + wrong).encode()
        return MinimalPair(good, wrong, cues, lures)
    except UnicodeEncodeError as error:
        raise _format(path, number, "a text with half of a surrogate pair") from error
    except InvalidInput as error:
        raise FileFormatError(f"line {number} of {path}: {error}") from error


def _listed(words: Any) -> list[Any]:
    if not isinstance(words, list):
        raise bad("cues cannot be read", repr(words), "a list of words", "Write [] for none.")
    return words


def _place(text: str, word: Any) -> Stretch:
    """Returns where a word stands in a text."""
    if isinstance(word, list) and _ends(word) != (0, 0):
        return _ends(word)
    found = [span for span in _words(text) if text[slice(*span)] == word]
    if len(found) != 1:
        raise bad(
            "a cue cannot be placed",
            f"{word!r}, which is {len(found)} of the words of {text!r}",
            "a word that occurs once, or [start, stop] in characters",
            "Give [start, stop].",
        )
    return found[0]


def _format(path: Path, number: int, seen: str) -> FileFormatError:
    return FileFormatError(
        four_parts(
            f"line {number} of {path} is no minimal pair",
            seen,
            "a JSON object with the texts sentence_good and sentence_bad",
            "See BLiMP's files for examples.",
        )
    )


def place_tokens(text: str, tokens: Tokens, row: int = 0) -> list[Stretch | None]:
    """Returns the characters of a text that each of its tokens stands for; None for marks.

    Found by walking through both: tokens are told by their text, spaces and case aside.

    Args:
        text: The text.
        tokens: Its tokens, padding included.
        row: Row of the batch.

    Raises:
        InvalidInput: If a token is no part of the text (a byte of a character, or normalised).
    """
    places = [index for index, char in enumerate(text) if not char.isspace()]
    plain = _lower(text[index] for index in places)
    found: list[Stretch | None] = []
    unread: list[int] = []  # tokens that cannot be told by their text, until the next that can
    at = 0
    for piece, real in zip(tokens.strings[row], tokens.mask[row].tolist(), strict=True):
        word = _lower("".join(piece.split()))
        if at and not plain.startswith(word, at):
            word = word.removeprefix("##")
        start = plain.find(word, at) if unread else at
        if real and _unreadable(piece) and not plain.startswith(word, at):
            unread.append(len(found))
            found.append(None)
        elif not real or not word or start < 0 or not plain.startswith(word, start):
            found.append(None)
        else:
            if start > at:
                _spread(found, unread, (places[at], places[start - 1] + 1))
            unread, at = [], start + len(word)
            found.append((places[start], places[at - 1] + 1))
    if unread and at < len(plain):
        _spread(found, unread, (places[at], places[-1] + 1))
        at = len(plain)
    if at < len(plain):
        raise bad(
            "tokens cannot be placed in their text",
            f"{[*tokens.strings[row]]} for {text!r}, from {text[places[at] :][:20]!r} on",
            "tokens whose texts, one after the other, make up the text",
            "Leave the cues of this sentence out, or give texts with cues= as positions.",
        )
    return found


def _unreadable(piece: str) -> bool:
    """Whether a token is a byte of a character, or stands for a word that is not known."""
    return "\ufffd" in piece or piece.strip().lower().strip("<[]>") == "unk"


def _spread(found: list[Stretch | None], unread: Sequence[int], stretch: Stretch) -> None:
    # Which of them is which part is not known: each stands for all of it.
    for index in unread:
        found[index] = stretch


def _lower(chars: Iterable[str]) -> str:
    # Character by character: a few become two in lower case, which would move all places.
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in chars)


def overlapping(places: Sequence[Stretch | None], stretch: Stretch) -> list[int]:
    """Returns the tokens that share a character with a stretch of the text."""
    return [
        index
        for index, place in enumerate(places)
        if place is not None and place[0] < stretch[1] and stretch[0] < place[1]
    ]
