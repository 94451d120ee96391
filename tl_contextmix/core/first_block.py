"""A stack's first block, whose input is one vector of each token.

Nothing there needs a product for each pair of tokens but W_out: values are computed and go through
W_O and W_in token by token, and heads mix what comes out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.core.attention_terms import GatedTerm
from tl_contextmix.core.feed_forward_parts import FeedForwardParts, kept
from tl_contextmix.core.frozen_blocks import FrozenAttention, FrozenBlock
from tl_contextmix.core.token_sums import AttentionTerm, TokenSum


def first_parts(
    frozen: FrozenBlock, x: Float[Tensor, "batch pos d_model"]
) -> TokenSum | FeedForwardParts:
    """Returns the parts of a stack's own tokens in the first block's output; biases are no part.

    Args:
        frozen: The block.
        x: Its input.
    """
    nothing = torch.zeros_like(x)
    own = TokenSum(terms=(), own=x, bias=nothing, sum_up=lambda: x)
    stream = own
    for attention in frozen.attentions:
        if attention.sublayer.kind == "self":
            term = _term(attention, x)
            out = TokenSum(terms=(term,), own=None, bias=nothing, sum_up=lambda: nothing)
            stream = stream.join(out.frozen(attention.norm_out))
        stream = stream.frozen(attention.norm_after)
    ff, ending = frozen.feed_forward, frozen.ending
    if ff is None:
        return stream
    read = stream
    if frozen.block.parallel:
        read = replace(own, terms=tuple(term.through(slice(0)) for term in stream.terms))
    weights, W_out = (), x[0, :0]
    if not ff.sublayer.routes:
        weights, W_out = tuple(weight for weight, _ in ff.sublayer.branches()), ff.sublayer.W_out
    found = FeedForwardParts(
        sublayer=ff.sublayer,
        read=read.frozen(ff.norm_in),
        weights=weights,
        slopes=ff.slopes,
        W_out=W_out,
        norm_out=ff.norm_out,
        residual=stream,
        norm_after=ff.norm_after if ending is None else ending.norm_after,
        bias=nothing,
        total=nothing,
        ending=ending,
        # Of the encoder nothing is a part here: cross-attention, which is after, has no term.
        keep=kept(frozen.block),
    )
    # W_in is passed by each head's value of each token, or by each pair (half of them, if causal).
    passed = 2 * sum(term.pattern.shape[1] for term in found.read.terms)
    whole = ff.sublayer.routes or ff.sublayer.silent or x.shape[1] <= passed
    return found if whole else found.folded()


def parts_of(
    first: TokenSum | FeedForwardParts, targets: slice, sources: slice
) -> Float[Tensor, "batch target source d_model"]:
    """Returns the parts of some tokens at some targets after the first block."""
    if isinstance(first, FeedForwardParts):
        found = first.at(targets, sources)
    else:
        found = first.dense(targets, sources).transpose(1, 2)
    return found.contiguous()  # or the next block's W_in is copied for each target


def _term(attention: FrozenAttention, x: Float[Tensor, "batch pos d_model"]) -> AttentionTerm:
    value = attention.value(attention.norm_in.linear(x)[:, :, None])[:, :, 0]
    of = attention.pattern, value, attention.sublayer.W_O, x.new_ones(*x.shape[:2], 1)
    return AttentionTerm(*of) if attention.gate is None else GatedTerm(*of, gate=attention.gate)
