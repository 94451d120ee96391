r"""The engine: every tensor on a block's residual path as a sum over source tokens plus a bias.

With attention patterns and norm scales frozen at their real values, everything up to the
feed-forward activation is linear in the sources and stays a `TokenSum`; after it come
`FeedForwardParts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.adapters.passes import Pass
from tl_contextmix.core.blocks import AttentionSublayer, Block, Identity, Trace, shift
from tl_contextmix.core.feed_forward_parts import (
    DEFAULT_MAX_BYTES,
    Bias,
    FeedForwardParts,
    Precision,
    feed_forward_points,
)
from tl_contextmix.core.folded_weights import Folds
from tl_contextmix.core.model_view import StackName
from tl_contextmix.core.token_sums import TokenSum
from tl_contextmix.errors import InvalidInput
from tl_contextmix.results.axes import positions

Point = Literal["attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post", "block_out"]
POINTS: tuple[Point, ...] = (
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_out",
    "resid_post",
    "block_out",
)
Heads = bool | int | Sequence[int] | Sequence[Sequence[int]]
"""False: all heads together. True: each alone, one map per head. A number or a list of numbers:
these together. A list of lists: one map per group."""


def identities(asked: Sequence[Point]) -> frozenset[Identity]:
    """Returns what has to hold of a pass for a block's parts to add up at some points."""
    found: set[Identity] = {"mixing", "attn"}
    if any(at != "attn_out" for at in asked):
        found.add("read")
    if any(at in ("mlp_out", "resid_post", "block_out") for at in asked):
        found |= {"activation", "mlp"}
    if any(at in ("resid_post", "block_out") for at in asked):
        found.add("block")
    return frozenset(found)


def linear_points(
    block: Block, trace: Trace, stack: StackName, asked: Sequence[Point] = POINTS
) -> dict[str, TokenSum]:
    """Returns the token sums of a block up to the input of its feed-forward sublayer.

    Besides the points before the feed-forward sublayer: ``"stream"``, the residual stream that
    the feed-forward output is added to, and ``"residual"``, that with what hooks added after the
    feed-forward sublayer. What hooks added belongs to no source: it is in the bias.

    Args:
        block: The block.
        trace: The pass.
        stack: The stack.
        asked: What is needed; where that lies before the first norm, no norm's scale is computed.
    """
    kind = "cross" if stack == "cross" else "self"
    block.attention(kind)
    if set(asked) != {"attn_out"}:
        block.require_attention()
    x = trace.resid_in(block)
    stream = TokenSum(terms=(), own=x, bias=torch.zeros_like(x), sum_up=lambda: x)
    result: dict[str, TokenSum] = {}
    for attention in block.attentions:
        out = _attention_sum(attention, trace)
        stream = stream.join(out).shifted(trace.edit(attention.edits.stream))
        if attention.kind == kind:
            result |= {"attn_out": out, "resid_mid": stream}
            if set(asked) <= set(result):
                return result
        if attention.norm_after is not None:
            stream = stream.summing_to(trace.summed(attention)).linear(attention.norm_after)
    result["stream"] = result["residual"] = stream
    ff = block.feed_forward
    if ff is not None:
        result["residual"] = stream.shifted(trace.edit(ff.edits.stream))
        read = stream
        if block.parallel:
            silent = tuple(read.through(slice(0)) for read in stream.terms)
            read = replace(stream, terms=silent, own=x, bias=torch.zeros_like(x), sum_up=lambda: x)
        result["mlp_in"] = read if ff.norm_in is None else read.linear(ff.norm_in)
    return result


def _attention_sum(attention: AttentionSublayer, trace: Trace) -> TokenSum:
    read = attention.term(trace)
    bias = read.scale.new_zeros(*read.scale.shape[:2], read.weight.shape[2])
    token_sum = TokenSum(
        terms=(read,),
        own=None,
        bias=shift(bias, attention.b_O),
        sum_up=lambda: attention.raw_output(trace),
    )
    return token_sum if attention.norm_out is None else token_sum.linear(attention.norm_out)


def parts_at(
    block: Block,
    points: dict[str, TokenSum],
    at: Point,
    bias: Bias,
    max_bytes: int = DEFAULT_MAX_BYTES,
    folds: Folds | None = None,
) -> TokenSum | FeedForwardParts:
    """Returns a block's parts at any point.

    Args:
        block: The block.
        points: Its token sums from `linear_points`.
        at: The point.
        bias: The bias convention, see `decompose`.
        max_bytes: Workspace.
        folds: Products of weights that are kept, of all blocks; None for those of this block.

    Raises:
        InvalidInput: If the block has no feed-forward sublayer and the point is inside of one.
        UnsupportedModel: If the point lies after an activation that is not elementwise.
    """
    return parts_at_all(block, points, (at,), bias, max_bytes, folds)[at]


def parts_at_all(
    block: Block,
    points: dict[str, TokenSum],
    asked: Sequence[Point],
    bias: Bias,
    max_bytes: int = DEFAULT_MAX_BYTES,
    folds: Folds | None = None,
) -> dict[Point, TokenSum | FeedForwardParts]:
    """Returns a block's parts at several points, which share what is computed; see `parts_at`."""
    result: dict[Point, TokenSum | FeedForwardParts] = {}
    expanded: dict[str, FeedForwardParts] = {}
    for at in asked:
        if at in points:
            result[at] = points[at]
        elif block.feed_forward is not None:
            expanded = expanded or feed_forward_points(block, points, bias, max_bytes, folds)
            result[at] = expanded[at]
        elif at in ("resid_post", "block_out"):
            result[at] = points["residual"]
        else:
            raise InvalidInput(
                f"there is no {at} in layer {block.layer}",
                "a block without a feed-forward sublayer",
                "'attn_out', 'resid_mid', 'resid_post' or 'block_out'",
                "Ask for one of these.",
            )
    return result


def parts_of_heads(
    parts: TokenSum | FeedForwardParts,
) -> dict[str, TokenSum | FeedForwardParts]:
    """Returns the parts that come through each head, by its label, and through no head.

    They add up to the parts.
    """
    whole = parts
    if isinstance(parts, FeedForwardParts):
        whole = parts.read if parts.residual is None else parts.residual
    assert isinstance(whole, TokenSum)
    places: dict[str, tuple[int | None, int]] = {
        f"cross {head}" if term else str(head): (term, head)
        for term, read in enumerate(whole.terms)
        for head in range(read.pattern.shape[1])
    }
    if whole.own is not None:
        places["residual"] = None, 0
    return {label: parts.of_head(*place) for label, place in places.items()}


def norms_at(
    parts: Mapping[Point, TokenSum | FeedForwardParts],
    max_bytes: int,
    precision: Precision = "full",
) -> dict[Point, Float[Tensor, "batch target source"]]:
    """Returns the norms of the parts at several points of one block.

    The points after the feed-forward sublayer are three looks at the same tiles: all of them
    cost what the last one costs.

    Args:
        parts: The parts.
        max_bytes: Workspace.
        precision: Of the products with value vectors.
    """
    result: dict[Point, Tensor] = {
        at: token_sum.norms(max_bytes)
        for at, token_sum in parts.items()
        if isinstance(token_sum, TokenSum)
    }
    after: list[Point] = [at for at in POINTS if isinstance(parts.get(at), FeedForwardParts)]
    if after:
        last = parts[after[-1]]
        assert isinstance(last, FeedForwardParts)
        low = torch.bfloat16 if precision == "bfloat16" else None
        stages = last.stage_norms(max_bytes, low)
        # Where no norm follows, block_out is resid_post.
        result |= {at: stages[min(POINTS[3:].index(at), len(stages) - 1)] for at in after}
    return result


def head_groups(forward_pass: Pass, heads: Heads) -> list[list[int]] | None:
    """Returns the heads of each map; None for all of them together, in one map.

    Args:
        forward_pass: A pass.
        heads: What was asked for.

    Raises:
        InvalidInput: If there is no such head, or one is named twice in a group.
    """
    if heads is False:
        return None
    if heads is None:
        raise InvalidInput(
            "no heads were named",
            "None",
            "a truth value, a head, or a list of them",
            "Give heads=False for all of them together, heads=True for each alone.",
        )
    count = forward_pass.blocks[0].attention(forward_pass.kind).W_O.shape[0]
    if heads is True:
        return [[head] for head in range(count)]
    asked: list[Any] = [heads]
    if isinstance(heads, Sequence) and not isinstance(heads, str):
        asked = list(heads) if any(isinstance(head, Sequence) for head in heads) else asked
    groups = [positions("head", group, range(count)) for group in asked]
    for group in groups:
        if len(set(group)) < len(group):
            raise InvalidInput(
                "a head cannot be in a group twice",
                repr(heads),
                "different heads in a group",
                "Name each once.",
            )
    return groups


def group_labels(groups: list[list[int]] | None, together: str = "all") -> tuple[str, ...]:
    """Returns a label per map: ``"3"``, ``"0+3"``, or what all heads together are called."""
    if groups is None:
        return (together,)
    return tuple("+".join(map(str, group)) for group in groups)
