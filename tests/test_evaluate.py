"""Evaluation of maps: by hand, against brute force, and with the grammar's known answers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from test_value_zeroing import case_of

import tl_contextmix as cm
from tl_contextmix.core.statistics import spearman
from tl_contextmix.demo_models.grammar import Grammar
from tl_contextmix.evaluation import agreement, cue_alignment
from tl_contextmix.results import ContextMap, Score

TEXT = "the keys to the cabinet"


@pytest.fixture(scope="module")
def fmap(causal: Any) -> ContextMap:
    return cm.attention_norms(causal, TEXT).normalize()


def rows(score: Score, metric: str) -> list[Any]:
    return [row for row in score.rows if row.metric == metric]


def test_cue_alignment_by_hand(fmap: ContextMap) -> None:
    scores = torch.zeros_like(fmap.scores)
    scores[..., 0] = 1.0
    # The last row: half on the second token, a quarter on the third and the first.
    scores[0, :, 0, -1, :] = torch.tensor([0.25, 0.5, 0.25, 0, 0, 0])
    made = replace(fmap, scores=scores, bias=None)
    found = cue_alignment(made, [[2]])
    dot, precision = rows(found, "dot")[0], rows(found, "average precision")[0]
    assert dot.value == pytest.approx(0.25)
    assert dot.chance == pytest.approx(1 / 6)
    # Second or third of the ranking, with equal chance.
    assert precision.value == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert precision.chance == pytest.approx(sum(1 / k for k in range(1, 7)) / 6)
    assert math.isnan(dot.low)
    assert math.isnan(dot.high)
    several = rows(cue_alignment(made, [[1, 2]]), "dot")[0]
    assert several.value == pytest.approx(0.75)
    assert several.chance == pytest.approx(2 / 6)


def test_only_what_a_target_can_read_counts(fmap: ContextMap) -> None:
    found = rows(cue_alignment(fmap, [[1]], pos=2), "dot")[0]
    assert found.chance == pytest.approx(1 / 3)
    with pytest.raises(cm.InvalidInput, match=r"position 4.*one of \[0, 1, 2\]"):
        cue_alignment(fmap, [[4]], pos=2)


def test_value_zeroing_finds_the_cue_where_the_lure_tempts(causal: Any) -> None:
    """The model card's causal check says that the model uses the cue: a good map must find it."""
    cases = []
    for sentence in Grammar(5, "test").sentences(1500):
        for site in sentence.sites:
            if site.kind == "agreement" and site.subtype == "pp1" and site.lures:
                cases.append((" ".join(sentence.words[: site.target]), site.cues[0] + 1))
    cases = cases[:25]
    maps = [cm.value_zeroing(causal, text).normalize() for text, _ in cases]
    found = cue_alignment(maps, [[cue] for _, cue in cases])
    best = max(rows(found, "dot"), key=lambda row: row.value)
    assert best.sentences == 25
    # Measured 0.97 in layer 2; attention norms of the whole block stay below 0.3.
    assert best.low > 0.8
    assert best.low > best.chance
    norms = [cm.attention_norms(causal, text).normalize() for text, _ in cases]
    others = rows(cue_alignment(norms, [[cue] for _, cue in cases]), "dot")
    assert max(row.value for row in others) < best.low


def test_a_batch_equals_single_sentences(causal: Any) -> None:
    texts, cues = ["the dogs near the cat", "the author that the senators admire"], [[2], [2]]
    together = cm.attention_norms(causal, texts).normalize()
    single = [cm.attention_norms(causal, text).normalize() for text in texts]
    for a, b in zip(
        cue_alignment(together, cues).rows, cue_alignment(single, cues).rows, strict=True
    ):
        assert a.value == pytest.approx(b.value, rel=1e-5)
        assert a.chance == pytest.approx(b.chance)


def test_chance_is_that_of_what_a_target_can_read_however_the_map_was_cut(
    causal: Any, fmap: ContextMap
) -> None:
    whole = cue_alignment(fmap, [[1]], pos=3).rows
    assert rows(cue_alignment(fmap, [[1]], pos=3), "dot")[0].chance == pytest.approx(1 / 4)
    one = cue_alignment(fmap.select(target=3), [[1]]).rows
    zeroed = cue_alignment(cm.value_zeroing(causal, TEXT, pos=3).normalize(), [[1]]).rows
    gradient = cue_alignment(cm.gradient_x_input(causal, TEXT, pos=3).normalize(), [[1]]).rows
    for found in (one, zeroed, gradient):
        for a, b in zip(found, whole, strict=False):
            assert a.chance == pytest.approx(b.chance)
    for a, b in zip(one, whole, strict=True):
        assert a.value == pytest.approx(b.value)


def test_agreement_with_itself_and_with_its_reverse(fmap: ContextMap) -> None:
    assert {round(row.value, 9) for row in agreement(fmap, fmap).rows} == {1.0}
    # Every row's order turned around among what can be read.
    top = fmap.scores.max() + 1
    turned = torch.tril(top - fmap.scores)
    found = agreement(fmap, replace(fmap, scores=turned, bias=None))
    assert {round(row.value, 9) for row in found.rows} == {-1.0}


def test_faithfulness_against_a_literal_loop(causal: Any, fmap: ContextMap) -> None:
    ids = fmap.target.ids
    with torch.no_grad():
        answer = int(causal(ids)[0, -1].argmax())
        real = float(causal(ids)[0, -1].log_softmax(-1)[answer])

    def drop(blanked: list[int]) -> float:
        changed = ids.clone()
        changed[0, blanked] = 7
        return real - float(causal(changed)[0, -1].log_softmax(-1)[answer])

    with torch.no_grad():
        others = list(range(ids.shape[1] - 1))
        single = torch.tensor([drop([j]) for j in others])
        row = fmap.scores[0, 1, 0, -1]
        ranked = sorted(others, key=lambda j: -float(row[j]))
        top = [ranked[:k] for k in range(1, len(ranked))]
        comprehensive = sum(drop(s) for s in top) / len(top)
        sufficient = sum(drop([j for j in others if j not in s]) for s in top) / len(top)
    found = cm.faithfulness(causal, TEXT, fmap, blank=7)
    values = {row.metric: row.value for row in found.rows if row.layer == "1"}
    assert values["comprehensiveness"] == pytest.approx(comprehensive, abs=1e-4)
    assert values["sufficiency"] == pytest.approx(sufficient, abs=1e-4)
    assert values["blank-out"] == pytest.approx(float(spearman(row[others], single)), abs=1e-5)


def test_ties_and_rows_of_no_numbers_are_no_information(causal: Any, fmap: ContextMap) -> None:
    flat = replace(fmap, scores=torch.ones_like(fmap.scores).tril(), bias=None)
    for row in cm.faithfulness(causal, TEXT, flat).rows:
        if row.metric == "blank-out":
            assert math.isnan(row.value)
        else:
            # Tied tokens are ranked in random orders; in that of storage it is 1.3 nats off.
            assert row.value == pytest.approx(row.chance, abs=0.3)
    scores = fmap.normalize().scores.clone()
    scores[..., 1] = torch.nan
    nothing = replace(fmap, scores=scores, bias=None)
    for row in (*cm.faithfulness(causal, TEXT, nothing).rows, *cue_alignment(nothing, [[2]]).rows):
        assert math.isnan(row.value)
        assert row.sentences == 0


def test_the_target_s_row_is_found_by_its_position(causal: Any, fmap: ContextMap) -> None:
    whole = cm.faithfulness(causal, TEXT, fmap, pos=-2)
    for part in (fmap.select(target=-2), fmap.select(target=[-2, -1])):
        assert cm.faithfulness(causal, TEXT, part, pos=-2).equals(whole)
    early = cm.gradient_x_input(causal, TEXT, pos=3)
    with pytest.raises(cm.InvalidInput, match=r"no row for the target: got .*\[3\].*position 5"):
        cm.faithfulness(causal, TEXT, early)
    assert all(math.isfinite(row.value) for row in cm.faithfulness(causal, TEXT, early, pos=3).rows)
    heads = cm.value_zeroing(causal, TEXT, heads=True)
    with pytest.raises(cm.InvalidInput, match="4 heads"):
        cm.faithfulness(causal, TEXT, heads)


def test_the_blank_itself_is_not_ranked(causal: Any, fmap: ContextMap) -> None:
    first = int(fmap.target.ids[0, 0])
    scores = fmap.scores.clone()
    scores[..., 0] = 9.0  # the beginning-of-sequence token, with which nothing can be done
    lifted = replace(fmap, scores=scores, bias=None)
    found = cm.faithfulness(causal, TEXT, lifted, blank=first)
    assert found.equals(cm.faithfulness(causal, TEXT, fmap, blank=first))


def test_masked_models_are_asked_at_their_mask() -> None:
    masked = cm.load_demo("masked-lm")
    text = "the keys to the cabinet [MASK] old ."
    fmap = cm.attention(masked, text, heads=False)
    assert cm.faithfulness(masked, text, fmap).equals(cm.faithfulness(masked, text, fmap, pos=6))
    with pytest.raises(
        cm.InvalidInput, match=r"0 masks in sentence 0; expected one mask in every sentence"
    ):
        cm.faithfulness(masked, "the keys", cm.attention(masked, "the keys", heads=False))


def test_gradients_under_inference_mode(causal: Any) -> None:
    plain = cm.gradient_x_input(causal, TEXT)
    with torch.inference_mode():
        ids = plain.source.ids + 0
        assert torch.equal(cm.gradient_x_input(causal, TEXT).scores, plain.scores)
        assert torch.equal(cm.gradient_x_input(causal, ids).scores, plain.scores)


def test_scores_show_save_and_add(fmap: ContextMap, tmp_path: Any) -> None:
    found = cue_alignment(fmap, [[2]], method="mine")
    both = found + agreement(fmap, fmap)
    assert len(both.rows) == 16
    assert set(both.to_dataframe().columns) >= {"method", "layer", "value", "low", "chance"}
    assert Score.load(both.save(tmp_path / "score")).equals(both)
    assert "mine" in both.show()._repr_html_()
    assert "mine" in repr(both)


def test_bad_input(causal: Any, fmap: ContextMap) -> None:
    raw = cm.attention_norms(causal, TEXT)
    heads = cm.attention_norms(causal, TEXT, at="attn_out", heads=True)
    for call, message in (
        (lambda: cue_alignment(raw, [[1]]), r"rows that sum to 1.*map\.normalize\(\)"),
        (lambda: cue_alignment(fmap, []), r"got \[\] for 1 sentences.*at least one cue"),
        (
            lambda: cue_alignment(fmap, [[]]),
            r"at least one cue, positions or texts",
        ),
        (lambda: cue_alignment(fmap, [[9]]), r"position 9.*one of"),
        (lambda: cue_alignment(fmap, [[1]], pos=9), r"9 in sentence 0; expected one of"),
        (lambda: agreement(fmap, fmap.select(layer=1)), r"different tokens or layers"),
        (lambda: cue_alignment(heads, [[1]]), r"4 heads"),
        (lambda: cm.faithfulness(causal, "the dogs near", fmap), r"of a different input"),
        (lambda: cm.faithfulness(causal, TEXT, fmap, target=[10**6]), r"no target: got 1000000"),
        (
            lambda: cm.faithfulness(causal, TEXT, fmap, target=[-1]),
            r"no target: got -1; expected a text, a token id",
        ),
        (lambda: cm.faithfulness(causal, TEXT, fmap, target=[1, 2]), r"or a list of 1"),
        (
            lambda: cm.faithfulness(causal, TEXT, fmap, pos=9),
            r"no such position: got 9",
        ),
        (lambda: agreement([fmap], [fmap, fmap]), r"got 1 and 2 sentences"),
        (lambda: cue_alignment(fmap, [[True]]), r"this cues: got \[\[True\]\]"),
    ):
        with pytest.raises(cm.InvalidInput, match=message):
            call()


def test_without_a_tokenizer_nothing_can_be_blanked() -> None:
    model = zoo.build(case_of("gpt2"), dtype=torch.float32, tokenizer=False)
    map = cm.attention_norms(model, torch.tensor([[5, 9, 17]])).normalize()
    with pytest.raises(cm.InvalidInput, match="Pass blank=<token id>"):
        cm.faithfulness(model, torch.tensor([[5, 9, 17]]), map)
    assert cm.faithfulness(model, torch.tensor([[5, 9, 17]]), map, blank=3).rows


def test_nothing_known_is_nan() -> None:
    assert math.isnan(float(spearman(torch.ones(3), torch.rand(3))))
