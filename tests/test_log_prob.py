"""Log-probability contributions are what the paper's equations say, on every model and host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from asked import bound, case_of, keywords, relative, shared, view_of
from oracles_log_prob import Parts, log_probs
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.adapters.questions import Answer
from tl_contextmix.core.contrast import Contrast
from tl_contextmix.core.residual_stream import needed
from tl_contextmix.core.tiled_logits import read_vocabulary
from tl_contextmix.engine.log_prob_scores import run_question
from tl_contextmix.results import LogProbContributions

CASES = zoo.spread()
RULES = ("frozen", "frozen+beta", "recompute")
POS = -2


def asked(model: Any, given: zoo.Inputs, **options: Any) -> LogProbContributions:
    """The contributions at the last position but one."""
    options = {"pos": POS, **keywords(given), **options}
    return cm.log_prob_contributions(model, given.tokens, **options)


def literal(model: Any, given: zoo.Inputs, row: int) -> Parts:
    """The parts of the stream, from a pass of its own."""
    view = view_of(model)
    stack = view.base_stack(None)
    batch = make_batch(view, Given(given.tokens, decoder_input=given.decoder_tokens))
    blocks = view.stacks[stack]
    names = [name for block in blocks for name in (*block.points(), *needed(block))]
    trace = view.run(batch, names)
    length = batch.side(stack).ids.shape[1]
    return Parts(view, trace, stack, row, length + POS)


# Which places of a part's name are kept, by the way of cutting: kind, layer, -, head, source,
# dimension of an attention part; kind, layer, -, neuron of a feed-forward part.
KEPT = {"layer": (0, 1), "head": (0, 1, 3), "position": (0, 1, 4), "head_position": (0, 1, 3, 4)}
KEPT |= {"ff_neuron": (0, 1, 3), "attn_neuron": (0, 1, 3, 4, 5)}
COLUMNS = {
    "head": ("head",),
    "position": ("source",),
    "head_position": ("head", "source"),
    "ff_neuron": ("neuron",),
    "attn_neuron": ("head", "source", "neuron"),
}


def layers_of(parts: Parts) -> dict[tuple, Tensor]:
    """What each sublayer writes, biases included, in order."""
    found: dict[tuple, Tensor] = {}
    for key, part in parts.parts.items():
        found[key[:2]] = found.get(key[:2], 0) + part
    return found


def name_of(one: dict[str, Any], by: str) -> tuple:
    """The name of a component among the parts of the oracle."""
    if one["kind"] == "embed":
        return ("embed",)
    if one["kind"].endswith("bias"):
        return (one["kind"].removesuffix(" bias"), one["layer"], "bias")
    return (one["kind"], one["layer"], *(one[c] for c in COLUMNS.get(by, ())))


def is_read(view: Any, parts: Parts, one: dict[str, Any]) -> bool:
    """Whether a component reads something: what comes later is no source of a causal model."""
    if one["source"] is None or one["kind"] != "attn" or "decoder" not in view.stacks:
        return True
    if one["source"] <= parts.pos:
        return True
    pattern = parts.trace.pattern(view.blocks()[one["layer"]].attentions[0])
    assert not pattern[parts.row, :, parts.pos, one["source"]].any()
    return False


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_every_score_is_the_equation(case: zoo.Case) -> None:
    model, given = shared(case)
    view, row = view_of(model), 1
    parts = literal(model, given, row)
    whole, layers = parts.whole(), layers_of(parts)
    order = list(layers)
    for number, by in enumerate(KEPT):
        if by == "ff_neuron" and view.blocks()[0].feed_forward is None:
            with pytest.raises(cm.InvalidInput, match="no components by ff_neuron"):
                asked(model, given, by=by)
            continue
        rule = RULES[number % 3]
        found = asked(model, given, by=by, norm=rule)
        target = int(found.target.ids[row])
        vectors = layers if by == "layer" else parts.summed(KEPT[by])
        seen = 0
        for place in range(0, found.scores.shape[1], 1 + found.scores.shape[1] // 40):
            one = found.components.at(row, place)
            name = name_of(one, by)
            if not is_read(view, parts, one):
                assert bool(found.scores[row, place].isnan())
                continue
            base = sum((layers[key] for key in order[: order.index(name[:2])]), 0 * whole)
            after, before = (
                log_probs(view, state, whole, rule)[target]
                for state in (base + vectors[name], base)
            )
            # log p reaches -20 and more: 1e-12 of that, and float32 inside some hosts.
            expected = pytest.approx(float(after - before), abs=2e-9)
            assert float(found.scores[row, place]) == expected, one
            seen += 1
        assert seen >= 5 or by == "layer"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_telescope_to_the_model_s_own_log_probability(case: zoo.Case) -> None:
    model, given = shared(case)
    logits = zoo.logits(model, given)[:, POS]
    for rule in RULES:
        found = asked(model, given, norm=rule)
        steps = found.trajectory
        torch.testing.assert_close(found.scores, steps.diff(dim=1), atol=1e-10, rtol=0)
        assert found.steps[:2] == ("nothing", "embed")
        own = logits.log_softmax(-1).gather(1, found.target.ids)[:, 0]
        torch.testing.assert_close(found.log_prob, own)
        assert torch.equal(found.target.ids[:, 0], logits.argmax(-1))
        if rule != "frozen":
            torch.testing.assert_close(steps[:, -1], own, atol=max(1e-9, bound(case)), rtol=0)
    single = zoo.shared(case, dtype=torch.float32)
    found = asked(single, given, target=17)
    assert float((found.trajectory[:, -1] - found.log_prob).abs().max()) <= 1e-5


@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_the_best_neurons_are_those_of_full_evaluation(case: zoo.Case) -> None:
    model, given = shared(case)
    view = view_of(model)
    for by in ("ff_neuron", "attn_neuron"):
        if by == "ff_neuron" and view.blocks()[0].feed_forward is None:
            continue
        for rule in RULES:
            whole = asked(model, given, by=by, norm=rule)
            found = asked(model, given, by=by, norm=rule, k=5)
            best = whole.top(5)
            assert found.labels(0) == best.labels(0)
            assert found.labels(1) == best.labels(1)
            torch.testing.assert_close(found.scores, best.scores, atol=1e-11, rtol=0)
            torch.testing.assert_close(found.logits, best.logits, equal_nan=True)
            full = rule == "recompute" and view.readout.norm is not None
            full |= view.readout.head is not None
            full |= view.readout.soft_cap is not None
            assert bool(found.note) == full
            if not full:
                assert bool((found.evaluated < found.possible).all())
            else:
                assert found.evaluated.tolist() == whole.evaluated.tolist()
            assert torch.equal(found.possible, whole.evaluated)


@pytest.mark.once
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])  # with and without a soft cap
def test_small_gains_keep_their_digits_in_float32(family: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 32, generator=generator)
    vectors = 1e-4 * torch.randn(2, 20, 32, generator=generator)
    found = []
    for dtype in (torch.float32, torch.float64):
        model = zoo.build(case_of(family), dtype=dtype)
        x, ids = base.to(dtype), torch.tensor([7, 9])
        vocabulary = read_vocabulary(
            view_of(model).readout, "frozen+beta", x, Contrast(tuple(ids[:, None])), 2**30
        )
        found.append(vocabulary.gains(x, vectors.to(dtype)))
    assert 1e-5 < float(found[1].abs().max()) < 1e-3
    # A logarithm of a sum that is close to 1 keeps 1e-7 nats, a thousandth of these.
    assert relative(found[0].double(), found[1]) <= 1e-6


@pytest.mark.once
def test_increases_beyond_the_reach_of_exponentials() -> None:
    """Logits of thousands: what is left NaN at first is computed anew, with one look at all."""
    model, given = zoo.build(case_of("gpt2")), zoo.inputs(case_of("gpt2"))
    with torch.no_grad():
        view_of(model).readout.weights("W_U").mul_(3000)
    whole = asked(model, given, target=9)
    assert float(whole.scores.abs().max()) > 500
    assert relative(whole.scores, whole.trajectory.diff(dim=1)) <= 1e-12
    every, best = (asked(model, given, by="ff_neuron", k=k, target=9) for k in (None, 5))
    assert bool(every.scores.isfinite().all())
    assert relative(every.top(5).scores, best.scores) <= 1e-12
    answer = run_question(view_of(model), Given(given.tokens), Answer(pos=POS))
    prediction = answer.prediction("frozen+beta", 2**30)
    states, (first, *_) = prediction.stream.states, prediction.stream.components
    near = replace(prediction.vocabulary, reach="near")
    assert near.gains(states[:, 0], first.total[:, None]).isnan().all()
