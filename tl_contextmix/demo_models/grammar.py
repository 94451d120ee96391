"""Synthetic English whose every decision comes with its reason.

The grammar writes sentences such as "the keys to the cabinet are old ." and knows, for every word
that other words *determine*, which ones they are. Such a place is a `Site`: the verb "are" is
determined by "keys" (the cue), not by "cabinet" (the lure), and the minimally different wrong word
is "is". Cues are a ground-truth rationale: a context-mixing map of a model that has learned the
grammar should point at them.

Phenomena: number agreement with attractors (prepositional phrases, subject and object relative
clauses), reflexive pronouns, determiner-noun agreement, facts about countries, and copying a name.

Two kinds of pairs are held out of training, so that a test measures the rule and not the memory of
a pair: a share of all (subject noun, agreeing verb) pairs and a share of all pairs of names.
Standard library only; deterministic by seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tl_contextmix.demo_models import lexicon as lex
from tl_contextmix.demo_models.lexicon import NounClass, VerbForms, known_words

__all__ = ["Grammar", "Sentence", "Shares", "Site", "known_words"]

Split = Literal["train", "test"]
SiteKind = Literal["agreement", "reflexive", "determiner", "fact", "name"]

MAX_WORDS = 26
"""Longer sentences are thrown away and drawn again."""

_CLASSES: tuple[NounClass, ...] = ("person", "animal", "thing")
_FACT_PATTERNS = (
    "capital_of",
    "is_the_capital",
    "people_in_country",
    "city_is_in",
    "is_spoken_in",
    "people_in_city",
)


@dataclass(frozen=True)
class Site:
    """A position whose word is determined by other words of the sentence."""

    kind: SiteKind
    target: int
    """Index of the determined word."""
    cues: tuple[int, ...]
    """Indices of the words that determine it."""
    lures: tuple[int, ...]
    """Indices of words of the cues' type with the other feature value (attractors)."""
    wrong: str
    """The minimally different word that would be ungrammatical or false here."""
    subtype: str = ""
    """Construction: "simple", "pp1", "pp2", "src", "orc", ...; for facts, the pattern."""
    held_out: bool = False
    """Whether the pair that decides this site never occurs in the training split."""


@dataclass(frozen=True)
class Shares:
    """Probabilities of the sentence types; what is left goes to name copying."""

    agreement: float = 0.66
    reflexive: float = 0.13
    fact: float = 0.11


@dataclass
class Sentence:
    """Words and the sites among them."""

    words: list[str] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)

    def add(self, word: str) -> int:
        """Appends `word` and returns its index."""
        self.words.append(word)
        return len(self.words) - 1

    def add_text(self, text: str) -> None:
        """Appends the words of `text`, separated by spaces."""
        self.words.extend(text.split())

    @property
    def text(self) -> str:
        """The sentence as the tokenizers expect it: words joined by single spaces."""
        return " ".join(self.words)


@dataclass(frozen=True)
class _NounPhrase:
    lemma: str
    plural: bool
    head: int
    determiner: int
    noun_class: NounClass


@dataclass(frozen=True)
class _Subject:
    phrase: _NounPhrase
    nouns: tuple[tuple[int, bool], ...]
    """(index, is plural) of the nouns in the modifiers: the possible lures."""
    subtype: str


def _share(text: str, one_in: int) -> bool:
    """Whether `text` falls into a fixed pseudo-random share of ``1 / one_in`` of all texts."""
    return zlib.crc32(text.encode()) % one_in == 0


def is_held_out(noun: str, verb: str) -> bool:
    """Whether the training split never joins subject `noun` (singular) to `verb` (plural form)."""
    return _share(f"{noun}|{verb}", 8)


class Grammar:
    """A stream of sentences, the same one for the same arguments.

    Args:
        seed: Seed of the stream.
        split: "train" leaves the held-out pairs away, "test" prefers them.
        shares: How often each type of sentence is drawn.
    """

    def __init__(self, seed: int, split: Split = "train", shares: Shares | None = None) -> None:
        self._random = random.Random(seed)
        self._split = split
        self._shares = shares or Shares()

    def sentences(self, count: int) -> list[Sentence]:
        """Returns the next `count` sentences."""
        return [self.sentence() for _ in range(count)]

    def sentence(self) -> Sentence:
        """Returns the next sentence, of at most `MAX_WORDS` words."""
        while True:
            sentence = self._draw_type()
            if len(sentence.words) <= MAX_WORDS:
                return sentence

    def agreement(self) -> Sentence:
        """Returns a sentence whose verbs agree in number with their subjects."""
        sentence = Sentence()
        if self._random.random() < 0.12:
            sentence.add("the")
            sentence.add(self._random.choice(lex.PEOPLE)[0])
            sentence.add_text("says that")
        subject = self._subject(sentence)
        self._verb_phrase(sentence, subject)
        sentence.add(".")
        return sentence

    def reflexive(self) -> Sentence:
        """Returns a sentence that ends in a reflexive pronoun."""
        sentence = Sentence()
        subject = self._subject(sentence, "person")
        phrase = subject.phrase
        cues = self._subject_cues(sentence, phrase)
        if self._random.random() < 0.6:
            forms = self._pick_verb(lex.REFLEXIVE_VERBS, phrase.lemma)
            # Its ending shows the subject's number too.
            cues += (self._verb(sentence, subject, forms),)
        else:
            sentence.add(self._random.choice(lex.PAST_REFLEXIVE))
        right, wrong = self._reflexive_pronouns(phrase)
        target = sentence.add(right)
        lures = _other_number(subject.nouns, phrase.plural)
        sentence.sites.append(Site("reflexive", target, cues, lures, wrong, subject.subtype))
        sentence.add(".")
        return sentence

    def fact(self) -> Sentence:
        """Returns a sentence about a country, its capital and its language.

        The pattern "people in <capital> speak <language>" needs two facts. A quarter of the
        countries never occur in it during training (subtype "people_in_city", held out).
        """
        entry = self._random.choice(lex.FACTS)
        country, capital, language = entry
        pattern = self._random.choice(_FACT_PATTERNS)
        held_out = pattern == "people_in_city" and _share(country, 4)
        if held_out and self._split == "train":
            return self.fact()
        text, cue, target = {
            "capital_of": (f"the capital of {country} is {capital} .", 3, 5),
            "is_the_capital": (f"{capital} is the capital of {country} .", 0, 5),
            "people_in_country": (f"people in {country} speak {language} .", 2, 4),
            "city_is_in": (f"the city of {capital} is in {country} .", 3, 6),
            "is_spoken_in": (f"{language} is spoken in {country} .", 0, 4),
            "people_in_city": (f"people in {capital} speak {language} .", 2, 4),
        }[pattern]
        sentence = Sentence()
        sentence.add_text(text)
        column = entry.index(sentence.words[target])
        others = [other[column] for other in lex.FACTS if other[0] != country]
        wrong = self._random.choice(others)
        sentence.sites.append(Site("fact", target, (cue,), (), wrong, pattern, held_out))
        return sentence

    def name(self) -> Sentence:
        """Returns a sentence in which a giver is named twice and the receiver must be copied."""
        giver, receiver = self._names()
        in_order = self._random.random() < 0.5
        first, second = (giver, receiver) if in_order else (receiver, giver)
        form = self._random.random()
        place = self._random.choice(lex.PLACES)
        gift = self._random.choice(lex.GIFTS)
        if form < 0.5:
            subtype, opening = "when", f"when {first} and {second} went to the {place} ,"
        else:
            subtype, opening = "met", f"{first} met {second} at the {place} and then"
        sentence = Sentence()
        sentence.add_text(f"{opening} {giver} gave a {gift} to {receiver} .")
        target = len(sentence.words) - 2
        before = sentence.words[:target]
        cues = tuple(i for i, word in enumerate(before) if word == receiver)
        lures = tuple(i for i, word in enumerate(before) if word == giver)
        sentence.sites.append(Site("name", target, cues, lures, giver, subtype, True))
        return sentence

    def _draw_type(self) -> Sentence:
        draw = self._random.random()
        shares = self._shares
        if draw < shares.agreement:
            return self.agreement()
        if draw < shares.agreement + shares.reflexive:
            return self.reflexive()
        if draw < shares.agreement + shares.reflexive + shares.fact:
            return self.fact()
        return self.name()

    def _names(self) -> tuple[str, str]:
        """Draws two names; a sixth of all pairs is kept for the test split."""
        while True:
            first, second = self._random.sample(lex.NAMES, 2)
            if _share("|".join(sorted((first, second))), 6) == (self._split == "test"):
                return first, second

    def _noun_phrase(self, sentence: Sentence, noun_class: NounClass | None = None) -> _NounPhrase:
        rng = self._random
        chosen = noun_class or rng.choices(_CLASSES, (6, 2, 2))[0]
        singular, plural_form = rng.choice(lex.NOUNS[chosen])
        plural = rng.random() < 0.5
        word, other = (plural_form, singular) if plural else (singular, plural_form)
        determiner = "the"
        if rng.random() >= 0.7:
            determiner = rng.choice(lex.PLURAL_DETERMINERS if plural else lex.SINGULAR_DETERMINERS)
        first = sentence.add(determiner)
        if rng.random() < 0.25:
            sentence.add(rng.choice(lex.THING_ADJECTIVES if chosen == "thing" else lex.ADJECTIVES))
        head = sentence.add(word)
        if determiner != "the":
            subtype = "adjective" if head > first + 1 else "adjacent"
            sentence.sites.append(Site("determiner", head, (first,), (), other, subtype))
        return _NounPhrase(singular, plural, head, first, chosen)

    def _subject(self, sentence: Sentence, noun_class: NounClass | None = None) -> _Subject:
        """Writes a subject, in three of five cases with a modifier that holds possible lures."""
        phrase = self._noun_phrase(sentence, noun_class)
        draw = self._random.random()
        if draw < 0.30:
            return self._prepositional(sentence, phrase)
        if draw < 0.45 and phrase.noun_class != "thing":
            return self._subject_relative(sentence, phrase)
        if draw < 0.60:
            return self._object_relative(sentence, phrase)
        return _Subject(phrase, (), "simple")

    def _prepositional(self, sentence: Sentence, phrase: _NounPhrase) -> _Subject:
        rng = self._random
        count = 1 if rng.random() < 0.75 else 2
        nouns = []
        for _ in range(count):
            if phrase.noun_class == "thing":
                sentence.add(rng.choice(lex.THING_PREPOSITIONS))
                inner_class = rng.choice(("thing", "thing", "thing", "person"))
            else:
                sentence.add(rng.choice(lex.PREPOSITIONS))
                inner_class = rng.choice(_CLASSES)
            inner = self._noun_phrase(sentence, inner_class)
            nouns.append((inner.head, inner.plural))
        return _Subject(phrase, tuple(nouns), f"pp{count}")

    def _subject_relative(self, sentence: Sentence, phrase: _NounPhrase) -> _Subject:
        sentence.add("that")
        forms = self._pick_verb(lex.TRANSITIVE, phrase.lemma)
        self._verb(sentence, _Subject(phrase, (), "in_src"), forms)
        inner = self._noun_phrase(sentence)
        return _Subject(phrase, ((inner.head, inner.plural),), "src")

    def _object_relative(self, sentence: Sentence, phrase: _NounPhrase) -> _Subject:
        if self._random.random() < 0.7:
            sentence.add("that")
        inner = self._noun_phrase(sentence, "person")
        forms = self._pick_verb(lex.TRANSITIVE, inner.lemma)
        outer = ((phrase.head, phrase.plural),)
        self._verb(sentence, _Subject(inner, outer, "in_orc"), forms)
        return _Subject(phrase, ((inner.head, inner.plural),), "orc")

    def _verb_phrase(self, sentence: Sentence, subject: _Subject, again: bool = True) -> None:
        if self._random.random() < 0.18:
            sentence.add(self._random.choice(lex.ADVERBS))
        draw = self._random.random()
        if subject.phrase.noun_class == "thing":
            self._thing_predicate(sentence, subject, draw)
        else:
            self._person_predicate(sentence, subject, draw)
        if again and self._random.random() < 0.10:
            sentence.add("and")
            conjoined = _Subject(subject.phrase, subject.nouns, "vpconj")
            self._verb_phrase(sentence, conjoined, again=False)

    def _thing_predicate(self, sentence: Sentence, subject: _Subject, draw: float) -> None:
        if 0.7 <= draw < 0.75:
            sentence.add_text("will fall")
            return
        if draw < 0.7:
            tense = lex.BE_PRESENT if draw < 0.6 else lex.BE_PAST
            self._verb(sentence, subject, tense, listed=False)
            sentence.add(self._random.choice(lex.THING_ADJECTIVES))
            return
        forms = self._lexical_verb(sentence, subject, lex.THING_VERBS)
        if forms[0] in lex.LINKING_THING_VERBS:
            sentence.add(self._random.choice(lex.THING_ADJECTIVES))

    def _person_predicate(self, sentence: Sentence, subject: _Subject, draw: float) -> None:
        rng = self._random
        if draw < 0.28:
            self._lexical_verb(sentence, subject, lex.INTRANSITIVE)
        elif draw < 0.50:
            self._lexical_verb(sentence, subject, lex.TRANSITIVE)
            self._noun_phrase(sentence)
        elif draw < 0.72:
            tense = lex.BE_PRESENT if draw < 0.65 else lex.BE_PAST
            self._verb(sentence, subject, tense, listed=False)
            sentence.add(rng.choice(lex.ADJECTIVES))
        elif draw < 0.82:
            self._verb(sentence, subject, lex.BE_PRESENT, listed=False)
            sentence.add(rng.choice(lex.PARTICIPLES))
        elif draw < 0.90:
            self._verb(sentence, subject, lex.HAVE, listed=False)
            sentence.add(rng.choice(lex.PAST_INTRANSITIVE))
        elif draw < 0.95:
            sentence.add("will")
            sentence.add(rng.choice(lex.INTRANSITIVE)[0])
        else:
            sentence.add(rng.choice(lex.PAST_INTRANSITIVE))

    def _lexical_verb(
        self, sentence: Sentence, subject: _Subject, table: Sequence[VerbForms]
    ) -> VerbForms:
        forms = self._pick_verb(table, subject.phrase.lemma)
        self._verb(sentence, subject, forms)
        return forms

    def _pick_verb(self, table: Sequence[VerbForms], lemma: str) -> VerbForms:
        """Draws a verb for a subject: never a held-out pair in training, preferably one in test."""
        wanted = self._split == "test"
        fitting = [forms for forms in table if is_held_out(lemma, forms[0]) == wanted]
        return self._random.choice(fitting or table)

    def _verb(
        self, sentence: Sentence, subject: _Subject, forms: VerbForms, listed: bool = True
    ) -> int:
        """Writes the form of a verb that agrees with its subject, marks it and returns its index.

        A verb that `_pick_verb`, which keeps pairs held out, has drawn is ``listed``. Auxiliaries
        are few, so none is held out: every noun is seen with every one of them.
        """
        phrase = subject.phrase
        right, wrong = forms if phrase.plural else (forms[1], forms[0])
        target = sentence.add(right)
        cues = self._subject_cues(sentence, phrase)
        lures = _other_number(subject.nouns, phrase.plural)
        held_out = listed and is_held_out(phrase.lemma, forms[0])
        site = Site("agreement", target, cues, lures, wrong, subject.subtype, held_out)
        sentence.sites.append(site)
        return target

    def _subject_cues(self, sentence: Sentence, phrase: _NounPhrase) -> tuple[int, ...]:
        """Head noun, and its determiner where that shows the number too ("the" does not)."""
        if sentence.words[phrase.determiner] == "the":
            return (phrase.head,)
        return (phrase.head, phrase.determiner)

    def _reflexive_pronouns(self, phrase: _NounPhrase) -> tuple[str, str]:
        """Returns the right pronoun and the one of the other number."""
        gender = lex.GENDER[phrase.lemma]
        if phrase.plural:
            return "themselves", "herself" if gender == "feminine" else "himself"
        if gender == "either":
            return self._random.choice(("himself", "herself")), "themselves"
        return "himself" if gender == "masculine" else "herself", "themselves"


def _other_number(nouns: Sequence[tuple[int, bool]], plural: bool) -> tuple[int, ...]:
    """Indices of the nouns whose number differs from the subject's."""
    return tuple(index for index, is_plural in nouns if is_plural != plural)
