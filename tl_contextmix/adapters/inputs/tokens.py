"""Texts and tensors become the tokens of both sides of a model, checked against it, and labels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypedDict, get_args

import numpy
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_contextmix.adapters.chats import ROLES, chats_of
from tl_contextmix.adapters.inputs.activation_cache import Cache, describe
from tl_contextmix.adapters.inputs.model_arguments import further_arguments, warn_of_lost_segments
from tl_contextmix.adapters.inputs.padding import (
    find_padding,
    find_target_padding,
    require_safe_padding,
)
from tl_contextmix.adapters.tokenizers import Labels
from tl_contextmix.core.blocks import Batch, Side
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.validation import LATER, as_list, is_text, require_choice
from tl_contextmix.errors import InvalidInput, seen, warn
from tl_contextmix.results import Tokens

Text = str | Sequence[str]
Ids = Tensor | numpy.ndarray | Sequence[int] | Sequence[Sequence[int]]
Chat = Sequence[Mapping[str, Any]]
TextPairs = Sequence[tuple[str, str]]
# What a tokenizer of Hugging Face returns is a mapping.
Input = Annotated[Text | TextPairs | Chat | Sequence[Chat] | Ids | Mapping[str, Any], LATER]
PaddingSide = Literal["right", "left"]


class TokenInputs(TypedDict, total=False):
    """What every method takes of an input besides the text or the tokens themselves."""

    attention_mask: Ids | None
    """1 at real tokens, 0 at padding, whose scores are 0. None: everything is real, or what a
    tokenizer's result or texts of unequal length say. Rows of like length run together, without the
    padding around them."""

    prepend_bos: bool | None
    """Whether texts get a beginning-of-sequence token; None: the model's default. A text that
    has its own (a chat template's output) gets no second one, with a warning unless this is
    False. Token ids are taken as they are, as everywhere in TransformerLens."""

    padding_side: PaddingSide | None
    """Where texts of unequal length are padded; None: on the right."""

    decoder_input: Input | None
    """Text, texts or token ids of an encoder-decoder's decoder side; None: what ``generate`` starts
    the decoder with. A text follows that, ids are taken as they are."""

    language: str | None
    """Target language that an encoder-decoder's decoder is told, as its tokenizer names it; None:
    what ``generate`` tells it by the generation config, or else the tokenizer's. Ids of
    ``decoder_input`` are taken as they are."""

    token_type_ids: Ids | None
    """Segment of each token, for models that take segments; None: what a tokenizer's result or
    pairs of texts say, else one segment."""

    position_ids: Ids | None
    """Position of each token, for models that take positions; None: the model's own."""

    labels: Labels | None
    """Names of the token ids, for all displays and for ``target``, of a model without a tokenizer
    (a board game's moves): a list, or a function of the id. Where outputs are not tokens
    (``d_vocab_out``), a pair: names of the tokens and of the outputs."""


class Inputs(TokenInputs, total=False):
    """What methods that only look at a forward pass take besides."""

    cache: Cache | None
    """A TransformerLens ActivationCache of the same input, instead of a forward pass."""


@dataclass(frozen=True)
class Given:
    """An input and what `Inputs` has.

    A text, several, pairs of texts, a chat or several, token ids [batch, pos] or [pos], or all that
    the model's own forward takes, by name, as a tokenizer returns it. A chat may be open: its last
    message then goes on.
    """

    input: Input
    attention_mask: Ids | None = None
    prepend_bos: bool | None = None
    padding_side: PaddingSide | None = None
    decoder_input: Input | None = None
    language: str | None = None
    token_type_ids: Ids | None = None
    position_ids: Ids | None = None
    labels: Labels | None = None
    cache: Cache | None = None
    further: Mapping[str, Any] = field(default_factory=dict)
    open_ended: bool = False


def make_batch(view: ModelView, given: Given) -> Batch:
    """Returns the tokens of both sides, for one pass over all rows.

    Raises:
        InvalidInput: If they do not fit the model, or padding changes what it makes of them.
    """
    batch = read_batch(view, given)
    if not bool(batch.main.mask.all()):
        require_safe_padding(view, batch.main)
    return batch


def read_batch(view: ModelView, given: Given) -> Batch:
    """Returns the tokens of both sides, checked against the model; padding is not.

    Raises:
        InvalidInput: If they do not fit.
    """
    if given.padding_side is not None:
        require_choice("padding side", given.padding_side, get_args(PaddingSide))
    if not (given.prepend_bos is None or isinstance(given.prepend_bos, (bool, numpy.bool_))):
        raise InvalidInput(
            "prepend_bos cannot be read",
            seen(given.prepend_bos),
            "True, False or None",
            "Leave it out for the model's default.",
        )
    given = _tokenized(given)
    if view.hears is not None:
        return _heard_batch(view, given)
    main, segments = _main_side(view, given)
    further = {**segments, **given.further}
    if further:
        further = further_arguments(view, further, main)
    # GPT-2, too, takes segments, but was not trained with any.
    if "decoder" not in view.stacks and "token_type_ids" not in further:
        warn_of_lost_segments(view, main)
    decoder = _decoder_side(view, given, main.ids.shape[0])
    return Batch(main=main, decoder=decoder, further=further)


def _heard_batch(view: ModelView, given: Given) -> Batch:
    """Returns the frames of sound, and the tokens of the decoder side."""
    assert view.hears is not None
    unused = replace(given, input="", decoder_input=None, language=None, labels=None)
    if unused != Given(""):
        raise InvalidInput(
            "this has no meaning for a model of sound",
            "attention_mask, prepend_bos, padding_side, token_type_ids or position_ids",
            "none of them",
            "Give sounds of one length.",
        )
    main, sound = view.hears(given.input)
    return Batch(main, _decoder_side(view, given, len(main.ids)), sound)


def _tokenized(given: Given) -> Given:
    """Returns what is given with ids and masks as tensors, a tokenizer's result taken apart."""
    main, mask, decoder_input = given.input, given.attention_mask, given.decoder_input
    further = {"token_type_ids": given.token_type_ids, "position_ids": given.position_ids}
    if isinstance(main, Mapping) and "input_ids" in main:
        held = dict(main)
        main = held.pop("input_ids")
        held_mask, held_decoder_ids = (
            held.pop(name, None) for name in ("attention_mask", "decoder_input_ids")
        )
        mask = held_mask if mask is None else mask
        decoder_input = held_decoder_ids if decoder_input is None else decoder_input
        further = {**held, **{name: one for name, one in further.items() if one is not None}}
    if isinstance(decoder_input, Mapping) and "input_ids" in decoder_input:
        decoder_input = decoder_input["input_ids"]
    return replace(
        given,
        input=as_tensor(main),
        attention_mask=as_tensor(mask),
        decoder_input=as_tensor(decoder_input),
        further={name: as_tensor(one) for name, one in further.items() if one is not None},
    )


def as_tensor(given: Any) -> Any:
    """Returns an array or a list of numbers, or of lists of them, as a tensor; else what it is.

    Columns of texts become a list, see `as_list`.
    """
    try:
        if isinstance(given, numpy.ndarray) and given.dtype.kind in "iufb":
            return torch.as_tensor(given)
        given = as_list(given)
        first = given[0] if isinstance(given, (list, tuple)) and given else None
        if isinstance(first, (list, tuple, int, numpy.integer, numpy.ndarray)):
            return torch.tensor(numpy.array(given))
    except (TypeError, ValueError, RuntimeError):
        pass  # texts, or rows of unequal length: said by what reads it
    return given


def sound_of(given: Any, name: str) -> Any:
    """Returns sound as a tensor where it can be one, a feature extractor's result taken apart.

    Args:
        given: Samples or features, or what the feature extractor returned.
        name: What the model calls them.

    Raises:
        InvalidInput: If a sound is padded. Whisper hears its padding: its encoder takes no mask.
    """
    if isinstance(given, Mapping) and name in given:
        mask = as_tensor(given.get("attention_mask"))
        if name == "input_values" and isinstance(mask, Tensor) and not bool(mask.all()):
            raise InvalidInput(
                "padded sounds cannot be heard apart from their padding",
                f"{int((mask == 0).any(-1).sum())} of {len(mask)} with zeros in attention_mask",
                "sounds of one length",
                "Call once for each sound, not padded.",
            )
        given = given[name]
    return as_tensor(given)


def _main_side(view: ModelView, given: Given) -> tuple[Side, dict[str, Tensor]]:
    """Returns the tokens of the main side, and the segments of pairs of texts."""
    if isinstance(given.input, Tensor):
        ids = require_ids(view, given.input, "input")
        if given.prepend_bos:
            warn(
                "no beginning-of-sequence token is put before token ids",
                "prepend_bos=True with ids",
                "prepend_bos=True with a text",
                "Pass a text, put the token before the ids, or leave prepend_bos out.",
            )
        if given.attention_mask is None:
            return find_padding(view, ids, given.padding_side or "right"), {}
        return Side(ids=ids, mask=_mask(given.attention_mask, ids)), {}
    padded: PaddingSide = given.padding_side or "right"
    chats = None if isinstance(given.input, str) else chats_of(given.input)
    if chats is not None:
        side, segments = _chats(view, chats, given, padded), {}
    elif _are_pairs(given.input):
        side, segments = _pairs(view, given, padded)
    else:
        texts, segments = _texts(view, given.input, "input"), {}
        rows = [view.encode(text, given.prepend_bos) for text in texts]
        side = _pad(view, texts, rows, padded)
    require_ids(view, side.ids, "input")
    if given.attention_mask is None:
        return side, segments
    mask = _mask(given.attention_mask, side.ids)
    if bool((mask & ~side.mask.to(mask.device)).any()):
        raise InvalidInput(
            "the attention_mask does not fit the texts",
            "ones at the padding of a shorter text",
            f"zeros at the padding on the {padded}",
            "Leave the mask out: the padding of texts is known.",
        )
    return replace(side, mask=mask), segments


def _chats(view: ModelView, chats: Sequence[Chat], given: Given, padded: PaddingSide) -> Side:
    """Returns chats as their tokenizer's template puts them."""
    if given.prepend_bos is not None:
        raise InvalidInput(
            "prepend_bos has no meaning for a chat",
            f"prepend_bos={given.prepend_bos}",
            "None",
            "Leave it out: the chat template writes the model's own special tokens.",
        )
    ids, roles = zip(*(view.encode_chat(chat, given.open_ended) for chat in chats), strict=True)
    # An encoder-decoder's sides are its stacks.
    alone = len(view.stacks) == 1
    side = pad_rows(ids, view.pad_id(), padded)
    return replace(side, roles=pad_rows(roles, -1, padded).ids if alone else None)


def _are_pairs(given: object) -> bool:
    return (
        isinstance(given, (list, tuple))
        and bool(given)
        and all(isinstance(one, tuple) and len(one) == 2 for one in given)
    )


def _pairs(view: ModelView, given: Given, padded: str) -> tuple[Side, dict[str, Tensor]]:
    """Returns pairs of texts as their tokenizer joins them, and their segments."""
    sides = zip(*given.input, strict=True)
    firsts, seconds = (_texts(view, list(texts), "input") for texts in sides)
    if given.prepend_bos is not None:
        raise InvalidInput(
            "prepend_bos has no meaning for pairs of texts",
            f"prepend_bos={given.prepend_bos}",
            "None",
            "Leave it out: the tokenizer adds the model's own special tokens.",
        )
    rows = [view.encode_pair(one, other) for one, other in zip(firsts, seconds, strict=True)]
    side = _pad(view, firsts, [ids for ids, _ in rows], padded)
    segments = [segments for _, segments in rows if segments is not None]
    if "token_type_ids" not in view.takes or len(segments) < len(rows):
        return side, {}
    return side, {"token_type_ids": pad_rows(segments, 0, padded).ids}


def _decoder_side(view: ModelView, given: Given, rows: int) -> Side | None:
    asked, language = given.decoder_input, given.language
    if view.encode_decoder is None:
        for name, one in (("decoder_input", asked), ("language", language)):
            if one is not None:
                raise InvalidInput(
                    f"{name} has no meaning for this model",
                    describe(one),
                    "None: the model has one stack",
                    "Leave it out.",
                )
        return None
    if isinstance(asked, Tensor):
        ids = require_ids(view, asked, "decoder_input")
        side = find_target_padding(view, ids, view.encode_decoder(None, language))
    else:
        texts = [None] * rows if asked is None else _texts(view, asked, "decoder_input")
        if language is None and (caution := view.prompt_caution()):
            warn(caution)
        encoded = [view.encode_decoder(text, language) for text in texts]
        side = _pad(view, texts, encoded, "right")
        require_ids(view, side.ids, "decoder_input")
    require_as_many(rows, side.ids.shape[0])
    return side


def require_as_many(inputs: int, others: int) -> None:
    """Raises InvalidInput unless there are as many decoder inputs as inputs."""
    if others != inputs:
        raise InvalidInput(
            "input and decoder_input do not fit each other",
            f"{inputs} and {others} rows",
            "as many decoder inputs as inputs",
            "Give one decoder input per input.",
        )


def _texts(view: ModelView, given: object, name: str) -> list[str]:
    texts: Any = [given] if isinstance(given, str) else given
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise InvalidInput(
            f"the {name} cannot be read",
            _describe_items(texts),
            "a str, a list of str or of pairs of them, token ids [batch, pos], or what a "
            "tokenizer returns",
            "Give rows of ids one length.",
        )
    if not all(map(is_text, texts)):
        raise InvalidInput(
            f"the {name} cannot be read",
            seen(given),
            "characters that a text can have",
            "Leave out halves of surrogate pairs.",
        )
    if not texts or not all(texts):
        raise InvalidInput(
            f"the {name} is empty",
            repr(given),
            "at least one character in every text",
            "Leave empty texts out.",
        )
    if len(texts) > 1 and view.reads_text() and _are_pieces(view, texts):
        raise InvalidInput(
            f"the {name} is the tokens of one text, not a list of texts",
            f"{len(texts)} strings that are one token each, such as to_str_tokens returns: "
            f"{list(texts[:4])}{', ...' if len(texts) > 4 else ''}",
            "texts, or token ids",
            "Pass the text itself, or to_tokens(text). Give texts of one token each in calls of "
            "their own.",
        )
    return list(texts)


def _are_pieces(view: ModelView, texts: Sequence[str]) -> bool:
    """Whether these are the tokens of a text rather than texts of one token each.

    They are where they begin or end with a special token, or where the first of three or more
    begins without a space (or ``##``) and others with one.
    """
    continued = [text[0].isspace() or text.startswith("##") for text in texts]
    like_one_text = len(texts) > 2 and not continued[0] and any(continued)
    if not like_one_text:
        special = {view.to_string(token).strip() for token in view.special_tokens()}
        if not special.intersection((texts[0].strip(), texts[-1].strip())):
            return False
    return all("\ufffd" in text or len(view.pieces(text)) == 1 for text in texts)


def _describe_items(given: object) -> str:
    if isinstance(given, (list, tuple)):
        kinds = sorted({type(item).__name__ for item in given})
        return f"{describe(given)} of {', '.join(kinds)}"
    return describe(given)


def require_ids(view: ModelView, ids: Tensor, name: str) -> Tensor:
    """Returns token ids [batch, pos] that the model can run; raises InvalidInput otherwise."""
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
    return InvalidInput(f"the {name} cannot be run", seen, expected, remedy)


def _mask(mask: object, ids: Tensor) -> Tensor:
    found = _mask_values(mask, ids)
    real = found.to(ids.device).bool()
    if not bool(real.any(dim=1).all()):
        row = int((~real.any(dim=1)).nonzero()[0])
        raise InvalidInput(
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
    raise InvalidInput(
        "the attention_mask does not fit the tokens",
        seen,
        f"a tensor of zeros and ones of shape {tuple(ids.shape)}",
        "Give 1 for every real token and 0 for padding.",
    )


def pad_rows(rows: Sequence[Sequence[int]], pad: int, side: str = "right") -> Side:
    """Returns rows of token ids of any lengths as one tensor, padded on a side."""
    ids = [torch.tensor(row) for row in rows]
    real = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return Side(
        ids=pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=side),
        mask=pad_sequence(real, batch_first=True, padding_side=side),
    )


def _pad(view: ModelView, texts: Sequence[str | None], rows: list[list[int]], side: str) -> Side:
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise InvalidInput(
                "a text has no tokens",
                repr(text),
                "at least one token in every text",
                "Leave the text out, or let prepend_bos give it one.",
            )
    return pad_rows(rows, view.pad_id(), side)


def label_sides(view: ModelView, batch: Batch) -> dict[str, Tokens]:
    """Returns the labels of each side of a batch."""
    sides = {"decoder": batch.decoder, "encoder": batch.main}
    if batch.decoder is None:
        sides = dict.fromkeys(view.stacks, batch.main)
    return {name: label(view, name, side) for name, side in sides.items() if side is not None}


def label(view: ModelView, name: str, side: Side) -> Tokens:
    """Returns the labels of one side of a batch."""
    # Copies: the caller may write on what was given, or on a result.
    ids, mask = side.ids.cpu().clone(), side.mask.cpu().clone()
    # Each token is decoded once: long inputs repeat theirs.
    show = (name == "encoder" and view.to_source) or view.to_string
    texts = {token: show(token) for token in ids.unique().tolist()}
    strings = tuple(tuple(texts[token] for token in row) for row in ids.tolist())
    sides, places = ((name, ids.shape[1]),), None
    if side.roles is not None and bool((side.roles == side.roles[0]).all()):
        runs = itertools.groupby(side.roles[0].tolist())
        sides = tuple((ROLES[role], len([*run])) for role, run in runs)
        places = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    return Tokens(ids, strings, mask, sides, places=places, spaced=view.spaced())


def word_table(view: ModelView, *ids: Tensor) -> dict[str, str]:
    """Returns the text of all that is predicted, by its id as text (as files hold them)."""
    known = torch.cat([some.flatten().cpu() for some in ids]).unique().tolist()
    return {str(token): view.to_output(token) for token in known}
