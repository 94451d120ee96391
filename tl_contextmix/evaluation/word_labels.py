"""Labels of words (a tagger's, a parser's, your own) on the tokens of a result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

import torch

from tl_contextmix.core.validation import LATER, checked, require_choice
from tl_contextmix.core.words import is_mark
from tl_contextmix.errors import InvalidInput, seen
from tl_contextmix.evaluation.minimal_pairs import overlapping, place_tokens, words_of
from tl_contextmix.results import ContextMap, LayerFigures, Tokens

Span = tuple[int, int, str]
"""First character or token, the one after the last, and the label."""
Labels = Annotated[Callable[[str], Any] | Sequence[Any], LATER]
Of = Literal["pos", "dep", "entity"]
ARROW = " from "
_ATTRIBUTES: dict[Of, tuple[str, str]] = {  # of spaCy's tokens, of stanza's words
    "pos": ("pos_", "upos"),
    "dep": ("dep_", "deprel"),
    "entity": ("ent_type_", "ner"),
}


@checked
def label_tokens(
    tokens: Tokens, texts: str | Sequence[str], labels: Labels, *, of: Of = "pos"
) -> tuple[tuple[Span, ...], ...]:
    """Returns the stretches of tokens that labelled words or spans cover, per text.

    A token that covers characters of several words belongs to the first.

    Args:
        tokens: The tokens of a result, such as its ``source``.
        texts: The texts they are of.
        labels: Labels of each text, in a list, or a function that returns those of a text: a label
            for each word (words are split at spaces, or at spaces and punctuation, whichever has
            as many; None for no label); spans ``(start, stop, label)`` of characters; or a document
            of spaCy or stanza.
        of: Which label of such a document: the universal part of speech, the dependency relation,
            or the kind of named entity.

    Returns:
        Stretches ``(start, stop, label)`` of tokens per text, in order.

    Raises:
        InvalidInput: If labels fit neither the texts nor their words, or tokens do not spell them.

    Example:
        >>> import tl_contextmix as cm
        >>> from tl_contextmix.evaluation import label_tokens
        >>> model, text = cm.load_demo("masked-lm"), "the keys are old ."
        >>> tokens = cm.attention(model, text).source
        >>> label_tokens(tokens, text, [["DET", "NOUN", "VERB", "ADJ", None]])
        (((1, 2, 'DET'), (2, 3, 'NOUN'), (3, 4, 'VERB'), (4, 5, 'ADJ')),)
    """
    found = []
    for row, (text, one) in enumerate(_of_each(texts, labels, tokens.shape[0], "labels")):
        places, spans, at = place_tokens(text, tokens, row), [], 0
        for start, stop, label in sorted(_character_spans(text, one, of)):
            mine = [index for index in overlapping(places, (start, stop)) if index >= at]
            if mine:
                at = mine[-1] + 1
                spans.append((mine[0], at, label))
        found.append(tuple(spans))
    return tuple(found)


def _of_each(texts: str | Sequence[str], given: Any, rows: int, what: str) -> list[tuple[str, Any]]:
    """Returns each text with its labels or arcs."""
    texts = [texts] if isinstance(texts, str) else [*texts]
    found = [given(text) for text in texts] if callable(given) else [*given]
    if not len(found) == len(texts) == rows:
        raise InvalidInput(
            f"{what} do not fit the texts",
            f"{what} of {len(found)} texts, {len(texts)} texts, {rows} rows of tokens",
            "as many of each",
            f"Pass a list with the {what} of each text, even of one.",
        )
    return list(zip(texts, found, strict=True))


def _character_spans(text: str, given: Any, of: Of) -> list[Span]:
    """Returns labelled spans of the characters of a text, without empty labels."""
    require_choice("label of a document", of, [*_ATTRIBUTES])
    ours, theirs = _ATTRIBUTES[of]
    if hasattr(given, "sentences"):  # stanza
        words = [token for sentence in given.sentences for token in sentence.tokens]
        # Of a multi-word token the label of its first word; entities have a prefix, or are "O".
        each = [(w, w if of == "entity" else w.words[0]) for w in words]
        named = [(*_ends(w), getattr(holder, theirs, None) or "") for w, holder in each]
        if of == "entity":
            named = [(*ends, "" if kind == "O" else kind.split("-")[-1]) for *ends, kind in named]
    elif hasattr(given, "ents"):  # spaCy
        if of == "entity":
            named = [(e.start_char, e.end_char, e.label_) for e in given.ents]
        else:
            named = [(w.idx, w.idx + len(w.text), getattr(w, ours)) for w in given]
    else:
        named = _named(text, given)
    return [(start, stop, str(label)) for start, stop, label in named if label]


def _named(text: str, given: Any) -> list[tuple[int, int, Any]]:
    listed = [*given] if isinstance(given, Iterable) and not isinstance(given, str) else []
    if isinstance(given, (tuple, list)) and not given:
        return []
    if listed and all(isinstance(one, (tuple, list)) and len(one) == 3 for one in listed):
        inside = all(0 <= start < stop <= len(text) for start, stop, _ in listed)
        if inside:
            return [(start, stop, label) for start, stop, label in listed]
    elif all(one is None or isinstance(one, str) for one in listed):
        for words in (words_of(text, spaces=True), words_of(text)):
            if len(words) == len(listed):
                return [(*word, label) for word, label in zip(words, listed, strict=True)]
    raise InvalidInput(
        "labels do not fit the words",
        f"{seen(given)} for {text[:100]!r}",
        f"a label for each of {len(text.split())} words, spans (start, stop, label) of characters, "
        "or a document of spaCy or stanza",
        "Use None for a word without a label.",
    )


@checked
def by_kind(
    map: ContextMap,
    *,
    texts: str | Sequence[str] | None = None,
    labels: Labels | None = None,
    of: Of = "pos",
    arcs: Labels | None = None,
) -> LayerFigures:
    r"""Returns the mean score of a map by the kind of its pairs: which compositions are amplified?

    .. math:: \frac{1}{|P_k|} \sum_{(i, j) \in P_k} F_{ij}

    with :math:`P_k` the pairs of kind :math:`k`. Every pair of a target and a source is of one
    kind, the first that fits:

    ================== ============================================================================
    ``special``        one of the two is a mark such as ``[CLS]`` or ``<s>``
    ``self``           a token and itself
    ``same token``     the same token elsewhere
    ``pieces``         pieces of one word
    ``R: head``        a head that reads its dependent, by an arc with the relation ``R``
    ``R: dependent``   a dependent that reads its head
    ``in one X``       words of one span that is labelled ``X``: a compound, a name
    ``X from Y``       a target that is labelled ``X``, a source that is labelled ``Y``
    ``neighbours``     words that are next to each other
    ``other``          all others
    ================== ============================================================================

    With the difference of two maps, ``after.normalize() - before.normalize()``, it is the change
    of a row's share that a component makes (Kobayashi et al. 2024, section 5).

    Args:
        map: A map with one head; heads are averaged by ``.mean("head")``.
        texts: Its texts, for ``labels`` and ``arcs``.
        labels: Labels of words or spans, see `label_tokens`.
        of: Likewise.
        arcs: Dependency arcs of each text in a list, or a function that returns those of a text:
            ``(head, dependent, relation)`` with spans ``(start, stop)`` of characters, or a
            document of spaCy or stanza.

    Returns:
        `LayerFigures` [batch layer quantity]; NaN where a text has no such pair. Sources that a
        causal map cannot read are no pairs.

    Raises:
        InvalidInput: If the map has several heads, or labels do not fit.
    """
    if len(map.heads) != 1:
        raise InvalidInput(
            "pairs of several heads have no one score",
            f"{len(map.heads)} heads",
            "one map per layer",
            "Take .mean('head') or select(head=...).",
        )
    if (labels is None and arcs is None) != (texts is None):
        raise InvalidInput(
            "labels are of words of texts",
            "labels without texts" if texts is None else "texts without labels",
            "both, or neither",
            "Pass texts= and labels= or arcs=.",
        )
    batch, sides = len(map.scores), (map.target, map.source)
    spans = [
        [()] * batch if labels is None else label_tokens(side, texts or "", labels, of=of)
        for side in sides
    ]
    tied = [{}] * batch if arcs is None else _all_arcs(map, texts or "", arcs)
    readable = _readable(map)
    kinds = [
        _kinds(map, row, spans[0][row], spans[1][row], tied[row], readable[row])
        for row in range(batch)
    ]
    names = sorted({name for one in kinds for name in one}, key=_order)
    values = map.scores.new_full((batch, len(map.layers), len(names)), torch.nan)
    scores = map.scores[:, :, 0].detach()
    for row, groups in enumerate(kinds):
        for name, pairs in groups.items():
            target, source = torch.tensor(pairs, device=scores.device).T
            values[row, :, names.index(name)] = scores[row][:, target, source].mean(-1)
    return LayerFigures(
        values=values,
        layers=map.layers,
        quantities=tuple(names),
        title="Scores by kind of pair",
        caption="Mean over the pairs of a text. A target and a source of one kind: see by_kind.",
        unit=map.unit,
        provenance=map.provenance,
    )


_KINDS = ("special", "self", "same token", "pieces", "neighbours", "other")


def _order(name: str) -> tuple[int, str]:
    return (_KINDS.index(name) if name in _KINDS[:4] else 9 if name in _KINDS else 5), name


def _readable(map: ContextMap) -> torch.Tensor:
    """Returns which sources targets can read [batch target source]: in a causal map, no later one.

    What is told of the whole map holds for a part of it.
    """
    names = [
        torch.tensor([n == "encoder" for n in side.names()]) for side in (map.target, map.source)
    ]
    one_axis = ~names[1] | (names[0][:, None] & names[1])
    later = map.source.positions()[:, None] > map.target.positions()[:, :, None]
    later = later & one_axis & map.target.real_pairs(map.source).cpu()
    unread = later & (map.scores == 0).flatten(1, 2).all(dim=1).cpu()
    return ~later if bool((unread == later).all()) else torch.ones_like(later)


def _kinds(
    map: ContextMap,
    row: int,
    ours: Sequence[Span],
    theirs: Sequence[Span],
    tied: dict[tuple[int, int], str],
    readable: torch.Tensor,
) -> dict[str, list[tuple[int, int]]]:
    """Returns the pairs of real tokens of a text, by kind."""
    words = _word_numbers(map, row)
    target, source = (
        _places(side, row, spans, words)
        for side, spans in ((map.target, ours), (map.source, theirs))
    )
    result: dict[str, list[tuple[int, int]]] = {}
    for t, s in product(target, source):
        if not readable[t, s]:
            continue
        kind = _kind(target[t], source[s], bool(words))
        kind = kind if kind in _KINDS[:4] else tied.get((t, s), kind)
        result.setdefault(kind, []).append((t, s))
    return result


_Key = tuple[str, int]
"""Stack and number of a token."""


def _keys(side: Tokens, row: int) -> dict[int, _Key]:
    """Returns what tells real tokens from each other, by their place on the axis."""
    keys = zip(side.names(), side.labels(), strict=True)
    return {at: key for at, key in enumerate(keys) if bool(side.mask[row, at])}


def _word_numbers(map: ContextMap, row: int) -> dict[_Key, int]:
    """Returns numbers of the words of tokens, one after the other for words that are neighbours.

    Rows and columns may be parts of the tokens; nothing where they are of other tokens.
    """
    begins, texts = dict[_Key, bool](), dict[_Key, str]()
    for side in (map.source, map.target):
        keys, spans = _keys(side, row), side.words()[row]
        inside = {at for start, stop in spans for at in range(start + 1, stop)}
        for at, key in keys.items():
            if texts.setdefault(key, side.strings[row][at]) != side.strings[row][at]:
                return {}
            # Only a token that stands beside the one before it tells whether it goes on with it.
            if key not in begins or keys.get(at - 1) == (key[0], key[1] - 1):
                begins[key] = at not in inside
    if not {*_keys(map.target, row).values()} & {*_keys(map.source, row).values()}:
        return {}
    result, number = dict[_Key, int](), 0
    for name, place in sorted(begins):
        apart = (name, place - 1) not in begins
        number += 2 if apart else int(begins[name, place])
        result[name, place] = number
    return result


def _all_arcs(
    map: ContextMap, texts: str | Sequence[str], arcs: Any
) -> list[dict[tuple[int, int], str]]:
    """Returns per text which pairs of target and source are tied, and how."""
    result = []
    for row, (text, one) in enumerate(_of_each(texts, arcs, len(map.scores), "arcs")):
        target, source = (place_tokens(text, side, row) for side in (map.target, map.source))
        pairs: dict[tuple[int, int], str] = {}
        for head, dependent, relation in _arcs(text, one):
            for name, (a, b) in (("head", (head, dependent)), ("dependent", (dependent, head))):
                for pair in product(overlapping(target, a), overlapping(source, b)):
                    pairs.setdefault(pair, f"{relation}: {name}")
        result.append(pairs)
    return result


def _arcs(text: str, given: Any) -> list[tuple[tuple[int, int], tuple[int, int], str]]:
    """Returns the spans of head and dependent of each arc, with its relation."""
    if hasattr(given, "sentences"):  # stanza
        result = []
        for sentence in given.sentences:
            known = {word.id: word for word in sentence.words if word.start_char is not None}
            some = [(known[w.head], w) for w in known.values() if w.head in known]
            result += [(_ends(h), _ends(w), str(w.deprel)) for h, w in some]
        return result
    if hasattr(given, "ents"):  # spaCy
        spans = {word.i: (word.idx, word.idx + len(word.text)) for word in given}
        some = [(w.head.i, w.i, w.dep_) for w in given if w.head.i != w.i]
        return [(spans[head], spans[own], str(relation)) for head, own, relation in some]
    try:
        arcs = [(tuple(head), tuple(own), str(relation)) for head, own, relation in given]
    except (TypeError, ValueError):
        arcs = [((0, 0), (0, 0), "")]
    for *ends, _ in arcs:
        if not all(len(span) == 2 and 0 <= span[0] < span[1] <= len(text) for span in ends):
            raise InvalidInput(
                "these are no arcs of the text",
                f"{seen(given)} for {text[:100]!r}",
                "(head, dependent, relation) with spans (start, stop) of characters, or a document "
                "of spaCy or stanza",
                "Pass an empty list for a text without arcs.",
            )
    return arcs


def _ends(word: Any) -> tuple[int, int]:
    return word.start_char, word.end_char


class _Place(NamedTuple):
    """A token: which one, its text, its word and labelled span, and whether it is a mark."""

    key: _Key
    text: str
    word: int
    label: Span | None
    mark: bool


def _places(
    side: Tokens, row: int, spans: Sequence[Span], words: dict[_Key, int]
) -> dict[int, _Place]:
    """Returns the real tokens of a text, by their place on the axis."""
    label = {at: span for span in spans for at in range(span[0], span[1])}
    strings = side.strings[row]
    return {
        at: _Place(key, strings[at], words.get(key, -1), label.get(at), is_mark(strings[at]))
        for at, key in _keys(side, row).items()
    }


def _kind(target: _Place, source: _Place, both: bool) -> str:
    if target.mark or source.mark:
        return "special"
    if both and target.key == source.key:
        return "self"
    if target.text == source.text:
        return "same token"
    both = both and target.key[0] == source.key[0]
    if both and target.word == source.word:
        return "pieces"
    ours, theirs = target.label, source.label
    if ours is not None and theirs is not None:
        return f"in one {ours[2]}" if ours == theirs else f"{ours[2]}{ARROW}{theirs[2]}"
    return "neighbours" if both and abs(target.word - source.word) == 1 else "other"
