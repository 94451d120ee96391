r"""The engine: every tensor on a block's residual path as a sum over source tokens plus a bias.

With attention patterns and norm scales frozen at their real values, everything up to the
feed-forward activation is linear in the sources and stays a `Mixture`; behind it is an `Expansion`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_contextmix.blocks import AttentionSublayer, Block, Trace, shift
from tl_contextmix.errors import bad
from tl_contextmix.expansion import DEFAULT_MAX_BYTES, Bias, Expansion, expand
from tl_contextmix.hosts import as_view
from tl_contextmix.inputs import Cache, Given, PaddingSide, Pass, Text, run_pass
from tl_contextmix.model_view import StackName
from tl_contextmix.results import Decomposition
from tl_contextmix.results.axes import whole_number
from tl_contextmix.tensors import Mixture, Read

Point = Literal["attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post", "block_out"]
POINTS: tuple[Point, ...] = (
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_out",
    "resid_post",
    "block_out",
)


def linear_points(
    block: Block, trace: Trace, stack: StackName, asked: Sequence[Point] = POINTS
) -> dict[str, Mixture]:
    """Returns the mixtures of a block up to the input of its feed-forward sublayer.

    Besides the points before the feed-forward sublayer: ``"stream"``, the residual stream that
    the feed-forward output is added to.

    Args:
        block: The block.
        trace: The pass.
        stack: The stack.
        asked: What is needed; where that lies before the first norm, no norm's scale is computed.
    """
    kind = "cross" if stack == "cross" else "self"
    x = trace.resid_in(block)
    stream = Mixture(reads=(), own=x, bias=torch.zeros_like(x), sum_up=lambda: x)
    found: dict[str, Mixture] = {}
    for attention in block.attentions:
        out = _attention_mixture(attention, trace)
        stream = stream.join(out)
        if attention.kind == kind:
            found |= {"attn_out": out, "resid_mid": stream}
            if set(asked) <= set(found):
                return found
        if attention.norm_after is not None:
            stream = stream.linear(attention.norm_after)
    found["stream"] = stream
    ff = block.feed_forward
    if ff is not None:
        read = stream
        if block.parallel:
            silent = tuple(read.silent() for read in stream.reads)
            read = replace(stream, reads=silent, own=x, bias=torch.zeros_like(x), sum_up=lambda: x)
        found["mlp_in"] = read if ff.norm_in is None else read.linear(ff.norm_in)
    return found


def _attention_mixture(attention: AttentionSublayer, trace: Trace) -> Mixture:
    pattern, value = trace.pattern(attention), trace.value(attention)
    scale = pattern.new_ones(pattern.shape[0], pattern.shape[2], 1)
    read = Read(pattern=pattern, value=value, weight=attention.W_O, scale=scale)
    bias = pattern.new_zeros(*scale.shape[:2], read.weight.shape[2])
    mixture = Mixture(
        reads=(read,),
        own=None,
        bias=shift(bias, attention.b_O),
        sum_up=lambda: attention.raw_output(trace),
    )
    return mixture if attention.norm_out is None else mixture.linear(attention.norm_out)


def parts_at(
    block: Block,
    points: dict[str, Mixture],
    at: Point,
    bias: Bias,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Mixture | Expansion:
    """Returns a block's parts at any point.

    Args:
        block: The block.
        points: Its mixtures from `linear_points`.
        at: The point.
        bias: The bias convention, see `decompose`.
        max_bytes: Workspace.

    Raises:
        InvalidInput: If the block has no feed-forward sublayer and the point is inside of one.
        UnsupportedModel: If the point lies behind an activation that is not elementwise.
    """
    return parts_at_all(block, points, (at,), bias, max_bytes)[at]


def parts_at_all(
    block: Block,
    points: dict[str, Mixture],
    asked: Sequence[Point],
    bias: Bias,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> dict[Point, Mixture | Expansion]:
    """Returns a block's parts at several points, which share what is computed; see `parts_at`."""
    found: dict[Point, Mixture | Expansion] = {}
    expanded: dict[str, Expansion] = {}
    for at in asked:
        if at in points:
            found[at] = points[at]
        elif block.feed_forward is not None:
            expanded = expanded or expand(block, points, bias, max_bytes)
            found[at] = expanded[at]
        elif at in ("resid_post", "block_out"):
            found[at] = points["stream"]
        else:
            raise bad(
                f"there is no {at} in layer {block.layer}",
                "a block without a feed-forward sublayer",
                "'attn_out', 'resid_mid', 'resid_post' or 'block_out'",
                "Ask for one of these.",
            )
    return found


def norms_at(
    parts: Mapping[Point, Mixture | Expansion], max_bytes: int
) -> dict[Point, Float[Tensor, "batch target source"]]:
    """Returns the norms of the parts at several points of one block.

    The points behind the feed-forward sublayer are three looks at the same tiles: all of them
    cost what the last one costs.
    """
    found: dict[Point, Tensor] = {
        at: mixture.norms(max_bytes)
        for at, mixture in parts.items()
        if isinstance(mixture, Mixture)
    }
    behind: list[Point] = [at for at in POINTS if isinstance(parts.get(at), Expansion)]
    if behind:
        last = parts[behind[-1]]
        assert isinstance(last, Expansion)
        stages = last.stage_norms(max_bytes)
        # Where no norm follows, block_out is resid_post.
        found |= {at: stages[min(POINTS[3:].index(at), len(stages) - 1)] for at in behind}
    return found


def require_point(at: object) -> Point:
    """Returns the point.

    Raises:
        InvalidInput: If there is no such point.
    """
    if at not in POINTS:
        raise bad(
            "there is no such point",
            repr(at),
            f"one of {list(POINTS)}",
            "Points name places in a block; hook names differ between hosts.",
        )
    return at  # type: ignore[return-value]


def require_bias(bias: object) -> Bias:
    """Returns the bias convention.

    Raises:
        InvalidInput: If there is no such convention.
    """
    if bias not in ("contributor", "fixed"):
        raise bad(
            "there is no such bias convention",
            repr(bias),
            "'contributor' or 'fixed'",
            "See the docstring of decompose.",
        )
    return bias  # type: ignore[return-value]


def require_budget(max_bytes: object) -> int:
    """Returns the budget.

    Raises:
        InvalidInput: If it is not a positive number of bytes.
    """
    number = whole_number(max_bytes)
    if number is None or number <= 0:
        raise bad(
            "max_bytes is not a budget",
            repr(max_bytes),
            "a positive number of bytes",
            "The default is 1 GiB.",
        )
    return number


def decompose(
    model: object,
    input: Text | Tensor,
    *,
    at: Point = "resid_post",
    layer: int | Sequence[int] | None = None,
    stack: StackName | None = None,
    bias: Bias = "contributor",
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide = "right",
    decoder_input: Text | Tensor | None = None,
    cache: Cache | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Decomposition:
    r"""Returns a block's activation as one vector per source token plus a bias.

    .. math:: y_i = \sum_j F_{ij} + b_i

    exactly, at every point (to rounding: 1e-10 in float64). Attention patterns and norm scales are
    frozen at their real values; the feed-forward activation is passed by integrated gradients from
    the zero baseline, in closed form (Kobayashi et al. 2024, section 3 and eq. 12).

    Points, in the order data flows: ``attn_out`` what attention adds to the residual stream (2020),
    ``resid_mid`` with the residual (2021; before LN1 in post-LN models), ``mlp_in`` what the
    feed-forward block reads (after LN1 or LN2), ``mlp_out`` what it adds, ``resid_post`` with the
    residual, ``block_out`` the block's output (after LN2 in post-LN models). In a parallel block
    (GPT-J, Pythia) the feed-forward block reads its own token only.

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`.
        input: A text, several, or token ids [batch, pos].
        at: The point.
        layer: Layer or layers; None for all. Negative counts from the end.
        stack: ``"encoder"``, ``"decoder"`` or ``"cross"`` of an encoder-decoder (default: the
            decoder). ``"cross"`` is the decoder block seen at its cross-attention. From there on
            the source axis is the decoder's tokens followed by the encoder's.
        bias: What the feed-forward path starts from. ``"contributor"``: from zero, biases being
            one more contributor with a share of its own (as DecompX). ``"fixed"``: from the biases
            alone, whose image is the constant.
        attention_mask: 1 at real tokens, 0 at padding.
        prepend_bos: Whether texts get a beginning-of-sequence token; None: the model's default.
        padding_side: Where texts of unequal length are padded.
        decoder_input: Decoder side of an encoder-decoder; None: its start token.
        cache: A TransformerLens ActivationCache of the same input, instead of a forward pass.
        max_bytes: Workspace of the feed-forward points, besides the result. A quarter of it is
            for pairs of tokens even where the layer itself leaves less: its weights folded into
            each other, about ``d_model * (d_mlp + 3 * d_model)`` numbers, and ``2 * d_mlp +
            12 * d_model`` per token (d_mlp twice if gated).

    Returns:
        A `Decomposition`: ``parts`` [batch layer target source d_model] in units of the residual
        stream, ``bias`` [batch layer target d_model]. Rows of padding are not the model's.

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If the model is one whose numbers would be wrong.

    Cost: a forward pass, ``2 n^2 d_mlp (d_model + H)`` operations per layer behind the
    feed-forward block (half if causal), ``n^2 d_model`` numbers per layer for the result.
    """
    at, bias = require_point(at), require_bias(bias)
    max_bytes = require_budget(max_bytes)
    given = Given(input, attention_mask, prepend_bos, padding_side, decoder_input, cache)
    done = run_pass(as_view(model), given, layer=layer, stack=stack)
    parts, biases = torch.empty(0), []
    with torch.no_grad():
        for index, block in enumerate(done.progress("decompose")):
            linear = linear_points(block, done.trace, done.stack, (at,))
            found = parts_at(block, linear, at, bias, max_bytes)
            dense = _dense(found, max_bytes)
            if not index:
                # The largest result there is: never twice in memory.
                parts = dense.new_empty(len(dense), len(done.blocks), *dense.shape[1:])
            parts[:, index] = dense
            del dense
            biases.append(found.bias)
    return Decomposition(
        parts=parts,
        bias=torch.stack(biases, dim=1),
        layers=done.layers,
        point=at,
        stack=done.stack,
        target=done.target,
        source=done.source(at),
        provenance=done.provenance("decompose", {"at": at, "bias": bias}),
    )


def _dense(found: Mixture | Expansion, max_bytes: int) -> Tensor:
    if isinstance(found, Expansion):
        return found.parts(max_bytes)
    return found.dense(slice(0, found.bias.shape[1])).transpose(1, 2)


def masked(done: Pass, scores: Tensor, at: str) -> Tensor:
    """Returns scores [batch ... target source] with padding at exactly zero."""
    target, source = done.target.mask, done.source(at).mask
    if bool(target.all()) and bool(source.all()):
        return scores
    real = (target[:, :, None] & source[:, None, :]).to(scores.device)
    shape = (real.shape[0], *[1] * (scores.ndim - 3), *real.shape[1:])
    return scores.masked_fill(~real.view(shape), 0)
