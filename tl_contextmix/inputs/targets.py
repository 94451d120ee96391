"""Which prediction is asked about: a position of each sentence and the id of one token there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_contextmix.errors import ContextMixWarning, InvalidInput, depth_of_caller, four_parts
from tl_contextmix.model_view import Batch, ModelView
from tl_contextmix.results import Tokens

Names = str | Sequence[str]
Ids = int | Sequence[int]
# Below this ratio of probabilities, whether a word was meant with its space is a matter of taste.
_MUCH = 10.0


def predicting_rows(
    view: ModelView, batch: Batch, stack: str, pos: int | None
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
        raise _bad(
            "it is not clear which word the model is asked for",
            f"{counts[row]} masks in sentence {row}",
            "one mask in every sentence",
            "Put the tokenizer's mask token where a word is to be predicted, or give pos=.",
        )
    return found.int().argmax(dim=1).cpu()


def rows_at(pos: int, mask: Tensor) -> Int[Tensor, " batch"]:
    """Returns a position in each sentence; a negative one counts from its last real token.

    Raises:
        InvalidInput: If it is padding, or not there, in one of them.
    """
    mask = mask.cpu()
    length = mask.shape[1]
    if isinstance(pos, bool) or not isinstance(pos, int) or not -length <= pos < length:
        raise _bad("there is no such position", repr(pos), f"from {-length} to {length - 1}")
    last = length - 1 - mask.int().flip(dims=[1]).argmax(dim=1)
    rows = last + 1 + pos if pos < 0 else torch.full_like(last, pos)
    real = (rows >= 0) & mask.gather(1, rows.clamp(min=0)[:, None])[:, 0]
    if not bool(real.all()):
        row = int((~real).nonzero()[0])
        raise _bad(
            "nothing is predicted at this position",
            f"{pos}, padding in sentence {row}",
            "a position of a real token in every sentence",
        )
    return rows


def ids_of(asked: Ids | None, best: Tensor, d_vocab: int) -> Int[Tensor, " batch"]:
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
    listed = [asked] * len(best) if isinstance(asked, int) else list(asked)
    wrong = [t for t in listed if isinstance(t, bool) or not isinstance(t, int)]
    wrong += [t for t in listed if t not in wrong and not 0 <= t < d_vocab]
    if wrong or len(listed) != len(best):
        raise _bad(
            "these are no target tokens",
            repr(asked),
            f"an id from 0 to {d_vocab - 1}, or {len(best)} of them",
        )
    return torch.tensor(listed)


def target_tokens(
    view: ModelView,
    target: Names | None,
    target_ids: Ids | None,
    logits: Float[Tensor, "batch d_vocab"],
) -> Tokens:
    """Returns the token that each sentence is asked about.

    Args:
        view: The model.
        target: Its text, for all sentences or for each; it has to be one token.
        target_ids: Its id, instead.
        logits: What the model says there; the best token is the default.

    Raises:
        InvalidInput: If a text is several tokens or an unknown word, or an id does not exist.

    Warns:
        ContextMixWarning: If a text without its leading space was given and the one with it is
            far more probable.
    """
    if target is not None and target_ids is not None:
        raise _bad(
            "the target is given twice",
            f"target={target!r} and target_ids={target_ids!r}",
            "one of them",
            "Leave one out.",
        )
    texts = [target] * len(logits) if isinstance(target, str) else list(target or ())
    if texts:
        target_ids = [single_token(view, text) for text in texts]
    ids = ids_of(target_ids, logits.argmax(dim=-1), logits.shape[1])
    _warn_about_spaces(view, texts, ids.tolist(), logits)
    return Tokens(
        ids=ids[:, None],
        strings=tuple((view.to_string(token),) for token in ids.tolist()),
        mask=torch.ones(len(ids), 1, dtype=torch.bool),
        sides=(("target", 1),),
    )


def single_token(view: ModelView, text: object) -> int:
    """Returns the id of a text that is one token.

    Raises:
        InvalidInput: If it is several, naming them, or a word the model does not know.
    """
    if not isinstance(text, str) or not text:
        raise _bad("the target cannot be read", repr(text), "a text that is one token")
    found = view.pieces(text)
    if len(found) != 1:
        pieces = ", ".join(repr(view.to_string(token)) for token in found)
        spaced = " " + text
        fits = not text.startswith(" ") and len(view.pieces(spaced)) == 1
        hint = f"{spaced!r}, with its space, is one token. " if fits else ""
        raise _bad(
            "the target is not one token",
            f"{text!r}, which is {len(found)}: {pieces}",
            "a text that is one token of this model's vocabulary",
            f"{hint}Ask for one of the pieces, or give target_ids=.",
        )
    unknown = found[0] == view.special_ids().get("unknown")
    if unknown and view.to_string(found[0]).strip() != text.strip():
        raise _bad(
            "the target is not in the vocabulary",
            f"{text!r}, which becomes {view.to_string(found[0])!r}",
            "a word of this model's vocabulary",
            "Use another word, or give target_ids=.",
        )
    return found[0]


def _warn_about_spaces(
    view: ModelView, texts: Sequence[str], ids: Sequence[int], logits: Tensor
) -> None:
    for row, (text, token) in enumerate(zip(texts, ids, strict=False)):
        spaced = [] if text.startswith(" ") else view.pieces(" " + text)
        if len(spaced) != 1 or spaced[0] == token:
            continue
        ratio = float((logits[row, spaced[0]] - logits[row, token]).double().exp())
        if ratio > _MUCH:
            warnings.warn(
                four_parts(
                    "the target continues the last word of the text",
                    f"{text!r}, which the model finds {ratio:.0f} times less probable than "
                    f"{' ' + text!r}",
                    "a word with its leading space where a new word begins",
                    f"Ask for {' ' + text!r} if that is what was meant.",
                ),
                ContextMixWarning,
                stacklevel=depth_of_caller(),
            )


def _bad(
    failed: str, seen: str, expected: str, remedy: str = "See the docstring of the method."
) -> InvalidInput:
    return InvalidInput(four_parts(failed, seen, expected, remedy))
