"""Which prediction is asked about: a position of each sentence and the id of one token there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_contextmix.core.blocks import Batch
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.validation import whole_number
from tl_contextmix.errors import bad, four_parts, warn
from tl_contextmix.results import LogProbContributions, QueryContributions, Tokens

Target = str | int | Sequence[str | int] | Tensor
"""One token for all sentences, or one for each: its text or its id."""
# Below this ratio of probabilities, whether a word was meant with its space is a matter of taste.
_MUCH = 10.0


def predicting_rows(
    view: ModelView, batch: Batch, stack: str, pos: object
) -> Int[Tensor, " batch"]:
    """Returns the position of each sentence that a prediction is read from.

    Args:
        view: The model.
        batch: Its tokens.
        stack: The stack that writes the answer.
        pos: The position; None for the last token of a decoder and the mask of an encoder.

    Raises:
        InvalidInput: If there is no such position, or not one mask in every sentence.
    """
    side = batch.side(stack)
    if pos is not None or stack == "decoder":
        return rows_at(-1 if pos is None else pos, side.mask)
    mask = view.special_ids().get("mask")
    found = (side.ids == -1 if mask is None else side.ids == mask) & side.mask.to(side.ids.device)
    counts = found.sum(dim=1).tolist()
    if any(count != 1 for count in counts):
        row = next(row for row, count in enumerate(counts) if count != 1)
        raise bad(
            "it is not clear which word the model is asked for",
            f"{counts[row]} masks in sentence {row}",
            "one mask in every sentence",
            "Put the tokenizer's mask token where a word is to be predicted, or give pos=.",
        )
    return found.int().argmax(dim=1).cpu()


def rows_at(pos: object, mask: Tensor) -> Int[Tensor, " batch"]:
    """Returns a position in each sentence; a negative one counts from its last real token.

    Raises:
        InvalidInput: If it is padding, or not there, in one of them.
    """
    mask = mask.cpu()
    length = mask.shape[1]
    number = whole_number(pos)
    if number is None or not -length <= number < length:
        raise bad(
            "there is no such position",
            repr(pos),
            f"an integer from {-length} to {length - 1}",
            "Give one position for all sentences; negative ones count from each one's last token.",
        )
    last = length - 1 - mask.int().flip(dims=[1]).argmax(dim=1)
    rows = last + 1 + number if number < 0 else torch.full_like(last, number)
    real = (rows >= 0) & mask.gather(1, rows.clamp(min=0)[:, None])[:, 0]
    if not bool(real.all()):
        row = int((~real).nonzero()[0])
        raise bad(
            "nothing is predicted at this position",
            f"{number}, padding in sentence {row}",
            "a position of a real token in every sentence",
            "Count from the end with a negative one, or ask about this sentence alone.",
        )
    return rows


def answer_of(batch: Batch, view: ModelView, *given: object) -> LogProbContributions | None:
    """Returns the contributions that components were taken from, and checks all results' tokens.

    Args:
        batch: The tokens the components are asked about.
        view: The model.
        *given: What names components; what is no result is passed over.

    Raises:
        InvalidInput: If a result is of other tokens.
    """
    results = [g for g in given if isinstance(g, (LogProbContributions, QueryContributions))]
    for result in results:
        sides = [(result.tokens, batch.side(view.base_stack(None)))]
        if result.encoder is not None:
            sides.append((result.encoder, batch.main))
        for tokens, side in sides:
            same = torch.equal(tokens.ids.cpu(), side.ids.cpu())
            if not same or not torch.equal(tokens.mask.cpu(), side.mask.cpu()):
                raise bad(
                    "the chosen components belong to another input",
                    f"components found in {tokens.strings[0]}",
                    f"components found in the tokens {side.ids.tolist()}, padding included",
                    "Give the input, and its padding, that they were found on.",
                )
    return next((r for r in results if isinstance(r, LogProbContributions)), None)


def ids_of(asked: object, best: Tensor, d_vocab: int) -> Int[Tensor, " batch"]:
    """Returns the id of one token for each sentence.

    Args:
        asked: One id for all, one for each, or None for the best.
        best: The most probable token of each sentence.
        d_vocab: Number of token ids.

    Raises:
        InvalidInput: If something else is asked for.
    """
    if asked is None:
        return best.cpu()
    one = whole_number(asked)
    found = [whole_number(token) for token in _each(asked)] if one is None else [one] * len(best)
    ids = [token for token in found if token is not None and 0 <= token < d_vocab]
    if len(ids) < len(found) or len(ids) != len(best):
        raise bad(
            "these are no target tokens",
            repr(asked),
            f"a text or an id from 0 to {d_vocab - 1}, or {len(best)} of them",
            "Pass one for all sentences, or one for each.",
        )
    return torch.tensor(ids)


def _each(asked: Any) -> list[Any]:
    """Returns what a list, an array or a tensor holds; nothing for anything else."""
    asked = asked.tolist() if isinstance(asked, Tensor) else asked
    return list(asked) if isinstance(asked, Iterable) and not isinstance(asked, str) else []


def target_tokens(
    view: ModelView,
    target: object,
    logits: Float[Tensor, "batch d_vocab"],
) -> Tokens:
    """Returns the token that each sentence is asked about.

    Args:
        view: The model.
        target: Its text, which has to be one token, or its id; for all sentences or for each.
        logits: What the model says there; the best token is the default.

    Raises:
        InvalidInput: If a text is several tokens or an unknown word, or an id does not exist.

    Warns:
        ContextMixWarning: If a text without its leading space was given and the one with it is
            far more probable.
    """
    named = [target] * len(logits) if isinstance(target, str) else _each(target)
    if any(isinstance(token, str) for token in named):
        target = [single_token(view, one) if isinstance(one, str) else one for one in named]
    ids = ids_of(target, logits.argmax(dim=-1), logits.shape[1])
    _warn_about_spaces(view, named, ids.tolist(), logits)
    return Tokens(
        ids=ids[:, None],
        strings=tuple((view.to_output(token),) for token in ids.tolist()),
        mask=torch.ones(len(ids), 1, dtype=torch.bool),
        sides=(("target", 1),),
    )


def single_token(view: ModelView, text: str) -> int:
    """Returns the id of a text that is one token.

    Raises:
        InvalidInput: If it is several, naming them, or a word the model does not know.
    """
    found = view.pieces(text)
    if view.labelled and not found:
        raise bad(
            "no label is called that",
            repr(text),
            "one of the labels",
            "Name the target as labels= does, or pass an id.",
        )
    if len(found) != 1:
        pieces = ", ".join(repr(view.to_output(token)) for token in found)
        spaced = " " + text
        fits = not text.startswith(" ") and len(view.pieces(spaced)) == 1
        hint = f"{spaced!r}, with its space, is one token. " if fits else ""
        raise bad(
            "the target is not one token",
            f"{text!r}, which is {len(found)}: {pieces}",
            "a text that is one token of this model's vocabulary",
            f"{hint}Ask for one of the pieces, or pass an id.",
        )
    unknown = not view.labelled and found[0] == view.special_ids().get("unknown")
    if unknown and view.to_output(found[0]).strip() != text.strip():
        raise bad(
            "the target is not in the vocabulary",
            f"{text!r}, which becomes {view.to_output(found[0])!r}",
            "a word of this model's vocabulary",
            "Use another word, or pass an id.",
        )
    return found[0]


def _warn_about_spaces(
    view: ModelView, named: Sequence[Any], ids: Sequence[int], logits: Tensor
) -> None:
    for row, (text, token) in enumerate(zip(named, ids, strict=False)):
        fits = isinstance(text, str) and not text.startswith(" ")
        spaced = view.pieces(" " + text) if fits else []
        if len(spaced) != 1 or spaced[0] == token:
            continue
        ratio = float((logits[row, spaced[0]] - logits[row, token]).double().exp())
        if ratio > _MUCH:
            warn(
                four_parts(
                    "the target continues the last word of the text",
                    f"{text!r}, which the model finds {ratio:.0f} times less probable than "
                    f"{' ' + text!r}",
                    "a word with its leading space where a new word begins",
                    f"Ask for {' ' + text!r} if that is what was meant.",
                )
            )
