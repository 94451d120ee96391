"""Value Zeroing by its definition, in plain Hugging Face models: one forward pass per value.

Neither the package nor TransformerLens is used here; the benchmarks compare others with it, and
`tests/test_inseq_benchmark.py` compares the package with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Stack = Literal["encoder", "decoder", "cross"]

_SELF = "self_attn.v_proj|attn.v_proj|attn.c_attn|query_key_value|self.value|SelfAttention.v"
_CROSS = "encoder_attn.v_proj|EncDecAttention.v"


def stacks_of(model: Any) -> list[Stack]:
    """Returns the names of the maps that a model has."""
    return ["encoder", "cross", "decoder"] if model.config.is_encoder_decoder else ["decoder"]


def half_squared(changed: Tensor, kept: Tensor) -> Tensor:
    """Returns cosine distances as half the squared distance of unit vectors."""
    unit = torch.nn.functional.normalize
    return (unit(changed, dim=-1) - unit(kept, dim=-1)).square().sum(-1) / 2


def one_minus_cosine(changed: Tensor, kept: Tensor) -> Tensor:
    """Returns cosine distances as inseq takes them: rounding is that of numbers around 1."""
    return 1 - torch.nn.functional.cosine_similarity(changed, kept, dim=-1)


@torch.no_grad()
def hidden_states(model: Any, ids: Sequence[Tensor], stack: Stack) -> Tensor:
    """Returns what each block puts out [layer pos d_model]; the last after the final norm."""
    given: dict[str, Any] = {"input_ids": ids[0], "output_hidden_states": True}
    if len(ids) == 1:
        return torch.cat(model(**given).hidden_states[1:])
    found = model(decoder_input_ids=ids[1], **given)
    states = found.encoder_hidden_states if stack == "encoder" else found.decoder_hidden_states
    return torch.cat(states[1:])


def literal(
    model: Any,
    ids: Sequence[Tensor],
    stack: Stack,
    distance: Callable[[Tensor, Tensor], Tensor] = half_squared,
) -> Tensor:
    """Returns distances [layer target source], each from a forward pass with one value at zero.

    Args:
        model: A Hugging Face model with a language modelling head.
        ids: Token ids [1, pos], and those of the decoder for encoder-decoders.
        stack: Which map; ``"decoder"`` for models of one stack.
        distance: Between a block's outputs [pos d_model] with and without the value.
    """
    kept = hidden_states(model, ids, stack)
    sources = ids[-1 if stack == "decoder" else 0].shape[1]
    found = kept.new_zeros(*kept.shape[:2], sources)
    for layer, (name, module) in enumerate(_value_modules(model, stack)):
        for source in range(sources):
            hook = module.register_forward_hook(_zeroing(name, source, model.config))
            found[layer, :, source] = distance(hidden_states(model, ids, stack)[layer], kept[layer])
            hook.remove()
    return found


def as_inseq(distances: Tensor, threshold: float = 1e-5) -> Tensor:
    """Returns distances as inseq gives them: small ones zeroed, rows divided by their sums."""
    kept = distances.masked_fill(distances < threshold, 0)
    total = kept.sum(dim=-1, keepdim=True)
    return kept / total.masked_fill(total == 0, 1)


def _value_modules(model: Any, stack: Stack) -> list[tuple[str, Any]]:
    names = re.compile(rf"\b({_CROSS if stack == 'cross' else _SELF})$")
    inside = ""
    if model.config.is_encoder_decoder:
        inside = "encoder." if stack == "encoder" else "decoder."
    return [(n, m) for n, m in model.named_modules() if names.search(n) and inside in n]


def _zeroing(name: str, source: int, config: Any) -> Any:
    """Returns a hook that zeroes one position of a value projection's output, bias included."""

    def hook(module: Any, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        if name.endswith("c_attn"):  # queries, keys and values side by side
            out[:, source, 2 * (out.shape[-1] // 3) :] = 0
        elif name.endswith("query_key_value"):  # the same, head by head
            heads = out.view(*out.shape[:2], config.num_attention_heads, 3, -1)
            heads[:, source, :, 2] = 0
        else:
            out[:, source] = 0
        return out

    return hook
