"""Contributions to a direction add up to the model's own activation, at every point and split."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import zoo
from asked import bound, case_of, host_trace, host_value, keywords, relative, shared, view_of
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.plotting.panels import Curves, Table
from tl_contextmix.results import LogProbContributions

TEXT = "the keys to the cabinet"
AT: tuple[Any, ...] = ("resid_pre", "attn_in", "resid_mid", "mlp_in", "resid_post", "block_out")
SPLITS: tuple[Any, ...] = ("head", "position", "head_position", "ff_neuron", "attn_neuron")
POS = -2


def vector(model: Any) -> Tensor:
    """A random direction, the same for every model of a width."""
    width = view_of(model).blocks()[0].attentions[0].W_O.shape[2]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(width, generator=generator, dtype=torch.float64)


def toward(model: Any, given: zoo.Inputs, target: cm.Direction, **options: Any) -> Any:
    """Contributions to a direction at the last position but one."""
    options = {"pos": POS, **keywords(given), **options}
    return cm.log_prob_contributions(model, given.tokens, target=target, **options)


def own(model: Any, given: zoo.Inputs, layer: int, at: str) -> Tensor:
    """The host's own activation [batch pos d_model] at a point, without the engine."""
    trace, blocks = host_trace(view_of(model), given, None)
    block = blocks[layer]
    if at == "resid_pre":
        return trace.resid_in(block)
    if at == "attn_in":
        norm, x = block.attentions[0].norm_in, trace.resid_in(block)
        return x if norm is None else norm(x)
    if at == "block_out":
        return trace[block.resid_out]
    if at == "resid_post" and block.feed_forward is None:
        return host_value(block, trace, "resid_mid", "self")
    return host_value(block, trace, at, "self")


@pytest.mark.parametrize("case", zoo.cases(), ids=str)
def test_everything_adds_up_to_the_model_s_own_activation(case: zoo.Case) -> None:
    model, given = shared(case)
    ff = view_of(model).blocks()[0].feed_forward
    target = cm.Direction(vector(model), layer=-1, at="block_out")
    layers = toward(model, given, target)
    for at in AT:
        if ff is None and at == "mlp_in":
            continue
        expected = own(model, given, -1, at)[:, POS] @ vector(model)
        found = toward(model, given, cm.Direction(vector(model), layer=-1, at=at))
        assert relative(found.log_prob, expected) <= bound(case), at
        total = found.scores.nansum(dim=1) + found.trajectory[:, 0]
        assert relative(total, expected) <= bound(case), at
    for by in SPLITS:
        if by == "ff_neuron" and ff is None:
            continue
        found = toward(model, given, target, by=by)
        assert torch.equal(found.trajectory, layers.trajectory)
        gaps = found.gaps[~found.gaps.isnan()]
        assert gaps.numel()
        assert float(gaps.abs().max()) <= 1e-10 * float(found.scores.nan_to_num().abs().max())


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_a_key_gives_the_neuron_s_own_pre_activation(case: zoo.Case) -> None:
    model, given = shared(case)
    trace, blocks = host_trace(view_of(model), given, None)
    ff = blocks[1].feed_forward
    _, bias = ff.branches()[0]
    expected = trace[ff.pre][:, POS, 3] - (0 if bias is None else bias[3])
    found = toward(model, given, cm.Direction(layer=1, neuron=3))
    assert relative(found.log_prob, expected) <= bound(case)
    assert found.asked() == "the key of L1N3"
    # The first layer's last stream is the second's first, in post-LN models past the norm.
    before = toward(model, given, cm.Direction(vector(model), layer=1, at="resid_pre"))
    after = toward(model, given, cm.Direction(vector(model), layer=0, at="block_out"))
    assert relative(before.scores, after.scores) <= 1e-12
    assert before.steps == after.steps


@pytest.mark.parametrize("family", ["gpt2", "bert", "gemma2"])
def test_heads_and_neurons_by_hand(family: str) -> None:
    """What a head reads, through its W_O and the norms that follow, frozen, times the direction."""
    model, given = shared(case_of(family))
    trace, blocks = host_trace(view_of(model), given, None)
    block, along = blocks[0], vector(model)
    attention, ff = block.attentions[0], block.feed_forward
    stream = own(model, given, 0, "mlp_in")[:, POS] if ff.norm_in is None else None
    written = torch.einsum("bhd,hdm->bhm", trace[attention.mixed][:, POS], attention.W_O)
    neurons = ff.coefficients(trace)[:, POS, :, None] * ff.W_out
    whole = host_value(block, trace, "attn_out", "self")[:, POS, None]
    if attention.norm_out is not None:
        raw = written.sum(1, keepdim=True) + (0 if attention.b_O is None else attention.b_O)
        written = attention.norm_out.linear(written) / attention.norm_out.scale(raw)
        out = neurons.sum(1, keepdim=True) + ff.constant()
        neurons = ff.norm_out.linear(neurons) / ff.norm_out.scale(out)
    if attention.norm_after is not None:
        mid = trace.resid_in(block)[:, POS, None] + whole
        written = attention.norm_after.linear(written) / attention.norm_after.scale(mid)
        assert stream is not None
        assert relative(attention.norm_after(mid)[:, 0], stream) <= 1e-12
    target = cm.Direction(along, layer=0, at="resid_post")
    for by, expected in (("head", written @ along), ("ff_neuron", neurons @ along)):
        found = toward(model, given, target, by=by)
        bias = found.components.is_bias()[0]
        assert relative(found.scores[:, ~bias], expected) <= 1e-10


def test_best_neurons_rules_positions_and_padding() -> None:
    model, given = shared(case_of("gpt2"))
    target = cm.Direction(vector(model), layer=2, at="mlp_in", name="odd")
    for by in ("ff_neuron", "attn_neuron"):
        few = toward(model, given, target, by=by, k=4)
        every = toward(model, given, target, by=by).top(4)
        assert torch.equal(few.components.numbers(), every.components.numbers())
        assert relative(few.scores, every.scores) <= 1e-10
        assert bool((few.evaluated < few.possible).all())
    # Under each rule the last state's value is the model's, less the norm's bias under "frozen".
    expected = own(model, given, 2, "mlp_in")[:, POS] @ vector(model)
    ff = view_of(model).blocks()[2].feed_forward
    for norm in ("frozen", "frozen+beta", "recompute"):
        found = toward(model, given, target, norm=norm)
        constant = ff.norm_in.bias @ vector(model) if norm == "frozen" else 0
        assert relative(found.trajectory[:, -1] + constant, expected) <= 1e-10
    along = toward(model, given, target, pos="all", by="position")
    values = own(model, given, 2, "mlp_in") @ vector(model)
    assert relative(along.log_prob, values.flatten()) <= 1e-10
    assert relative(along.summed().log_prob, values.sum(dim=1)) <= 1e-10
    assert along.summed().asked() == "'odd' at L2 mlp_in"
    tight = toward(model, given, target, pos="all", by="position", max_bytes=5_000)
    # Smaller tiles are other products to BLAS, whose last bits depend on their shapes.
    assert relative(tight.scores.nan_to_num(), along.scores.nan_to_num()) <= 1e-14
    assert torch.equal(tight.scores.isnan(), along.scores.isnan())
    mask = torch.ones_like(given.tokens)
    mask[1, 4:] = 0
    padded = toward(model, given, target, attention_mask=mask, by="position")
    alone = cm.log_prob_contributions(
        model, given.tokens[1:, :4], target=target, pos=POS, by="position"
    )
    found = padded.scores[1][~padded.scores[1].isnan()]
    assert relative(found, alone.scores[~alone.scores.isnan()]) <= 1e-10


def test_models_without_logits_have_directions_and_later_layers_may_be_hooked() -> None:
    model, given = shared(case_of("gpt2"))
    target = cm.Direction(vector(model), layer=1, at="mlp_in")
    plain = toward(model, given, target)
    view = view_of(model)

    def add(stream: Tensor, hook: Any) -> Tensor:
        return stream + 0.5 * stream.flip(-1)

    def spoil(pattern: Tensor, hook: Any) -> Tensor:
        return pattern + torch.rand_like(pattern)

    # What is added before is a component; what happens in later layers matters to nobody.
    with model.hooks(
        fwd_hooks=[(view.blocks()[1].resid_in, add), (view.blocks()[2].feed_forward.pre, spoil)]
    ):
        found = toward(model, given, target)
        expected = own(model, given, 1, "mlp_in")[:, POS] @ vector(model)
    assert "L1 resid_pre steering" in found.steps
    assert relative(found.log_prob, expected) <= 1e-10
    assert relative(found.log_prob, plain.log_prob) > 1e-3
    with (
        model.hooks(fwd_hooks=[(view.blocks()[1].feed_forward.pre, spoil)]),
        pytest.raises(cm.UnsupportedModel, match="hook"),
    ):
        toward(model, given, target)
    silent = replace(view, readout=replace(view.readout, refusal="no logits"))
    with pytest.raises(cm.UnsupportedModel, match="no logits"):
        cm.log_prob_contributions(silent, given.tokens, target=9)
    assert torch.equal(toward(silent, given, target).scores, plain.scores)
    # Nor does it matter how many logits there are: a reward model has one.
    weights = view.readout.weights
    first = {"W_U": weights("W_U")[:, :1], "b_U": torch.zeros(1)}
    one = replace(view, readout=replace(view.readout, weights=first.get))
    assert torch.equal(toward(one, given, target).scores, plain.scores)
    with pytest.raises(cm.InvalidInput, match="no target: got 1; .*ids from 0 to 0"):
        cm.log_prob_contributions(one, given.tokens, target=1)
    _, cache = model.run_with_cache(given.tokens)
    kept = toward(model, given, target, cache=cache)
    assert relative(kept.scores, plain.scores) <= 1e-10


@pytest.mark.once
def test_results_of_directions_are_asked_about_shown_and_stored(tmp_path: Path) -> None:
    model = cm.load_demo("causal-lm")
    target = cm.Direction(layer=2, neuron=78)
    found = cm.log_prob_contributions(model, TEXT, target=target, by="ff_neuron", k=5)
    assert found.unit == "inner product"
    panels = found.panels()
    table = next(panel for panel in panels if isinstance(panel, Table))
    curve = next(panel for panel in panels if isinstance(panel, Curves))
    assert "for the key of L2N78" in table.caption
    assert curve.title == "Inner product with the key of L2N78 through the layers"
    assert curve.unit == "inner product"
    again = LogProbContributions.load(found.save(tmp_path / "found.safetensors"))
    assert again.asked() == found.asked()
    assert again.of_direction
    # Its components are asked about like any: what they say, what activates them, what they do.
    read = cm.component_readouts(model, TEXT, components=again)
    assert torch.equal(read.components.numbers(), found.components.numbers())
    chain = cm.query_contributions(model, TEXT, neurons=found)
    assert relative(chain.weights, found.scores) == 0
    out = cm.knockout(model, TEXT, neurons=found, controls=0)
    best = cm.knockout(model, TEXT, neurons=found, controls=0, target=int(out.target.ids[0, 0]))
    assert torch.equal(out.before, best.before)
    # Neurons named by hand are weighted by what they write along the direction.
    one = found.components.at(0, 0)
    listed = cm.query_contributions(
        model, TEXT, neurons=[(one["layer"], one["neuron"])], target=target
    )
    assert float(listed.weights) == pytest.approx(float(found.scores[0, 0]), rel=1e-5)
    with pytest.raises(cm.InvalidInput, match=r"write nothing along the direction: got L2N5"):
        cm.query_contributions(model, TEXT, neurons=[(2, 5)], target=target)


@pytest.mark.once
def test_vectors_of_any_kind_and_what_is_no_direction() -> None:
    model = cm.load_demo("causal-lm")
    numbers = vector(model).tolist()
    asked = [
        cm.log_prob_contributions(
            model,
            TEXT,
            target=cm.Direction(given, layer=np.int64(1)),  # type: ignore[arg-type]
        )
        for given in (numbers, np.array(numbers), torch.tensor(numbers, dtype=torch.float16))
    ]
    assert torch.equal(asked[0].scores, asked[1].scores)
    assert relative(asked[0].scores, asked[2].scores) <= 1e-2
    direction = cm.Direction(numbers, layer=1)
    half, mlp_out = cast("Any", (1.5, "mlp_out"))
    for make, match in (
        (lambda: cm.Direction(layer=1), "not clear which direction"),
        (lambda: cm.Direction(numbers, layer=1, neuron=2), "not clear which direction"),
        (lambda: cm.Direction(layer=1, neuron=2, at="resid_pre"), "a key at another point"),
        (lambda: cm.Direction(numbers, layer=1, at=mlp_out), "no such point.*'mlp_out'"),
        (lambda: cm.Direction([numbers], layer=1), "no direction.*one vector"),
        (lambda: cm.Direction([1, True], layer=1), "no direction"),
        (lambda: cm.Direction([float("nan")], layer=1), "no direction"),
        (lambda: cm.Direction("keys", layer=1), "no direction"),
        (lambda: cm.Direction(numbers, layer=half), "no layer: got 1.5"),
    ):
        with pytest.raises(cm.InvalidInput, match=match):
            make()
    wrong: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (cm.Direction(numbers, layer=9), {}, "no such layer.*9"),
        (cm.Direction(numbers[:5], layer=1), {}, "a vector of 5 numbers; expected 128"),
        (cm.Direction(layer=1, neuron=512), {}, "neuron 512; expected a number from 0 to 511"),
        (direction, {"foil": " is"}, "a direction has no foil"),
        (direction, {"score": "rank", "by": "ff_neuron"}, "score is one of tokens"),
        (direction, {"generate": 2}, "target of its own"),
        (cm.Direction(layer=0, neuron=1), {"by": "ff_neuron"}, "none before this point"),
        ([direction], {}, "direction.*log_prob_contributions"),
    )
    for target, options, match in wrong:
        with pytest.raises(cm.InvalidInput, match=match):
            cm.log_prob_contributions(model, TEXT, target=target, **options)
    for ask in (cm.gradient_x_input, partial(cm.knockout, heads=[(0, 1)])):
        with pytest.raises(cm.InvalidInput, match=r"direction is no target here.*log_prob_contrib"):
            ask(model, TEXT, target=direction)
