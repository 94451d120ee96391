"""Sentences in the form that every method is run on: tokens, position, answer, cues."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from tl_contextmix.adapters.inputs import Given, Labels, label, make_batch, read_batch
from tl_contextmix.adapters.inputs.tokens import as_tensor
from tl_contextmix.adapters.questions import Answer, one_each
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.validation import as_list
from tl_contextmix.errors import InvalidInput, UnsupportedModel
from tl_contextmix.evaluation.alignment import require_cues
from tl_contextmix.evaluation.minimal_pairs import MinimalPair, overlapping, place_tokens

Unusable = Literal["error", "drop"]


@dataclass(frozen=True)
class Sentence:
    """One sentence, as passed to every method.

    Attributes:
        tokens: Its ids [1, pos], with the mask for a masked model.
        place: The predicting position.
        answer: What is asked there; if no target is known, the model's prediction.
        wrong: Id of the wrong one, or None.
        cues: Positions or texts of the cues; empty if unknown.
        labels: Names of the token ids, see `Inputs`.
    """

    tokens: Tensor
    place: int
    answer: Answer
    wrong: int | None = None
    cues: tuple[int | str, ...] = ()
    labels: Labels | None = None


def sentences_of(
    model: object,
    view: ModelView,
    input: Any,
    cues: Any,
    unusable: Unusable,
    *,
    answer: Answer,
    contrast: bool = False,
) -> tuple[list[Sentence], tuple[tuple[str, str], ...]]:
    """Returns texts, token ids or minimal pairs as sentences, and those that cannot be scored.

    Args:
        model: The model.
        view: Its view.
        input: See `tl_contextmix.evaluation.compare`.
        cues: Likewise.
        unusable: Likewise.
        answer: Target and foil of texts.
        contrast: Whether the wrong words of pairs are foils.

    Raises:
        InvalidInput: If they do not match the model or each other.
        UnsupportedModel: If the model has two stacks.
    """
    given = as_list(input)
    several = isinstance(given, (list, tuple)) or (isinstance(given, Tensor) and given.ndim)
    listed = [*map(as_tensor, given)] if several else []
    kinds = {type(one) for one in listed}
    if kinds not in ({str}, {Tensor}, {MinimalPair}):
        raise InvalidInput(
            "cannot compare methods on this input",
            f"a {type(input).__name__}{' of ' * bool(kinds)}"
            + ", ".join(sorted(kind.__name__ for kind in kinds)),
            "a list of texts, of rows of token ids, or of minimal pairs",
            "See load_minimal_pairs and demo_pairs.",
        )
    if len(view.stacks) == 2:
        raise UnsupportedModel(
            "compare does not support encoder-decoders",
            f"{view.name}, which has two stacks",
            "a causal or masked language model",
            "Use cue_alignment and agreement on maps of one of its stacks.",
        )
    causal = "decoder" in view.stacks
    mask = None if causal else mask_id(model)
    if kinds != {MinimalPair}:
        asked = [[]] * len(listed) if cues is None else require_cues(len(listed), cues)
        if contrast:
            raise InvalidInput(
                "texts have no wrong word to contrast with",
                "contrast=True and texts",
                "contrast=True with minimal pairs",
                "Pass target= and foil=.",
            )
        targets = one_each(answer.target, len(listed), "target")
        foils = one_each(answer.foil, len(listed), "foil")
        answers = map(Answer, targets, foils)
        texts = zip(listed, asked, answers, strict=True)
        return _usable(
            [(_words(view, t), partial(_text, view, t, mask, c, a)) for t, c, a in texts], unusable
        )
    if not answer.empty:
        raise InvalidInput(
            "minimal pairs have their own targets",
            "target= or foil= together with minimal pairs",
            "target= and foil= only for texts",
            "Pass contrast=True for the wrong words as foils.",
        )
    if cues is not None:
        raise InvalidInput(
            "minimal pairs have their own cues",
            "cues= together with minimal pairs",
            "cues= only for texts",
            "Put them into the pairs: MinimalPair(good, bad, cues).",
        )
    known = sum(bool(pair.cues) for pair in listed)
    if known not in (0, len(listed)):
        raise InvalidInput(
            "only some pairs have cues",
            f"{known} of {len(listed)} pairs with cues",
            "cues for all pairs, or for none",
            "Run compare separately on pairs with and without cues.",
        )
    return _usable(
        [(pair.good, partial(pair_sentence, view, pair, mask, contrast)) for pair in listed],
        unusable,
    )


def _usable(
    asked: Iterable[tuple[str, Callable[[], Sentence]]], unusable: Unusable
) -> tuple[list[Sentence], tuple[tuple[str, str], ...]]:
    """Returns the usable sentences, and the texts of the others with the reasons."""
    found: list[Sentence] = []
    dropped: list[tuple[str, str]] = []
    first: InvalidInput | None = None
    for text, read in asked:
        try:
            found.append(read())
        except InvalidInput as error:
            if unusable == "error":
                raise
            first = first or error
            dropped.append((text, str(error)))
    if first is not None and not found:
        raise first
    return found, tuple(dropped)


def _words(view: ModelView, given: str | Tensor) -> str:
    return given if isinstance(given, str) else view.to_text(given.flatten().tolist())


def _text(
    view: ModelView,
    text: str | Tensor,
    mask: int | None,
    cues: Iterable[int | str],
    answer: Answer,
) -> Sentence:
    side = read_batch(view, Given(text)).main
    tokens = side.ids[side.mask][None].cpu()
    last = tokens.shape[1] - 1
    places = [last] if mask is None else (tokens[0] == mask).nonzero()[:, 0].tolist()
    if len(places) != 1:
        raise InvalidInput(
            "the predicting position is ambiguous",
            f"{len(places)} masks in {_words(view, text)!r}",
            "exactly one mask token in every text",
            "Replace the word to predict with the tokenizer's mask token.",
        )
    return Sentence(tokens, places[0], replace(answer, pos=places[0]), None, tuple(cues))


def pair_sentence(
    view: ModelView, pair: MinimalPair, mask: int | None, contrast: bool, *, one_token: bool = False
) -> Sentence:
    """Returns a minimal pair as what comes before the word that differs, or masks it.

    With ``contrast`` the wrong word is a foil; with ``one_token`` they differ in a single token.
    """
    good, wrong = (make_batch(view, Given(text)).main for text in (pair.good, pair.bad))
    ids, others = good.ids[0].tolist(), wrong.ids[0].tolist()
    # Alignment is needed only for cues or a mask.
    places = place_tokens(pair.good, label(view, "", good)) if pair.cues or mask else []
    cues = tuple(index for cue in pair.cues for index in overlapping(places, cue))
    if mask is None:
        pairs = enumerate(zip(ids, others, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), None)
        if first is None:
            raise _unasked(
                pair, "tokens that are a prefix of the wrong sentence", "tokens that differ"
            )
        if pair.good[: pair.target[0]] != pair.bad[: pair.wrong_target[0]]:
            raise _unasked(pair, "other spaces before the word than in the wrong one", "the same")
        if one_token and ids[first + 1 :] != others[first + 1 :]:
            raise _unasked(pair, "more than one token that differs", "one critical token")
        if first == 0:
            raise _unasked(pair, "no token before the answer", "at least one")
        if any(cue >= first for cue in cues):
            raise _unasked(pair, "a cue after the answer", "cues before it, for a causal model")
        return _sentence(good.ids[:, :first], first - 1, ids[first], others[first], cues, contrast)
    target = overlapping(places, pair.target)
    theirs = overlapping(place_tokens(pair.bad, label(view, "", wrong)), pair.wrong_target)
    if len(target) != 1 or len(theirs) != 1:
        raise _unasked(
            pair,
            f"{len(target)} tokens for {pair.answer!r} and {len(theirs)} for {pair.wrong!r}",
            "single-token words, for one mask",
        )
    tokens = good.ids.cpu().clone()
    tokens[0, target[0]] = mask
    return _sentence(tokens, target[0], ids[target[0]], others[theirs[0]], cues, contrast)


def _sentence(
    tokens: Tensor, place: int, right: int, wrong: int, cues: tuple[int, ...], contrast: bool
) -> Sentence:
    answer = Answer(right, wrong if contrast else None, place)
    return Sentence(tokens.cpu(), place, answer, wrong, cues)


def _unasked(pair: MinimalPair, seen: str, expected: str) -> InvalidInput:
    return InvalidInput(
        "this pair cannot be scored on the model",
        f"{seen} in {pair.good!r}",
        expected,
        "Remove it, or skip such pairs with unusable='drop' (--drop-unusable).",
    )


def mask_id(model: object) -> int:
    """Returns the id of a masked model's mask token."""
    result = getattr(getattr(model, "tokenizer", None), "mask_token_id", None)
    if not isinstance(result, int):
        raise InvalidInput(
            "a masked model needs a mask token",
            "a tokenizer without one, or no tokenizer",
            "a tokenizer with a mask token",
            "Set model.tokenizer.",
        )
    return result
