"""Word tables of the English demo grammar.

The order of every table is part of the data set: sentences are drawn by index, so reordering a
table changes every sentence of every seed and with them the training data of the shipped models.
"""

from __future__ import annotations

from typing import Literal

NounClass = Literal["person", "animal", "thing"]
Gender = Literal["masculine", "feminine", "either"]
VerbForms = tuple[str, str]
"""(plural form, singular form) of a verb in the present tense."""

_PEOPLE_BY_GENDER: tuple[tuple[Gender, str], ...] = (
    (
        "masculine",
        "boy/boys man/men king/kings father/fathers uncle/uncles prince/princes waiter/waiters",
    ),
    (
        "feminine",
        "girl/girls woman/women queen/queens mother/mothers aunt/aunts sister/sisters"
        " actress/actresses",
    ),
    (
        "either",
        "teacher/teachers doctor/doctors farmer/farmers student/students author/authors"
        " pilot/pilots senator/senators guard/guards child/children nurse/nurses driver/drivers"
        " lawyer/lawyers manager/managers customer/customers",
    ),
)


def _forms(text: str) -> tuple[tuple[str, str], ...]:
    """Splits ``"a/b c/d"`` into ``(("a", "b"), ("c", "d"))``."""
    return tuple((first, second) for first, second in (item.split("/") for item in text.split()))


PEOPLE = tuple(pair for _, text in _PEOPLE_BY_GENDER for pair in _forms(text))
"""(singular, plural) of every noun for a person."""

GENDER: dict[str, Gender] = {
    singular: gender for gender, text in _PEOPLE_BY_GENDER for singular, _ in _forms(text)
}
"""Grammatical gender by singular noun; ``"either"`` allows both reflexive pronouns."""

ANIMALS = _forms(
    "dog/dogs cat/cats horse/horses bird/birds cow/cows fox/foxes mouse/mice duck/ducks"
    " lion/lions wolf/wolves"
)
THINGS = _forms(
    "key/keys cabinet/cabinets book/books table/tables box/boxes car/cars house/houses tree/trees"
    " picture/pictures letter/letters door/doors window/windows lamp/lamps bottle/bottles"
    " knife/knives chair/chairs boat/boats coat/coats shelf/shelves plant/plants clock/clocks"
    " bridge/bridges"
)
NOUNS: dict[NounClass, tuple[tuple[str, str], ...]] = {
    "person": PEOPLE,
    "animal": ANIMALS,
    "thing": THINGS,
}

INTRANSITIVE = _forms(
    "laugh/laughs smile/smiles sleep/sleeps walk/walks run/runs sing/sings dance/dances wait/waits"
    " swim/swims cry/cries jump/jumps work/works travel/travels"
)
TRANSITIVE = _forms(
    "like/likes see/sees know/knows admire/admires help/helps watch/watches love/loves"
    " follow/follows visit/visits avoid/avoids hate/hates hear/hears find/finds"
)
THING_VERBS = _forms("fall/falls break/breaks look/looks stay/stays seem/seems")
LINKING_THING_VERBS = frozenset({"look", "stay", "seem"})
REFLEXIVE_VERBS = _forms(
    "hurt/hurts see/sees know/knows like/likes help/helps blame/blames trust/trusts"
)
BE_PRESENT: VerbForms = ("are", "is")
BE_PAST: VerbForms = ("were", "was")
HAVE: VerbForms = ("have", "has")
PAST_REFLEXIVE = ("hurt", "saw", "knew", "liked", "helped", "blamed", "trusted")
PAST_INTRANSITIVE = ("laughed", "smiled", "slept", "walked", "waited", "danced", "worked")
PARTICIPLES = (
    "laughing smiling sleeping walking running singing dancing waiting swimming working"
).split()

ADJECTIVES = (
    "old young tall happy sad small big red black white new strong green clever famous quiet"
).split()
THING_ADJECTIVES = "old new small big red black white green broken heavy clean empty".split()
PREPOSITIONS = ("near", "behind", "beside", "with")
THING_PREPOSITIONS = ("to", "of", "on", "under", "near", "behind", "beside", "in")
ADVERBS = ("often", "never", "always", "rarely", "still")
SINGULAR_DETERMINERS = ("this", "that", "a", "every")
PLURAL_DETERMINERS = ("these", "those", "many", "some")

NAMES = (
    "mary john anna peter lucy tom sarah david emma paul laura mark alice james helen simon"
).split()
GIFTS = ("book", "drink", "letter", "ring", "key", "coat", "lamp", "picture")
PLACES = ("park", "garden", "kitchen", "city", "school", "market", "station", "beach")

_FACTS = (
    "france/paris/french italy/rome/italian germany/berlin/german spain/madrid/spanish"
    " japan/tokyo/japanese china/beijing/chinese russia/moscow/russian greece/athens/greek"
    " portugal/lisbon/portuguese poland/warsaw/polish sweden/stockholm/swedish"
    " norway/oslo/norwegian denmark/copenhagen/danish finland/helsinki/finnish"
    " hungary/budapest/hungarian turkey/ankara/turkish romania/bucharest/romanian"
    " bulgaria/sofia/bulgarian thailand/bangkok/thai vietnam/hanoi/vietnamese iran/tehran/persian"
    " iceland/reykjavik/icelandic albania/tirana/albanian croatia/zagreb/croatian"
    " serbia/belgrade/serbian ukraine/kyiv/ukrainian latvia/riga/latvian estonia/tallinn/estonian"
    " lithuania/vilnius/lithuanian mongolia/ulaanbaatar/mongolian nepal/kathmandu/nepali"
    " egypt/cairo/arabic england/london/english korea/seoul/korean indonesia/jakarta/indonesian"
    " slovenia/ljubljana/slovene"
)
FACTS = tuple((a, b, c) for a, b, c in (fact.split("/") for fact in _FACTS.split()))
"""(country, capital, language)."""

FUNCTION_WORDS = (
    "the that says and will himself herself themselves capital of is people in speak city spoken"
    " when went to gave a met at then , ."
).split()
"""Words written by the sentence patterns themselves, outside any table."""

OTHER_NUMBER: dict[str, str] = {}
"""Every noun form mapped to its form of the other number ("key" -> "keys" and back)."""
for _singular, _plural in PEOPLE + ANIMALS + THINGS:
    OTHER_NUMBER[_singular] = _plural
    OTHER_NUMBER[_plural] = _singular


def known_words() -> frozenset[str]:
    """Returns every word the English grammar can produce.

    The causal and the masked demo model were trained on these words only; any other word is
    split into fragments (causal) or becomes the unknown token (masked), and what the models do
    with it means nothing.
    """
    words: set[str] = set(FUNCTION_WORDS)
    pairs = PEOPLE + ANIMALS + THINGS + INTRANSITIVE + TRANSITIVE + THING_VERBS + REFLEXIVE_VERBS
    for forms in (*pairs, BE_PRESENT, BE_PAST, HAVE, *FACTS):
        words.update(forms)
    for table in (
        PAST_REFLEXIVE,
        PAST_INTRANSITIVE,
        PARTICIPLES,
        ADJECTIVES,
        THING_ADJECTIVES,
        PREPOSITIONS,
        THING_PREPOSITIONS,
        ADVERBS,
        SINGULAR_DETERMINERS,
        PLURAL_DETERMINERS,
        NAMES,
        GIFTS,
        PLACES,
    ):
        words.update(table)
    return frozenset(words)
