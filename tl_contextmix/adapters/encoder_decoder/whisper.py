"""Hugging Face speech models as encoder-decoders; TransformerLens has no class for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_contextmix.adapters.decoder_prompt import caution
from tl_contextmix.adapters.encoder_decoder.decoding import MemoryDecoder
from tl_contextmix.adapters.encoder_decoder.generation_config import end_tokens, require_followed
from tl_contextmix.adapters.encoder_decoder.model import (
    EncoderDecoder,
    module_norm,
    require_no_hooks_on,
    special_ids,
)
from tl_contextmix.adapters.inputs.activation_cache import describe
from tl_contextmix.adapters.recognition import maths_dtype
from tl_contextmix.adapters.running import require_no_autocast, require_no_dropout
from tl_contextmix.adapters.tokenizers import in_frame, piece_of, text_of
from tl_contextmix.adapters.unbridged import Place, keeping
from tl_contextmix.adapters.weight_processing import fingerprint
from tl_contextmix.errors import InvalidInput, UnsupportedModel, warn
from tl_contextmix.results import Provenance
from tl_contextmix.results.labels import package_version


def is_speech(model: object) -> bool:
    """Whether a model is a Hugging Face encoder-decoder like Whisper.

    Others, such as Speech2Text, downsample features by strides that masks must follow.
    """
    config = getattr(model, "config", None)
    return (
        isinstance(model, nn.Module)
        and bool(getattr(config, "is_encoder_decoder", False))
        and hasattr(config, "num_mel_bins")
        and getattr(model, "main_input_name", "") == "input_features"
        and hasattr(getattr(model, "get_encoder", lambda: None)(), "layers")
    )


def from_speech(
    model: Any, tokenizer: Any, language: str | None = None, task: str | None = None
) -> EncoderDecoder:
    """Returns a Hugging Face speech model (Whisper) as an encoder-decoder.

    Without a tokenizer, or a processor that has one, token ids are shown as numbers. Language and
    task are what ``generate`` takes; None: by the settings.
    """
    from transformers import __version__

    if not hasattr(model, "generate"):
        raise UnsupportedModel(
            "DecoderLens needs a decoder that predicts tokens",
            f"a {type(model).__name__}",
            "a WhisperForConditionalGeneration",
            "Load it as one.",
        )
    require_no_dropout(model)
    first = next(model.parameters())
    require_no_autocast(first.device)
    tokenizer = _checked(getattr(tokenizer, "tokenizer", tokenizer))
    encoder, settings, config = model.get_encoder(), model.generation_config, model.config
    require_followed(settings, speech=True)
    require_no_hooks_on([encoder])
    start = settings.decoder_start_token_id
    decoder = MemoryDecoder(
        model=model,
        owner=model,
        dtype=maths_dtype(first),
        start=(int(config.decoder_start_token_id if start is None else start),),
        ends=end_tokens(settings),
        pad=settings.pad_token_id or 0,
        n_ctx=getattr(config, "max_target_positions", None),
        masked=False,
    )
    norm = getattr(encoder, "layer_norm", None)
    norm = None if norm is None else module_norm(model, norm)

    def encode_target(text: str, end: bool) -> list[int]:
        _, words, after = in_frame(_require(tokenizer), text=text)
        return [*words, *(after or decoder.ends[:1])] if end else words

    def memory(features: Float[Tensor, "batch mel frame"]) -> Tensor:
        last = _speech_states(model, features)[-1]
        return last if norm is None else norm(last)

    return EncoderDecoder(
        provenance=lambda options: Provenance(
            method="decoder_lens",
            options=dict(options),
            model=str(getattr(config, "_name_or_path", "") or type(model).__name__),
            host=type(model).__name__,
            host_version=__version__,
            version=package_version(),
            processing=(),
            fingerprint=fingerprint(dict(model.named_parameters())),
        ),
        n_layers=len(encoder.layers),
        view=None,
        states=lambda features: _speech_states(model, features),
        norm=norm,
        decoder=decoder,
        prompt=lambda features: _prompt(decoder, tokenizer, features, memory, language, task),
        encode_target=encode_target,
        to_string=lambda token: piece_of(tokenizer, token),
        to_text=lambda ids: text_of(tokenizer, ids, skip_special_tokens=True),
        special=special_ids(decoder, tokenizer),
        direct=True,
    )


def _prompt(
    decoder: MemoryDecoder,
    tokenizer: Any,
    features: Float[Tensor, "batch mel frame"],
    memory: Callable[[Tensor], Tensor],
    language: str | None,
    task: str | None,
) -> Int[Tensor, "batch prompt"]:
    """Returns Whisper's decoder prompt: start, language, task and timestamps.

    By the settings; a language they leave open is the tokenizer's, and else the one that Whisper
    hears from its last encoder layer.

    Warns:
        ContextMixWarning: If the tokenizer was told a language that the settings do not force.
    """
    settings = decoder.model.generation_config
    named = ("language", "task", "forced_decoder_ids")
    is_open = all(getattr(settings, name, None) is None for name in named)
    known = getattr(tokenizer, "language", None) if language is None else None
    if is_open and task is None and known is not None:
        ids = [int(token) for token in tokenizer.prefix_tokens]
        warn(caution(known, tokenizer.convert_ids_to_tokens(ids)))
        return torch.tensor([ids] * len(features))
    # Without a language to be heard any memory will do.
    unnamed = language is None and getattr(settings, "language", None) is None
    heard = hasattr(settings, "lang_to_id") and unnamed
    config = decoder.model.config
    size = (len(features), config.max_source_positions, config.d_model)
    result = decoder.generation_prompt(
        memory(features) if heard else torch.zeros(size), language, task
    )
    if known is not None and not set(tokenizer.prefix_tokens[1:2]) <= set(result[0].tolist()):
        warn(caution(known, tokenizer.convert_ids_to_tokens(result[0].tolist())))
    return result


def _speech_states(model: Any, features: Float[Tensor, "batch mel frame"]) -> list[Tensor]:
    """Returns the encoder's states: after convolutions and positions, then after every block."""
    encoder, first = model.get_encoder(), next(model.parameters())
    bins = model.config.num_mel_bins
    if features.shape[1] != bins:
        raise _unfit(features, f"{bins} mel bins")
    places = {str(n): Place(layer, "out") for n, layer in enumerate(encoder.layers)}
    with keeping(model, {"in": Place(encoder.layers[0], "in"), **places}) as kept:
        try:
            encoder(features.to(first.device, first.dtype))
        except ValueError as error:
            raise _unfit(features, str(error)) from error
    return list(kept.values())


def _unfit(features: Tensor, expected: str) -> InvalidInput:
    return InvalidInput(
        "cannot encode the audio features",
        describe(features),
        f"features that match the model ({expected})",
        "Compute them with the model's own feature extractor.",
    )


def _checked(tokenizer: Any) -> Any:
    if tokenizer is None or (callable(tokenizer) and hasattr(tokenizer, "decode")):
        return tokenizer
    raise InvalidInput(
        "not a tokenizer",
        describe(tokenizer),
        "the model's tokenizer, or a processor that has one",
        "Load it with the model.",
    )


def _require(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise InvalidInput(
            "cannot tokenize a text",
            "a speech model without a tokenizer",
            "tokenizer=",
            "Pass the model's tokenizer or processor.",
        )
    return tokenizer
