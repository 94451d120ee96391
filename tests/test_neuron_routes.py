"""Parts go through the feed-forward neurons by three routes to the same numbers, by counts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from asked import case_of, shared
from torch import Tensor

pytest.importorskip("meters", reason="the benchmarks are part of the repository only")

import zoo
from blocks import Sizes, build, with_relu
from memories import gpt2
from meters import flops
from run import measure, ours

import tl_contextmix as cm
from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.inputs import Given
from tl_contextmix.adapters.passes import run_pass
from tl_contextmix.core import neuron_routes
from tl_contextmix.core.attention_terms import GatedTerm
from tl_contextmix.core.blocks import Block, Trace
from tl_contextmix.core.feed_forward_parts import FeedForwardParts
from tl_contextmix.core.first_block import first_parts
from tl_contextmix.core.first_block import parts_of as parts_after
from tl_contextmix.core.frozen_blocks import freeze, own_parts
from tl_contextmix.core.neuron_routes import Costs, Route
from tl_contextmix.engine.parts import POINTS, linear_points, parts_at
from tl_contextmix.methods import decompx, norms

pytestmark = pytest.mark.once
SMALL = Sizes(10, d=12, heads=3, m=40)
CASES = {
    "causal": SMALL,
    "both ways": replace(SMALL, causal=False, post_norm=True),
    "gated": replace(SMALL, gated=True),
    "sandwich": replace(SMALL, sandwich=True),
    "parallel": replace(SMALL, parallel=True),
    "with an encoder": replace(SMALL, encoder=7),
    "a batch": replace(SMALL, batch=3, window=4),
}


def parts_of(block: Block, trace: Trace, max_bytes: int = 2**30) -> Tensor:
    """Every part of a block's output."""
    found = parts_at(
        block, linear_points(block, trace, "decoder"), "block_out", "contributor", max_bytes
    )
    assert isinstance(found, FeedForwardParts)
    return found.parts(max_bytes)


def by(route: Route, patch: pytest.MonkeyPatch) -> list[Route]:
    """Has everything go by one route; returns what will have been asked."""
    asked: list[Route] = []

    def fixed(self: Costs, *counts: int, **more: Any) -> Route:
        del self, counts
        asked.append(route)
        # Nothing is gathered where no neuron was counted.
        return "all" if route == "active" and not more.get("active") else route

    patch.setattr(Costs, "route", fixed)
    patch.setattr(Costs, "may_gather", lambda *counts: True)
    return asked


@pytest.mark.parametrize("max_bytes", [2**30, 40_000])
@pytest.mark.parametrize("name", CASES)
def test_every_route_leads_to_the_same_parts(
    name: str, max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, trace = build(CASES[name], torch.float64)
    with torch.no_grad():
        for one in (block, with_relu(block, trace)):
            by("all", monkeypatch)
            expected = parts_of(one, trace)
            for route in ("folded", "active"):
                asked = by(route, monkeypatch)
                found = parts_of(one, trace, max_bytes)
                torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
                assert asked


@pytest.mark.parametrize("max_bytes", [2**30, 40_000])
@pytest.mark.parametrize("name", CASES)
def test_pairs_that_are_few_go_through_the_weights_themselves(
    name: str, max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, trace = build(CASES[name], torch.float64)
    with torch.no_grad():
        monkeypatch.setattr(FeedForwardParts, "_few_pairs", lambda parts: False)
        expected = parts_of(block, trace)
        monkeypatch.setattr(FeedForwardParts, "_few_pairs", lambda parts: True)
        monkeypatch.delattr(FeedForwardParts, "folded")
        found = parts_of(block, trace, max_bytes)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gated", [False, True])
def test_every_route_transmits_the_same(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DecompX does: several parts of each place."""
    block, trace = build(replace(SMALL, gated=gated), torch.float64)
    ff = with_relu(block, trace).feed_forward
    x = torch.randn(2, 5, SMALL.d, dtype=torch.float64)
    parts = torch.randn(2, 5, 3, SMALL.d, dtype=torch.float64)
    slopes, _ = ff.linearise(ff.pre_activations(x * 0), ff.pre_activations(x), False)
    found = {}
    for route in ("all", "folded", "active"):
        by(route, monkeypatch)
        found[route] = ff.transmit(parts, slopes)
    alone = [ff.transmit(parts[..., place, :], slopes) for place in range(3)]
    for one in found.values():
        torch.testing.assert_close(one, torch.stack(alone, dim=2), rtol=1e-11, atol=1e-11)


def test_what_is_read_before_the_weights_of_a_gated_head() -> None:
    draw = partial(torch.randn, dtype=torch.float64)
    gate, term = draw(2, 4, 3, 5), (draw(2, 3, 4, 6), draw(2, 6, 3, 5), draw(3, 5, 8))
    read = GatedTerm(*term, 1 + draw(2, 4, 1).abs(), gate=gate)
    whole = read.dense(slice(0, 4), slice(1, 6))
    one = read.before_weights(1, 2, slice(1, 6)) @ read.weight.flatten(0, 1)
    torch.testing.assert_close(one, whole[1, :, 2])


# Counts


def test_a_tenth_of_relu_neurons_costs_a_quarter_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    block, trace = build(Sizes(128))
    found: dict[str, Tensor] = {}

    def work(name: str) -> None:
        found[name] = ours(block, trace, "block_out")["block_out"]

    with torch.no_grad():
        block = with_relu(block, trace, 0.1)
        few = flops(partial(work, "few"))
        by("all", monkeypatch)
        assert flops(partial(work, "all")) >= 4 * few
    torch.testing.assert_close(found["few"], found["all"])


def test_half_of_them_active_are_not_gathered() -> None:
    sizes = Costs(3072, 768, 12, 768, 768)
    share = {part: sizes.route(64, 64, active=int(64 * 3072 * part)) for part in (0.1, 0.2, 0.5)}
    assert share == {0.1: "active", 0.2: "active", 0.5: "all"}
    # Nor are neurons of a small model, whatever they are: each target would be looked at alone.
    small = Costs(64, 16, 4, 16, 16)
    assert not small.may_gather(32, 32)


@pytest.mark.parametrize(("causal", "least"), [(True, 1.6), (False, 2.2)])
def test_long_inputs_are_folded(
    causal: bool, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a length of 5.3 times the width: 4,096 tokens in GPT-2 small."""
    sizes = Sizes(512, d=96, heads=2, m=384, causal=causal, post_norm=not causal)
    # As in a model of that size, where a target's own calls are nothing.
    monkeypatch.setattr(neuron_routes, "_PER_TARGET", 0)
    block, trace = build(sizes)
    folded = measure(partial(ours, block, trace, "block_out"), products=False)
    by("all", monkeypatch)
    plain = measure(partial(ours, block, trace, "block_out"), products=False)
    assert plain.flops >= least * folded.flops
    assert folded.peak <= 1.1 * plain.peak


def test_short_inputs_are_not() -> None:
    sizes = Costs(3072, 768, 12, 768, 768)
    routes = {pairs: sizes.route(pairs, 64) for pairs in (512, 1024, 1200, 2048)}
    assert routes == {512: "all", 1024: "all", 1200: "folded", 2048: "folded"}


def test_many_parts_of_a_place_are_folded() -> None:
    ff = build(Sizes(4, d=96, heads=2, m=384))[0].feed_forward
    slopes = (torch.rand(1, 300, 384),)
    few, many = (
        flops(partial(ff.transmit, torch.randn(1, 300, count, 96), slopes), elementwise=False)
        for count in (16, 768)
    )
    assert few == 300 * 16 * 4 * 96 * 384
    assert many <= few * 768 / 16 / 3


def test_the_count_of_active_neurons_is_their_own() -> None:
    used = torch.rand(2, 3, 7) < 0.4
    found = neuron_routes.active_at(used)
    expected = [one.nonzero()[:, 0] for one in used.flatten(0, 1)]
    assert all(map(torch.equal, found, expected))


# DecompX


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_decompx_carries_all_tokens_at_once_to_the_same_numbers(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = shared(case_of(family))
    chunks = cm.decompx(model, given.tokens)
    monkeypatch.setattr(decompx._Carried, "_long", lambda self, max_bytes: True)
    monkeypatch.setattr(decompx, "_STRETCHES", 3)
    whole = cm.decompx(model, given.tokens)
    torch.testing.assert_close(whole.scores, chunks.scores, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(whole.bias, chunks.bias)


def test_decompx_of_a_long_input_takes_fewer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At 2.7 times the width, 2,048 tokens in GPT-2 small; where all of them fit.

    In layers after the first, which does not carry each pair through W_in.
    """
    monkeypatch.setattr(neuron_routes, "_PER_TARGET", 0)
    one, three = (
        [cm.estimate(model, 172, partial(cm.decompx, max_bytes=size)) for size in (2**30, 2**22)]
        for model in (gpt2(1, 64, 64), gpt2(3, 64, 64))
    )
    assert three[0].peak_bytes <= 4 * 5 * 172**2 // 2 * 64 * 4
    found, tight = (more.flops - less.flops for more, less in zip(three, one, strict=True))
    assert tight >= 1.7 * found


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
@pytest.mark.parametrize("passed", ["through heads", "read"])
def test_the_first_block_goes_through_heads_to_the_same_parts(
    case: zoo.Case, passed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    tokens = torch.randint(zoo.rows.FIRST_WORD_ID, zoo.rows.D_VOCAB, (2, 12))
    decoder = None if given.decoder_tokens is None else tokens
    if passed == "read":
        monkeypatch.setattr(FeedForwardParts, "folded", lambda self: self)
    view = as_view(model)
    done = run_pass(view, Given(tokens, decoder_input=decoder), **decompx._needed(view, None))
    carried = decompx._carry(done, done.blocks[-1:], "contributor", 2**30)
    for stack in (carried.own, carried.encoder):
        if stack is None:
            continue
        block = stack.blocks[0]
        x = done.trace.resid_in(block.block)
        with torch.no_grad():
            begun = first_parts(block, x)
            expected = block(own_parts(x, slice(0, 12)), None, {})
            for targets, sources in ((slice(0, 12), slice(3, 8)), (slice(5, 12), slice(0, 12))):
                found = parts_after(begun, targets, sources)
                wanted = expected[:, targets, sources]
                torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_one_product_for_each_pair_of_the_first_block(causal: bool) -> None:
    """W_out's, and mixing heads: what `attention_norms` takes, too."""
    sizes = Sizes(96, d=64, heads=4, m=256, causal=causal, post_norm=not causal)
    block, trace = build(sizes)
    (attention,), x = block.attentions, trace.resid_in(block)
    weights = {name: attention.weights(name) for name in ("W_O", "b_O")}
    weights["W_V"] = torch.randn(4, 64, 16)
    block = replace(block, attentions=(replace(attention, weights=weights.get),))
    with torch.no_grad():
        frozen, _ = freeze(block, trace, torch.zeros_like(x), None, False)
        work = partial(first_parts, frozen, x)
        chunks = [slice(start, start + 16) for start in range(0, 96, 16)]
        reached = [slice(one.start if causal else 0, 96) for one in chunks]
        begun = work()
        count = sum(
            flops(partial(parts_after, begun, *one), elementwise=False)
            for one in zip(reached, chunks, strict=True)
        )
        fold = flops(work, elementwise=False)
    pairs = 16 * sum(one.stop - one.start for one in reached)
    own = 2 * 96 * 64 * (256 + 64)  # each token's values through the folded weights, and W_O
    assert count == pairs * 2 * (256 * 64 + 4 * (256 + 64)) + own
    # W_V, W_O into W_in, and each token's own path.
    assert fold == 2 * 96 * 64 * 64 + 2 * 64 * 64 * 256 + 2 * 96 * 64 * 256


# In bfloat16


def test_products_in_bfloat16_are_offered_where_they_would_save_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    low, text = cm.load_demo("causal-lm", dtype=torch.bfloat16), "the keys to the cabinet are"
    cm.attention_norms(low, text)
    monkeypatch.setattr(norms, "_MANY", 10**6)
    with pytest.warns(cm.ContextMixWarning, match="precision='bfloat16' takes 97% of"):
        cm.attention_norms(low, text)
    cm.attention_norms(low, text, precision="bfloat16")
    cm.attention_norms(low, text, at="mlp_in")
    cm.attention_norms(cm.load_demo("causal-lm"), text)


def test_where_nothing_is_in_bfloat16_it_is_refused() -> None:
    model, text = cm.load_demo("causal-lm"), "the keys to the cabinet are"
    asked: dict[str, Any] = {"precision": "bfloat16"}
    with pytest.raises(cm.InvalidInput, match=r"nothing here is computed in bfloat16.*mlp_in"):
        cm.attention_norms(model, text, at=["resid_mid", "mlp_in"], precision="bfloat16")
    with pytest.raises(cm.InvalidInput, match="nearly equal: bfloat16 would leave them no digit"):
        cm.value_zeroing(model, text, **asked)
    experts = case_of("mixtral")
    with pytest.raises(cm.InvalidInput, match="a model of experts"):
        cm.attention_norms(zoo.shared(experts), zoo.inputs(experts).tokens, precision="bfloat16")
    maps = cm.attention_norms(model, text, at=POINTS, precision="bfloat16")
    with pytest.raises(cm.InvalidInput, match="cosines are of small differences"):
        cm.cancellation(maps)
    assert cm.contextualization_change(maps).values.isfinite().all()
    assert maps["mlp_out"].provenance.options["precision"] == "bfloat16"
