"""Knockouts do what zeroing the host's own activations does, and random ones are other ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from asked import bound, case_of, host_trace, keywords, shared, view_of
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.core.blocks import Trace
from tl_contextmix.engine.selection import Controls, chosen_components, without_sources
from tl_contextmix.results import Knockout
from tl_contextmix.results.components import Components, Grid, join


def knocked(model: Any, given: zoo.Inputs, **options: Any) -> Knockout:
    """A knockout at the last position."""
    options = {"controls": 0, "pos": -1, **keywords(given), **options}
    return cm.knockout(model, given.tokens, **options)


def literal(model: Any, given: zoo.Inputs, change: Any) -> Tensor:
    """Log-probabilities at the last position, the last block recomputed with changed insides."""
    view = view_of(model)
    trace, blocks = host_trace(view, given, None)
    changed = dict(trace.values)
    change(blocks[-1], changed)
    stream = blocks[-1].output(Trace(trace.batch, changed, trace.dtype))
    return view.readout(stream[:, -1]).log_softmax(dim=-1)


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
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
            post, b_post = ff.activate(ff.pre_activations(x)), ff.weights("b_post")
            post[:, -1, [3, 17]] = 0
            values[ff.post] = post if b_post is None else post + b_post

    expected = literal(model, given, change)
    found = knocked(model, given, neurons=neurons, heads=found_heads, target=9)
    own = zoo.logits(model, given)[:, -1].log_softmax(dim=-1)
    torch.testing.assert_close(found.before[:, 0], own[:, 9])
    limit = max(1e-9, 10 * bound(case)) if bound(case) > 1e-9 else 1e-9
    torch.testing.assert_close(found.after[:, 0], expected[:, 9], atol=limit, rtol=0)
    torch.testing.assert_close(found.after[:, 1], found.after[:, 0].exp())
    rank = (expected > expected[:, 9, None]).sum(dim=-1) + 1
    torch.testing.assert_close(found.after[:, 2], 1 / rank.double())
    assert torch.equal(found.best.ids[:, 0], expected.argmax(dim=-1))
    everywhere = knocked(
        model, given, neurons=neurons, heads=found_heads, target=9, everywhere=True
    )
    torch.testing.assert_close(everywhere.after, found.after)  # nothing reads the last block
    if last:
        first = [
            knocked(model, given, heads=[(0, 1)], target=9, everywhere=p).after
            for p in (False, True)
        ]
        assert float((first[0] - first[1]).abs().max()) > 1e-6


def test_the_mean_is_that_of_real_tokens() -> None:
    model, given = shared(case_of("gpt2"))
    mask = torch.ones_like(given.tokens)
    mask[0, 4:] = 0
    view = view_of(model)
    blocks = view.blocks()
    name = blocks[-1].feed_forward.post
    options: dict[str, Any] = {"replace_with": "mean", "controls": 0, "target": 9}
    options |= {"neurons": [(len(blocks) - 1, 3)], "attention_mask": mask}
    found = cm.knockout(model, given.tokens, **options)
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
    # The same at whatever positions the sentences are asked about.
    every = cm.knockout(model, given.tokens, **options, pos="all")
    torch.testing.assert_close(every.after[[3, 9]], found.after)


def test_random_controls_are_as_many_others_of_the_same_kinds() -> None:
    model, given = shared(case_of("gpt2"))
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
    # With all others as the control, removing these is that control: by means, by their own.
    for replace_with in ("zero", "mean"):
        options = {"target": 9, "replace_with": replace_with}
        half = knocked(model, given, heads=heads[:6], controls=1, **options)
        rest = knocked(model, given, heads=heads[6:], **options)
        torch.testing.assert_close(half.controls[:, 0], rest.after)
    frame = found.summary()
    assert frame.when.tolist() == ["before", "after", "control"] * 3
    middle = frame[(frame.quantity == "log_prob") & (frame.when == "control")]["mean"].item()
    assert middle == pytest.approx(float(found.controls[:, :, 0].mean()))


def test_what_cannot_be_knocked_out() -> None:
    model, given = shared(case_of("gpt2"))
    for by in ("layer", "position", "head_position"):
        found = cm.log_prob_contributions(model, given.tokens, by=by).top(2)
        with pytest.raises(cm.InvalidInput, match=f"cannot be chosen.*a result by {by}"):
            knocked(model, given, heads=found)
    for options, message in (
        ({}, r"nothing was chosen"),
        ({"heads": [(0, 4)]}, r"no such component: got L0H4"),
        ({"heads": [(0, 1, 2)]}, r"the heads cannot be read: got \(0, 1, 2\)"),
        ({"heads": [(0, 1)], "everywhere": "first"}, r"cannot use this everywhere: got 'first'"),
        ({"heads": [(0, 1)], "replace_with": "noise"}, r"replace_with: got 'noise'; expected"),
        ({"heads": [(0, 1)], "controls": -1}, r"controls: got -1; expected an integer from 0"),
    ):
        method: Any = cm.knockout
        with pytest.raises(cm.InvalidInput, match=message):
            method(model, given.tokens, **options)


def test_components_are_named_by_numbers_or_by_label() -> None:
    model, given = shared(case_of("gpt2"))
    for name, listed, others in (
        ("heads", [(1, 2)], ((1, 2), "L1H2", ["L1H2"], torch.tensor([1, 2]))),
        ("neurons", [(0, 7)], ((0, 7), "L0N7", ["L0.7", (0, 7)])),
        ("neurons", [(0, 3, 5)], ((0, 3, 5), "L0H3N5")),
    ):
        expected = knocked(model, given, **{name: listed})
        for other in others:
            assert knocked(model, given, **{name: other}).equals(expected), other
    for options in ({"heads": "L1N2"}, {"neurons": "L1H2"}, {"heads": "1.2"}, {"experts": "L1"}):
        with pytest.raises(cm.InvalidInput, match="cannot be read: got .*names such as 'L3"):
            knocked(model, given, **options)


def chosen(view: Any, neurons: Any = None, heads: Any = None) -> Components:
    """Heads and neurons by number, in two sentences."""
    pos = torch.tensor([5, 5])
    return without_sources(chosen_components(view, neurons, heads, pos), per_position=True)


def test_controls_have_nothing_in_common_with_the_chosen() -> None:
    """Neither a neuron of a chosen head, nor a head with a chosen neuron in it."""
    view = view_of(shared(case_of("gpt2"))[0])
    some = chosen(view, [(1, 2, 3), (1, 2, 4), (0, 0, 1), (2, 3)], [(1, 1), (2, 0)])
    controls = Controls(view, some, seed=0)
    seen = set()
    for _ in range(40):
        drawn = controls.draw()
        for row in range(2):
            ones = [drawn.at(row, place) for place in range(6)]
            names = [(one["kind"], one["layer"], one["head"], one["neuron"]) for one in ones]
            assert len(set(names)) == 6
            assert [one["kind"] for one in ones] == ["attn"] * 3 + ["mlp"] + ["attn"] * 2
            inside = {name[1:3] for name in names[:3]}
            heads = {name[1:3] for name in names[4:]}
            assert not heads & {(1, 1), (2, 0), (1, 2), (0, 0)}
            assert not inside & ({(1, 1), (2, 0)} | heads)
            assert not {name[1:] for name in names[:4]} & {
                (1, 2, 3),
                (1, 2, 4),
                (0, 0, 1),
                (2, None, 3),
            }
            seen.update(names)
    # Others of the same head may stand for a neuron.
    assert any(name[:3] == ("attn", 1, 2) for name in seen)
    assert len({name[1:3] for name in seen if name[0] == "attn" and name[3] is None}) == 8


def test_a_neuron_that_reads_several_sources_is_one() -> None:
    model, given = shared(case_of("gpt2"))
    every = cm.log_prob_contributions(model, given.tokens, by="attn_neuron", score="norm")
    best = every.top(40)
    names = {
        (one["layer"], one["head"], one["neuron"])
        for one in (best.components.at(0, place) for place in range(40))
    }
    assert len(names) == 7  # six sources each
    found = cm.knockout(model, given.tokens, neurons=best, controls=2)
    assert found.components.kind.shape == (2, 7)
    assert repr(found).startswith("Knockout of 7 components")
    listed = cm.knockout(model, given.tokens, neurons=[*names], target=9, controls=0)
    same = cm.knockout(model, given.tokens, neurons=best, target=9, controls=0)
    torch.testing.assert_close(listed.after, same.after)
    drawn = Controls(view_of(model), found.components, seed=0).draw()
    assert len({drawn.label(0, place) for place in range(7)}) == 7


def test_as_many_positions_as_are_chosen() -> None:
    """A neuron found at two positions is ablated at both; so is its control."""
    model, given = shared(case_of("gpt2"))
    view = view_of(model)
    one = chosen(view, [(1, 3)])
    twice = join([one, replace(one, pos=one.pos - 2), chosen(view, [(1, 4)])])
    drawn = Controls(view, twice, seed=3).draw()
    assert drawn.label(0, 0) == drawn.label(0, 1) != drawn.label(0, 2)
    assert torch.equal(drawn.pos, twice.pos)
    best = cm.log_prob_contributions(model, given.tokens, by="attn_neuron").top(6)
    queries = cm.query_contributions(model, given.tokens, neurons=best, by="ff_neuron", k=60)
    last, everywhere = (
        knocked(model, given, neurons=queries, everywhere=everywhere)
        for everywhere in (False, True)
    )
    assert bool((~last.components.is_empty()).sum() >= (~everywhere.components.is_empty()).sum())
    for row in range(2):
        counts = [int((~found.components.is_empty())[row].sum()) for found in (last, everywhere)]
        labels = {everywhere.components.label(row, place) for place in range(counts[1])}
        assert len(labels) == counts[1] < counts[0] == 60


@pytest.mark.parametrize("replace_with", ["zero", "mean"])
def test_one_pass_for_each_set(replace_with: str) -> None:
    model, given = shared(case_of("gpt2"))
    passes = []
    name = view_of(model).blocks()[0].resid_in
    with model.hooks(fwd_hooks=[(name, lambda stream, hook: passes.append(1))]):
        found = knocked(
            model, given, neurons=[(1, 3)], heads=[(2, 1)], controls=5, replace_with=replace_with
        )
    assert len(passes) == 2 + 5
    assert found.controls.shape[1] == 5
