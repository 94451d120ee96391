"""Attention weights, the map that every other one is judged against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Cache, Given, PaddingSide, Text, run_pass
from tl_contextmix.core.model_view import StackName
from tl_contextmix.engine.parts import masked
from tl_contextmix.engine.registry import method
from tl_contextmix.results import ContextMap


@method(cites=("abnar2020quantifying",), compared={"attention": {"heads": False}})
def attention(
    model: object,
    input: Text | Tensor,
    *,
    heads: bool = True,
    layer: int | Sequence[int] | None = None,
    stack: StackName | None = None,
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide = "right",
    decoder_input: Text | Tensor | None = None,
    cache: Cache | None = None,
) -> ContextMap:
    r"""Returns the attention weights.

    .. math:: C_{hij} = A_{hij} \qquad \text{or} \qquad C_{ij} = \frac{1}{H} \sum_h A_{hij}

    as the model used them. They say nothing of what is read, nor of the residual connection;
    `attention_norms` and the other maps do. Attention rollout (Abnar & Zuidema 2020) is
    ``attention(model, text, heads=False).rollout()``: heads averaged, each layer averaged with
    the identity, layers multiplied.

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`.
        input: A text, several, or token ids [batch, pos].
        heads: One map per head; False for their mean.
        layer: Layer or layers; None for all. Negative counts from the end.
        stack: ``"encoder"``, ``"decoder"`` or ``"cross"`` of an encoder-decoder (default: the
            decoder's self-attention).
        attention_mask: 1 at real tokens, 0 at padding. Scores of padding are 0.
        prepend_bos: Whether texts get a beginning-of-sequence token; None: the model's default.
        padding_side: Where texts of unequal length are padded.
        decoder_input: Decoder side of an encoder-decoder; None: its start token.
        cache: A TransformerLens ActivationCache of the same input, instead of a forward pass.

    Returns:
        A `ContextMap` [batch layer head target source] of probabilities; rows sum to 1, except
        where the model has an attention sink of its own.

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If the model is one whose numbers would be wrong.

    Cost: a forward pass.
    """
    given = Given(input, attention_mask, prepend_bos, padding_side, decoder_input, cache)
    done = run_pass(as_view(model), given, layer=layer, stack=stack)
    kind = "cross" if done.stack == "cross" else "self"
    patterns = [
        done.trace.pattern(sublayer).detach()
        for block in done.blocks
        for sublayer in block.attentions
        if sublayer.kind == kind
    ]
    scores = masked(done, torch.stack(patterns, dim=1), "attn_out")
    scores = scores if heads else scores.mean(dim=2, keepdim=True)
    return ContextMap(
        scores=scores,
        layers=done.layers,
        heads=tuple(str(head) for head in range(scores.shape[2])) if heads else ("mean",),
        point="pattern",
        stack=done.stack,
        target=done.target,
        source=done.source("attn_out"),
        unit="attention weight",
        includes_residual=False,
        provenance=done.provenance("attention", {"heads": heads}),
    )
