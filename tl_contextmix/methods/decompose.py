"""A block's activation as one vector per source token plus a bias."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, Input, Inputs
from tl_contextmix.adapters.passes import Pass, run_pass
from tl_contextmix.core.feed_forward_parts import DEFAULT_MAX_BYTES, Bias, FeedForwardParts
from tl_contextmix.core.folded_weights import Folds
from tl_contextmix.core.model_view import StackName
from tl_contextmix.core.validation import Layers, Positive
from tl_contextmix.engine.citations import norm_papers
from tl_contextmix.engine.parts import (
    POINTS,
    Point,
    identities,
    linear_points,
    parts_at,
    parts_of_heads,
)
from tl_contextmix.engine.registry import method
from tl_contextmix.results import Decomposition, HeadDecomposition


@method(cites=norm_papers)
def decompose(
    model: object,
    input: Input,
    *,
    at: Point = "resid_post",
    heads: bool = False,
    layer: Layers | None = None,
    stack: StackName | None = None,
    bias: Bias = "contributor",
    max_bytes: Positive = DEFAULT_MAX_BYTES,
    **inputs: Unpack[Inputs],
) -> Decomposition:
    r"""Returns a block's activation as one vector per source token plus a bias.

    .. math:: y_i = \sum_j F_{ij} + b_i

    exactly, at every point (to rounding: 1e-10 in float64). Attention patterns and norm scales are
    frozen at their real values; the feed-forward activation is passed by integrated gradients from
    the zero baseline, in closed form (Kobayashi et al. 2024, section 3 and eq. 12).

    Points, in the order data flows: ``attn_out`` what attention adds to the residual stream (2020),
    ``resid_mid`` with the residual (2021; before LN1 in post-LN models), ``mlp_in`` what the
    feed-forward block reads (after LN1 or LN2, gain and bias included, unlike ``hook_normalized``),
    ``mlp_out`` what it adds, ``resid_post`` with the residual, ``block_out`` the block's output
    (after LN2 in post-LN models). In a parallel block (GPT-J, Pythia) the feed-forward block reads
    its own token only.

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`.
        input: A text, several, or token ids [batch, pos].
        at: The point.
        heads: Parts of each head. What reaches a token through no head, along its own residual
            stream, is one more entry (``"residual"``). After both attention sublayers of a decoder
            block, heads of cross-attention are called ``"cross 0"`` and so on. The feed-forward
            activation is passed with the slopes of all heads together.
        layer: Layer or layers; None for all. Negative counts from the end.
        stack: ``"encoder"``, ``"decoder"`` or ``"cross"`` of an encoder-decoder (default: the
            decoder). ``"cross"`` is the decoder block seen at its cross-attention. From there on
            the source axis is the decoder's tokens followed by the encoder's.
        bias: What the feed-forward path starts from. ``"contributor"``: from zero, biases being
            one more contributor with a share of its own (as DecompX). ``"fixed"``: from the biases
            alone, whose image is the constant.
        max_bytes: Workspace of the feed-forward points, besides the result. A quarter of it is
            for pairs of tokens even where the layer itself leaves less: its weights folded into
            each other, about ``d_model * (d_mlp + 3 * d_model)`` numbers, and ``2 * d_mlp +
            12 * d_model`` per token (d_mlp twice if gated).
        **inputs: Mask, padding and the like, see `Inputs`.

    Returns:
        A `Decomposition`: ``parts`` [batch layer target source d_model] in units of the residual
        stream, ``bias`` [batch layer target d_model]. Rows of padding are not the model's. With
        ``heads`` a `HeadDecomposition`, whose parts have a head axis after the layer.

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If the model is one whose numbers would be wrong.

    Cost: a forward pass, ``2 n^2 d_mlp (d_model + H)`` operations per layer after the
    feed-forward block (half if causal), ``n^2 d_model`` numbers per layer for the result. With
    ``heads``, that for each of them.
    """
    needs = identities((at,))
    forward_pass = run_pass(
        as_view(model), Given(input, **inputs), layer=layer, stack=stack, needs=needs
    )

    labels: tuple[str, ...] = ()
    folds = Folds(forward_pass.blocks)

    def vectors(part: Pass) -> dict[str, tuple[str, Tensor]]:
        nonlocal labels
        parts, biases = torch.empty(0), []
        if at in POINTS[3:]:
            part.trace.look_up(part.blocks)
        for index, block in enumerate(part.progress("decompose")):
            linear = linear_points(block, part.trace, part.stack, (at,))
            found = parts_at(block.held(part.trace), linear, at, bias, max_bytes, folds)
            each = parts_of_heads(found) if heads else {"all": found}
            labels = (*each,)
            for place, one in enumerate(each.values()):
                if isinstance(one, FeedForwardParts):
                    dense = one.parts(max_bytes)
                else:
                    dense = one.dense(slice(0, one.bias.shape[1])).transpose(1, 2)
                if not index and not place:
                    # The largest result there is: never twice in memory.
                    shape = (len(dense), len(part.blocks), len(each), *dense.shape[1:])
                    parts = dense.new_empty(shape)
                parts[:, index, place] = dense
                del dense
            biases.append(found.bias)
        parts = parts if heads else parts[:, :, 0]
        return {
            "parts": (f"batch layer {'head ' * heads}target source:{at}", parts),
            "bias": ("batch layer target", torch.stack(biases, dim=1)),
        }

    with torch.no_grad():
        found = forward_pass.together(vectors)
    made = partial(HeadDecomposition, heads=labels) if heads else Decomposition
    return made(
        parts=found["parts"],
        bias=found["bias"],
        layers=forward_pass.layers,
        point=at,
        stack=forward_pass.stack,
        target=forward_pass.target,
        source=forward_pass.source(at),
        provenance=forward_pass.provenance("decompose", {"at": at, "heads": heads, "bias": bias}),
    )
