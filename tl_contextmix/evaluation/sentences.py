"""Sentences as every method is asked about them: tokens, the position, the answer, the cues."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from tl_contextmix.adapters.inputs import Given, label, make_batch
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import InvalidInput, UnsupportedModel, bad, four_parts
from tl_contextmix.evaluation.alignment import require_cues
from tl_contextmix.evaluation.minimal_pairs import MinimalPair, overlapping, place_tokens

Unusable = Literal["error", "drop"]


@dataclass(frozen=True)
class Sentence:
    """One sentence as every method sees it.

    Attributes:
        tokens: Its ids [1, pos], a mask in the place that a masked model is asked about.
        place: The position whose prediction is looked at.
        answer: Id of the right token; what the model predicts where that is not known.
        wrong: Id of the wrong one, or None.
        cues: Positions or texts of the tokens that decide the answer; empty where not known.
    """

    tokens: Tensor
    place: int
    answer: int | None
    wrong: int | None = None
    cues: tuple[int | str, ...] = ()


def sentences_of(
    model: object,
    view: ModelView,
    input: Any,
    cues: Any,
    unusable: Unusable = "error",
) -> tuple[list[Sentence], tuple[tuple[str, str], ...]]:
    """Returns texts or minimal pairs as a model is asked about them, and which it cannot be.

    Args:
        model: The model.
        view: Its view.
        input: See `tl_contextmix.evaluation.compare`.
        cues: Likewise.
        unusable: Likewise.

    Raises:
        InvalidInput: If they do not fit the model or each other.
        UnsupportedModel: If the model has two stacks.
    """
    listed = list(input) if isinstance(input, (list, tuple)) else []
    kinds = {type(one) for one in listed}
    if kinds not in ({str}, {MinimalPair}):
        raise bad(
            "these sentences cannot be compared",
            f"a {type(input).__name__} of {sorted(kind.__name__ for kind in kinds)}",
            "a list of texts, or one of minimal pairs",
            "See load_minimal_pairs and demo_pairs.",
        )
    if len(view.stacks) == 2:
        raise UnsupportedModel(
            four_parts(
                "maps of an encoder-decoder are not compared",
                f"{view.name}, a model of two stacks",
                "a causal or a masked language model",
                "Use cue_alignment and agreement on maps of one of its stacks.",
            )
        )
    causal = "decoder" in view.stacks
    mask = None if causal else _mask_id(model)
    if kinds == {str}:
        asked = [[]] * len(listed) if cues is None else require_cues(len(listed), cues)
        texts = zip(listed, asked, strict=True)
        return _usable([(t, partial(_text, view, t, mask, c)) for t, c in texts], unusable)
    if cues is not None:
        raise bad(
            "cues were given twice",
            "cues= beside minimal pairs",
            "pairs that have their own",
            "Put them into the pairs: MinimalPair(good, bad, cues).",
        )
    known = sum(bool(pair.cues) for pair in listed)
    if known not in (0, len(listed)):
        raise bad(
            "the cues of some pairs are not known",
            f"{known} of {len(listed)} pairs with cues",
            "cues of all pairs, or of none",
            "Compare the pairs with cues and those without on their own.",
        )
    return _usable([(pair.good, partial(_pair, view, pair, mask)) for pair in listed], unusable)


def _usable(
    asked: Iterable[tuple[str, Callable[[], Sentence]]], unusable: Unusable
) -> tuple[list[Sentence], tuple[tuple[str, str], ...]]:
    """Returns the sentences that can be read, and the others' texts with the reasons."""
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


def _text(view: ModelView, text: str, mask: int | None, cues: Iterable[int | str]) -> Sentence:
    tokens = make_batch(view, Given(text)).main.ids.cpu()
    if mask is None:
        return Sentence(tokens, tokens.shape[1] - 1, None, None, tuple(cues))
    places = (tokens[0] == mask).nonzero()[:, 0].tolist()
    if len(places) != 1:
        raise bad(
            "it is not clear which word is asked for",
            f"{len(places)} masks in {text!r}",
            "one mask token in every text",
            "Put the tokenizer's mask token in the place of the word.",
        )
    return Sentence(tokens, places[0], None, None, tuple(cues))


def _pair(view: ModelView, pair: MinimalPair, mask: int | None) -> Sentence:
    good, wrong = (make_batch(view, Given(text)).main for text in (pair.good, pair.bad))
    ids, others = good.ids[0].tolist(), wrong.ids[0].tolist()
    # Where it is not asked for, nothing has to be found in the text.
    places = place_tokens(pair.good, label(view, "", good)) if pair.cues or mask else []
    cues = tuple(index for cue in pair.cues for index in overlapping(places, cue))
    if mask is None:
        pairs = enumerate(zip(ids, others, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), None)
        if first is None:
            raise _unasked(pair, "tokens that begin the wrong sentence", "tokens that differ")
        if first == 0:
            raise _unasked(pair, "nothing before the place", "at least one token before it")
        if any(cue >= first for cue in cues):
            raise _unasked(pair, "a cue behind the place", "cues that a causal model has read")
        return Sentence(good.ids[:, :first].cpu(), first - 1, ids[first], others[first], cues)
    target = overlapping(places, pair.target)
    theirs = overlapping(place_tokens(pair.bad, label(view, "", wrong)), pair.wrong_target)
    if len(target) != 1 or len(theirs) != 1:
        raise _unasked(
            pair,
            f"{len(target)} tokens for {pair.answer!r} and {len(theirs)} for {pair.wrong!r}",
            "words of one token each, for one mask",
        )
    tokens = good.ids.cpu().clone()
    tokens[0, target[0]] = mask
    return Sentence(tokens, target[0], ids[target[0]], others[theirs[0]], cues)


def _unasked(pair: MinimalPair, seen: str, expected: str) -> InvalidInput:
    return bad(
        "the model cannot be asked about this pair",
        f"{seen} in {pair.good!r}",
        expected,
        "Leave the pair out, or all of its kind with unusable='drop' (--drop-unusable).",
    )


def _mask_id(model: object) -> int:
    found = getattr(getattr(model, "tokenizer", None), "mask_token_id", None)
    if not isinstance(found, int):
        raise bad(
            "a masked model cannot be asked",
            "a tokenizer without a mask token",
            "a tokenizer with one",
            "Give the model its tokenizer.",
        )
    return found
