"""Minimal pairs: two sentences that differ in one place, and the words that decide it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tl_contextmix.core.pieces import has_parts, join_pieces, whole_characters
from tl_contextmix.core.validation import FilePath, NotNegative, Positive, checked
from tl_contextmix.errors import FileFormatError, InvalidInput
from tl_contextmix.evaluation.cue_rules import derive_cues
from tl_contextmix.results import Tokens

Stretch = tuple[int, int]
# Letters and digits with apostrophes or hyphens inside, or one mark of punctuation.
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[^\w\s]|_")


@dataclass(frozen=True)
class MinimalPair:
    """An acceptable sentence, and one that differs in one place and is not.

    Attributes:
        good: The acceptable sentence.
        bad: The unacceptable one.
        cues: Words of the good sentence that decide the answer, as character spans
            ``(start, stop)``; empty if unknown.
        lures: Words that suggest the wrong answer, likewise.
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
                raise InvalidInput(
                    "a cue must be another part of the sentence",
                    f"{span!r} in {self.good!r}",
                    f"characters (start, stop), 0 <= start < stop <= {len(self.good)}, outside of "
                    f"{self.answer!r}",
                    "Give character offsets in the good sentence.",
                )

    @property
    def target(self) -> Stretch:
        """The character span in which the good sentence differs, in whole words."""
        return self._difference()[0]

    @property
    def answer(self) -> str:
        """The right word or words."""
        return self.good[slice(*self.target)]

    @property
    def wrong_target(self) -> Stretch:
        """The character span in which the bad sentence differs."""
        return self._difference()[1]

    @property
    def wrong(self) -> str:
        """The wrong word or words."""
        return self.bad[slice(*self.wrong_target)]

    @property
    def prefix(self) -> str:
        """The text before the answer, as a causal model reads it."""
        return self.good[: self.target[0]].rstrip()

    def masked(self, mask: str) -> str:
        """Returns the good sentence with the answer masked, as a masked model reads it."""
        start, stop = self.target
        return self.good[:start] + mask + self.good[stop:]

    def _difference(self) -> tuple[Stretch, Stretch]:
        good, wrong = words_of(self.good), words_of(self.bad)
        texts = [self.good[slice(*word)] for word in good]
        others = [self.bad[slice(*word)] for word in wrong]
        shorter = min(len(texts), len(others))
        first = _common(texts, others, shorter)
        last = _common(texts[::-1], others[::-1], shorter - first)
        return _stretch(good[first : len(good) - last]), _stretch(wrong[first : len(wrong) - last])


def _no_pair(seen: str) -> InvalidInput:
    return InvalidInput(
        "not a minimal pair",
        seen,
        "two sentences that differ in one word",
        "Fix the pair, or remove it.",
    )


def _ends(span: Any) -> Stretch:
    """Returns start and stop of a span, or an empty span for anything else."""
    ends = [*span] if isinstance(span, (tuple, list)) else []
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    return (ends[0], ends[1]) if whole and len(ends) == 2 else (0, 0)


def _common(a: Sequence[str], b: Sequence[str], most: int) -> int:
    """Returns the length of the common prefix of two lists."""
    return next((index for index in range(most) if a[index] != b[index]), most)


def words_of(text: str, *, spaces: bool = False) -> list[Stretch]:
    """Returns the characters of each word, split at spaces alone or at punctuation too."""
    return [match.span() for match in (re.compile(r"\S+") if spaces else _WORD).finditer(text)]


def _stretch(words: Sequence[Stretch]) -> Stretch:
    return (words[0][0], words[-1][1]) if words else (0, 0)


@checked
def demo_pairs(
    kind: str = "agreement", count: Positive = 50, *, lures: bool = True, seed: NotNegative = 5
) -> tuple[MinimalPair, ...]:
    """Returns minimal pairs from the demo models' grammar, with cues and lures.

    They are from the test split, with a preference for unseen combinations of subject and verb.

    Args:
        kind: ``"agreement"`` (a verb and its subject), ``"reflexive"``, ``"determiner"``,
            ``"fact"`` or ``"name"``.
        count: Number of pairs.
        lures: Whether to take only sentences with a lure (attractor) for the wrong answer.
        seed: Random seed.

    Raises:
        InvalidInput: If there is no such kind, or it has no lures.
    """
    from tl_contextmix.demo_models.pairs import KINDS, minimal_pairs

    if kind not in KINDS or (lures and not KINDS[kind]):
        raise InvalidInput(
            "the grammar has no such pairs",
            f"kind={kind!r}, lures={lures}",
            f"one of {list(KINDS)}; with lures {[k for k, tempted in KINDS.items() if tempted]}",
            "Choose one of these, or set lures=False.",
        )
    return tuple(MinimalPair(*pair) for pair in minimal_pairs(kind, count, lures, seed))


@checked
def load_minimal_pairs(
    path: FilePath, *, cues: Literal["given", "derived"] = "given"
) -> tuple[MinimalPair, ...]:
    """Reads minimal pairs from a local file with one JSON object per line.

    The format is BLiMP's (Warstadt et al. 2020): ``sentence_good`` and ``sentence_bad``, which are
    compared to find the word that differs. Optional fields are ``cues`` and ``lures``: lists of
    words of the good sentence, or of character spans ``[start, stop]`` for words that occur more
    than once. All other fields are ignored, and empty lines skipped.

    BLiMP has no cues. For the five of its sets that Mohebbi et al. (2023) use, they follow from
    the template: the words of an anaphor's antecedent, the noun of a determiner, the noun that a
    verb agrees with (the noun next to the verb is the lure). The authors take them from a parser
    and a coreference resolver, which in "a lot of girls" see ``lot`` as the subject.

    Args:
        path: The file.
        cues: ``"given"``: those in the fields ``cues`` and ``lures``, or none. ``"derived"``: where
            a line has no such fields, those of the rule for its ``UID``.

    Raises:
        InvalidInput: If there is no such file.
        FileFormatError: If a line is invalid, or no cues can be derived for it; the message has its
            number.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, TypeError, ValueError) as error:
        raise InvalidInput(
            "cannot read the minimal pairs",
            f"{path!r} ({getattr(error, 'strerror', None) or error})",
            "a file with one JSON object per line",
            "Pass the path of a local file, such as one of BLiMP's.",
        ) from error
    path = Path(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _format(path, line, "bytes that are not UTF-8 text") from error
    # Not splitlines: a sentence may contain Unicode's other line separators.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise _format(path, 1, "an empty file")
    return tuple(_pair(path, number, line, cues == "derived") for number, line in lines)


def _pair(path: Path, number: int, line: str, derived: bool) -> MinimalPair:
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
        listed = [found.get(name, []) for name in ("cues", "lures")]
        for words in listed:
            if not isinstance(words, list):
                remedy = "Write [] for none."
                raise InvalidInput("cues must be a list", repr(words), "a list of words", remedy)
        cues, lures = (tuple(_place(good, word) for word in words) for words in listed)
        # Lone surrogates cannot be tokenized.
        (good + wrong).encode()
        pair = MinimalPair(good, wrong, cues, lures)
        return pair if cues or lures or not derived else _with_cues(pair, found.get("UID"))
    except UnicodeEncodeError as error:
        raise _format(path, number, "a lone surrogate") from error
    except InvalidInput as error:
        raise FileFormatError(f"line {number} of {path}: {error}") from error


def _with_cues(pair: MinimalPair, uid: object) -> MinimalPair:
    """Returns a pair with the cues that the template of its set has."""
    spans = words_of(pair.good)
    target = next(at for at, span in enumerate(spans) if span[0] == pair.target[0])
    found = derive_cues(uid, [pair.good[slice(*span)] for span in spans], target)
    cues, lures = (tuple(spans[at] for at in some) for some in found)
    return MinimalPair(pair.good, pair.bad, cues, lures)


def _place(text: str, word: Any) -> Stretch:
    """Returns the span of a word in a text."""
    if isinstance(word, list) and _ends(word) != (0, 0):
        return _ends(word)
    found = [span for span in words_of(text) if text[slice(*span)] == word]
    if len(found) != 1:
        raise InvalidInput(
            "a cue is ambiguous or missing",
            f"{word!r}, which occurs {len(found)} times in {text!r}",
            "a word that occurs once, or a character span [start, stop]",
            "Give [start, stop].",
        )
    return found[0]


def _format(path: Path, number: int, seen: str) -> FileFormatError:
    return FileFormatError(
        f"line {number} of {path} is not a minimal pair",
        seen,
        "a JSON object with the strings sentence_good and sentence_bad",
        "See BLiMP's files for examples.",
    )


def place_tokens(text: str, tokens: Tokens, row: int = 0) -> list[Stretch | None]:
    """Returns the character span of each token in a text; None for special tokens.

    Tokens are aligned with the text from left to right, ignoring spaces and case.

    Args:
        text: The text.
        tokens: Its tokens, padding included.
        row: Row of the batch.

    Raises:
        InvalidInput: If a token does not occur in the text, for example because it was normalized.
    """
    places = [index for index, char in enumerate(text) if not char.isspace()]
    plain = _lower(text[index] for index in places)
    result: list[Stretch | None] = []
    unread: list[int] = []  # tokens without matching text, until the next that matches
    at = 0

    def spread(stretch: Stretch) -> None:
        # Their boundaries are unknown, so each gets the whole span.
        for index in unread:
            result[index] = stretch

    strings, mask = tokens.strings[row], tokens.mask[row].tolist()
    # Tokens that share a character share its place.
    for first, last in whole_characters(strings):
        piece, real = join_pieces(strings[first:last]), mask[first]
        word = _lower("".join(piece.split()))
        if at and not plain.startswith(word, at):
            word = word.removeprefix("##")
        start = plain.find(word, at) if unread else at
        unknown = has_parts(piece) or piece.strip().lower().strip("<[]>") == "unk"
        if real and unknown and not plain.startswith(word, at):
            unread += range(first, last)
            result += [None] * (last - first)
        elif not real or not word or start < 0 or not plain.startswith(word, start):
            result += [None] * (last - first)
        else:
            if start > at:
                spread((places[at], places[start - 1] + 1))
            unread, at = [], start + len(word)
            result += [(places[start], places[at - 1] + 1)] * (last - first)
    if unread and at < len(plain):
        spread((places[at], places[-1] + 1))
        at = len(plain)
    if at < len(plain):
        raise InvalidInput(
            "cannot align the tokens with the text",
            f"{[*tokens.strings[row]]} for {text!r}, from {text[places[at] :][:20]!r} on",
            "tokens that spell out the text",
            "Remove this sentence's cues, or pass texts with cues= as positions.",
        )
    return result


def _lower(chars: Iterable[str]) -> str:
    # Per character: some become two in lower case, which would shift all offsets.
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in chars)


def overlapping(places: Sequence[Stretch | None], stretch: Stretch) -> list[int]:
    """Returns the tokens that overlap a character span of the text."""
    return [
        index
        for index, place in enumerate(places)
        if place is not None and place[0] < stretch[1] and stretch[0] < place[1]
    ]
