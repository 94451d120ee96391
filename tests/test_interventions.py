"""What the parts say would happen without a source or a neuron is what happens without it.

Two interventions on the host itself, by plain hooks of TransformerLens and nothing of the engine.
With attention patterns and norm scales held, everything up to the feed-forward activation is linear
in the parts: taking one out changes what comes later by exactly that part. Log-probabilities are
no sums, but the last component's contribution is exact by its definition,
log p(w | h) - log p(w | h - v), with the scale of the final norm held.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from asked import bound, keywords, recorded, relative, shared, stacks, view_of
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.core.blocks import Block
from tl_contextmix.core.token_sums import Norm

CASES = zoo.spread()
SOURCE = 1


def frozen(norm: Norm | None, change: Tensor, whole: Tensor) -> Tensor:
    """The change of a norm's output whose scale is held at that of the whole."""
    return change if norm is None else norm.linear(change) / norm.scale(whole)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_source_taken_out_of_the_values_takes_its_part_out_of_what_follows(
    case: zoo.Case,
) -> None:
    """The host computes with one value set to zero and the patterns it had; norms are held here."""
    model, given = shared(case)
    for stack in stacks(case):
        kind = "cross" if stack == "cross" else "self"
        for block in view_of(model).blocks(stack):
            attention = next(a for a in block.attentions if a.kind == kind)
            before, after = both_runs(model, given, block, attention)
            # What the host's own z loses, through its own output matrix.
            lost = before[attention.mixed] - after[attention.mixed]
            change = torch.einsum("bthd,hdm->btm", lost, attention.W_O)
            raw = torch.einsum("bthd,hdm->btm", before[attention.mixed], attention.W_O)
            raw = raw if attention.b_O is None else raw + attention.b_O
            change = frozen(attention.norm_out, change, raw)
            options = {"stack": stack, "layer": block.layer, **keywords(given)}
            parts = cm.decompose(model, given.tokens, at="attn_out", **options).parts
            assert relative(parts[:, 0, :, SOURCE], change) <= bound(case), (stack, block.layer)
            assert float(change.abs().max()) > 1e-3


def both_runs(model: Any, given: zoo.Inputs, block: Block, attention: Any) -> tuple[dict, dict]:
    """The host's activations as they are, and with the value of one source set to zero."""

    def zero(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, SOURCE] = 0
        return value

    names = [attention.pattern, attention.mixed, block.resid_in]
    before = recorded(model, given, names)
    after = recorded(model, given, names, {attention.value: zero})
    # Values do not touch the pattern of their own sublayer: it is held without a hand.
    assert torch.equal(before[attention.pattern], after[attention.pattern])
    return before, after


PRE_LN = [
    case
    for case in CASES
    if case.family in ("gpt2", "opt", "llama", "qwen2", "gqa", "no_norm", "mistral")
]


@pytest.mark.parametrize("case", PRE_LN, ids=str)
def test_a_part_taken_out_of_the_stream_changes_what_the_feed_forward_reads(
    case: zoo.Case,
) -> None:
    """The part is subtracted from the residual stream of the host; its norm's scale is held."""
    model, given = shared(case)
    view = view_of(model)
    block = view.blocks()[-1]
    ff = block.feed_forward
    options = {"layer": -1, **keywords(given)}
    stream = cm.decompose(model, given.tokens, at="resid_mid", **options)
    part = stream.parts[:, 0, :, SOURCE]
    read = cm.decompose(model, given.tokens, at="mlp_in", **options)
    last = block.attentions[-1]
    assert ff.norm_in is not None or case.family == "no_norm"
    before = recorded(model, given, [ff.pre, block.resid_in])

    # The part goes out where the block's attention writes it: at the host's own z there is no
    # single vector for it, so the stream that enters the block is shifted by it. That shift passes
    # the residual path as it is; the pattern and z are put back to what they were.
    own = recorded(model, given, [last.mixed])[last.mixed]
    shifted = recorded(
        model,
        given,
        [ff.pre],
        {block.resid_in: lambda x: x - part, last.mixed: lambda z: own},
    )
    whole = stream.total()[:, 0]
    assert ff.norm_in is None or ff.norm_in.kind in ("ln", "rms")
    weight = ff.branches()[0][0]
    # The host takes the norm anew; its scale is divided out and the held one put in.
    if ff.norm_in is None:
        change = before[ff.pre] - shifted[ff.pre]
    else:
        bias = ff.branches()[0][1]
        constant = 0 if bias is None else bias
        beta = 0 if ff.norm_in.bias is None else ff.norm_in.bias @ weight
        scale, new = ff.norm_in.scale(whole), ff.norm_in.scale(whole - part)
        linear = (before[ff.pre] - constant - beta) * scale
        change = (linear - (shifted[ff.pre] - constant - beta) * new) / scale
    expected = read.parts[:, 0, :, SOURCE] @ weight
    assert relative(change, expected) <= 10 * bound(case)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "qwen2", "no_norm", "gqa"])
def test_the_last_neuron_taken_out_lowers_the_log_prob_by_its_contribution(family: str) -> None:
    """Exact for the last sublayer and a held scale of the final norm.

    A contribution is log p(w | h + v) - log p(w | h) with h the stream *before* the neuron's
    sublayer: what taking the neuron out costs where nothing else of that sublayer is left. So the
    host runs with all other neurons of the sublayer taken out, and then with this one, too.
    """
    found = [case for case in CASES if case.family == family]
    if not found:
        pytest.skip(f"{family} does not load on this version")
    model, given = shared(found[0])
    view = view_of(model)
    block = view.blocks()[-1]
    ff = block.feed_forward
    count = ff.W_out.shape[0]
    scores = cm.log_prob_contributions(model, given.tokens, by="ff_neuron", pos=-1, target=[7, 9])
    components = scores.components
    chosen = (components.layer[0] == block.layer) & (components.neuron[0] >= 0)
    places = chosen.nonzero()[:, 0]
    assert len(places) == count
    norm, readout = view.readout.norm, view.readout
    state = recorded(model, given, [block.resid_out])[block.resid_out][:, -1]
    held = torch.ones_like(state) if norm is None else norm.scale(state)
    W_U = readout.weights("W_U")
    # What a gated sublayer adds behind its product is no neuron's.
    b_post = ff.weights("b_post")
    b_post = 0 if b_post is None else b_post

    def log_prob(kept: Tensor) -> Tensor:
        """The host's stream with some neurons left, read with the held scale."""
        edits = {ff.post: lambda post: (post - b_post) * kept + b_post}
        stream = recorded(model, given, [block.resid_out], edits)[block.resid_out][:, -1]
        stream = stream - ff.constant()
        hidden = stream if norm is None else norm.linear(stream) / held
        hidden = hidden if norm is None or norm.bias is None else hidden + norm.bias
        assert W_U is not None
        logits = hidden * readout.scale @ W_U
        b_U = readout.weights("b_U")
        logits = logits if b_U is None else logits + b_U
        return logits.log_softmax(-1).gather(1, torch.tensor([[7], [9]]))[:, 0]

    dtype = state.dtype
    nothing = log_prob(torch.zeros(count, dtype=dtype))
    for neuron in (0, 5, count - 1):
        kept = torch.zeros(count, dtype=dtype)
        kept[neuron] = 1
        change = log_prob(kept) - nothing
        place = places[components.neuron[0, places] == neuron]
        contribution = scores.scores[:, place][:, 0]
        assert relative(contribution, change) <= 100 * bound(found[0])
