"""Knockouts do what zeroing the host's own activations does, and random ones are other ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from asked import bound, host_trace, keywords, view_of
from test_log_prob import case_of, shared
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.model_view import Trace
from tl_contextmix.results.components import Grid, join

CASES = zoo.cases()


def knocked(model: Any, given: zoo.Inputs, **options: Any) -> cm.Knockout:
    """A knockout at the last position."""
    return cm.knockout(
        model, given.tokens, **{"controls": 0, "pos": -1, **keywords(given), **options}
    )


def literal(model: Any, given: zoo.Inputs, change: Any) -> Tensor:
    """Log-probabilities at the last position, the last block recomputed with changed insides."""
    view = view_of(model)
    trace, blocks = host_trace(view, given, None)
    changed = dict(trace.values)
    change(blocks[-1], changed)
    stream = blocks[-1].output(Trace(trace.batch, changed, trace.dtype))
    return view.readout(stream[:, -1]).log_softmax(dim=-1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_heads_and_neurons_vanish(case: zoo.Case) -> None:
    model, given = shared(case)
    view = view_of(model)
    last = len(view.blocks()) - 1
    ff = view.blocks()[last].feed_forward
    has_ff = ff is not None and not ff.refusal
    # The last attention sublayer: what follows of it is recomputed by hand.
    kind = "cross_attn" if case.encoder_decoder else "attn"
    own_tokens = given.decoder_tokens if case.encoder_decoder else given.tokens
    pos = torch.full((2,), -1 + len(own_tokens[0]))
    heads = Grid(kind, last, pos, (("head", range(1, 2)),)).table()
    inside = Grid(kind, last, pos, (("head", range(2, 3)), ("neuron", range(5, 6)))).table()
    every = cm.log_prob_contributions(model, given.tokens, by="head", pos=-1, **keywords(given))
    some = every.top(2)
    found_heads = replace(some, components=join([heads, inside]))
    neurons = [(last, 3), (last, 17)] if has_ff else None
    batch = host_trace(view, given, None)[0].batch

    def change(block: Any, values: dict[str, Tensor]) -> None:
        z = values[block.attentions[-1].mixed] = values[block.attentions[-1].mixed].clone()
        z[:, -1, 1] = 0
        z[:, -1, 2, 5] = 0
        if ff is not None and ff.refusal:
            pytest.skip("no recomputed neurons for a softmax over them")
        if has_ff:
            # What the feed-forward block reads has changed, too, unless it is parallel.
            x = block.feed_forward_input(Trace(batch, values, z.dtype))
            x = x if ff.norm_in is None else ff.norm_in(x)
            post, b_post = ff.post_activation(x), ff.weights("b_post")
            post[:, -1, [3, 17]] = 0
            values[ff.post] = post if b_post is None else post + b_post

    expected = literal(model, given, change)
    found = knocked(model, given, neurons=neurons, heads=found_heads, target_ids=9)
    own = zoo.logits(model, given)[:, -1].log_softmax(dim=-1)
    torch.testing.assert_close(found.before[:, 0], own[:, 9])
    limit = max(1e-9, 10 * bound(case)) if bound(case) > 1e-9 else 1e-9
    torch.testing.assert_close(found.after[:, 0], expected[:, 9], atol=limit, rtol=0)
    torch.testing.assert_close(found.after[:, 1], found.after[:, 0].exp())
    rank = (expected > expected[:, 9, None]).sum(dim=-1) + 1
    torch.testing.assert_close(found.after[:, 2], 1 / rank.double())
    assert torch.equal(found.best.ids[:, 0], expected.argmax(dim=-1))
    everywhere = knocked(
        model, given, neurons=neurons, heads=found_heads, target_ids=9, positions="all"
    )
    torch.testing.assert_close(everywhere.after, found.after)  # nothing reads the last block
    if last:
        first = [
            knocked(model, given, heads=[(0, 1)], target_ids=9, positions=p).after
            for p in ("last", "all")
        ]
        assert float((first[0] - first[1]).abs().max()) > 1e-6


def test_the_mean_is_that_of_real_tokens() -> None:
    case = case_of("gpt2")
    model, given = shared(case)
    mask = torch.ones_like(given.tokens)
    mask[0, 4:] = 0
    view = view_of(model)
    blocks = view.blocks()
    name = blocks[-1].feed_forward.post
    found = cm.knockout(
        model,
        given.tokens,
        neurons=[(len(blocks) - 1, 3)],
        attention_mask=mask,
        replace_with="mean",
        controls=0,
        target_ids=9,
    )
    _, cache = model.run_with_cache(given.tokens, attention_mask=mask)
    post = cache[name]
    mean = post[mask.bool()][:, 3].mean()
    trace, _ = host_trace(view, given, None)
    changed = post.clone()
    changed[0, 3, 3] = changed[1, 5, 3] = mean
    values = {**trace.values, name: changed}
    stream = blocks[-1].output(Trace(trace.batch, values, trace.dtype))
    rows = stream[[0, 1], [3, 5]]
    expected = view.readout(rows).log_softmax(dim=-1)[:, 9]
    torch.testing.assert_close(found.after[:, 0], expected)


def test_random_controls_are_as_many_others_of_the_same_kinds() -> None:
    case = case_of("gpt2")
    model, given = shared(case)
    best = cm.log_prob_contributions(model, given.tokens, by="ff_neuron").top(4)
    found = knocked(model, given, neurons=best, controls=3)
    assert found.controls.shape == (2, 3, 3)
    assert float(found.controls[:, :, 0].std(dim=1).min()) > 0
    again = knocked(model, given, neurons=best, controls=3)
    assert torch.equal(again.controls, found.controls)
    other = knocked(model, given, neurons=best, controls=3, seed=1)
    assert not torch.equal(other.controls, found.controls)
    # Three layers of four heads: with eleven out, one other is left.
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    with pytest.raises(cm.InvalidInput, match=r"not enough others.*1 others in attn for 11"):
        knocked(model, given, heads=heads[:11], controls=1)
    half = knocked(model, given, heads=heads[:6], controls=1, target_ids=9)
    rest = knocked(model, given, heads=heads[6:], target_ids=9)
    torch.testing.assert_close(half.controls[:, 0], rest.after)
    frame = found.summary()
    assert frame.when.tolist() == ["before", "after", "control"] * 3
    middle = frame[(frame.quantity == "log_prob") & (frame.when == "control")]["mean"].item()
    assert middle == pytest.approx(float(found.controls[:, :, 0].mean()))


def test_what_cannot_be_knocked_out() -> None:
    case = case_of("gpt2")
    model, given = shared(case)
    for by in ("layer", "position", "head_position"):
        found = cm.log_prob_contributions(model, given.tokens, by=by).top(2)
        with pytest.raises(cm.InvalidInput, match=f"cannot be chosen.*a result by {by}"):
            knocked(model, given, heads=found)
    for options, message in (
        ({}, r"nothing was chosen"),
        ({"heads": [(0, 4)]}, r"no such component: got L0H4"),
        ({"heads": [(0, 1, 2)]}, r"the heads cannot be read: got \(0, 1, 2\)"),
        ({"heads": [(0, 1)], "positions": "first"}, r"no such positions: got 'first'"),
        ({"heads": [(0, 1)], "replace_with": "noise"}, r"no such replacement: got 'noise'"),
        ({"heads": [(0, 1)], "controls": -1}, r"so many random sets: got -1"),
    ):
        method = getattr(cm.knockout, "__wrapped__", cm.knockout)
        with pytest.raises(cm.InvalidInput, match=message):
            method(model, given.tokens, **options)
