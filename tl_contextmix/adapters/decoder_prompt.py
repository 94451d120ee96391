"""The prompt of an encoder-decoder's decoder, as in ``generate``.

Hugging Face's ``generate`` starts a decoder with ``decoder_start_token_id`` (or the BOS token) of
the generation config and makes it say ``forced_bos_token_id`` first, the code of the target
language in multilingual models. Where nothing is forced, but the tokenizer was told a target
language, its code is what the decoder was trained to start with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tl_contextmix.adapters.reading import Handle
from tl_contextmix.adapters.tokenizers import in_frame, require_tokenizer, target_mode
from tl_contextmix.errors import four_parts


@dataclass(frozen=True)
class Prompt:
    """A decoder's prompt.

    Attributes:
        ids: The start token, and the one that is forced after it.
        caution: What the tokenizer knows and ``generate`` does not; empty if they agree.
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
            return int(start)
    # As T5, whose decoder starts with padding.
    start = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    return 0 if start is None else int(start)


def decoder_prompt(model: Any) -> Prompt:
    """Returns the prompt that the decoder of a TransformerLens model is given before a text."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    settings = getattr(getattr(model, "original_model", None), "generation_config", None)
    start, forced = decoder_start(model), getattr(settings, "forced_bos_token_id", None)
    ids = (start,) if forced is None else (start, int(forced))
    known = _target_language(tokenizer)
    if known is None or known in ids:
        return Prompt(ids)
    if forced is None:
        # Any word shows what comes before it.
        own, _ = _target(model, tokenizer, "a")
        ids = (start, *own[1:]) if len(own) > 1 else tuple(own)
    return Prompt(ids, caution(tokenizer.tgt_lang, tokenizer.convert_ids_to_tokens(list(ids))))


def caution(language: str, told: list[str]) -> str:
    """Returns what to say of a target language that a tokenizer knows and generation ignores."""
    return four_parts(
        "the tokenizer's target language is not what generate() makes the decoder start with",
        f"{language!r}, and a decoder that is told {' '.join(map(str, told))} here",
        "the language in model.generation_config (forced_bos_token_id, or language)",
        "Set it there, or give decoder_input.",
    )


def make_encode_decoder(handle: Handle) -> Callable[[str | None], list[int]]:
    """Returns the function that turns a target text into decoder input ids.

    As in training: the prompt comes first and the end token is left off, so that position ``t``
    predicts token ``t`` of the text. None gives the prompt alone.
    """

    def encode(text: str | None) -> list[int]:
        model = handle.get()
        prompt = decoder_prompt(model).ids
        if text is None:
            return list(prompt)
        tokenizer = require_tokenizer(model)
        own, rest = _target(model, tokenizer, text)
        if len(prompt) == 1 and _target_language(tokenizer) not in prompt:
            # What the tokenizer puts before a text is the text's where nothing is forced.
            rest = own[1:] + rest
        return [*prompt, *rest]

    return encode


def _target(model: Any, tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Returns the decoder's inputs for a text as in training, up to the text and from it on."""
    # Marian has a vocabulary of its own for the target language.
    with target_mode(tokenizer):
        before, words, after = in_frame(tokenizer, text_target=text)
    # The last one is dropped, so there is one to drop.
    start = decoder_start(model)
    labels = [*before, *words, *(after or [start])]
    # A bridge's model does it the way of its family: mBART moves the
    # language code from the end to the front.
    original = getattr(model, "original_model", None)
    shift = getattr(original, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        shifted = [start, *labels[:-1]]
    else:
        shifted = shift(labels=torch.tensor([labels], device="cpu"))[0].tolist()
    return shifted[: 1 + len(before)], shifted[1 + len(before) :]


def _target_language(tokenizer: Any) -> int | None:
    """Returns the id of the target language that a tokenizer was told; None if it was not."""
    language = getattr(tokenizer, "tgt_lang", None)
    # A target text makes some take the source language for it.
    if language is None or language == getattr(tokenizer, "src_lang", None):
        return None
    if hasattr(tokenizer, "get_lang_id"):  # M2M100's names are not its tokens
        return int(tokenizer.get_lang_id(language))
    found = tokenizer.convert_tokens_to_ids(language)
    return None if found is None or found == tokenizer.unk_token_id else int(found)
