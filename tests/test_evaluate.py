"""Evaluation of maps: by hand, against brute force, and with the grammar's known answers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import tl_contextmix as cm
from tl_contextmix.demo_models.grammar import Grammar
from tl_contextmix.evaluate import agreement, cue_alignment, faithfulness
from tl_contextmix.ranks import spearman

TEXT = "the keys to the cabinet"


@pytest.fixture(scope="module")
def model() -> Any:
    return cm.load_demo("causal-lm")


@pytest.fixture(scope="module")
def fmap(model: Any) -> cm.ContextMap:
    return cm.attention_norms(model, TEXT).normalize()


def rows(score: cm.Score, metric: str) -> list[Any]:
    return [row for row in score.rows if row.metric == metric]


def test_cue_alignment_by_hand(fmap: cm.ContextMap) -> None:
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
    assert (dot.low, dot.high) == (pytest.approx(0.25), pytest.approx(0.25))
    several = rows(cue_alignment(made, [[1, 2]]), "dot")[0]
    assert several.value == pytest.approx(0.75)
    assert several.chance == pytest.approx(2 / 6)


def test_only_what_a_target_can_read_counts(fmap: cm.ContextMap) -> None:
    found = rows(cue_alignment(fmap, [[1]], targets=2), "dot")[0]
    assert found.chance == pytest.approx(1 / 3)
    with pytest.raises(cm.InvalidInput, match=r"position 4.*one of \[0, 1, 2\]"):
        cue_alignment(fmap, [[4]], targets=2)


def test_value_zeroing_finds_the_cue_where_the_lure_tempts(model: Any) -> None:
    """The model card's causal check says that the model uses the cue: a good map must find it."""
    cases = []
    for sentence in Grammar(5, "test").sentences(1500):
        for site in sentence.sites:
            if site.kind == "agreement" and site.subtype == "pp1" and site.lures:
                cases.append((" ".join(sentence.words[: site.target]), site.cues[0] + 1))
    cases = cases[:25]
    maps = [cm.value_zeroing(model, text).normalize() for text, _ in cases]
    found = cue_alignment(maps, [[cue] for _, cue in cases])
    best = max(rows(found, "dot"), key=lambda row: row.value)
    assert best.sentences == 25
    # Measured 0.97 in layer 2; attention norms of the whole block stay below 0.3.
    assert best.low > 0.8
    assert best.low > best.chance
    norms = [cm.attention_norms(model, text).normalize() for text, _ in cases]
    others = rows(cue_alignment(norms, [[cue] for _, cue in cases]), "dot")
    assert max(row.value for row in others) < best.low


def test_a_batch_equals_single_sentences(model: Any) -> None:
    texts, cues = ["the dogs near the cat", "the author that the senators admire"], [[2], [2]]
    together = cm.attention_norms(model, texts).normalize()
    single = [cm.attention_norms(model, text).normalize() for text in texts]
    for a, b in zip(
        cue_alignment(together, cues).rows, cue_alignment(single, cues).rows, strict=True
    ):
        assert a.value == pytest.approx(b.value, rel=1e-5)
        assert a.chance == pytest.approx(b.chance)


def test_agreement_with_itself_and_with_its_reverse(fmap: cm.ContextMap) -> None:
    assert {round(row.value, 9) for row in agreement(fmap, fmap).rows} == {1.0}
    # Every row's order turned around among what can be read.
    top = fmap.scores.max() + 1
    turned = torch.tril(top - fmap.scores)
    found = agreement(fmap, replace(fmap, scores=turned, bias=None))
    assert {round(row.value, 9) for row in found.rows} == {-1.0}


def test_faithfulness_against_a_literal_loop(model: Any, fmap: cm.ContextMap) -> None:
    ids = fmap.target.ids
    with torch.no_grad():
        answer = int(model(ids)[0, -1].argmax())
        real = float(model(ids)[0, -1].log_softmax(-1)[answer])

    def drop(blanked: list[int]) -> float:
        changed = ids.clone()
        changed[0, blanked] = 7
        return real - float(model(changed)[0, -1].log_softmax(-1)[answer])

    with torch.no_grad():
        others = list(range(ids.shape[1] - 1))
        single = torch.tensor([drop([j]) for j in others])
        row = fmap.scores[0, 1, 0, -1]
        ranked = sorted(others, key=lambda j: -float(row[j]))
        top = [ranked[:k] for k in range(1, len(ranked))]
        comprehensive = sum(drop(s) for s in top) / len(top)
        sufficient = sum(drop([j for j in others if j not in s]) for s in top) / len(top)
    found = faithfulness(model, TEXT, fmap, blank=7)
    values = {row.metric: row.value for row in found.rows if row.layer == "1"}
    assert values["comprehensiveness"] == pytest.approx(comprehensive, abs=1e-4)
    assert values["sufficiency"] == pytest.approx(sufficient, abs=1e-4)
    assert values["blank-out"] == pytest.approx(float(spearman(row[others], single)), abs=1e-5)


def test_scores_show_save_and_add(fmap: cm.ContextMap, tmp_path: Any) -> None:
    found = cue_alignment(fmap, [[2]], method="mine")
    both = found + agreement(fmap, fmap)
    assert len(both.rows) == 16
    assert set(both.to_dataframe().columns) >= {"method", "layer", "value", "low", "chance"}
    assert cm.Score.load(both.save(tmp_path / "score")).equals(both)
    assert "mine" in both.show()._repr_html_()
    assert "mine" in repr(both)


def test_bad_input(model: Any, fmap: cm.ContextMap) -> None:
    raw = cm.attention_norms(model, TEXT)
    heads = cm.attention_norms(model, TEXT, at="attn_out", heads=True)
    for call, message in (
        (lambda: cue_alignment(raw, [[1]]), r"rows that sum to 1.*map\.normalize\(\)"),
        (lambda: cue_alignment(fmap, []), r"got \[\] for 1 sentences.*at least one cue"),
        (lambda: cue_alignment(fmap, [[]]), r"at least one cue for every sentence"),
        (lambda: cue_alignment(fmap, [[9]]), r"position 9.*one of"),
        (lambda: cue_alignment(fmap, [[1]], targets=9), r"9 in sentence 0; expected one of"),
        (lambda: agreement(fmap, fmap.select(layer=1)), r"same tokens and layers"),
        (lambda: cue_alignment(heads, [[1]]), r"4 heads"),
        (lambda: faithfulness(model, "the dogs near", fmap), r"of another input"),
    ):
        with pytest.raises(cm.InvalidInput, match=message):
            call()


def test_nothing_known_is_nan() -> None:
    assert math.isnan(float(spearman(torch.ones(3), torch.rand(3))))
