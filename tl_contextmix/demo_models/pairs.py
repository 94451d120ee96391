"""Minimal pairs out of the grammar: a sentence, its wrong twin, what decides and what tempts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from tl_contextmix.demo_models.grammar import Grammar, Sentence, Shares, Site, SiteKind

KINDS: dict[SiteKind, bool] = {
    "agreement": True,
    "reflexive": True,
    "determiner": False,
    "fact": False,
    "name": True,
}
"""What decides a word, and whether there are words that tempt to a wrong one."""

_SHARES: dict[SiteKind, Shares] = {
    "agreement": Shares(1.0, 0.0, 0.0),
    "reflexive": Shares(0.0, 1.0, 0.0),
    "determiner": Shares(1.0, 0.0, 0.0),
    "fact": Shares(0.0, 0.0, 1.0),
    "name": Shares(0.0, 0.0, 0.0),
}

Stretch = tuple[int, int]
Twins = tuple[str, str, tuple[Stretch, ...], tuple[Stretch, ...]]


def minimal_pairs(kind: SiteKind, count: int, lures: bool, seed: int) -> Iterator[Twins]:
    """Yields the right sentence, the wrong one, and the characters of cues and lures.

    Every sentence comes once, with the first of its places that is of the kind asked for and has
    something before it.

    Args:
        kind: What decides the place.
        count: How many.
        lures: Whether to take only places with a word that tempts to the wrong answer.
        seed: Of the sentences.
    """
    yield from islice(_twins(kind, lures, seed), count)


def _twins(kind: SiteKind, lures: bool, seed: int) -> Iterator[Twins]:
    grammar = Grammar(seed, "test", _SHARES[kind])
    known: set[str] = set()
    while True:
        sentence = grammar.sentence()
        if sentence.text in known:
            continue
        known.add(sentence.text)
        for site in sentence.sites:
            # A causal model has read only what stands before the place.
            before = all(cue < site.target for cue in site.cues)
            if site.kind == kind and site.target and before and (site.lures or not lures):
                yield _pair(sentence, site)
                break


def _pair(sentence: Sentence, site: Site) -> Twins:
    words = list(sentence.words)
    places = []
    for word in words:
        start = places[-1][1] + 1 if places else 0
        places.append((start, start + len(word)))
    words[site.target] = site.wrong
    cues, lures = (tuple(places[i] for i in found) for found in (site.cues, site.lures))
    return sentence.text, " ".join(words), cues, lures
