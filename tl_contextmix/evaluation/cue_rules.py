"""Which words decide a pair of BLiMP: rules for its templates, set by set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tl_contextmix.errors import InvalidInput

Found = tuple[list[int], list[int]]
"""Indices of the cues, and of the lures, among the words of the good sentence."""

_DETERMINERS = frozenset(
    "a an the this that these those all some most many few every each no both several "
    "any another other one two three four five ten twenty".split()
)


# How the nouns and names of two words in these sets begin.
_COMPOUNDS = (
    *("art galler", "college campus", "current event", "great lakes", "grocery store"),
    *("harvard university", "high school", "movie theater", "newspaper article"),
    *("public park", "winston churchill"),
)


def _after_determiner(words: Sequence[str]) -> int:
    """Returns the first word that is no determiner."""
    place = 3 if [word.lower() for word in words[:3]] == ["a", "lot", "of"] else 0
    while place < len(words) - 1 and words[place].lower() in _DETERMINERS:
        place += 1
    return place


def _antecedent(words: Sequence[str], target: int) -> Found:
    """Returns the words of the phrase that the sentence begins with."""
    noun = _after_determiner(words)
    compound = " ".join(words[noun : noun + 2]).lower().startswith(_COMPOUNDS)
    return [*range(noun + 1 + compound)], []


def _last_noun(words: Sequence[str], target: int) -> Found:
    """Returns the noun of the determiner: these sentences end with it."""
    nouns = [at for at in range(target + 1, len(words)) if words[at][0].isalpha()]
    return nouns[-1:], []


def _before_verb(words: Sequence[str], target: int) -> Found:
    return [target - 1], []


def _before_preposition(words: Sequence[str], target: int) -> Found:
    """Returns the noun before "of" or "about", and the noun that stands next to the verb."""
    between = range(_after_determiner(words), target)
    found = [at - 1 for at in between if words[at] in ("of", "about")]
    return found[:1], [target - 1]


# The five sets of Mohebbi et al. 2023. Cues are what they name: antecedent, noun, subject.
RULES: dict[str, Callable[[Sequence[str], int], Found]] = {
    "anaphor_number_agreement": _antecedent,
    "determiner_noun_agreement_2": _last_noun,
    "determiner_noun_agreement_with_adj_2": _last_noun,
    "distractor_agreement_relational_noun": _before_preposition,
    "regular_plural_subject_verb_agreement_1": _before_verb,
}


def derive_cues(uid: object, words: Sequence[str], target: int) -> Found:
    """Returns the words that decide which sentence is good, and those that tempt to the other."""
    rule = RULES.get(str(uid))
    if rule is None:
        raise InvalidInput(
            "there is no rule for the cues of this set",
            f"UID {uid!r}",
            f"one of {[*RULES]}",
            "Give the words that decide in a field 'cues', or read the file with cues='given'.",
        )
    cues, lures = rule(words, target)
    places = [*cues, *lures]
    if (
        not cues
        or not all(0 <= one < len(words) and one != target for one in places)
        or {*cues} & {*lures}
    ):
        raise InvalidInput(
            f"the rule of {uid} does not fit this sentence",
            " ".join(words),
            "a sentence of BLiMP's template",
            "Give its cues in a field 'cues'.",
        )
    return cues, lures
