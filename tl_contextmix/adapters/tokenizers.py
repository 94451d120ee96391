"""Text to token ids and back, as the users of each TransformerLens class expect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tl_contextmix.adapters.reading import Handle
from tl_contextmix.adapters.recognition import Facts
from tl_contextmix.errors import bad


def require_tokenizer(model: Any) -> Any:
    """Returns the model's tokenizer.

    Raises:
        InvalidInput: If it has none.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise bad(
            "text cannot be turned into tokens",
            "a model without a tokenizer",
            "token ids of shape [batch, pos]",
            "Pass a tensor of token ids, or give the model a tokenizer.",
        )
    return tokenizer


def make_encode(handle: Handle, facts: Facts) -> Callable[[str, bool | None], list[int]]:
    """Returns the function that turns one text into token ids.

    HookedTransformer and decoder-only bridges are asked themselves. Encoders and encoder-decoders
    were trained on texts framed by special tokens, and the bridge's to_tokens of 4.3 puts T5's end
    token first and drops BART's, so there the tokenizer is asked, and its frame is completed.
    """
    pair = facts.host == "HookedEncoderDecoder" or "decoder_blocks" in facts.model._modules
    framed = pair or (facts.encoder_only and facts.host != "HookedTransformer")

    def encode(text: str, prepend_bos: bool | None) -> list[int]:
        model = handle.get()
        tokenizer = require_tokenizer(model)
        if not framed:
            options = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
            return model.to_tokens(text, truncate=False, **options)[0].tolist()
        if prepend_bos is not None:
            raise bad(
                "prepend_bos has no meaning for an encoder",
                f"prepend_bos={prepend_bos}",
                "None",
                "Leave it out: the tokenizer adds the model's own special tokens.",
            )
        ids = list(tokenizer(text)["input_ids"])
        return _ended(tokenizer, ids) if pair else _enclosed(tokenizer, ids)

    return encode


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """Returns a source text with its end token.

    A tokenizer that TransformerLens has loaded again with add_bos_token has lost it. mBART and
    M2M100 put a language code behind it.
    """
    end = tokenizer.eos_token_id
    return ids if not ids or end is None or end in ids[-2:] else [*ids, end]


def _enclosed(tokenizer: Any, ids: list[int]) -> list[int]:
    """Returns a text between an encoder's special tokens, for the same reason."""
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    if not ids or first is None or last is None:
        return ids
    ids = ids if ids[0] == first else [first, *ids]
    return ids if ids[-1] == last and len(ids) > 1 else [*ids, last]


def make_encode_decoder(handle: Handle) -> Callable[[str | None], list[int]]:
    """Returns the function that turns a target text into decoder input ids.

    As in training: the start token comes first and the end token is left off, so that position
    ``t`` predicts token ``t`` of the text. None gives the start token alone.
    """

    def encode(text: str | None) -> list[int]:
        model = handle.get()
        start = decoder_start(model)
        if text is None:
            return [start]
        tokenizer = require_tokenizer(model)
        # Marian has a vocabulary of its own for the target language.
        labels = list(tokenizer(text_target=text)["input_ids"])
        if not labels or labels[-1] not in tokenizer.all_special_ids:
            labels = [*labels, start]
        # The last one is dropped. A bridge's model does it the way of its family: mBART moves the
        # language code from the end to the front.
        original = getattr(model, "original_model", None)
        shift = getattr(original, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            return [start, *labels[:-1]]
        return shift(labels=torch.tensor([labels], device="cpu"))[0].tolist()

    return encode


def make_pieces(handle: Handle) -> Callable[[str], list[int]]:
    """Returns the function that turns a word into token ids, without special tokens.

    Of an encoder-decoder, the ids its decoder predicts. SentencePiece puts a space in front of
    every text, so that one given with its space gets two: the tokenizer is then asked without.
    """

    def pieces(text: str) -> list[int]:
        tokenizer = require_tokenizer(handle.get())
        pair = getattr(handle.get(), "_modules", {})
        name = "text_target" if "decoder" in pair or "decoder_blocks" in pair else "text"
        found = list(tokenizer(**{name: text}, add_special_tokens=False)["input_ids"])
        if len(found) > 1 and text.startswith(" "):
            first = tokenizer.convert_ids_to_tokens(found[0])
            if isinstance(first, str) and first and not first.strip("\u2581"):
                bare = tokenizer(**{name: text[1:]}, add_special_tokens=False)["input_ids"]
                found = list(bare) if len(bare) < len(found) else found
        return found

    return pieces


def special_ids(model: Any) -> dict[str, int]:
    """Returns the ids of the tokens that stand for a word: ``"mask"`` and ``"unknown"``."""
    tokenizer = getattr(model, "tokenizer", None)
    found = {
        "mask": getattr(tokenizer, "mask_token_id", None),
        "unknown": getattr(tokenizer, "unk_token_id", None),
    }
    return {name: int(token) for name, token in found.items() if token is not None}


def decoder_start(model: Any) -> int:
    """Returns the id that starts the decoder of an encoder-decoder."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    for holder in (config, model.cfg):
        start = getattr(holder, "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    # As T5, whose decoder starts with padding.
    start = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    return 0 if start is None else int(start)


def make_pad_id(handle: Handle, facts: Facts) -> Callable[[], int]:
    """Returns the function that gives the id of padding.

    RoBERTa counts positions by it, so the model's own comes before the tokenizer's, to which
    TransformerLens adds one where it has none; that one may lie outside of the vocabulary.
    """
    d_vocab = int(facts.model.W_E.shape[0])
    configured = getattr(facts.hf_config(), "pad_token_id", None)

    def pad_id() -> int:
        tokenizer = getattr(handle.get(), "tokenizer", None)
        for found in (configured, getattr(tokenizer, "pad_token_id", None)):
            if isinstance(found, int) and 0 <= found < d_vocab:
                return found
        return 0

    return pad_id


def make_to_string(handle: Handle) -> Callable[[int], str]:
    """Returns the function that shows one token id, leading spaces kept."""

    def to_string(token: int) -> str:
        tokenizer = getattr(handle.get(), "tokenizer", None)
        if tokenizer is None:
            return str(token)
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            # Vocabularies are padded to round numbers, and no token stands behind the last ids.
            return f"[{token}]"
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        # SentencePiece marks a leading space that decoding a single token drops.
        starts_word = isinstance(piece, str) and piece.startswith("\u2581")
        return " " + text.lstrip() if starts_word else text

    return to_string
