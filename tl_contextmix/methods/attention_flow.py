"""Attention flow: how much can be carried from each input token through the attention weights."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor
from typing_extensions import Unpack

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Input
from tl_contextmix.adapters.passes import Pass, run_asked
from tl_contextmix.adapters.questions import AnswerInputs
from tl_contextmix.core.model_view import StackName
from tl_contextmix.core.token_sums import blocks
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput
from tl_contextmix.results import ContextMap

# scipy's maximum flow takes 32-bit integers. No flow exceeds what enters its target, which is 1.
_UNIT = 2**30
_ENDLESS = np.int32(2**31 - 1)
# Capacities in one graph: larger ones take more steps, smaller ones more calls.
_TOGETHER = 2**16


@method(cites=("abnar2020quantifying",), compared=True, estimated=False)  # no tensors
def attention_flow(
    model: object,
    input: Input,
    *,
    stack: StackName | None = None,
    **inputs: Unpack[AnswerInputs],
) -> ContextMap:
    r"""Returns the attention flow from each input token to each position after every layer.

    Tokens of every layer are nodes; an edge from token ``j`` of layer ``l - 1`` to token ``i`` of
    layer ``l`` can carry

    .. math:: c_{lij} = \tfrac{1}{2} \bar A_{lij} + \tfrac{1}{2} \delta_{ij}

    with the attention weights averaged over heads, and a score is the maximum flow from an input
    token to a position (Abnar & Zuidema 2020, section 3). Unlike a rollout, which multiplies the
    weights along each path, a path carries the smallest capacity on it, and paths share edges.

    Args:
        model: Any TransformerLens model, see `tl_contextmix.check`.
        input: A text, several, or token ids [batch, pos].
        stack: ``"encoder"`` or ``"decoder"`` of an encoder-decoder (default: the decoder's
            self-attention).
        **inputs: ``target``, ``pos`` or ``generate`` for the rows that predict, see `Asked`; mask,
            padding and the like, see `Inputs`.

    Returns:
        A `ContextMap` [batch layer 1 target source] from the input to each layer: flows between 0
        and 1, which need not sum to 1. Each capacity is rounded to a multiple of ``2 ** -30``.

    Raises:
        InvalidInput: If an argument does not fit the model, or the stack is ``"cross"``.
        UnsupportedModel: If the model is one whose numbers would be wrong.

    Cost: a forward pass, and a maximum flow for each pair of tokens and each layer ``l``, in a
    graph of ``l n ^ 2`` edges, all of them side by side: for short texts.
    """
    if stack == "cross":
        raise InvalidInput(
            "attention flow stays within one stack",
            "stack='cross'",
            "'encoder' or 'decoder'",
            "For both, roll out a map of the decoder with encoder=.",
        )
    forward_pass = run_asked(as_view(model), input, inputs, stack=stack, needs={"pattern"})
    for block in forward_pass.blocks:
        block.require_attention()

    def flows(part: Pass) -> dict[str, tuple[str, Tensor]]:
        weights = [
            part.trace.pattern(block.attention("self")).detach().mean(1) for block in part.blocks
        ]
        patterns = torch.stack(weights, dim=1).double().cpu().numpy()
        capacities = (patterns + np.eye(patterns.shape[-1])) / 2
        rows = part.own(None if part.asked is None else part.asked.rows)
        scores = torch.from_numpy(_flows(capacities, rows)).to(weights[0])[:, :, None]
        return {"scores": ("batch layer head target source:attn_out", scores)}

    return forward_pass.map(
        "attention_flow",
        forward_pass.together(flows)["scores"],
        "attn_out",
        "attention flow",
        heads=["mean"],
        point="pattern",
        from_input=True,
    )


def _flows(capacities: np.ndarray, rows: list[int] | None) -> np.ndarray:
    """Returns the maximum flows [sentence layer target source] of capacities of these axes.

    Of targets that are not among the rows they are 0. Pairs are solved together, side by side: each
    has a copy of what is on its way, between one source of all flow and one sink.
    """
    count, layers, length, _ = capacities.shape
    wanted = np.isin(np.arange(length), range(length) if rows is None else rows)
    whole = np.rint(capacities * _UNIT).astype(np.int32)
    flows = np.zeros(capacities.shape)
    itself = np.broadcast_to(np.eye(length, dtype=bool), (count, length, length))
    above = [itself]  # by layer, which nodes are reached from each source
    for depth in range(1, layers + 1):
        above.append((whole[:, depth - 1] > 0) @ above[-1])
        below = [itself]  # and which reach each target
        for layer in reversed(range(1, depth)):
            below.insert(0, (whole[:, layer].swapaxes(1, 2) > 0) @ below[0])
        pairs = np.argwhere(above[-1] & wanted[:, None])
        for some in blocks(len(pairs), _TOGETHER // (depth * length**2)):
            sentence, i, j = pairs[some].T
            on_way = np.stack(below)[:, sentence, :, i][..., None]
            on_way = on_way & np.stack(above[:-1])[:, sentence, :, j][..., None, :]
            copy, layer, target, source = (whole[sentence, :depth] * on_way).nonzero()
            # Nodes of layer l of a copy begin at l * length from its first.
            first = np.arange(len(i)) * (depth + 1) * length
            everything = len(i) * (depth + 1) * length
            into, out = np.full_like(i, everything), np.full_like(i, everything + 1)
            nodes = first[copy] + layer * length
            starts = np.concatenate([nodes + source, into, first + depth * length + i])
            ends = np.concatenate([nodes + length + target, first + j, out])
            carried = whole[sentence[copy], layer, target, source]
            carried = np.concatenate([carried, np.full(2 * len(i), _ENDLESS)])
            graph = csr_array((carried, (starts, ends)), shape=(everything + 2,) * 2)
            found = maximum_flow(graph, everything, everything + 1).flow
            flows[sentence, depth - 1, i, j] = found[[everything]].toarray()[0, first + j]
    return flows / _UNIT
