"""Attention weights, the map that every other one is judged against."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Input
from tl_contextmix.adapters.passes import Pass, run_asked
from tl_contextmix.adapters.questions import AnswerInputs
from tl_contextmix.core.blocks import Block
from tl_contextmix.core.model_view import StackName
from tl_contextmix.core.validation import Layers
from tl_contextmix.engine.parts import Heads, group_labels, head_groups
from tl_contextmix.engine.registry import method
from tl_contextmix.results import ContextMap


@method(cites=("abnar2020quantifying",), compared={"attention": {"heads": False}})
def attention(
    model: object,
    input: Input,
    *,
    heads: Heads = True,
    layer: Layers | None = None,
    stack: StackName | None = None,
    **inputs: Unpack[AnswerInputs],
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
        heads: True: one map per head. False: their mean. A number or a list of numbers: the mean of
            these. A list of lists: one map per group.
        layer: Layer or layers; None for all. Negative counts from the end.
        stack: ``"encoder"``, ``"decoder"`` or ``"cross"`` of an encoder-decoder (default: the
            decoder's self-attention).
        **inputs: ``target``, ``pos`` or ``generate`` for the rows that predict, see `Asked`; mask,
            padding and the like, see `Inputs`.

    Returns:
        A `ContextMap` [batch layer head target source] of probabilities; rows sum to 1, together
        with `ContextMap.sink` where the model has an attention sink of its own (gpt-oss).

    Raises:
        InvalidInput: If an argument does not fit the model.
        UnsupportedModel: If the model is one whose numbers would be wrong.

    Cost: a forward pass.
    """
    view, cached = as_view(model), inputs.get("cache") is not None
    kind = "cross" if stack == "cross" else "self"

    def also(block: Block) -> list[str]:
        # A cache does not say whether hooks edited the pattern that it holds.
        scores = block.attention(kind).sink_scores
        return [scores] if cached and scores else []

    forward_pass = run_asked(
        view, input, inputs, layer=layer, stack=stack, needs={"pattern"}, also=also
    )
    groups = head_groups(forward_pass, heads)

    def grouped(found: Tensor) -> Tensor:
        if heads is True:
            return found
        if groups is None:
            return found.mean(dim=1, keepdim=True)
        return torch.stack([found[:, group].mean(dim=1) for group in groups], dim=1)

    def pattern(part: Pass, block: Block) -> Tensor:
        return grouped(part.trace.pattern(block.attention(part.kind)).detach())

    def share(part: Pass, block: Block) -> Tensor:
        return grouped(part.trace.sink(block.attention(part.kind)).detach())

    scores = forward_pass.by_block("attention", "batch head target source:attn_out", pattern)
    sink = None
    if any(block.attention(forward_pass.kind).sink_scores for block in forward_pass.blocks):
        sink = forward_pass.by_block("attention", "batch head target", share)
    return forward_pass.map(
        "attention",
        scores,
        "attn_out",
        "attention weight",
        heads=group_labels(groups, "mean"),
        options={"heads": heads},
        point="pattern",
        includes_residual=False,
        sink=sink,
    )
