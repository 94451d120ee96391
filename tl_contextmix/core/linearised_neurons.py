"""What the feed-forward sublayer makes of token sums: its parts, and shares of its neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add

from jaxtyping import Float, Int
from torch import Tensor

from tl_contextmix.core.blocks import Block, FeedForward
from tl_contextmix.core.feed_forward_parts import DEFAULT_MAX_BYTES, Bias, FeedForwardParts
from tl_contextmix.core.frozen_blocks import freeze_feed_forward
from tl_contextmix.core.token_sums import FrozenNorm, TokenSum, blocks

# Of which shares of neurons are made at once: fewer take longer, more take memory for nothing.
_TARGETS = 16


def feed_forward_points(
    block: Block, points: dict[str, TokenSum], bias: Bias, max_bytes: int = DEFAULT_MAX_BYTES
) -> dict[str, FeedForwardParts]:
    """Returns a block's parts at and after its feed-forward output; they share what they hold.

    Args:
        block: The block.
        points: Its token sums from `decompose.linear_points`.
        bias: The bias convention, see `decompose`.
        max_bytes: Workspace.
    """
    ff = block.feed_forward
    assert ff is not None
    added = _feed_forward(ff, points["mlp_in"], bias, max_bytes)
    stream = points["residual"]
    total, parts_bias = added.total + stream.total, added.bias + stream.bias
    ending = None
    if block.ending is not None:
        ending = freeze_feed_forward(block.ending, total, total, parts_bias, bias == "fixed")
        parts_bias = parts_bias + ending.adds(parts_bias[:, :, None], True)[:, :, 0]
        total = total + block.ending(total)
    summed = replace(added, residual=stream, bias=parts_bias, total=total, ending=ending)
    normed, last = summed, block.feed_forwards[-1].norm_after
    if last is not None:
        norm = FrozenNorm.at(last, total)
        normed = replace(summed, norm_after=norm, bias=norm.affine(parts_bias), total=last(total))
    return {"mlp_out": added, "resid_post": summed, "block_out": normed}


def neuron_shares(
    ff: FeedForward,
    read: TokenSum,
    convention: Bias,
    rows: Sequence[int],
    neurons: Int[Tensor, " neuron"],
    shares: Float[Tensor, "batch target source neuron"],
) -> Float[Tensor, "batch target neuron"]:
    """Writes each source's share of some neurons' activations; returns the share of no source.

    Args:
        ff: The feed-forward sublayer.
        read: What it reads, from `decompose.linear_points`.
        convention: The bias convention, see `decompose`.
        rows: The targets.
        neurons: The neurons.
        shares: Where the shares are written: they are many, and made a few targets at a time.
    """
    some = ff.holding(read.total).select(neurons)
    start, end = (some.pre_activations(x) for x in (read.bias, read.total))
    slopes, rest = some.linearise(start, end, convention == "fixed")
    hidden = [read.map(weight).ready() for weight, _ in some.branches()]
    # Tiles are contiguous: of all targets a few at a time, of others one each.
    whole = list(rows) == list(range(read.bias.shape[1]))
    branched = list(zip(hidden, slopes, strict=True))
    for places in blocks(len(rows), _TARGETS if whole else 1):
        tile = places if whole else slice(rows[places.start], rows[places.start] + 1)
        parts = (token_sum.dense(tile) * slope[:, None, tile] for token_sum, slope in branched)
        shares[:, places] = reduce(add, parts).transpose(1, 2)
    return rest[:, list(rows)]


def _feed_forward(
    ff: FeedForward, read: TokenSum, convention: Bias, max_bytes: int
) -> FeedForwardParts:
    ff, branches, W_out = ff.holding(read.total), (), read.bias[0, :0]
    if not ff.routes:
        branches, W_out = ff.branches(), ff.W_out
    shape = read.bias.shape[:2]
    flat = ff if ff.gain is None else replace(ff, gain=ff.gain.flatten(0, 1))
    slopes = tuple(read.bias.new_empty(*shape, ff.width) for _ in range(1 + ff.gated))
    # Not like what is read, whose axes may lie in another order in memory: flat views are written.
    bias, total = (read.bias.new_empty(read.bias.shape) for _ in range(2))
    # Some tokens at a time: slopes take a dozen tensors of their own size on the way.
    size = 16 * len(slopes) * ff.width * bias.element_size()
    for rows in blocks(shape.numel(), max(16, max_bytes // 4 // size)):
        begun, ended = (x.flatten(0, 1)[rows] for x in (read.bias, read.total))
        held = flat.part(rows)
        start, end, constant = *map(held.pre_activations, (begun, ended)), held.constant()
        pieces, rest = held.linearise(start, end, convention == "fixed")
        for slope, piece in zip(slopes, pieces, strict=True):
            slope.flatten(0, 1)[rows] = piece
        bias.flatten(0, 1)[rows] = held.write(rest) + constant
        total.flatten(0, 1)[rows] = held.write(held.activate(end)) + constant
    norm_out = FrozenNorm.at(ff.norm_out, total)
    bias = norm_out.affine(bias)
    total = total if ff.norm_out is None else ff.norm_out(total)
    return FeedForwardParts(
        sublayer=ff,
        read=read,
        weights=tuple(weight for weight, _ in branches),
        slopes=slopes,
        W_out=W_out,
        norm_out=norm_out,
        residual=None,
        norm_after=None,
        bias=bias,
        total=total,
    )
