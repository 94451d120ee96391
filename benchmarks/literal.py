"""What a user of TransformerLens would write for a question, with hooks, vectors and loops.

Each on the model with GPT-2's widths of `methods.py`: the pairs of `against.py` that need a whole
model and no equation of a paper. All give the same numbers as the package does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import reference
import torch
from torch import Tensor

from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.core.blocks import Block, FeedForward, Trace
from tl_contextmix.core.model_view import ModelView
from tl_contextmix.core.residual_stream import needed
from tl_contextmix.engine.memory_coefficients import CASES


def traced(view: ModelView, ids: Tensor) -> tuple[list[Block], Trace]:
    """Runs the model once and keeps what its blocks are made of."""
    blocks = [*view.blocks()]
    names = [name for block in blocks for name in (*block.points(), *needed(block))]
    return blocks, view.run(make_batch(view, Given(ids)), names)


def mixing_ratio(model: Any, ids: Tensor) -> Tensor:
    """Returns how much of each token [layer pos] others bring, from the vectors of all pairs."""
    blocks, trace = traced(as_view(model), ids)
    found = []
    for block in blocks:
        parts, _ = reference.attention_parts(block, trace, "mlp_in")
        own = parts.diagonal().T
        mixing, preserving = (parts.sum(dim=1) - own).norm(dim=-1), own.norm(dim=-1)
        found.append(mixing / (mixing + preserving))
    return torch.stack(found)


def token_memory(model: Any, ids: Tensor) -> Tensor:
    """Returns shares [layer target source neuron]: all pairs' vectors, times W_in and the slope."""
    blocks, trace = traced(as_view(model), ids)
    found = []
    for block in blocks:
        parts, bias = reference.attention_parts(block, trace, "mlp_in")
        ff = _feed_forward(block)
        ((W_in, b_in),) = ff.branches()
        assert b_in is not None
        pre = (parts.sum(dim=1) + bias) @ W_in + b_in
        found.append((parts @ W_in) * ff.require_activation().secant(None, pre)[:, None])
    return torch.stack(found)


def top_tokens(model: Any, ids: Tensor) -> Tensor:
    """Returns top tokens [layer pos 4]: residual, feed-forward output, sum; and the kind of sum.

    Each is read by the model's own final norm and unembedding, one position after the other.
    """
    view = as_view(model)
    blocks, trace = traced(view, ids)
    found = torch.zeros(len(blocks), ids.shape[1], 4)
    for layer, block in enumerate(blocks):
        ff = _feed_forward(block)
        for pos in range(ids.shape[1]):
            after = trace[block.resid_out][0, pos]
            added = ff.project(trace[ff.post][0, pos])
            tops = [int(view.readout(x).argmax()) for x in (after - added, added, after)]
            found[layer, pos] = torch.tensor([*tops, CASES.index(_case(*tops))])
    return found


def _case(residual: int, ffn: int, output: int) -> str:
    if residual == output:
        return "agreement" if ffn == output else "residual"
    if ffn == output:
        return "ffn"
    return "conflict" if residual == ffn else "composition"


def knockout(model: Any, ids: Tensor, layer: int, head: int, target: int) -> Tensor:
    """Returns a token's log-probability before and after a head is zeroed at the last position."""

    def zero(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, -1, head] = 0
        return z

    name = as_view(model).blocks()[layer].attentions[0].mixed
    before, after = model(ids), model.run_with_hooks(ids, fwd_hooks=[(name, zero)])
    return torch.stack([x[0, -1].log_softmax(dim=-1)[target] for x in (before, after)])


def edges(model: Any, ids: Tensor, target: int) -> Tensor:
    """Returns what a token's log-probability is without each edge to the last position.

    The scores of an edge are masked in a pass of its own: [layer source].
    """

    def masked(source: int) -> Callable[..., Tensor]:
        def hook(scores: Tensor, hook: Any) -> Tensor:
            scores[:, :, -1, source] = -torch.inf
            return scores

        return hook

    found = []
    for block in as_view(model).blocks():
        name = block.attentions[0].pattern.replace("hook_pattern", "hook_attn_scores")
        for source in range(ids.shape[1]):
            logits = model.run_with_hooks(ids, fwd_hooks=[(name, masked(source))])
            found.append(logits[0, -1].log_softmax(dim=-1)[target])
    return torch.stack(found).view(-1, ids.shape[1])


def queries(model: Any, ids: Tensor, layer: int, neuron: int) -> Tensor:
    """Returns what each earlier neuron at the last position brings to one's pre-activation.

    Every neuron's vector is carried through the frozen norm on its own.
    """
    blocks, trace = traced(as_view(model), ids)
    norm = _feed_forward(blocks[layer]).norm_in
    assert norm is not None
    assert norm.weight is not None
    ((W_in, _),) = _feed_forward(blocks[layer]).branches()
    scale = norm.scale(blocks[layer].middle(trace)[0, -1])
    found = []
    for block in blocks[:layer]:
        ff = _feed_forward(block)
        for coefficient, value in zip(trace[ff.post][0, -1], ff.W_out, strict=True):
            written = coefficient * value
            read = (written - written.mean()) / scale * norm.weight
            found.append(read @ W_in[:, neuron])
    return torch.stack(found)


def _feed_forward(block: Block) -> FeedForward:
    assert block.feed_forward is not None
    return block.feed_forward
