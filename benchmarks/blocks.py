"""Blocks of random weights and activations, made without any model class."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tl_contextmix.core.activations import ACTIVATIONS
from tl_contextmix.core.blocks import AttentionSublayer, Batch, Block, FeedForward, Side, Trace
from tl_contextmix.core.token_sums import Norm
from tl_contextmix.engine.parts import linear_points


@dataclass(frozen=True)
class Sizes:
    """What a block is measured at; GPT-2's and BERT's sizes unless said otherwise.

    Attributes:
        n: Tokens.
        d: Width of the residual stream.
        heads: Attention heads.
        m: Neurons of the feed-forward block.
        causal: Whether tokens see only what is before them.
        window: How many tokens back are seen (causal); None for all.
        batch: Rows.
        gated: Whether the feed-forward block has a gate.
        post_norm: LayerNorm after the residual sums (BERT) instead of before (GPT-2).
        sandwich: Norms of what attention and the feed-forward block add (Gemma 2).
        parallel: Whether the feed-forward block reads the block's input (GPT-J).
        encoder: Length of an encoder that is also read; 0 for none.
    """

    n: int
    d: int = 768
    heads: int = 12
    m: int = 3072
    causal: bool = True
    window: int | None = None
    batch: int = 1
    gated: bool = False
    post_norm: bool = False
    sandwich: bool = False
    parallel: bool = False
    encoder: int = 0


class _Draw:
    """Draws tensors; on ``meta`` they have a shape and no numbers."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
        self.kind = {"dtype": dtype, "device": device}

    def __call__(self, *shape: int) -> Tensor:
        spread = shape[-2] ** -0.5 if len(shape) > 1 else 1.0
        return torch.randn(*shape, generator=self.generator, **self.kind) * spread

    def norm(self, width: int) -> Norm:
        return Norm("ln", 1 + 0.3 * self(width), self(width), 1e-5)


def build(
    sizes: Sizes, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Block, Trace]:
    """Returns a block and what a forward pass would have left behind."""
    draw = _Draw(dtype, device)
    values = {"x": 3 * sizes.n**0.5 * draw(sizes.batch, sizes.n, sizes.d)}
    attentions = [_attention(sizes, draw, values, "self")]
    if sizes.encoder:
        attentions.append(_attention(sizes, draw, values, "cross"))
    block = Block(
        layer=0,
        resid_in="x",
        resid_out="out",
        attentions=tuple(attentions),
        feed_forward=_feed_forward(sizes, draw),
        parallel=sizes.parallel,
    )
    side = _side(sizes.batch, sizes.n)
    batch = Batch(_side(sizes.batch, sizes.encoder), side) if sizes.encoder else Batch(side)
    return block, Trace(batch, values, dtype)


def _side(rows: int, length: int) -> Side:
    ids = torch.zeros(rows, length, dtype=torch.long)
    return Side(ids, torch.ones_like(ids, dtype=torch.bool))


def _attention(
    sizes: Sizes, draw: _Draw, values: dict[str, Tensor], kind: Literal["self", "cross"]
) -> AttentionSublayer:
    length, d_head = sizes.n if kind == "self" else sizes.encoder, sizes.d // sizes.heads
    scores = draw(sizes.batch, sizes.heads, sizes.n, length)
    if kind == "self" and sizes.causal:
        place = torch.arange(length, device=scores.device)
        distance = place[:, None] - place
        seen = (distance >= 0) & (distance < (sizes.window or length))
        scores = scores.masked_fill(~seen, -torch.inf)
    pattern = scores.softmax(-1)
    value = draw(sizes.batch, length, sizes.heads, d_head)
    mixed = torch.einsum("bhts,bshd->bthd", pattern, value)
    values |= {f"{kind} pattern": pattern, f"{kind} v": value, f"{kind} z": mixed}
    weights = {"W_O": draw(sizes.heads, d_head, sizes.d), "b_O": draw(sizes.d)}
    return AttentionSublayer(
        stack="decoder",
        kind=kind,
        pattern=f"{kind} pattern",
        value=f"{kind} v",
        mixed=f"{kind} z",
        key="",
        weights=weights.get,
        norm_out=draw.norm(sizes.d) if sizes.sandwich else None,
        norm_after=draw.norm(sizes.d) if sizes.post_norm else None,
    )


def _feed_forward(sizes: Sizes, draw: _Draw) -> FeedForward:
    d, m = sizes.d, sizes.m
    weights = {"W_in": draw(d, m), "b_in": draw(m), "W_out": draw(m, d), "b_out": draw(d)}
    if sizes.gated:
        weights |= {"W_gate": draw(d, m), "b_gate": draw(m)}
    name = "silu" if sizes.gated else "gelu"
    return FeedForward(
        pre="",
        post="",
        pre_linear="linear" if sizes.gated else None,
        weights=weights.get,
        activation=next(known for known in ACTIVATIONS if known.name == name),
        norm_in=None if sizes.post_norm else draw.norm(d),
        norm_out=draw.norm(d) if sizes.sandwich else None,
        norm_after=draw.norm(d) if sizes.post_norm else None,
    )


def with_relu(block: Block, trace: Trace, share: float | None = None) -> Block:
    """Returns a block with ReLU neurons, each active at a share of the tokens (None: whatever)."""
    ff = block.feed_forward
    assert ff is not None
    names = ("W_in", "b_in", "W_gate", "b_gate", "W_out", "b_out")
    weights = {name: ff.weights(name) for name in names}
    if share is not None:
        read = linear_points(block, trace, "decoder")["mlp_in"].total
        weights["b_in"] = -(read @ ff.branches()[0][0]).quantile(1 - share, dim=1)[0]
    relu = next(known for known in ACTIVATIONS if known.name == "relu")
    return replace(block, feed_forward=replace(ff, activation=relu, weights=weights.get))
