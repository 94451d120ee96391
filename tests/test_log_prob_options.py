"""Options of the contributions: scores, readouts, padding, caches, precision, targets."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from asked import case_of, keywords, relative, shared, view_of
from oracles_log_prob import log_probs
from test_log_prob import KEPT, POS, asked, layers_of, literal

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.adapters.questions import Answer, ask, single_token
from tl_contextmix.core.contrast import Contrast
from tl_contextmix.errors import ContextMixWarning

pytestmark = pytest.mark.once


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_the_scores_that_the_paper_compares(family: str) -> None:
    model, given = shared(case_of(family))
    view, row, rule = view_of(model), 1, "frozen+beta"
    parts = literal(model, given, row)
    whole, layers = parts.whole(), layers_of(parts)
    order, zero = list(layers), torch.zeros_like(parts.whole())
    names = ("log_prob", "prob_increase", "norm", "coefficient", "rank")
    names += ("coefficient_norm", "coefficient_rank")
    found = {
        name: asked(model, given, by="ff_neuron", score=name, norm=rule, target=11)
        for name in names
    }
    one = found["norm"]
    for place in range(0, one.scores.shape[1], 37):
        part = one.components.at(row, place)
        layer, neuron = part["layer"], part["neuron"]
        vector = parts.parts["mlp", layer, "n", neuron]
        base = sum((layers[key] for key in order[: order.index(("mlp", layer))]), zero)
        ff = view.blocks()[layer].feed_forward
        m = float(parts.trace[ff.post][row, parts.pos, neuron])
        norm = float(ff.W_out[neuron].norm())
        alone = log_probs(view, vector / m, whole, "frozen" if view.readout.head is None else rule)
        rank = 1 + int((alone > alone[11]).sum())
        after, before = (log_probs(view, x, whole, rule)[11].exp() for x in (base + vector, base))
        expected = {
            "log_prob": float(log_probs(view, vector, whole, rule)[11]),
            "prob_increase": float(after - before),
            "norm": norm,
            "coefficient": m,
            "rank": 1 / rank,
            "coefficient_norm": abs(m) * norm,
            "coefficient_rank": m / rank,
        }
        for name, value in expected.items():
            score = float(found[name].scores[row, place])
            assert score == pytest.approx(value, rel=1e-6, abs=1e-9), name
    # They are different orders: an option that changes nothing would not be seen above.
    orders = {tuple(result.top(20).labels(row)) for result in found.values()}
    assert len(orders) >= 6


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bart", "t5", "marian"])
def test_readouts_are_logits_that_add_up(family: str) -> None:
    case = case_of(family)
    model, given = shared(case)
    view = view_of(model)
    W_U = view.readout.weights("W_U")
    chosen = None
    for by in KEPT:
        every = asked(model, given, by=by)
        chosen = every.top(12)
        found = cm.component_readouts(
            model, given.tokens, components=chosen, k=W_U.shape[1], **keywords(given)
        )
        for row in range(2):
            ids, logits = found.top_ids[row], found.top_logits[row]
            at = (ids == chosen.target.ids[row]).nonzero()[:, 1]
            torch.testing.assert_close(logits.gather(1, at[:, None])[:, 0], chosen.logits[row])
            torch.testing.assert_close(found.bottom_logits[row], logits.flip(1))
        # All components and the constants are the model's logit (before a cap).
        if by == "layer":
            total = every.logits.sum(dim=1)
            frozen = asked(model, given, norm="frozen", target=9)
            other = asked(model, given, norm="frozen", target=13)
            difference = frozen.logits.sum(dim=1) - other.logits.sum(dim=1)
            if view.readout.soft_cap is None:
                log_ratio = frozen.trajectory[:, -1] - other.trajectory[:, -1]
                torch.testing.assert_close(difference, log_ratio)
            assert total.isfinite().all()
    assert chosen is not None
    with pytest.raises(cm.InvalidInput, match="belong to another input"):
        cm.component_readouts(
            model, given.tokens[:1], components=chosen, **keywords(zoo.inputs(case, batch=1))
        )


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_padding_changes_nothing_and_padded_sources_have_no_score(family: str) -> None:
    model, given = shared(case_of(family))
    mask = torch.ones_like(given.tokens)
    mask[0, 4:] = 0
    for by in ("position", "head_position", "attn_neuron"):
        padded = cm.log_prob_contributions(
            model, given.tokens, by=by, attention_mask=mask, **keywords(given)
        )
        decoder = {k: v[:1] for k, v in keywords(given).items()}
        alone = cm.log_prob_contributions(model, given.tokens[:1, :4], by=by, **decoder)
        frame = padded.to_dataframe()
        mine = frame[frame.batch == 0].reset_index(drop=True)
        expected = alone.to_dataframe()
        assert len(mine) == len(expected) < len(frame) / 2 + 1 or family == "bart"
        assert list(mine.kind) == list(expected.kind)
        assert list(mine.source) == list(expected.source)
        torch.testing.assert_close(
            torch.tensor(mine.score.to_numpy()), torch.tensor(expected.score.to_numpy())
        )
    best = cm.log_prob_contributions(
        model,
        given.tokens,
        by="attn_neuron",
        attention_mask=mask,
        k=5,
        **keywords(given),
    )
    assert best.labels(0) == padded.top(5).labels(0)
    # Empty places, of the sentence with fewer components, are no rows of a table.
    read = cm.component_readouts(
        model, given.tokens, components=best, attention_mask=mask, k=3, **keywords(given)
    )
    scores = read.scores.clone()
    scores[1, 2:] = torch.nan
    table = replace(read, scores=scores).top(4).to_dataframe()
    expected = read.to_dataframe().merge(table[["batch", "score"]].drop_duplicates())
    assert table.groupby("batch").size().tolist() == [4 * 2 * 3, 2 * 2 * 3]
    assert sorted(table.token) == sorted(expected.token)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_a_cache_instead_of_a_pass(family: str) -> None:
    model, given = shared(case_of(family))
    _, cache = model.run_with_cache(given.tokens, **keywords(given))
    for by in ("layer", "ff_neuron"):
        fresh, found = asked(model, given, by=by), asked(model, given, by=by, cache=cache)
        torch.testing.assert_close(found.scores, fresh.scores)
        torch.testing.assert_close(found.log_prob, fresh.log_prob)
    neurons = fresh.top(3)
    fresh, found = (
        cm.query_contributions(
            model, given.tokens, neurons=neurons, pos=POS, cache=c, **keywords(given)
        )
        for c in (None, cache)
    )
    torch.testing.assert_close(found.scores, fresh.scores, equal_nan=True)


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_half_precision_models_come_close(family: str) -> None:
    case = case_of(family)
    given = zoo.inputs(case)
    whole = asked(zoo.build(case, dtype=torch.float32), given, target=9)
    half = asked(zoo.build(case, dtype=torch.bfloat16), given, target=9)
    assert half.scores.dtype == torch.float32
    # Eight bits: 0.05 nats measured on log-probabilities of -10.
    assert relative(half.trajectory, whole.trajectory) <= 0.05
    assert float((half.trajectory[:, -1] - half.log_prob).abs().max()) <= 0.2


def test_targets_as_text() -> None:
    model = cm.load_demo("causal-lm")
    text = "the capital of france is"
    default = cm.log_prob_contributions(model, text)
    asked_for = cm.log_prob_contributions(model, text, target=" paris")
    assert default.target.strings == asked_for.target.strings == ((" paris",),)
    assert torch.equal(default.scores, asked_for.scores)
    ids = asked_for.target.ids[0].tolist()
    assert torch.equal(cm.log_prob_contributions(model, text, target=ids).scores, asked_for.scores)
    both = cm.log_prob_contributions(model, [text, text], target=[" paris", " rome"])
    assert float(both.log_prob[0]) > float(both.log_prob[1])
    with pytest.raises(cm.InvalidInput, match=r"' paris rome', which is 2: ' paris', ' rome'"):
        cm.log_prob_contributions(model, text, target={" paris rome"})


def test_a_leading_space_is_part_of_a_target() -> None:
    model = zoo.build(case_of("gpt2"))
    view = view_of(model)
    ids = {"cat": [9, 10], " cat": [11], "dog": [12], " dog": [13], "sun": [14], " sun": [15]}
    view = replace(view, pieces=lambda text: ids[text])
    with pytest.raises(
        cm.InvalidInput, match=r"not one token: got 'cat', which is 2.*' cat', with"
    ):
        single_token(view, "cat")
    assert single_token(view, " cat") == 11
    logits = torch.zeros(1, 61)
    logits[0, 13] = 5.0
    batch = make_batch(view, Given(torch.tensor([[1, 2]])))

    def contrast(target: str) -> Contrast:
        return ask(view, batch, Answer(target=target)).contrast(logits)

    with pytest.warns(ContextMixWarning, match=r"'dog', which the model finds 148 times less"):
        assert contrast("dog").target[0].tolist() == [12]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for target in (" dog", "sun"):
            contrast(target)


def test_a_mask_is_asked_for_in_masked_models() -> None:
    model = cm.load_demo("masked-lm")
    found = cm.log_prob_contributions(model, "the keys to the cabinet [MASK] old .", target="are")
    assert found.tokens.strings[0][int(found.pos[0])] == "[MASK]"
    assert abs(float(found.trajectory[0, -1] - found.log_prob[0])) <= 1e-5
    neurons = cm.log_prob_contributions(
        model, "the keys to the cabinet [MASK] old .", by="ff_neuron", k=3
    )
    assert "head is not linear" in neurons.note
    # The bound of a linear readout would be no bound here: all were evaluated.
    assert torch.equal(neurons.evaluated, neurons.possible)


@pytest.mark.skipif(zoo.major() == 2, reason="TransformerLens 2 has no encoder-decoder that works")
def test_cross_attention_is_a_component_of_its_own() -> None:
    model = cm.load_demo("encoder-decoder")
    found = cm.log_prob_contributions(model, "the bat burned .", by="position")
    frame = found.to_dataframe()
    assert {"attn", "cross_attn"} <= set(frame.kind)
    words = frame[(frame.kind == "cross_attn") & (frame.layer == 0)].source_token
    assert [word.strip() for word in words] == [w.strip() for w in found.encoder.strings[0]]
    assert len(found.panels()) >= 4


def test_gaps_are_what_the_components_miss() -> None:
    model, given = shared(case_of("gpt2"))
    layers = asked(model, given)
    for by in KEPT:
        found: Any = asked(model, given, by=by)
        for step, name in enumerate(found.steps[1:], start=1):
            kind, layer = ("mlp" if "mlp" in name else "attn"), name.split()[0][1:]
            mine = found.components.of_kind(kind) | found.components.of_kind(f"{kind} bias")
            gap = found.gaps[0, step]
            if by == "layer" or name == "embed" or (kind == "mlp") != (by == "ff_neuron"):
                assert gap.isnan()
                continue
            mine &= found.components.layer == int(layer)
            total = found.scores[0][mine[0]].nansum() + gap
            torch.testing.assert_close(total, layers.scores[0, step - 1])


@pytest.mark.parametrize(
    ("family", "left"), [("gpt2", False), ("gpt2", True), ("opt", False), ("bart", False)]
)
def test_the_best_of_sentences_of_different_length(family: str, left: bool) -> None:
    model, given = shared(case_of(family))
    mask = torch.ones_like(given.tokens)
    mask[0, slice(3) if left else slice(3, None)] = 0
    options = {"attention_mask": mask, "by": "attn_neuron", "pos": -1, **keywords(given)}
    whole = cm.log_prob_contributions(model, given.tokens, **options)
    positive = int((whole.scores[0] > 0).sum())
    for k in (positive + 20, 10**6):
        found = cm.log_prob_contributions(model, given.tokens, k=k, **options)
        best = whole.top(k)
        # As many as there are: the shorter sentence's last places are empty, not cut off others.
        counts = (~found.scores.isnan()).sum(dim=1)
        assert torch.equal(counts, found.possible.clamp(max=k))
        assert torch.equal(counts, best.scores.isfinite().sum(dim=1))
        for row in range(2):
            assert found.labels(row) == best.labels(row)
            assert all(found.labels(row)[: counts[row]])
            assert not any(found.labels(row)[counts[row] :])
        close(found.scores, best.scores)
        close(found.coefficients, best.coefficients)
        close(found.logits, best.logits)
    assert int(found.possible[0]) < int(found.possible[1])
    assert int(found.scores.isnan().sum()) == int(found.possible.diff())
    assert len(found.to_dataframe()) == int(found.possible.sum())
    readouts = cm.component_readouts(
        model, given.tokens, components=found, k=2, attention_mask=mask, **keywords(given)
    )
    assert len(readouts.to_dataframe()) == 4 * int(found.possible.sum())
    assert readouts.top_words[0][-1] == ("", "")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to rounding, NaN where NaN is expected."""
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9, equal_nan=True)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_what_comes_later_is_no_component(family: str) -> None:
    """As if the sentence ended there, whatever the score."""
    model, given = shared(case_of(family))
    for by, options in (
        ("position", {}),
        ("head_position", {}),
        ("attn_neuron", {}),
        ("attn_neuron", {"score": "norm"}),
        ("attn_neuron", {"score": "rank"}),
        ("attn_neuron", {"k": 10**6}),
    ):
        options = {"by": by, "target": 9, **options}
        found = cm.log_prob_contributions(model, given.tokens, pos=1, **options)
        alone = cm.log_prob_contributions(model, given.tokens[:, :2], **options)
        mine, expected = found.to_dataframe(), alone.to_dataframe()
        assert int(mine.source.max()) == 1
        names = ["kind", "layer", "head", "source", "neuron"]
        mine, expected = (frame.sort_values(["batch", *names]) for frame in (mine, expected))
        assert mine[names].to_numpy().tolist() == expected[names].to_numpy().tolist()
        close(torch.tensor(mine.score.to_numpy()), torch.tensor(expected.score.to_numpy()))
        assert torch.equal(found.possible, alone.possible)
        assert int(found.top(10**6).components.source.max()) == 1


def test_a_silent_neuron_gains_nothing() -> None:
    """Exactly, so that those of a ReLU stand in the same order whoever finds the best."""
    model, given = shared(case_of("opt"))
    whole = asked(model, given, by="ff_neuron")
    silent = whole.coefficients == 0
    assert int(silent.sum()) > 20
    assert bool((whole.scores[silent] == 0).all())
    k = int((whole.scores > 0).sum(dim=1).max()) + 10
    found = asked(model, given, by="ff_neuron", k=k)
    for row in range(2):
        assert found.labels(row) == whole.top(k).labels(row)
