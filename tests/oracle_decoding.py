"""DecoderLens the slow way: encoder blocks are taken out of a Hugging Face model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

# Where each family keeps its encoder blocks, and the norm behind them.
_BLOCKS, _NORMS = ("block", "layers"), ("final_layer_norm", "layer_norm", "norm")


def truncated(reference: Any, layers: int, *, norm: bool = True) -> Any:
    """A copy of a model with only the first encoder blocks, and with or without the final norm."""
    model = copy.deepcopy(reference)
    encoder = model.get_encoder()
    name = next(name for name in _BLOCKS if isinstance(getattr(encoder, name, None), nn.ModuleList))
    setattr(encoder, name, getattr(encoder, name)[:layers])
    final = next((name for name in _NORMS if getattr(encoder, name, None) is not None), None)
    if final is not None and not norm:
        setattr(encoder, final, nn.Identity())
    return model


def depth(reference: Any) -> int:
    """Number of encoder blocks."""
    encoder = reference.get_encoder()
    return next(len(getattr(encoder, name)) for name in _BLOCKS if hasattr(encoder, name))


def cache() -> Any:
    """An empty cache; that of transformers 5.23 counts the layers of the encoder."""
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


@torch.no_grad()
def said(model: Any, *inputs: Tensor, **options: Any) -> Tensor:
    """What a model generates, its start token left out."""
    options = {"do_sample": False, "past_key_values": cache(), **options}
    return model.generate(*inputs, **options)[:, 1:]


@torch.no_grad()
def logits(model: Any, tokens: Tensor, decoder_tokens: Tensor, **options: Any) -> Tensor:
    """A model's logits."""
    return model(tokens, decoder_input_ids=decoder_tokens, use_cache=False, **options).logits
