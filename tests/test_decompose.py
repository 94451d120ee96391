"""The engine: complete at every point of every model, and equal to the literal equations."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from asked import (
    bound,
    case_of,
    host_trace,
    host_value,
    keywords,
    points,
    relative,
    shared,
    stacks,
    view_of,
)
from oracles import Position

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given
from tl_contextmix.adapters.passes import Pass, run_pass
from tl_contextmix.core.activations import ACTIVATIONS
from tl_contextmix.core.blocks import AttentionSublayer, Batch, Block, FeedForward, Side, Trace
from tl_contextmix.core.feed_forward_parts import Bias
from tl_contextmix.core.model_view import StackName
from tl_contextmix.core.token_sums import Norm
from tl_contextmix.engine.parts import (
    POINTS,
    FeedForwardParts,
    Point,
    linear_points,
    norms_at,
    parts_at,
    parts_at_all,
)
from tl_contextmix.results import HeadDecomposition

CASES = zoo.spread()
BIASES = ("contributor", "fixed")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_and_bias_add_up_to_the_models_own_activation(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    view = view_of(model)
    for stack in stacks(case):
        trace, blocks = host_trace(view, given, stack)
        kind = "cross" if stack == "cross" else "self"
        for point in points(blocks[0]):
            expected = torch.stack([host_value(b, trace, point, kind) for b in blocks], dim=1)
            for bias in BIASES:
                parts = cm.decompose(
                    model, given.tokens, at=point, stack=stack, bias=bias, **keywords(given)
                )
                assert relative(parts.total(), expected) <= bound(case), (stack, point, bias)


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_bias_convention_matters_behind_the_activation_where_there_are_biases(
    case: zoo.Case,
) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    block = view_of(model).blocks()[0]
    ff = block.feed_forward
    for point in points(block):
        found = [
            cm.decompose(model, given.tokens, at=point, bias=bias, **keywords(given))
            for bias in BIASES
        ]
        same = point in ("attn_out", "resid_mid", "mlp_in") or ff is None
        if ff is not None and not same:
            entering = cm.decompose(model, given.tokens, at="mlp_in", **keywords(given)).bias
            own = [bias for _, bias in ff.branches() if bias is not None]
            same = not any(bool(bias.any()) for bias in (entering, *own))
        assert torch.equal(found[0].parts, found[1].parts) == same, point


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_a_literal_loop_over_tokens_and_heads(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case, batch=1)
    view = view_of(model)
    stack = stacks(case)[-1]
    trace, blocks = host_trace(view, given, stack)
    block, bias = blocks[-1], "fixed" if case.family in ("gpt2", "llama", "t5") else "contributor"
    target = trace.resid_in(block).shape[1] - 2
    oracle = Position(block, trace, 0, target, stack or "decoder")
    if block.feed_forward is not None and not block.feed_forward.refusal:
        oracle.feed_forward(steps=2000, convention=bias)
    for point in POINTS:
        if point not in oracle.points:
            continue
        expected, expected_bias = oracle.points[point]
        found = cm.decompose(
            model, given.tokens, at=point, stack=stack, bias=bias, layer=-1, **keywords(given)
        )
        behind = point in ("mlp_out", "resid_post", "block_out")
        # The oracle's midpoint rule: 1e-8 with 2000 steps where g is smooth, and a kink inside a
        # path that does not start at zero (ReLU, "fixed") is misplaced by up to half a step.
        limit = (1e-3 if "relu" in _activation(block) else 1e-6) if behind else 1e-10
        parts = torch.stack(expected)
        assert relative(found.parts[0, 0, target], parts) <= limit, point
        assert relative(found.bias[0, 0, target], expected_bias) <= limit, point


@pytest.mark.parametrize("case", CASES, ids=str)
def test_heads_and_the_residual_add_up_to_the_parts(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    view = view_of(model)
    for stack in stacks(case):
        trace, blocks = host_trace(view, given, stack)
        kind = "cross" if stack == "cross" else "self"
        attention = next(a for a in blocks[0].attentions if a.kind == kind)
        for point in points(blocks[0]):
            asked = {"at": point, "stack": stack, "layer": [0], **keywords(given)}
            whole = cm.decompose(model, given.tokens, **asked)
            found = cm.decompose(model, given.tokens, heads=True, **asked)
            assert isinstance(found, HeadDecomposition)
            assert relative(found.parts.sum(dim=2), whole.parts) <= 1e-10, (stack, point)
            assert torch.equal(found.bias, whole.bias)
            assert relative(found.total(), whole.total()) <= 1e-10
            last = f"{len(attention.W_O) - 1}" if point == "attn_out" else "residual"
            assert found.heads[-1] == last
        # By hand: pattern times value times W_O, of each head alone.
        asked = {"at": "attn_out", "stack": stack, "layer": [0], **keywords(given)}
        found = cm.decompose(model, given.tokens, heads=True, **asked)
        assert isinstance(found, HeadDecomposition)
        read = torch.einsum("bsHd,Hdm->bHsm", trace.value(attention), attention.W_O)
        expected = trace.pattern(attention)[..., None] * read[:, :, None]
        if attention.norm_out is not None:
            norm, raw = attention.norm_out, attention.raw_output(trace)
            expected = norm.linear(expected) / norm.scale(raw)[:, None, :, None]
        assert relative(found.parts[:, 0], expected) <= 1e-10
        maps = cm.attention_norms(model, given.tokens, heads=True, **asked)
        assert relative(found.norms().scores, maps.scores) <= 1e-10
        assert found.norms().heads == maps.heads


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_heads_of_a_selection_and_of_cross_attention(family: str, tmp_path: Path) -> None:
    case = case_of(family, *(["t5"] if family == "bart" else []))
    model, given = zoo.shared(case), zoo.inputs(case)
    found = cm.decompose(model, given.tokens, heads=True, **keywords(given))
    assert isinstance(found, HeadDecomposition)
    crossed = [label for label in found.heads if label.startswith("cross ")]
    assert len(crossed) == (len(found.heads) // 2 if case.encoder_decoder else 0)
    one = found.select(head="residual", target=-1)
    assert one.heads == ("residual",)
    # What comes past all heads comes from the token itself.
    own = one.parts[..., : given.tokens.shape[1] if not crossed else 5, :]
    assert float(own[:, :, :, :, :-1].abs().max()) == 0
    assert float(own[:, :, :, :, -1].abs().max()) > 0
    again = HeadDecomposition.load(found.save(tmp_path / "heads.safetensors"))
    assert again.equals(found)
    tight = cm.decompose(model, given.tokens, heads=True, max_bytes=60_000, **keywords(given))
    assert relative(tight.parts, found.parts) <= 1e-12


def _activation(block: Block) -> str:
    ff = block.feed_forward
    return "" if ff is None or ff.activation is None else ff.activation.name


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_norms_without_the_parts_equal_norms_of_the_parts(case: zoo.Case) -> None:
    """Also when the byte budget leaves room for a few pairs and neurons at a time."""
    model, given = zoo.shared(case), zoo.inputs(case)
    for stack in stacks(case):
        for point in points(view_of(model).blocks(stack)[0]):
            kwargs = {"at": point, "stack": stack, **keywords(given)}
            parts = cm.decompose(model, given.tokens, **kwargs)
            norms = parts.norms()
            assert norms.bias is not None
            for max_bytes in (2**30, 60_000):
                found = cm.attention_norms(model, given.tokens, max_bytes=max_bytes, **kwargs)
                assert relative(found.scores, norms.scores) <= 1e-12, (point, max_bytes)
                assert relative(found.bias, norms.bias) <= 1e-12
                assert found.source.strings == parts.source.strings


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bart", "bert"])
@pytest.mark.parametrize("max_bytes", [1, 5_000])
def test_a_small_budget_changes_nothing_but_the_order_of_sums(family: str, max_bytes: int) -> None:
    """One pair and one neuron at a time is the least that every step can work with."""
    found = [case for case in CASES if case.family == family]
    if not found:
        pytest.skip(f"{family} does not load on this version")
    model, given = zoo.shared(found[0]), zoo.inputs(found[0], batch=1)
    given = zoo.Inputs(
        given.tokens[:, :3], None if given.decoder_tokens is None else given.decoder_tokens[:, :2]
    )
    whole = cm.decompose(model, given.tokens, layer=0, **keywords(given))
    small = cm.decompose(model, given.tokens, layer=0, max_bytes=max_bytes, **keywords(given))
    assert relative(small.parts, whole.parts) <= 1e-12


def test_more_tokens_than_dimensions() -> None:
    """Only relative positions allow as many in a model as small as the tests have them."""
    case = case_of("t5")
    model, given = zoo.shared(case), zoo.inputs(case, batch=1)
    many = zoo.Inputs(given.tokens.repeat(1, 5), given.decoder_tokens)
    trace, blocks = host_trace(view_of(model), many, "encoder")
    expected = host_value(blocks[0], trace, "attn_out", "self")
    assert expected.shape[1] > expected.shape[2]
    parts = cm.decompose(
        model=model, input=many.tokens, at="attn_out", layer=0, stack="encoder", **keywords(many)
    )
    assert relative(parts.total()[:, 0], expected) <= bound(case)


@pytest.mark.parametrize("bias", BIASES)
def test_a_mixing_ratio_is_that_of_the_parts(bias: Bias) -> None:
    """2021, eq. 8, at points whose rows are never all in memory."""
    model, given = shared(case_of("gpt2"))
    for point in POINTS:
        parts = cm.decompose(model, given.tokens, at=point, bias=bias).parts
        own = parts.diagonal(dim1=2, dim2=3).movedim(-1, 2)
        others, kept = (parts.sum(3) - own).norm(dim=-1), own.norm(dim=-1)
        found = cm.mixing_ratio(model, given.tokens, at=point, bias=bias).values
        assert relative(found.flatten(), (others / (others + kept)).flatten()) <= 1e-10, point


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_future_sources_are_exactly_zero_in_causal_stacks(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    blocks = view_of(model).blocks("decoder" if case.encoder_decoder else None)
    for point in points(blocks[0]):
        scores = cm.attention_norms(model, given.tokens, at=point, **keywords(given)).scores
        own = scores[..., : scores.shape[3]]
        future = torch.triu(own, diagonal=1)
        if case.both_ways:
            assert bool((future[..., 0, 1:] > 0).all()), point
        else:
            assert not bool(future.any()), point


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_heads_of_attn_out_are_pattern_times_value_norm_and_sum_to_the_whole(
    case: zoo.Case,
) -> None:
    """2020, eq. 4; and the norm of the sum is at most the sum of the norms."""
    model, given = zoo.shared(case), zoo.inputs(case)
    for stack in stacks(case):
        kwargs = {"at": "attn_out", "stack": stack, **keywords(given)}
        heads = cm.attention_norms(model, given.tokens, heads=True, **kwargs)
        summed = cm.attention_norms(model, given.tokens, **kwargs)
        assert heads.heads == tuple(str(h) for h in range(heads.scores.shape[2]))
        assert bool((summed.scores[:, :, 0] <= heads.scores.sum(2) + 1e-12).all())
        trace, blocks = host_trace(view_of(model), given, stack)
        block = blocks[0]
        attention = block.attentions[-1 if stack == "cross" else 0]
        if attention.norm_out is None:
            values = torch.einsum("bshd,hdm->bshm", trace.value(attention), attention.W_O)
            expected = trace.pattern(attention) * values.norm(dim=-1).permute(0, 2, 1)[:, :, None]
            assert relative(heads.scores[:, 0], expected) <= 1e-12
            groups = [[1, 0], [1]]
            some = cm.attention_norms(model, given.tokens, heads=groups, **kwargs)
            assert some.heads == ("1+0", "1")
            assert some.bias is None
            parts = torch.einsum(
                "bhts,bshm->bhtsm", trace.pattern(attention)[:, :2], values[:, :, :2]
            )
            assert relative(some.scores[:, 0, 0], parts.sum(1).norm(dim=-1)) <= 1e-9
            assert relative(some.scores[:, 0, 1], expected[:, 1]) <= 1e-12
        weights = cm.attention(model, given.tokens, stack=stack, **keywords(given)).scores
        some = cm.attention(model, given.tokens, heads=[0, 1], stack=stack, **keywords(given))
        assert relative(some.scores[:, :, 0], weights[:, :, :2].mean(2)) <= 1e-12


def hand_made(
    *,
    norm_after: Norm | None = None,
    parallel: bool = False,
    feed_forward: bool = True,
    cross: bool = False,
) -> tuple[Block, Trace]:
    """Two tokens, two dimensions, a head for each: every number can be checked on paper.

    Values are the inputs, W_O doubles, the second token attends 1/4 and 3/4. The feed-forward
    block is ReLU with W_in = [[1, 0, 1], [0, 1, -1]], b_in = (0, 0, -1), W_out = rows (1, 0),
    (0, 1), (2, 2), b_out = (10, 20). Cross-attention reads (1, 0), (0, 1) and (2, 2) of an
    encoder, the second token 1/2, 1/4 and 1/4 of them.
    """
    eye = torch.eye(2, dtype=torch.float64)
    attention_weights = {"W_O": 2 * eye[:, None], "b_O": torch.tensor([0.5, 0.5]).double()}
    ff_weights = {
        "W_in": torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]]).double(),
        "b_in": torch.tensor([0.0, 0.0, -1.0]).double(),
        "W_out": torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]).double(),
        "b_out": torch.tensor([10.0, 20.0]).double(),
    }
    relu = next(activation for activation in ACTIVATIONS if activation.name == "relu")
    attention = AttentionSublayer(
        stack="decoder",
        kind="self",
        pattern="pattern",
        value="v",
        mixed="z",
        key="k",
        weights=attention_weights.get,
        norm_after=norm_after,
    )
    ff = FeedForward(
        pre="pre",
        post="post",
        pre_linear=None,
        weights=ff_weights.get,
        activation=relu,
        norm_after=norm_after,
    )
    x = torch.tensor([[[4.0, 0.0], [0.0, 8.0]]]).double()
    values = {
        "x": x,
        "v": x[..., None],
        "pattern": torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]] * 2]).double(),
        "cross_v": torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]]).double()[..., None],
        "cross_pattern": torch.tensor([[[[0.0, 1.0, 0.0], [0.5, 0.25, 0.25]]] * 2]).double(),
    }
    sides = [
        Side(torch.zeros(1, n, dtype=torch.long), torch.ones(1, n, dtype=torch.bool))
        for n in ((3, 2) if cross else (2,))
    ]
    other = replace(attention, kind="cross", pattern="cross_pattern", value="cross_v")
    attentions = (attention, other) if cross else (attention,)
    block = Block(0, "x", "out", attentions, ff if feed_forward else None, parallel=parallel)
    batch = Batch(sides[0], sides[1] if cross else None)
    return block, Trace(batch, values, torch.float64)


def row(
    block: Block, trace: Trace, point: Point, stack: StackName = "decoder"
) -> tuple[list, list]:
    parts = parts_at(block, linear_points(block, trace, stack), point, "contributor")
    dense = (
        parts.parts(2**30)
        if isinstance(parts, FeedForwardParts)
        else parts.dense(slice(0, 2)).transpose(1, 2)
    )
    return dense[0, 1].tolist(), parts.bias[0, 1].tolist()


def test_two_tokens_by_hand() -> None:
    block, trace = hand_made()
    # Second token: 2 * (1/4 * (4, 0)) from the first, 2 * (3/4 * (0, 8)) from itself.
    assert row(block, trace, "attn_out") == ([[2, 0], [0, 12]], [0.5, 0.5])
    # With its own residual (0, 8).
    assert row(block, trace, "resid_mid") == ([[2, 0], [0, 20]], [0.5, 0.5])
    # Pre-activations (2.5, 20.5, -19): the third unit is off, the others have slope 1.
    assert row(block, trace, "mlp_out") == ([[2, 0], [0, 20]], [10.5, 20.5])
    assert row(block, trace, "resid_post") == ([[4, 0], [0, 40]], [11, 21])
    assert row(block, trace, "block_out") == row(block, trace, "resid_post")


def test_two_tokens_by_hand_after_layer_norm() -> None:
    """Post-LN, gain (1, 2), bias (3, 0): a two-dimensional LayerNorm leaves half the difference."""
    gain, shift = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 0.0]).double()
    block, trace = hand_made(norm_after=Norm("ln", gain, shift, 0.0))
    # Sum (2.5, 20.5): centred (-9, 9), scale 9. Parts (2, 0) -> (1, -1)/9, (0, 20) -> (-10, 10)/9.
    parts, bias = row(block, trace, "mlp_in")
    torch.testing.assert_close(
        torch.tensor(parts), torch.tensor([[1 / 9, -2 / 9], [-10 / 9, 20 / 9]])
    )
    assert bias == [3.0, 0.0]


def test_two_tokens_by_hand_parallel() -> None:
    """The feed-forward block reads x = (0, 8) alone: units (0, 8, -9), output (0, 8)."""
    block, trace = hand_made(parallel=True)
    assert row(block, trace, "mlp_out") == ([[0, 0], [0, 8]], [10, 20])
    assert row(block, trace, "resid_post") == ([[2, 0], [0, 28]], [10.5, 20.5])


def test_two_tokens_by_hand_that_read_an_encoder() -> None:
    """The decoder's own attention, its cross-attention, and both behind it."""
    block, trace = hand_made(cross=True)
    assert row(block, trace, "attn_out") == ([[2, 0], [0, 12]], [0.5, 0.5])
    assert row(block, trace, "resid_mid") == ([[2, 0], [0, 20]], [0.5, 0.5])
    read = [[1, 0], [0, 0.5], [1, 1]]
    assert row(block, trace, "attn_out", "cross") == (read, [0.5, 0.5])
    assert row(block, trace, "resid_mid", "cross") == ([[2, 0], [0, 20], *read], [1, 1])
    early = linear_points(block, trace, "cross", ("attn_out",))
    assert early["attn_out"].terms[0].pattern.shape[-1] == 3
    # Pre-activations (5, 22.5, -18.5): the third unit is off here too.
    parts = [[4, 0], [0, 40], [2, 0], [0, 1], [2, 2]]
    for stack in ("decoder", "cross"):
        assert row(block, trace, "resid_post", stack) == (parts, [12, 22])


def test_points_are_named_in_the_order_data_flows() -> None:
    assert POINTS == ("attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post", "block_out")


def test_two_tokens_by_hand_without_feed_forward() -> None:
    """Gain 2 after attention: the block's output is the normed stream, and nothing is behind it."""
    gain = torch.tensor([2.0, 2.0]).double()
    block, trace = hand_made(norm_after=Norm("rms", gain, None, 0.0), feed_forward=False)
    parts, bias = row(block, trace, "resid_post")
    scale = math.sqrt((2.5**2 + 20.5**2) / 2) / 2
    torch.testing.assert_close(torch.tensor(parts), torch.tensor([[2, 0], [0, 20]]) / scale)
    torch.testing.assert_close(torch.tensor(bias), torch.tensor([0.5, 0.5]) / scale)
    assert row(block, trace, "block_out") == (parts, bias)
    assert row(block, trace, "resid_mid") == ([[2, 0], [0, 20]], [0.5, 0.5])
    for point in ("mlp_in", "mlp_out"):
        with pytest.raises(cm.InvalidInput, match=f"there is no {point} in layer 0"):
            row(block, trace, point)


def test_no_norm_is_applied_that_nobody_asks_for() -> None:
    block, trace = hand_made(norm_after=Norm("ln", None, None, 0.0))
    early = linear_points(block, trace, "decoder", ("resid_mid", "attn_out"))
    assert set(early) == {"attn_out", "resid_mid"}
    enough: list[tuple[Point, ...]] = [(), ("attn_out",)]
    for asked in enough:
        assert set(linear_points(block, trace, "decoder", asked)) == set(early)
    further: list[tuple[Point, ...]] = [("mlp_in",), ("attn_out", "block_out"), POINTS]
    for asked in further:
        every = linear_points(block, trace, "decoder", asked)
        assert set(every) == {"attn_out", "resid_mid", "mlp_in", "stream", "residual"}


@pytest.mark.parametrize("norm", [None, Norm("rms", None, None, 0.0)], ids=["pre", "post"])
@pytest.mark.parametrize("asked", [POINTS, POINTS[3:5], ("block_out",), ("attn_out",)], ids=str)
def test_norms_of_several_points_by_hand(norm: Norm | None, asked: tuple[Point, ...]) -> None:
    block, trace = hand_made(norm_after=norm)
    points = linear_points(block, trace, "decoder")
    found = norms_at(parts_at_all(block, points, asked, "contributor"), 2**30)
    assert set(found) == set(asked)
    for point in asked:
        expected = torch.tensor(row(block, trace, point)[0]).double().norm(dim=-1)
        torch.testing.assert_close(found[point][0, 1], expected, rtol=1e-6, atol=1e-6)


def test_padding_on_either_side_is_masked() -> None:
    model, given = shared(case_of("bart"))
    mask = torch.ones_like(given.tokens)
    mask[1, -2:] = 0
    for real in (mask, torch.ones_like(mask)):
        asked = Given(given.tokens, attention_mask=real, decoder_input=given.decoder_tokens)
        places: list[tuple[StackName, Point]] = [("encoder", "block_out"), ("cross", "attn_out")]
        for stack, point in places:
            done = run_pass(view_of(model), asked, layer=0, stack=stack)
            assert bool(done.source(point).mask.all()) == (real is not mask)
            # Padding among the sources, among the targets, and in both.
            other = {"encoder": done.tokens["decoder"], "decoder": done.tokens["encoder"]}
            for labels in (done.tokens, other):
                _zero_at_padding(replace(done, tokens=labels), point)


def _zero_at_padding(done: Pass, point: Point) -> None:
    kept = done.target.mask[:, :, None] & done.source(point).mask[:, None]
    for heads in (1, 3):
        shape = (2, len(done.blocks), heads, *kept.shape[1:])
        scores = (f"batch layer head target source:{point}", torch.full(shape, 7.0))
        found = done.together(lambda part, scores=scores: {"map": scores})
        assert torch.equal(found["map"], 7.0 * kept[:, None, None].expand(shape))
