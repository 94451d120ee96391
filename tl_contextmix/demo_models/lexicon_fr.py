"""Word tables of the English-to-French demo grammar.

The order of every table is part of the data set (see `lexicon.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Gender = Literal["masculine", "feminine"]
NounClass = Literal["person", "thing"]


@dataclass(frozen=True)
class Noun:
    """An English noun and its only translation."""

    english: tuple[str, str]
    """(singular, plural)."""
    french: tuple[str, str]
    gender: Gender
    noun_class: NounClass


@dataclass(frozen=True)
class AmbiguousNoun:
    """An English noun with two translations: a living being and a thing."""

    english: tuple[str, str]
    person: tuple[str, str, Gender]
    thing: tuple[str, str, Gender]


@dataclass(frozen=True)
class Verb:
    """Forms of a verb, each pair (singular, plural)."""

    present: tuple[str, str]
    past: tuple[str, str]
    french_present: tuple[str, str]
    french_past: tuple[str, str]


@dataclass(frozen=True)
class Adjective:
    """An English adjective and its four French forms."""

    english: str
    french: tuple[str, str, str, str]
    """Masculine and feminine singular, masculine and feminine plural."""
    classes: frozenset[NounClass]

    def form(self, gender: Gender, plural: bool) -> str:
        """Returns the French form that agrees."""
        return self.french[(gender == "feminine") + 2 * plural]


_NOUNS = {
    "person": """
        boy/boys/garçon/garçons/m girl/girls/fille/filles/f man/men/homme/hommes/m
        woman/women/femme/femmes/f king/kings/roi/rois/m queen/queens/reine/reines/f
        brother/brothers/frère/frères/m sister/sisters/sœur/sœurs/f
        baker/bakers/boulanger/boulangers/m nurse/nurses/infirmière/infirmières/f
        neighbour/neighbours/voisin/voisins/m dancer/dancers/danseuse/danseuses/f
        dog/dogs/chien/chiens/m cat/cats/chat/chats/m cow/cows/vache/vaches/f
        mouse/mice/souris/souris/f horse/horses/cheval/chevaux/m
        frog/frogs/grenouille/grenouilles/f
    """,
    "thing": """
        key/keys/clé/clés/f book/books/livre/livres/m table/tables/table/tables/f
        car/cars/voiture/voitures/f boat/boats/bateau/bateaux/m house/houses/maison/maisons/f
        tree/trees/arbre/arbres/m door/doors/porte/portes/f coat/coats/manteau/manteaux/m
        shirt/shirts/chemise/chemises/f knife/knives/couteau/couteaux/m
        chair/chairs/chaise/chaises/f box/boxes/boîte/boîtes/f glass/glasses/verre/verres/m
    """,
}
_GENDERS: dict[str, Gender] = {"m": "masculine", "f": "feminine"}


def _parts(item: str) -> list[str]:
    return item.split("/")


def _nouns(noun_class: NounClass) -> tuple[Noun, ...]:
    return tuple(
        Noun((one, many), (french, french_plural), _GENDERS[gender], noun_class)
        for one, many, french, french_plural, gender in map(_parts, _NOUNS[noun_class].split())
    )


NOUNS: dict[NounClass, tuple[Noun, ...]] = {"person": _nouns("person"), "thing": _nouns("thing")}
"""Animals count as persons: they sleep, and "it" never means them."""

_AMBIGUOUS = """
    bat/bats/chauve-souris/chauves-souris/f/batte/battes/f
    seal/seals/phoque/phoques/m/sceau/sceaux/m
    star/stars/vedette/vedettes/f/étoile/étoiles/f
    pupil/pupils/élève/élèves/m/pupille/pupilles/f
"""
AMBIGUOUS_NOUNS = tuple(
    AmbiguousNoun((one, many), (living, lives, _GENDERS[g]), (thing, things, _GENDERS[h]))
    for one, many, living, lives, g, thing, things, h in map(_parts, _AMBIGUOUS.split())
)


def _verbs(text: str) -> tuple[Verb, ...]:
    """Reads "base/third/past/fr sg/fr pl/fr past sg/fr past pl" items."""
    return tuple(
        Verb((third, base), (past, past), (french, plural), (past_french, past_plural))
        for base, third, past, french, plural, past_french, past_plural in map(_parts, text.split())
    )


INTRANSITIVE = _verbs("""
    sleep/sleeps/slept/dort/dorment/dormait/dormaient
    sing/sings/sang/chante/chantent/chantait/chantaient
    run/runs/ran/court/courent/courait/couraient
    swim/swims/swam/nage/nagent/nageait/nageaient
    eat/eats/ate/mange/mangent/mangeait/mangeaient
    wait/waits/waited/attend/attendent/attendait/attendaient
    smile/smiles/smiled/sourit/sourient/souriait/souriaient
    cry/cries/cried/pleure/pleurent/pleurait/pleuraient
""")
TRANSITIVE = _verbs("""
    see/sees/saw/voit/voient/voyait/voyaient
    find/finds/found/trouve/trouvent/trouvait/trouvaient
    love/loves/loved/aime/aiment/aimait/aimaient
    follow/follows/followed/suit/suivent/suivait/suivaient
    watch/watches/watched/regarde/regardent/regardait/regardaient
    take/takes/took/prend/prennent/prenait/prenaient
    hide/hides/hid/cache/cachent/cachait/cachaient
    know/knows/knew/connaît/connaissent/connaissait/connaissaient
""")
THING_VERBS = _verbs("""
    fall/falls/fell/tombe/tombent/tombait/tombaient
    burn/burns/burned/brûle/brûlent/brûlait/brûlaient
    shine/shines/shone/brille/brillent/brillait/brillaient
""")
BE = Verb(("is", "are"), ("was", "were"), ("est", "sont"), ("était", "étaient"))


def _adjectives(text: str, *classes: NounClass) -> tuple[Adjective, ...]:
    return tuple(
        Adjective(english, (masculine, feminine, masculines, feminines), frozenset(classes))
        for english, masculine, feminine, masculines, feminines in map(_parts, text.split())
    )


ADJECTIVES = (
    *_adjectives(
        """
        black/noir/noire/noirs/noires white/blanc/blanche/blancs/blanches
        green/vert/verte/verts/vertes red/rouge/rouge/rouges/rouges
        """,
        "person",
        "thing",
    ),
    *_adjectives(
        """
        strong/fort/forte/forts/fortes happy/heureux/heureuse/heureux/heureuses
        tired/fatigué/fatiguée/fatigués/fatiguées sad/triste/triste/tristes/tristes
        """,
        "person",
    ),
    *_adjectives(
        """
        clean/propre/propre/propres/propres heavy/lourd/lourde/lourds/lourdes
        empty/vide/vide/vides/vides broken/cassé/cassée/cassés/cassées
        """,
        "thing",
    ),
)
PREPOSITIONS = (
    ("behind", "derrière"),
    ("under", "sous"),
    ("with", "avec"),
    ("on", "sur"),
    ("before", "devant"),
)
DETERMINERS: dict[str, tuple[str | None, str | None, str | None]] = {
    "the": ("le", "la", "les"),
    "a": ("un", "une", None),
    "some": (None, None, "des"),
    "this": ("ce", "cette", None),
    "these": (None, None, "ces"),
    "my": ("mon", "ma", "mes"),
    "your": ("ton", "ta", "tes"),
    "his": ("son", "sa", "ses"),
}
"""English to French (masculine singular, feminine singular, plural); None where there is none."""

FUNCTION_WORDS = ("that", "them", "because", "it", "they", ".")


def known_words() -> frozenset[str]:
    """Returns every English word that the translation grammar can produce.

    Any other word is unknown to the demo translator; what it makes of it means nothing.
    """
    words = {*FUNCTION_WORDS, *DETERMINERS}
    words.update(english for english, _ in PREPOSITIONS)
    words.update(adjective.english for adjective in ADJECTIVES)
    for noun in (*NOUNS["person"], *NOUNS["thing"], *AMBIGUOUS_NOUNS):
        words.update(noun.english)
    for verb in (*INTRANSITIVE, *TRANSITIVE, *THING_VERBS, BE):
        words.update(verb.present + verb.past)
    return frozenset(words)
