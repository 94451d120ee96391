"""Which words decide a pair of BLiMP: rules for its templates, set by set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tl_contextmix.errors import bad

Found = tuple[list[int], list[int]]
"""Indices of the cues, and of the lures, among the words of the good sentence."""

_DETERMINERS = frozenset(
    "a an the this that these those all some most many few every each no both several "
    "any another other one two three four five ten twenty".split()
)


def _subject(words: Sequence[str]) -> int:
    """Returns the noun that a sentence begins with, after what determines it, or a name."""
    place = 3 if [word.lower() for word in words[:3]] == ["a", "lot", "of"] else 0
    while place < len(words) - 1 and words[place].lower() in _DETERMINERS:
        place += 1
    return place


def _antecedent(words: Sequence[str], target: int) -> Found:
    return [_subject(words)], []


def _noun_after(distance: int) -> Callable[[Sequence[str], int], Found]:
    def find(words: Sequence[str], target: int) -> Found:
        return [target + distance], []

    return find


def _before_verb(words: Sequence[str], target: int) -> Found:
    return [target - 1], []


def _relational(words: Sequence[str], target: int) -> Found:
    return [_subject(words)], [target - 1]


# The five sets of Mohebbi et al. 2023. Cues are what they name: antecedent, noun, subject.
RULES: dict[str, Callable[[Sequence[str], int], Found]] = {
    "anaphor_number_agreement": _antecedent,
    "determiner_noun_agreement_2": _noun_after(1),
    "determiner_noun_agreement_with_adj_2": _noun_after(2),
    "distractor_agreement_relational_noun": _relational,
    "regular_plural_subject_verb_agreement_1": _before_verb,
}


def derive_cues(uid: object, words: Sequence[str], target: int) -> Found:
    """Returns the words that decide which sentence is good, and those that tempt to the other.

    Args:
        uid: BLiMP's name of the set.
        words: Words of the good sentence.
        target: Index of the word that differs.

    Raises:
        InvalidInput: If there is no rule for the set, or its rule does not fit the sentence.
    """
    rule = RULES.get(str(uid))
    if rule is None:
        raise bad(
            "there is no rule for the cues of this set",
            f"UID {uid!r}",
            f"one of {[*RULES]}",
            "Give the words that decide in a field 'cues', or read the file with cues='given'.",
        )
    cues, lures = rule(words, target)
    places = [*cues, *lures]
    if not all(0 <= one < len(words) and one != target for one in places) or {*cues} & {*lures}:
        raise bad(
            f"the rule of {uid} does not fit this sentence",
            " ".join(words),
            "a sentence of BLiMP's template",
            "Give its cues in a field 'cues'.",
        )
    return cues, lures
