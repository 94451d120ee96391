"""Synthetic English sentences with their French translation and the reason for every French word.

French forms need context that English does not show: the gender of a noun decides the article, the
adjective and the pronoun; the number of a subject decides a past-tense verb; "bat" is an animal if
it sleeps and an object if it burns. For each French word the grammar gives the English words that
determine its exact form and the kind of context it needs, so that one can ask after which encoder
layer that context has arrived.

Some (noun, adjective) pairs are held out of training. Standard library only; deterministic by
seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from tl_contextmix.demo_models import lexicon_fr as lex
from tl_contextmix.demo_models.lexicon_fr import Adjective, Gender, NounClass, Verb

Split = Literal["train", "test"]
Context = Literal[
    "dictionary",
    "determiner",
    "adjective",
    "verb_number",
    "pronoun",
    "sense",
    "relative",
    "clitic",
]
"""What a French word needs beyond its own English word.

dictionary: nothing. determiner, adjective: gender and number of the noun (the adjective also moves
behind it). verb_number: the number of the subject, where the English past tense does not show it.
pronoun: gender of the antecedent. sense: the predicate that tells which meaning an ambiguous noun
has. relative: whether "that" is the subject (qui) or the object (que) of its clause. clitic: "them"
moves before the verb.
"""

MAX_ENGLISH_WORDS = 20
MAX_FRENCH_WORDS = 22

_BEFORE_VOWEL = {
    "le": "l'",
    "la": "l'",
    "ce": "cet",
    "ma": "mon",
    "ta": "ton",
    "sa": "son",
}
"""Form of a singular determiner before a noun that begins with a vowel sound."""
_VOWELS = "aeiouhéîê"

_PRONOUNS: dict[tuple[Gender, bool], str] = {
    ("masculine", False): "il",
    ("feminine", False): "elle",
    ("masculine", True): "ils",
    ("feminine", True): "elles",
}
"""French subject pronoun by gender and whether it is plural."""


@dataclass
class Translation:
    """An English sentence and its French translation, word by word."""

    english: list[str] = field(default_factory=list)
    french: list[str] = field(default_factory=list)
    sources: list[tuple[int, ...]] = field(default_factory=list)
    """Per French word the English indices that determine it, its dictionary source first."""
    contexts: list[Context] = field(default_factory=list)
    """Per French word the kind of context it needs."""

    @property
    def source_text(self) -> str:
        """The English sentence, words joined by single spaces."""
        return " ".join(self.english)

    @property
    def target_text(self) -> str:
        """The French sentence, words joined by single spaces."""
        return " ".join(self.french)

    def add_english(self, word: str) -> int:
        """Appends an English word and returns its index."""
        self.english.append(word)
        return len(self.english) - 1

    def add_french(
        self, word: str, sources: Sequence[int], context: Context = "dictionary"
    ) -> None:
        """Appends a French word with its reason."""
        self.french.append(word)
        self.sources.append(tuple(sources))
        self.contexts.append(context)


@dataclass(frozen=True)
class _Phrase:
    """A noun phrase whose English is written and whose French is known."""

    french: str
    gender: Gender
    plural: bool
    noun_class: NounClass
    determiner: str
    determiner_index: int
    noun_index: int
    adjective: tuple[Adjective, int] | None = None
    disambiguator: int | None = None
    """Index of the predicate that tells the meaning of an ambiguous noun."""


@dataclass(frozen=True)
class _UsedVerb:
    """A verb whose English is written."""

    verb: Verb
    index: int
    subject: _Phrase
    past: bool


_FrenchWriter = Callable[[Translation], None]
"""Writes the French of something whose English is written already."""


def _nothing(_: Translation) -> None:
    """Writes nothing: the French of an absent part."""


def is_held_out(noun: str, adjective: str) -> bool:
    """Whether training never joins `adjective` to `noun` (English, singular) in a noun phrase."""
    return zlib.crc32(f"{noun}|{adjective}".encode()) % 8 == 0


class TranslationGrammar:
    """A stream of translations, the same one for the same arguments.

    Args:
        seed: Seed of the stream.
        split: "train" leaves the held-out pairs away, "test" prefers them.
    """

    def __init__(self, seed: int, split: Split = "train") -> None:
        self._random = random.Random(seed)
        self._split = split

    def translations(self, count: int) -> list[Translation]:
        """Returns the next `count` translations."""
        return [self.translation() for _ in range(count)]

    def translation(self) -> Translation:
        """Returns the next translation within the length limits."""
        while True:
            pair = self._draw_type()
            fits = len(pair.english) <= MAX_ENGLISH_WORDS and len(pair.french) <= MAX_FRENCH_WORDS
            if fits:
                return pair

    def ambiguous(self) -> Translation:
        """Returns a sentence about an ambiguous noun, whose predicate tells the meaning."""
        rng = self._random
        pair = Translation()
        past, plural, living = (rng.random() < 0.5 for _ in range(3))
        noun = rng.choice(lex.AMBIGUOUS_NOUNS)
        noun_class: NounClass = "person" if living else "thing"
        singular, plural_form, gender = noun.person if living else noun.thing
        determiner = rng.choice(_determiners(plural))
        determiner_index = pair.add_english(determiner)
        noun_index = pair.add_english(noun.english[plural])
        modifier = self._prepositional(pair) if rng.random() < 0.4 else _nothing
        bare = _Phrase(
            french=plural_form if plural else singular,
            gender=gender,
            plural=plural,
            noun_class=noun_class,
            determiner=determiner,
            determiner_index=determiner_index,
            noun_index=noun_index,
        )
        if rng.random() < 0.5:
            verb = rng.choice(lex.INTRANSITIVE if living else lex.THING_VERBS)
            used = _write_verb(pair, verb, bare, past)
            complement, disambiguator = _nothing, used.index
        else:
            only = [a for a in lex.ADJECTIVES if a.classes == {noun_class}]
            used = _write_verb(pair, lex.BE, bare, past)
            complement, disambiguator = self._predicate_adjective(pair, bare, only)
        dot = pair.add_english(".")
        _write_phrase(pair, replace(bare, disambiguator=disambiguator))
        modifier(pair)
        _write_french_verb(pair, used)
        complement(pair)
        pair.add_french(".", [dot])
        return pair

    def pronoun(self) -> Translation:
        """Returns "X verbs Y because it is adjective": French needs the gender of Y.

        "it" can only be the thing Y; "they" means Y only if X is singular, so sentences with two
        plurals are drawn again.
        """
        rng = self._random
        while True:
            pair = Translation()
            past = rng.random() < 0.5
            subject = self._noun_phrase(pair, "person")
            main = _write_verb(pair, rng.choice(lex.TRANSITIVE), subject, past)
            thing = self._noun_phrase(pair, "thing")
            if not (subject.plural and thing.plural):
                break
        because = pair.add_english("because")
        pronoun = pair.add_english("they" if thing.plural else "it")
        second = _write_verb(pair, lex.BE, thing, past)
        complement, _ = self._predicate_adjective(pair, thing, _adjectives_for("thing"))
        dot = pair.add_english(".")

        _write_phrase(pair, subject)
        _write_french_verb(pair, main)
        _write_phrase(pair, thing)
        pair.add_french("car", [because])
        word = _PRONOUNS[thing.gender, thing.plural]
        pair.add_french(word, [pronoun, thing.noun_index], "pronoun")
        _write_french_verb(pair, second)
        complement(pair)
        pair.add_french(".", [dot])
        return pair

    def _draw_type(self) -> Translation:
        draw = self._random.random()
        past = self._random.random() < 0.5
        if draw < 0.10:
            return self.ambiguous()
        if draw < 0.25:
            return self.pronoun()
        return self._plain(past)

    def _plain(self, past: bool) -> Translation:
        """Returns subject, verb and complement, with a possible modifier of the subject."""
        pair = Translation()
        subject, modifier = self._subject(pair)
        if subject.noun_class == "thing":
            used, before_verb, after_verb = self._thing_predicate(pair, subject, past)
        else:
            used, before_verb, after_verb = self._person_predicate(pair, subject, past)
        dot = pair.add_english(".")
        _write_phrase(pair, subject)
        modifier(pair)
        before_verb(pair)
        _write_french_verb(pair, used)
        after_verb(pair)
        pair.add_french(".", [dot])
        return pair

    def _thing_predicate(
        self, pair: Translation, subject: _Phrase, past: bool
    ) -> tuple[_UsedVerb, _FrenchWriter, _FrenchWriter]:
        """Writes the English predicate; returns the verb and the French before and after it."""
        rng = self._random
        if rng.random() < 0.5:
            used = _write_verb(pair, rng.choice(lex.THING_VERBS), subject, past)
            return used, _nothing, _nothing
        used = _write_verb(pair, lex.BE, subject, past)
        complement, _ = self._predicate_adjective(pair, subject, _adjectives_for("thing"))
        return used, _nothing, complement

    def _person_predicate(
        self, pair: Translation, subject: _Phrase, past: bool
    ) -> tuple[_UsedVerb, _FrenchWriter, _FrenchWriter]:
        """As `_thing_predicate`, for persons and animals."""
        rng = self._random
        draw = rng.random()
        if draw < 0.35:
            used = _write_verb(pair, rng.choice(lex.INTRANSITIVE), subject, past)
            return used, _nothing, _nothing
        if draw < 0.55:
            used = _write_verb(pair, lex.BE, subject, past)
            complement, _ = self._predicate_adjective(pair, subject, _adjectives_for("person"))
            return used, _nothing, complement
        used = _write_verb(pair, rng.choice(lex.TRANSITIVE), subject, past)
        if draw < 0.70:
            them = pair.add_english("them")
            return used, lambda p: p.add_french("les", [them], "clitic"), _nothing
        thing = self._noun_phrase(pair)
        return used, _nothing, lambda p: _write_phrase(p, thing)

    def _predicate_adjective(
        self, pair: Translation, subject: _Phrase, fitting: Sequence[Adjective]
    ) -> tuple[_FrenchWriter, int]:
        """Writes an English adjective; returns the writer of the French one, and its index."""
        adjective = self._random.choice(fitting)
        index = pair.add_english(adjective.english)
        form = adjective.form(subject.gender, subject.plural)
        return lambda p: p.add_french(form, [index, subject.noun_index], "adjective"), index

    def _noun_phrase(self, pair: Translation, noun_class: NounClass | None = None) -> _Phrase:
        """Writes the English of a noun phrase."""
        rng = self._random
        chosen = noun_class or rng.choices(("person", "thing"), (6, 4))[0]
        plural = rng.random() < 0.5
        noun = rng.choice(lex.NOUNS[chosen])
        determiner = rng.choice(_determiners(plural)) if rng.random() < 0.4 else "the"
        determiner_index = pair.add_english(determiner)
        adjective = None
        if rng.random() < 0.35:
            drawn = self._attribute(noun.english[0], chosen)
            adjective = (drawn, pair.add_english(drawn.english))
        return _Phrase(
            french=noun.french[plural],
            gender=noun.gender,
            plural=plural,
            noun_class=chosen,
            determiner=determiner,
            determiner_index=determiner_index,
            noun_index=pair.add_english(noun.english[plural]),
            adjective=adjective,
        )

    def _attribute(self, noun: str, noun_class: NounClass) -> Adjective:
        """Draws an adjective: never a held-out pair in training, preferably one in test."""
        fitting = _adjectives_for(noun_class)
        wanted = self._split == "test"
        preferred = [a for a in fitting if is_held_out(noun, a.english) == wanted]
        return self._random.choice(preferred or fitting)

    def _subject(self, pair: Translation) -> tuple[_Phrase, _FrenchWriter]:
        """Writes a subject; returns it and the writer of its modifier's French."""
        rng = self._random
        subject = self._noun_phrase(pair)
        draw = rng.random()
        past = rng.random() < 0.5
        if draw < 0.20:
            return subject, self._prepositional(pair)
        if draw < 0.32 and subject.noun_class == "person":
            return subject, self._subject_relative(pair, subject, past)
        if draw < 0.46:
            return subject, self._object_relative(pair, past)
        return subject, _nothing

    def _prepositional(self, pair: Translation) -> _FrenchWriter:
        english, french = self._random.choice(lex.PREPOSITIONS)
        index = pair.add_english(english)
        inner = self._noun_phrase(pair)

        def write(p: Translation) -> None:
            p.add_french(french, [index])
            _write_phrase(p, inner)

        return write

    def _subject_relative(self, pair: Translation, subject: _Phrase, past: bool) -> _FrenchWriter:
        that = pair.add_english("that")
        used = _write_verb(pair, self._random.choice(lex.TRANSITIVE), subject, past)
        inner = self._noun_phrase(pair)

        def write(p: Translation) -> None:
            p.add_french("qui", [that, used.index], "relative")
            _write_french_verb(p, used)
            _write_phrase(p, inner)

        return write

    def _object_relative(self, pair: Translation, past: bool) -> _FrenchWriter:
        that = pair.add_english("that")
        inner = self._noun_phrase(pair, "person")
        used = _write_verb(pair, self._random.choice(lex.TRANSITIVE), inner, past)
        # Only "un" and "une" begin with a vowel. That a determiner follows "that" at all is what
        # makes it the object, so the determiner is a source in both cases.
        word = "qu'" if inner.determiner == "a" else "que"

        def write(p: Translation) -> None:
            p.add_french(word, [that, inner.determiner_index], "relative")
            _write_phrase(p, inner)
            _write_french_verb(p, used)

        return write


def _determiners(plural: bool) -> list[str]:
    column = 2 if plural else 0
    return [word for word, forms in lex.DETERMINERS.items() if forms[column]]


def _adjectives_for(noun_class: NounClass) -> list[Adjective]:
    return [adjective for adjective in lex.ADJECTIVES if noun_class in adjective.classes]


def _write_verb(pair: Translation, verb: Verb, subject: _Phrase, past: bool) -> _UsedVerb:
    """Writes the English form of a verb."""
    forms = verb.past if past else verb.present
    return _UsedVerb(verb, pair.add_english(forms[subject.plural]), subject, past)


def _write_french_verb(pair: Translation, used: _UsedVerb) -> None:
    english = used.verb.past if used.past else used.verb.present
    french = used.verb.french_past if used.past else used.verb.french_present
    word = french[used.subject.plural]
    if english[0] != english[1]:
        pair.add_french(word, [used.index])
    else:  # the English form is the same for one and for many
        pair.add_french(word, [used.index, used.subject.noun_index], "verb_number")


def _write_phrase(pair: Translation, phrase: _Phrase) -> None:
    """Writes the French of a noun phrase: determiner, noun, adjective."""
    noun = phrase.noun_index
    # The meaning decides the gender, so whatever tells it decides the determiner too.
    meaning = [] if phrase.disambiguator is None else [phrase.disambiguator]
    determiner_sources = [phrase.determiner_index, noun, *meaning]
    pair.add_french(_french_determiner(phrase), determiner_sources, "determiner")
    pair.add_french(phrase.french, [noun, *meaning], "sense" if meaning else "dictionary")
    if phrase.adjective:
        adjective, index = phrase.adjective
        pair.add_french(adjective.form(phrase.gender, phrase.plural), [index, noun], "adjective")


def _french_determiner(phrase: _Phrase) -> str:
    column = 2 if phrase.plural else int(phrase.gender == "feminine")
    form = lex.DETERMINERS[phrase.determiner][column]
    assert form is not None, (phrase.determiner, phrase.plural)
    if not phrase.plural and phrase.french[0] in _VOWELS:
        return _BEFORE_VOWEL.get(form, form)
    return form
