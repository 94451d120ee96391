"""Constant factors that a block's own forward pass has outside of its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tl_contextmix.core.blocks import Block
from tl_contextmix.core.token_sums import Norm


def with_multipliers(block: Block, module: nn.Module, like: torch.Tensor) -> Block:
    """Returns a reading of a block whose sublayers' outputs are multiplied as the host does it.

    A factor is read as a norm of the output that is nothing but a gain, so that what hooks add
    before it is multiplied, too. ``like`` has the dtype and the device of the maths.
    """
    inner = getattr(module, "original_component", None)
    scale = float(getattr(inner, "residual_multiplier", 1.0))
    if scale != 1.0:
        return _granite(block, module, scale, like)
    if hasattr(inner, "attn_out_multiplier"):
        return _falcon_h1(block, inner, like)
    factor = getattr(inner, "layer_scalar", None)
    return block if factor is None or float(factor) == 1.0 else _gemma4(block, float(factor), like)


def _granite(block: Block, module: nn.Module, scale: float, like: torch.Tensor) -> Block:
    """Granite multiplies all outputs by the same factor; version 4 shows them after it."""
    path = block.resid_in.rpartition(".")[0]

    def scaled(sublayer: Any, shown: str) -> Any:
        out = (f"{path}.{shown}",) if shown in module._modules else ()
        edits = replace(sublayer.edits, out=out)
        return replace(sublayer, norm_out=_gain(block, scale, like), edits=edits)

    ff = block.feed_forward
    return replace(
        block,
        attentions=tuple(scaled(one, "hook_attn_out") for one in block.attentions),
        mixers=tuple(replace(one, norm_out=_gain(block, scale, like)) for one in block.mixers),
        feed_forward=None if ff is None else scaled(ff, "hook_mlp_out"),
    )


def _falcon_h1(block: Block, inner: Any, like: torch.Tensor) -> Block:
    """Falcon-H1 has a factor for each sublayer; that of its feed-forward's gate is elsewhere."""
    attention, ff = block.attentions[0], block.feed_forward
    assert ff is not None
    assert attention.norm_in is not None
    norm_in = replace(
        attention.norm_in, weight=attention.norm_in.weight * inner.attention_in_multiplier
    )
    out, mixed = inner.attn_out_multiplier, inner.ssm_out_multiplier
    mlp = _gain(block, inner.feed_forward.down_multiplier, like)
    # The first of two places is before the factor, the module's own output after it.
    raw, after = ff.edits.raw[:1], ff.edits.raw[1:]
    return replace(
        block,
        attentions=(replace(attention, norm_in=norm_in, norm_out=_gain(block, out, like)),),
        mixers=tuple(replace(one, norm_out=_gain(block, mixed, like)) for one in block.mixers),
        feed_forward=replace(ff, norm_out=mlp, edits=replace(ff.edits, raw=raw, out=after)),
    )


def _gemma4(block: Block, factor: float, like: torch.Tensor) -> Block:
    """Gemma 4 multiplies the stream itself after each block."""
    name = "feed_forward" if block.ending is None else "ending"
    last: Any = getattr(block, name)
    edits = replace(last.edits, stream=())  # the block's output is shown after the factor
    after = replace(last, norm_after=_gain(block, factor, like), edits=edits)
    return replace(block, **{name: after})


def _gain(block: Block, factor: float, like: torch.Tensor) -> Norm:
    return Norm("none", weight=like.new_full((block.d_model,), factor), bias=None, eps=0.0)
