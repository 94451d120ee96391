"""Text to token ids and back, as the users of each TransformerLens class expect."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tl_contextmix.adapters.reading import Handle
from tl_contextmix.adapters.recognition import Facts
from tl_contextmix.core.model_view import Padding
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
    were trained on the ids that their tokenizers give, which to_tokens of a bridge puts special
    tokens in front of and cuts some off, so there the tokenizer is asked.
    """
    framed = _isframed(facts)

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
        before, words, after = in_frame(tokenizer, text=text)
        return [*before, *words, *after]

    return encode


def _isframed(facts: Facts) -> bool:
    """Whether texts get the special tokens of their tokenizer, not those of TransformerLens."""
    pair = facts.host == "HookedEncoderDecoder" or "decoder_blocks" in facts.model._modules
    return pair or (facts.encoder_only and facts.host != "HookedTransformer")


def make_encode_pair(
    handle: Handle, facts: Facts
) -> Callable[[str, str], tuple[list[int], list[int] | None]]:
    """Returns the function that turns two texts into the token ids and segments of one row."""
    framed = _isframed(facts)

    def encode_pair(first: str, second: str) -> tuple[list[int], list[int] | None]:
        tokenizer = require_tokenizer(handle.get())
        if not framed:
            raise bad(
                "a pair of texts has no meaning for this model",
                f"({first!r}, {second!r})",
                "one text a row: a decoder has no segments",
                "Join the two into one text.",
            )
        before, _, after = _split(tokenizer, {"text": first})
        if _lost_frame(tokenizer, before, after):
            tokenizer = _published(tokenizer)
        found = tokenizer(first, second)
        return list(found["input_ids"]), found.get("token_type_ids")

    return encode_pair


def in_frame(tokenizer: Any, **text: str) -> tuple[list[int], list[int], list[int]]:
    """Returns a text's ids between the special tokens that its tokenizer puts around them.

    They are the ones of the tokenizer as published. TransformerLens loads one that has a BOS token
    again with add_bos_token=True, and then transformers 5 has BOS replace all of them: BART and
    RoBERTa lose their end token, and texts of a tokenizer that adds nothing get a BOS.

    Args:
        tokenizer: The model's.
        text: One text by its name, ``text`` or ``text_target``.
    """
    before, words, after = _split(tokenizer, text)
    if _lost_frame(tokenizer, before, after):
        before, _, after = _split(_published(tokenizer), text)
    return before, words, after


def _lost_frame(tokenizer: Any, before: list[int], after: list[int]) -> bool:
    """Whether a text has at most a BOS around it and its tokenizer was loaded again for that."""
    # NLLB's tokenizer puts its own back, in the language that is set now.
    bare = [*before, *after] in ([], [getattr(tokenizer, "bos_token_id", None)])
    return bool(getattr(tokenizer, "init_kwargs", {}).get("add_bos_token")) and bare


def _split(tokenizer: Any, text: dict[str, str]) -> tuple[list[int], list[int], list[int]]:
    ids = list(tokenizer(**text)["input_ids"])
    words = list(tokenizer(**text, add_special_tokens=False)["input_ids"])
    for start in range(len(ids) - len(words) + 1):
        end = start + len(words)
        if ids[start:end] == words:
            return ids[:start], words, ids[end:]
    return [], ids, []


_PUBLISHED: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _published(tokenizer: Any) -> Any:
    """Returns a tokenizer as it was before TransformerLens asked for a BOS token."""
    found = _PUBLISHED.get(tokenizer)
    if found is None:
        options = {**tokenizer.init_kwargs, "local_files_only": True}
        del options["add_bos_token"]
        place = options.pop("name_or_path", tokenizer.name_or_path)
        try:
            found = type(tokenizer).from_pretrained(place, **options)
        except (OSError, ValueError) as error:
            raise bad(
                "the special tokens of a text are not known",
                "a tokenizer that TransformerLens has loaded again with add_bos_token=True, which "
                f"replaces them, and none at {place!r} any more",
                "the tokenizer as published where it was loaded from",
                "Put it back there, or pass token ids.",
            ) from error
        _PUBLISHED[tokenizer] = found
    return found


@contextmanager
def target_mode(tokenizer: Any) -> Iterator[None]:
    """Lets a tokenizer without a target language read target texts, and forget it again.

    M2M100's raises, others take the source language for one from then on.
    """
    unset = getattr(tokenizer, "tgt_lang", "") is None
    if unset:
        tokenizer.tgt_lang = tokenizer.src_lang
    try:
        yield
    finally:
        if unset:
            tokenizer.tgt_lang = None


def make_pieces(handle: Handle) -> Callable[[str], list[int]]:
    """Returns the function that turns a word into token ids, without special tokens.

    Of an encoder-decoder, the ids its decoder predicts. SentencePiece puts a space in front of
    every text, so that one given with its space gets two: the tokenizer is then asked without.
    """

    def pieces(text: str) -> list[int]:
        tokenizer = require_tokenizer(handle.get())
        pair = getattr(handle.get(), "_modules", {})
        name = "text_target" if "decoder" in pair or "decoder_blocks" in pair else "text"

        def bare(text: str) -> list[int]:
            with target_mode(tokenizer):
                return list(tokenizer(**{name: text}, add_special_tokens=False)["input_ids"])

        found = bare(text)
        if len(found) > 1 and text.startswith(" "):
            first = tokenizer.convert_ids_to_tokens(found[0])
            if isinstance(first, str) and first and not first.strip("\u2581"):
                fewer = bare(text[1:])
                found = fewer if len(fewer) < len(found) else found
        return found

    return pieces


def special_ids(model: Any) -> dict[str, int]:
    """Returns the ids of special tokens by their role; see `ModelView.special_ids`."""
    tokenizer = getattr(model, "tokenizer", None)
    segmented = "token_type_ids" in getattr(tokenizer, "model_input_names", ())
    found = {
        "mask": getattr(tokenizer, "mask_token_id", None),
        "unknown": getattr(tokenizer, "unk_token_id", None),
        "separator": getattr(tokenizer, "sep_token_id", None) if segmented else None,
    }
    return {name: int(token) for name, token in found.items() if token is not None}


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


def padding_of(model: Any) -> Padding | None:
    """Returns how the model's tokenizer pads; None where there is none, or it does not."""
    tokenizer = getattr(model, "tokenizer", None)
    token = getattr(tokenizer, "pad_token_id", None)
    if not isinstance(token, int):
        return None

    def also(*roles: str) -> bool:
        return any(getattr(tokenizer, f"{role}_token_id", None) == token for role in roles)

    side = str(getattr(tokenizer, "padding_side", "right"))
    return Padding(token, side, also("bos", "cls", "unk"), also("eos", "sep", "unk"))


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
