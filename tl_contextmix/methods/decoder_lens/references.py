"""What the decoder lens is given, checked against the model: sources, references, tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tl_contextmix.adapters import EncoderDecoder
from tl_contextmix.adapters.inputs import Given, make_batch, pad_rows
from tl_contextmix.adapters.inputs.activation_cache import describe
from tl_contextmix.adapters.inputs.tokens import as_tensor, require_as_many, sound_of
from tl_contextmix.adapters.questions import single_token
from tl_contextmix.core.blocks import Side
from tl_contextmix.core.text_metrics import words
from tl_contextmix.core.validation import whole_number
from tl_contextmix.errors import InvalidInput
from tl_contextmix.results.curves import as_texts


def read_source(
    model: EncoderDecoder, given: Given
) -> tuple[Side | Tensor, Side, tuple[str, ...], Mapping[str, Tensor]]:
    """Returns what the encoder reads, the decoder's prompt, the inputs as text, and what else."""
    if model.view is not None:
        batch = make_batch(model.view, given)
        if batch.further and not model.takes_further:
            raise InvalidInput(
                "an encoder that is read layer by layer takes tokens only",
                " and ".join(batch.further),
                "token ids and a mask",
                "Leave it out.",
            )
        listed = [given.input] if isinstance(given.input, str) else given.input
        inputs = tuple(text for text in listed if isinstance(text, str))
        if len(inputs) != len(batch.main.ids):
            rows = zip(batch.main.ids, batch.main.mask, strict=True)
            inputs = tuple(model.to_text(ids[mask].tolist()) for ids, mask in rows)
        assert batch.decoder is not None
        return batch.main, batch.decoder, inputs, batch.further
    features = sound_of(given.input, "input_features")
    whole = isinstance(features, Tensor) and features.ndim == 3 and len(features) > 0
    if not isinstance(features, Tensor) or not whole or not features.is_floating_point():
        raise InvalidInput(
            "a speech model cannot read this",
            describe(features),
            "features of shape [batch, mel, frame], at least one input",
            "Make them with the model's feature extractor.",
        )
    if replace(given, input="", decoder_input=None, language=None) != Given(""):
        raise InvalidInput(
            "this has no meaning for a speech model",
            "attention_mask, prepend_bos, padding_side, token_type_ids, position_ids or labels",
            "none of them",
            "Pass language and task, or set them in model.generation_config.",
        )
    return features, _speech_prompt(model, given.decoder_input, features), ("",) * len(features), {}


def _speech_prompt(model: EncoderDecoder, given: Any, features: Tensor) -> Side:
    """Returns a speech model's decoder prompt: ids as they are, a text after its prompt."""
    if isinstance(given, Mapping) and "input_ids" in given:
        given = given["input_ids"]
    ids = as_tensor(given)
    if isinstance(ids, Tensor):
        ids = ids[None] if ids.ndim == 1 else ids
        d_vocab, rows = model.decoder.d_vocab, len(features)
        fits = ids.dtype == torch.long and ids.ndim == 2 and len(ids) == rows and ids.numel() > 0
        if not fits or not bool(((ids >= 0) & (ids < d_vocab)).all()):
            raise InvalidInput(
                "the decoder_input cannot be run",
                describe(ids),
                f"ids from 0 to {d_vocab - 1} of shape [{rows}, pos]",
                "Give one row for every input.",
            )
        return Side(ids, torch.ones_like(ids, dtype=torch.bool))
    prompt = model.prompt(features)
    if given is None:
        return Side(prompt, torch.ones_like(prompt, dtype=torch.bool))
    texts = as_texts(given, "decoder_input")
    require_as_many(len(features), len(texts))
    rows = [
        [*start, *model.encode_target(text, False)]
        for start, text in zip(prompt.tolist(), texts, strict=True)
    ]
    return pad_rows(rows, model.decoder.pad)


def read_references(model: EncoderDecoder, given: object, count: int) -> tuple[str, ...] | None:
    """Returns the right answers, one per input, or None."""
    if given is None:
        return None
    result = as_texts(given, "references")
    if len(result) != count:
        raise InvalidInput(
            "references and inputs do not fit each other",
            f"{len(result)} references for {count} inputs",
            "one reference per input",
            "Give as many.",
        )
    for text in result:
        if not words(text) or not _content(model, text):
            raise InvalidInput(
                "a reference has no tokens",
                repr(text),
                "at least one token beside the special ones",
                "Leave the input out, or correct its reference.",
            )
    return result


def _content(model: EncoderDecoder, text: str) -> list[int]:
    """Returns the tokens of a text without special ones."""
    return [token for token in model.encode_target(text, False) if token not in model.special]


def read_tokens(model: EncoderDecoder, given: Any) -> list[int]:
    """Returns the ids of the tokens to be scored."""
    listed = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise InvalidInput(
            "there is nothing to score",
            f"target={given!r}",
            "a list of at least one token with mode='scores'",
            "Pass ids or words, the right one first.",
        )
    return [_token(model, one) for one in listed]


def _token(model: EncoderDecoder, one: object) -> int:
    if isinstance(one, str) and model.view is not None and model.view.labelled:
        one = single_token(model.view, one)
    ids = _content(model, one) if isinstance(one, str) else [whole_number(one)]
    if len(ids) == 1 and ids[0] is not None and 0 <= ids[0] < model.decoder.d_vocab:
        return ids[0]
    raise InvalidInput(
        "this is not one token",
        f"{one!r}, {len(ids)} tokens" if isinstance(one, str) else repr(one),
        f"words of one token each, or ids from 0 to {model.decoder.d_vocab - 1}",
        "Score the first token of longer words.",
    )
