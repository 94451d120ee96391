"""Texts and tensors become the tokens of both sides of a model, checked against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tl_contextmix.adapters.inputs.activation_cache import Cache, describe
from tl_contextmix.adapters.inputs.padding import (
    find_padding,
    find_target_padding,
    pad_rows,
    require_safe_padding,
)
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.errors import InvalidInput, bad

Text = str | Sequence[str]
PaddingSide = Literal["right", "left"]


@dataclass(frozen=True)
class Given:
    """What the caller gave besides the model.

    Attributes:
        input: A text, several texts, or token ids of shape [batch, pos] or [pos].
        attention_mask: 1 at real tokens, 0 at padding; None where there is none, or where it is
            known: that of texts, and ids that pad (see `padding.find_padding`).
        prepend_bos: Whether texts get a beginning-of-sequence token; None for the model's default.
            Token ids are taken as they are, as everywhere in TransformerLens.
        padding_side: Where texts of unequal length are padded.
        decoder_input: Text, texts or token ids of an encoder-decoder's decoder side; None for
            the start token alone.
        cache: A cache of a forward pass over the same input, instead of a new one.
    """

    input: Text | Tensor
    attention_mask: Tensor | None = None
    prepend_bos: bool | None = None
    padding_side: PaddingSide = "right"
    decoder_input: Text | Tensor | None = None
    cache: Cache | None = None


def make_batch(view: ModelView, given: Given) -> Batch:
    """Returns the tokens of both sides, checked against the model.

    Raises:
        InvalidInput: If they do not fit.
    """
    if given.padding_side not in ("right", "left"):
        raise bad(
            "there is no such padding side",
            repr(given.padding_side),
            "'right' or 'left'",
            "Choose one of these.",
        )
    main = _main_side(view, given)
    require_safe_padding(view, main)
    return Batch(main=main, decoder=_decoder_side(view, given, main.ids.shape[0]))


def _main_side(view: ModelView, given: Given) -> Side:
    if isinstance(given.input, Tensor):
        ids = _token_ids(view, given.input, "input")
        if given.attention_mask is None:
            return find_padding(view, ids, given.padding_side)
        return Side(ids=ids, mask=_mask(given.attention_mask, ids))
    texts = _texts(given.input, "input")
    rows = [view.encode(text, given.prepend_bos) for text in texts]
    side = _pad(view, texts, rows, given.padding_side)
    _token_ids(view, side.ids, "input")
    if given.attention_mask is None:
        return side
    mask = _mask(given.attention_mask, side.ids)
    if bool((mask & ~side.mask.to(mask.device)).any()):
        raise bad(
            "the attention_mask does not fit the texts",
            "ones at the padding of a shorter text",
            f"zeros at the padding on the {given.padding_side}",
            "Leave the mask out: the padding of texts is known.",
        )
    return Side(ids=side.ids, mask=mask)


def _decoder_side(view: ModelView, given: Given, rows: int) -> Side | None:
    asked = given.decoder_input
    if view.encode_decoder is None:
        if asked is not None:
            raise bad(
                "decoder_input has no meaning for this model",
                describe(asked),
                "None: the model has one stack",
                "Leave it out.",
            )
        return None
    if isinstance(asked, Tensor):
        ids = _token_ids(view, asked, "decoder_input")
        side = find_target_padding(view, ids, view.encode_decoder(None))
    else:
        texts = [None] * rows if asked is None else _texts(asked, "decoder_input")
        side = _pad(view, texts, [view.encode_decoder(text) for text in texts], "right")
        _token_ids(view, side.ids, "decoder_input")
    if side.ids.shape[0] != rows:
        raise bad(
            "input and decoder_input do not fit each other",
            f"{rows} and {side.ids.shape[0]} rows",
            "as many decoder inputs as inputs",
            "Give one decoder input per input.",
        )
    return side


def _texts(given: object, name: str) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise bad(
            f"the {name} cannot be read",
            _describe_items(texts),
            "a str, a list of str, or a tensor of token ids",
            "Convert arrays and lists of ids with torch.tensor.",
        )
    if not texts or not all(texts):
        raise bad(
            f"the {name} is empty",
            repr(given),
            "at least one character in every text",
            "Leave empty texts out.",
        )
    return list(texts)


def _describe_items(given: object) -> str:
    if isinstance(given, (list, tuple)):
        kinds = sorted({type(item).__name__ for item in given})
        return f"{describe(given)} of {', '.join(kinds)}"
    return describe(given)


def _token_ids(view: ModelView, ids: Tensor, name: str) -> Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise _bad_tokens(name, describe(ids), "integer token ids", "Residuals are not accepted.")
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.numel() == 0:
        raise _bad_tokens(
            name, describe(ids), "shape [batch, pos], both at least 1", "Reshape the tensor."
        )
    worst = int(ids.max()) if int(ids.max()) >= view.d_vocab else int(ids.min())
    if not 0 <= worst < view.d_vocab:
        raise _bad_tokens(
            name,
            f"token id {worst}",
            f"ids from 0 to {view.d_vocab - 1}",
            "Use the tokenizer of this model.",
        )
    if view.n_ctx is not None and ids.shape[1] > view.n_ctx:
        raise _bad_tokens(
            name,
            f"{ids.shape[1]} tokens",
            f"at most {view.n_ctx}, the longest input of this model",
            "Shorten the text; nothing is cut off silently.",
        )
    return ids.long()


def _bad_tokens(name: str, seen: str, expected: str, remedy: str) -> InvalidInput:
    return bad(f"the {name} cannot be run", seen, expected, remedy)


def _mask(mask: object, ids: Tensor) -> Tensor:
    found = _mask_values(mask, ids)
    real = found.to(ids.device).bool()
    if not bool(real.any(dim=1).all()):
        row = int((~real.any(dim=1)).nonzero()[0])
        raise bad(
            "the attention_mask leaves nothing",
            f"row {row} of zeros",
            "at least one real token in every row",
            "Leave the row out.",
        )
    return real


def _mask_values(mask: object, ids: Tensor) -> Tensor:
    """Returns a mask of the shape of the ids that holds nothing but zeros and ones."""
    seen = describe(mask)
    if isinstance(mask, Tensor):
        mask = mask[None] if mask.ndim == 1 else mask
        if mask.shape == ids.shape:
            strange = mask[(mask != 0) & (mask != 1)]
            if strange.numel() == 0:
                return mask
            seen += f" with the value {strange[0].item()}"
    raise bad(
        "the attention_mask does not fit the tokens",
        seen,
        f"a tensor of zeros and ones of shape {tuple(ids.shape)}",
        "Give 1 for every real token and 0 for padding.",
    )


def _pad(view: ModelView, texts: Sequence[str | None], rows: list[list[int]], side: str) -> Side:
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise bad(
                "a text has no tokens",
                repr(text),
                "at least one token in every text",
                "Leave the text out, or let prepend_bos give it one.",
            )
    return pad_rows(rows, view.pad_id(), side)
