"""Shares of sources in the activations of some neurons."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

from jaxtyping import Float, Int
from torch import Tensor

from tl_contextmix.core.blocks import FeedForward
from tl_contextmix.core.feed_forward_parts import Bias
from tl_contextmix.core.token_sums import TokenSum, beside, blocks

# Of which shares of neurons are made at once: fewer take longer, more take memory for nothing.
_TARGETS = 16


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
    return rest[:, beside(rest, list(rows))]
