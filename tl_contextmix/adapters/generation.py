"""What a model says next: its own continuation of a text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tl_contextmix.adapters.handles import Handle
from tl_contextmix.adapters.past import empty_cache
from tl_contextmix.adapters.running import lock_of
from tl_contextmix.core.blocks import Batch
from tl_contextmix.errors import UnsupportedModel, reason

Generate = Callable[[Batch, int], list[list[int]]]


def make_generate(handle: Handle) -> Generate:
    """Returns the function that continues each text of a batch by at most so many tokens.

    A bridge's Hugging Face model generates by its own settings (beams, suppressed tokens), without
    sampling; on other classes the most probable token follows each time. An end-of-sequence token
    ends a text and is part of it. Texts are continued one by one, so that none is padded.
    """

    def generate(batch: Batch, count: int) -> list[list[int]]:
        model: Any = handle.get()
        original = getattr(model, "original_model", None)
        rows = range(len(batch.main.ids))
        alone = [batch.each(lambda tensor, row=row: tensor[row : row + 1]) for row in rows]
        with torch.no_grad(), lock_of(model):
            if hasattr(original, "generate"):
                return [_by_hugging_face(model, one, count, handle.device) for one in alone]
            return [_greedy(model, one, count, handle.device) for one in alone]

    return generate


def reads_anew(host: str) -> bool:
    """Returns whether a class reads the whole text again for each token that it says."""
    return host != "TransformerBridge"


def _sides(batch: Batch, device: torch.device) -> list[Tensor]:
    """Returns the real tokens of the only row, of both sides."""
    sides = (batch.main, batch.decoder)
    return [side.ids[:, side.mask[0]].to(device) for side in sides if side is not None]


def _by_hugging_face(model: Any, batch: Batch, count: int, device: torch.device) -> list[int]:
    text, *decoder_ids = _sides(batch, device)
    prompt, original = (decoder_ids or [text])[0], model.original_model
    settings = copy.deepcopy(original.generation_config)
    settings.do_sample, settings.max_new_tokens = False, count
    settings.temperature, settings.top_p, settings.top_k = 1.0, 1.0, 50  # else it warns of them
    settings.max_length, settings.num_return_sequences = None, 1
    # Up to where it generates: it warns of lengths that it will not reach.
    settings.min_length = min(settings.min_length or 0, prompt.shape[1] + count)
    if settings.min_new_tokens is not None:
        settings.min_new_tokens = min(settings.min_new_tokens, count)
    settings.return_dict_in_generate = False
    given: dict[str, Any] = {"attention_mask": torch.ones_like(text)}
    for name, value in batch.further.items():
        given[name] = value[:, batch.main.mask[0]].to(device)
    if decoder_ids:
        given["decoder_input_ids"] = prompt
        # Else it puts its own start before a prompt that begins with another token.
        settings.decoder_start_token_id = int(prompt[0, 0])
        if settings.use_cache is not False and settings.cache_implementation is None:
            given["past_key_values"] = empty_cache()
    if settings.stop_strings:
        given["tokenizer"] = getattr(model, "tokenizer", None)
    try:
        found = original.generate(text, generation_config=settings, **given)
    except ValueError as error:
        raise UnsupportedModel(
            "the model does not generate by its own settings",
            reason(error),
            "settings of greedy decoding or beam search",
            "Reset them in model.original_model.generation_config, or pass the answer as target=.",
        ) from error
    return found[0, prompt.shape[1] :].tolist()


def _greedy(model: Any, batch: Batch, count: int, device: torch.device) -> list[int]:
    sides = _sides(batch, device)
    end = getattr(getattr(model, "tokenizer", None), "eos_token_id", None)
    result: list[int] = []
    while len(result) < count and (not result or result[-1] != end):
        token = model(*sides)[:, -1:].argmax(dim=-1)
        sides[-1] = torch.cat([sides[-1], token], dim=1)
        result.append(int(token))
    return result
