"""What the measured code is compared with: the same norms, computed word by word.

Up to the feed-forward input as the field's code does it (2021 and its descendants): a tensor
[head, target, source, d_model] of weighted value vectors, its sum over heads, the residual
connection as an identity matrix. Behind it, two ways for every pair of target and source: the
feed-forward block's two matrices applied to the pair's vector with the closed-form slope between
them, or integrated gradients in steps.

Only what `blocks.Sizes` offers without batch, gate, encoder, sandwich or parallel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import jvp, vmap

from tl_contextmix.core.blocks import Block, Trace
from tl_contextmix.core.token_sums import Norm
from tl_contextmix.engine.memory_coefficients import require_feed_forward

LINEAR_POINTS = ("attn_out", "resid_mid", "mlp_in")


def attention_parts(block: Block, trace: Trace, at: str) -> tuple[Tensor, Tensor]:
    """Returns parts [target source d_model] and bias [target d_model] before the activation."""
    attention = block.attentions[0]
    value, pattern = trace.value(attention)[0], trace[attention.pattern][0]
    transformed = torch.einsum("shd,hdm->hsm", value, attention.W_O)
    weighted = pattern[..., None] * transformed[:, None]
    parts = weighted.sum(dim=0)
    del weighted
    assert attention.b_O is not None
    bias = attention.b_O.expand(parts.shape[0], -1)
    if at == "attn_out":
        return parts, bias
    x = trace.resid_in(block)[0]
    parts = parts + torch.eye(len(x), dtype=x.dtype, device=x.device)[..., None] * x[:, None]
    norms = (attention.norm_after, require_feed_forward(block).norm_in if at == "mlp_in" else None)
    for norm in norms if at != "resid_mid" else ():
        if norm is not None:
            parts, bias = normed(norm, parts, bias)
    return parts, bias


def normed(norm: Norm, parts: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Returns parts and bias after a LayerNorm whose scale is that of their sum."""
    assert norm.weight is not None
    assert norm.bias is not None
    scale = norm.scale(parts.sum(dim=1) + bias)
    centred = parts - parts.mean(dim=-1, keepdim=True)
    bias = (bias - bias.mean(dim=-1, keepdim=True)) / scale * norm.weight + norm.bias
    return centred / scale[:, None] * norm.weight, bias


def norms(block: Block, trace: Trace, at: str, causal: bool) -> Tensor:
    """Returns norms [target source] at any point, the feed-forward block in closed form.

    The attention part takes all pairs, as the field's code does; behind the activation the future
    of a causal model is left out, to the reference's advantage.
    """
    parts, bias = attention_parts(block, trace, at if at in LINEAR_POINTS else "mlp_in")
    if at in LINEAR_POINTS:
        return parts.norm(dim=-1)
    ff = require_feed_forward(block)
    ((W_in, b_in),) = ff.branches()
    assert b_in is not None
    stream = (parts, bias) if ff.norm_in is None else attention_parts(block, trace, "resid_mid")
    out = parts.new_zeros(parts.shape[:2])
    for i, seen in targets(len(parts), causal):
        pre = parts[i].sum(dim=0) + bias[i]
        slope = ff.require_activation().secant(None, pre @ W_in + b_in)
        vectors = ((parts[i, seen] @ W_in) * slope) @ ff.W_out
        rest = ((bias[i] @ W_in + b_in) * slope) @ ff.W_out + ff.constant()
        if at != "mlp_out":
            vectors, rest = vectors + stream[0][i, seen], rest + stream[1][i]
        if at == "block_out" and ff.norm_after is not None:
            vectors, rest = normed(ff.norm_after, vectors[None], rest[None])
        out[i, seen] = vectors.norm(dim=-1)
    return out


def targets(n: int, causal: bool) -> Iterator[tuple[int, slice]]:
    """Yields each target with the sources it can read."""
    for i in range(n):
        yield i, slice(0, i + 1 if causal else n)


def gradient_step(block: Block, parts: Tensor, bias: Tensor, alpha: float, causal: bool) -> Tensor:
    """Returns one step of integrated gradients: derivatives of mlp_out [target source d_model].

    The path goes from zero to parts and biases. What is asked of each pair is a vector of d_model
    numbers, so that the cheapest gradient is one directional derivative (forward mode) per pair,
    the block's own forward pass shared by the sources of a target. Backward passes would take one
    per output dimension and target, d_model instead of n of them: more, as long as n < d_model.
    """
    ff = require_feed_forward(block)
    ((W_in, b_in),) = ff.branches()
    assert b_in is not None

    def feed_forward(x: Tensor, reached: Tensor) -> Tensor:
        return ff.require_activation()(x @ W_in + reached * b_in) @ ff.W_out

    found = torch.zeros_like(parts)
    reached = torch.full_like(bias[0, :1], alpha)
    for i, seen in targets(len(parts), causal):
        at = alpha * (parts[i].sum(dim=0) + bias[i])

        def along(part: Tensor, at: Tensor = at) -> Tensor:
            return jvp(feed_forward, (at, reached), (part, torch.zeros_like(reached)))[1]

        found[i, seen] = vmap(along)(parts[i, seen])
    return found


def integrated_gradients(
    block: Block, parts: Tensor, bias: Tensor, steps: int, causal: bool
) -> Tensor:
    """Returns the parts of mlp_out [target source d_model] by that many `gradient_step`."""
    total = torch.zeros_like(parts)
    for step in range(steps):
        total += gradient_step(block, parts, bias, (step + 0.5) / steps, causal) / steps
    return total
