"""How a model generates: which of transformers' generation settings are followed, and which not."""

from __future__ import annotations

from typing import Any

from tl_contextmix.adapters.tokenizers import decoder_start
from tl_contextmix.errors import UnsupportedModel, four_parts

# Settings that decode in another way than greedily or by beams from one encoder state, with the
# values at which they do nothing. All others are transformers' own affair, or the caller's.
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
# Those that look at the tokens of the source, which audio has none of.
_OF_SOURCE_TOKENS: dict[str, tuple[Any, ...]] = {
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
}


def generation_settings(model: Any) -> Any:
    """Returns how a model generates: a bridge's own settings, or T5's as a tokenizer has them."""
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
    """Returns the ids that end an answer."""
    end = settings.eos_token_id
    return tuple(end) if isinstance(end, (list, tuple)) else (() if end is None else (end,))


def require_followed(settings: Any, *, speech: bool) -> None:
    """Checks that nothing is set that decoding from earlier layers would not follow.

    Raises:
        UnsupportedModel: If something is, by its name.
    """
    refused = {**_REFUSED, **_OF_SOURCE_TOKENS} if speech else _REFUSED
    found = [
        f"{name}={value!r}"
        for name, neutral in refused.items()
        if (value := getattr(settings, name, None)) not in neutral
    ]
    if found:
        raise UnsupportedModel(
            four_parts(
                "these generation settings cannot be followed from every encoder layer",
                ", ".join(found),
                "greedy decoding or beam search, and settings that change scores or lengths",
                "Reset them in the model's generation_config.",
            )
        )
