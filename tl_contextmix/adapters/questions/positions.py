"""Positions that predictions are read from."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from tl_contextmix.adapters.questions.targets import items
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.validation import whole_number
from tl_contextmix.errors import InvalidInput, seen


def predicting_rows(view: ModelView, batch: Batch, stack: str, pos: object) -> list[list[int]]:
    """Returns the positions of each sentence that predictions are read from.

    None stands for the last token of a decoder, the mask of an encoder and where a classifier of
    texts answers.

    Raises:
        InvalidInput: If there is no such position, not one mask in every sentence, or a class for
            every token.
    """
    side = batch.side(stack)
    pos = view.answers_at if pos is None else pos
    if pos is None and view.classes:
        raise InvalidInput(
            "it is not clear which token's class is meant",
            "no position",
            "the position of one token, several, or 'all'",
            "Give pos=: this model has a class for every token.",
        )
    if pos is None and stack == "encoder":
        result = masks(view, side)
        counts = [len(some) for some in result]
        if any(count != 1 for count in counts):
            row = next(row for row, count in enumerate(counts) if count != 1)
            raise InvalidInput(
                "it is not clear which word the model is asked for",
                f"{counts[row]} masks in sentence {row}",
                "one mask in every sentence",
                "Put the tokenizer's mask token where a word is to be predicted, or give pos=.",
            )
        return result
    if isinstance(pos, str) and pos == "all":
        return [mask.nonzero()[:, 0].tolist() for mask in side.mask.cpu()]
    listed = items(pos)
    if listed is None:
        listed = [-1 if pos is None else pos]
    if not listed:
        raise _no_position(pos, side.mask.shape[1])
    columns = [rows_at(one, side.mask).tolist() for one in listed]
    return [list(row) for row in zip(*columns, strict=True)]


def masks(view: ModelView, side: Side) -> list[list[int]]:
    """Returns where each sentence has the tokenizer's mask token."""
    mask = view.special_ids().get("mask")
    found = (side.ids == -1 if mask is None else side.ids == mask) & side.mask.to(side.ids.device)
    return [row.nonzero()[:, 0].tolist() for row in found]


def rows_at(pos: object, mask: Tensor) -> Int[Tensor, " batch"]:
    """Returns a position in each sentence; a negative one counts from its last real token.

    Raises:
        InvalidInput: If it is padding, or not there, in one of them.
    """
    mask = mask.cpu()
    length = mask.shape[1]
    number = whole_number(pos)
    if number is None or not -length <= number < length:
        raise _no_position(pos, length)
    last = length - 1 - mask.int().flip(dims=[1]).argmax(dim=1)
    rows = last + 1 + number if number < 0 else torch.full_like(last, number)
    real = (rows >= 0) & mask.gather(1, rows.clamp(min=0)[:, None])[:, 0]
    if not bool(real.all()):
        row = int((~real).nonzero()[0])
        raise InvalidInput(
            "nothing is predicted at this position",
            f"{number}, padding in sentence {row}",
            "a position of a real token in every sentence",
            "Count from the end with a negative one, or ask about this sentence alone.",
        )
    return rows


def _no_position(pos: object, length: int) -> InvalidInput:
    return InvalidInput(
        "there is no such position",
        seen(pos),
        f"an integer from {-length} to {length - 1}, several, or 'all'",
        "Positions are the same for all sentences; negative ones count from each one's last token.",
    )
