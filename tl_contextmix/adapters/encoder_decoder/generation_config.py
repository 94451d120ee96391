"""Which of transformers' generation settings are supported."""

from __future__ import annotations

from typing import Any

from tl_contextmix.adapters.decoder_prompt import decoder_start
from tl_contextmix.errors import UnsupportedModel

# Settings beyond greedy or beam search from one encoder state, with their neutral values.
# transformers, or the caller, handles all others.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "cache_implementation": (None,),
    "constraints": (None,),
    "diversity_penalty": (None, 0.0),
    "dola_layers": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1),
    "max_time": (None,),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0.0),
    "prefill_chunk_size": (None,),
    "prompt_lookup_num_tokens": (None,),
    "stop_strings": (None,),
    "token_healing": (None, False),
    "use_mtp": (None, False),
}
# Settings that need source tokens, which audio does not have.
_OF_SOURCE_TOKENS: dict[str, tuple[Any, ...]] = {
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
}


def generation_settings(model: Any) -> Any:
    """Returns a bridge's generation settings, or T5's defaults with the tokenizer's ids."""
    from transformers import GenerationConfig

    original = getattr(model, "original_model", None)
    if original is not None:
        return original.generation_config
    tokenizer = getattr(model, "tokenizer", None)
    end = getattr(tokenizer, "eos_token_id", None)
    return GenerationConfig(
        decoder_start_token_id=decoder_start(model),
        eos_token_id=1 if end is None else int(end),
        pad_token_id=getattr(tokenizer, "pad_token_id", None) or 0,
    )


def end_tokens(settings: Any) -> tuple[int, ...]:
    """Returns the end-of-sequence ids."""
    end = settings.eos_token_id
    return tuple(end) if isinstance(end, (list, tuple)) else (() if end is None else (end,))


def require_followed(settings: Any, *, speech: bool) -> None:
    """Checks that decoding from earlier layers supports all settings.

    Raises:
        UnsupportedModel: If it does not.
    """
    refused = {**_REFUSED, **_OF_SOURCE_TOKENS} if speech else _REFUSED
    found = [
        f"{name}={value!r}"
        for name, neutral in refused.items()
        if (value := getattr(settings, name, None)) not in neutral
    ]
    if found:
        raise UnsupportedModel(
            "unsupported generation settings",
            ", ".join(found),
            "greedy decoding or beam search, with settings that only change scores or lengths",
            "Reset them in the model's generation_config.",
        )
