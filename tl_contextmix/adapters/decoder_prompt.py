"""The prompt of an encoder-decoder's decoder, as in ``generate``.

Hugging Face's ``generate`` starts a decoder with ``decoder_start_token_id`` (or the BOS token) of
the generation config and makes it say ``forced_bos_token_id`` first, the code of the target
language in multilingual models. A language that the call names comes before both. Where nothing
is forced, but the tokenizer was told a target language, its code is what the decoder was trained to
start with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tl_contextmix.adapters.handles import Handle
from tl_contextmix.adapters.tokenizers import in_frame, piece_of, require_tokenizer, target_mode
from tl_contextmix.errors import InvalidInput, UnsupportedModel, four_parts, warn


@dataclass(frozen=True)
class Prompt:
    """A decoder's prompt: the start token, and the one that is forced after it.

    ``caution`` is what the tokenizer knows and ``generate`` does not; empty if they agree.
    """

    ids: tuple[int, ...]
    caution: str = ""


def decoder_start(model: Any) -> int:
    """Returns the id that starts the decoder of an encoder-decoder."""
    original = getattr(model, "original_model", None)
    settings = getattr(original, "generation_config", None)
    # The first two are what transformers' generate looks at.
    for holder, name in (
        (settings, "decoder_start_token_id"),
        (settings, "bos_token_id"),
        (getattr(original, "config", None), "decoder_start_token_id"),
        (model.cfg, "decoder_start_token_id"),
    ):
        start = getattr(holder, name, None)
        if start is not None:
            return _one(name, start)
    # As T5, whose decoder starts with padding.
    start = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    return 0 if start is None else int(start)


def _one(name: str, given: Any) -> int:
    """Returns a token id of the settings, which may hold one for each row of a batch."""
    listed = {int(token) for token in given} if isinstance(given, Iterable) else {int(given)}
    if len(listed) != 1:
        raise UnsupportedModel(
            "the decoder's prompt is not the same for every text",
            f"{name}={given!r}",
            "one token",
            "Set one in model.generation_config, or give ids as decoder_input.",
        )
    return listed.pop()


def decoder_prompt(model: Any, language: str | None = None) -> Prompt:
    """Returns the prompt that the decoder of a TransformerLens model is given before a text.

    Args:
        model: The model.
        language: The target language, as its tokenizer names it; None: that of ``generate``.

    Raises:
        InvalidInput: If the tokenizer knows no such language.
    """
    tokenizer: Any = getattr(model, "tokenizer", None)
    if language is not None:
        with _speaking(tokenizer, language):
            return Prompt(_own_prompt(model, tokenizer))
    settings = getattr(getattr(model, "original_model", None), "generation_config", None)
    start, forced = decoder_start(model), getattr(settings, "forced_bos_token_id", None)
    ids = (start,) if forced is None else (start, _one("forced_bos_token_id", forced))
    known = _target_language(tokenizer)
    if known is None or known in ids:
        return Prompt(ids)
    if forced is None:
        ids = _own_prompt(model, tokenizer)
    return Prompt(ids, caution(tokenizer.tgt_lang, tokenizer.convert_ids_to_tokens(list(ids))))


def _own_prompt(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Returns what a decoder was trained to start with in the tokenizer's target language."""
    # Any word shows what comes before it.
    own, _ = _target(model, tokenizer, "a")
    return (decoder_start(model), *own[1:]) if len(own) > 1 else tuple(own)


@contextmanager
def _speaking(tokenizer: Any, language: str | None) -> Iterator[None]:
    """Tells a tokenizer the target language for a while; None changes nothing."""
    if language is None:
        yield
        return
    if not hasattr(tokenizer, "tgt_lang"):
        raise InvalidInput(
            "this model's decoder is told no language",
            f"language={language!r}",
            "a model whose tokenizer has target languages (NLLB, mBART, M2M100)",
            "Leave language out, or give decoder_input.",
        )
    before = tokenizer.tgt_lang
    try:
        if _language_id(tokenizer, language) is None:
            raise InvalidInput(
                "the tokenizer knows no such language",
                f"language={language!r}",
                "a code such as 'fra_Latn' (NLLB), 'fr_XX' (mBART) or 'fr' (M2M100)",
                "Name it as the tokenizer's src_lang is named.",
            )
        tokenizer.tgt_lang = language
        yield
    finally:
        tokenizer.tgt_lang = before


def caution(language: str, prompt: list[str]) -> str:
    """Returns what to say of a target language that a tokenizer knows and generation ignores."""
    return four_parts(
        "the tokenizer's target language is not what generate() makes the decoder start with",
        f"{language!r}, and a decoder that is told {' '.join(map(str, prompt))} here",
        "the language in model.generation_config (forced_bos_token_id, or language)",
        "Set it there, or give decoder_input.",
    )


def make_encode_decoder(handle: Handle) -> Callable[..., list[int]]:
    """Returns the function that turns a target text into decoder input ids.

    As in training: the prompt comes first and the end token is left off, so that position ``t``
    predicts token ``t`` of the text. None gives the prompt alone. See `decoder_prompt` for the
    language.
    """

    def encode(text: str | None, language: str | None = None) -> list[int]:
        model = handle.get()
        prompt = decoder_prompt(model, language).ids
        if text is None:
            return list(prompt)
        tokenizer = require_tokenizer(model)
        with _speaking(tokenizer, language):
            own, rest = _target(model, tokenizer, text)
            known = language is not None or _target_language(tokenizer) in prompt
        # What the tokenizer puts before a text is the text's where nothing is forced.
        lead = own[1:] if len(prompt) == 1 and not known else []
        return [*prompt, *lead, *_without_prompt(tokenizer, text, [*prompt, *lead], rest)]

    return encode


def _without_prompt(tokenizer: Any, text: str, prompt: list[int], ids: list[int]) -> list[int]:
    """Returns a text's ids without the prompt, or the end of it, that the text itself has."""
    for own in (prompt[start:] for start in range(len(prompt))):
        # The text must have it, too: an unknown word may have the same id.
        name = piece_of(tokenizer, own[0]).strip()
        if ids[: len(own)] == own and text.lstrip().startswith(name):
            warn(
                "a decoder's text has its prompt",
                repr("".join(piece_of(tokenizer, one) for one in own)),
                "a text without it",
                "It gets no second one. Leave it out of the text, or pass ids.",
            )
            return ids[len(own) :]
    return ids


def _target(model: Any, tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Returns the decoder's inputs for a text as in training, up to the text and from it on."""
    # Marian has a vocabulary of its own for the target language.
    with target_mode(tokenizer):
        before, words, after = in_frame(tokenizer, text_target=text)
    start = decoder_start(model)
    # Whisper's tokenizer begins with the start token itself.
    own = [*(getattr(tokenizer, "prefix_tokens", None) or ())]
    before = before[1:] if before[:1] == own[:1] == [start] else before
    # The last one is dropped, so there is one to drop.
    labels = [*before, *words, *(after or [start])]
    # A bridge's model does it the way of its family: mBART moves the
    # language code from the end to the front.
    original = getattr(model, "original_model", None)
    shift = getattr(original, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        shifted = [start, *labels[:-1]]
    else:
        shifted = shift(labels=torch.tensor([labels], device="cpu"))[0].tolist()
    first = 1 + len(before)
    # Behind mBART's texts comes an end, too, which is no token of a text that goes on.
    return shifted[:first], shifted[first : first + len(words)]


def _target_language(tokenizer: Any) -> int | None:
    """Returns the id of the target language that a tokenizer was told; None if it was not."""
    language = getattr(tokenizer, "tgt_lang", None)
    # A target text makes some take the source language for it.
    if language is None or language == getattr(tokenizer, "src_lang", None):
        return None
    return _language_id(tokenizer, language)


def _language_id(tokenizer: Any, language: str) -> int | None:
    if hasattr(tokenizer, "get_lang_id"):  # M2M100's names are not its tokens
        known = getattr(tokenizer, "lang_code_to_id", {language: 0})
        return int(tokenizer.get_lang_id(language)) if language in known else None
    found = tokenizer.convert_tokens_to_ids(language)
    return None if found is None or found == tokenizer.unk_token_id else int(found)
