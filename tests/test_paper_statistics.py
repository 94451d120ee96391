"""What experiments of the papers need beside maps: corpora, word labels, norm statistics."""

from __future__ import annotations

import csv
import json
import math
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import zoo
from asked import case_of
from published import BLIMP, blimp_row
from scipy import stats
from unchecked import answers

import tl_contextmix as cm
from tl_contextmix.core.statistics import ExactMoments
from tl_contextmix.errors import ContextMixError, FileFormatError, InvalidInput, UnsupportedModel
from tl_contextmix.evaluation import (
    alias_match,
    alignment_error_rate,
    assigns_variables,
    by_kind,
    cue_alignment,
    demo_pairs,
    expansion_rates,
    frequency_correlation,
    in_language,
    knockout_curve,
    label_tokens,
    load_minimal_pairs,
    log_prob_path,
    merge_figures,
    over_corpus,
    read_annotations,
    satisfies,
)

pytestmark = pytest.mark.mostly_once
TEXTS = [
    "the keys to the cabinet are old .",
    "the key is old .",
    "the doctors near the farmer sing .",
    "anna gave a letter to david .",
    "the cow is old .",
]


# Corpora


def mixing(model: Any, texts: list[str]) -> Any:
    return cm.mixing_ratio(model, texts)


def test_means_over_a_corpus_are_those_of_its_sentences(masked: Any) -> None:
    found = over_corpus(masked, [*TEXTS, " "], mixing, batch_size=2, shard_size=3)
    frame = pandas.concat(
        [cm.mixing_ratio(masked, text).to_dataframe().assign(text=text) for text in TEXTS]
    )
    for point in found.points:
        each = frame[frame.layer == point.layer].groupby("text").value.mean()
        assert point.value == pytest.approx(each.mean(), abs=1e-6)
        reach = stats.t.ppf(0.975, len(each) - 1) * stats.sem(each)
        assert point.high - point.value == pytest.approx(reach, rel=1e-4)
        assert (point.sentences, point.metric, point.category) == (len(TEXTS), "value", "all")


class Stopped(Exception):
    """A run that is stopped."""


def test_a_run_that_was_stopped_goes_on(masked: Any, tmp_path: Path) -> None:
    calls: list[int] = []

    def measure(model: Any, texts: list[str]) -> Any:
        calls.append(len(texts))
        if len(calls) == 3:
            raise Stopped
        return cm.mixing_ratio(model, texts)

    how: dict[str, Any] = {"batch_size": 2, "shard_size": 2, "checkpoint_seconds": 0.0}
    how["out"] = tmp_path / "figures.json"
    with pytest.raises(Stopped):
        over_corpus(masked, TEXTS, measure, **how)
    found = over_corpus(masked, TEXTS, measure, **how)
    assert calls == [2, 2, 1, 1], "what was read before is not read again"
    whole = over_corpus(masked, TEXTS, mixing, batch_size=2, shard_size=2)
    assert found.points == whole.points
    assert over_corpus(masked, TEXTS, measure, **how).points == whole.points
    assert len(calls) == 4
    for other in (TEXTS[:3], [*TEXTS, "the key is old ."], ["the key is new .", *TEXTS[1:]]):
        with pytest.raises(InvalidInput, match="not the one that was mined before"):
            over_corpus(masked, other, measure, **how)
    with pytest.raises(InvalidInput, match="differs in"):
        over_corpus(masked, TEXTS, measure, value="layer", **how)
    how["out"].write_text("{}")
    with pytest.raises(FileFormatError, match="holds no figures"):
        over_corpus(masked, TEXTS, measure, **how)


def test_models_side_by_side_scores_and_rows(masked: Any, causal: Any) -> None:
    both = over_corpus({"a": masked, "b": causal}, TEXTS, mixing)
    assert {point.category for point in both.points} == {"a", "b"}
    alone = over_corpus(causal, TEXTS, mixing)
    assert [p.value for p in both.points if p.category == "b"] == [p.value for p in alone.points]
    # A layer that one model has and the other has not is a gap in its curve.
    few = replace(both, points=both.select("value", "a")[1:] + both.select("value", "b")[:1])
    chart: Any = few.panels()[0]
    assert chart.labels == tuple(f"layer {layer}" for layer in range(len(alone.points)))
    (_, first), (_, second) = chart.series
    assert [math.isnan(value) for value in first] == [True, *[False] * (len(first) - 1)]
    assert [math.isnan(value) for value in second] == [False, *[True] * (len(first) - 1)]
    assert "layer 1" in few.show().text()

    def cues(model: Any, rows: list[dict[str, Any]]) -> Any:
        maps = cm.attention(model, [row["text"] for row in rows], heads=False)
        return cue_alignment(maps, [row["cues"] for row in rows])

    rows = [{"text": "the key is old .", "cues": [2]}, {"text": "the cow is old .", "cues": [2]}]
    found = over_corpus(causal, rows, cues, rows=True)
    expected = cues(causal, rows).to_dataframe()
    assert [p.value for p in found.select("dot", expected.method[0])] == pytest.approx(
        [*expected[expected.metric == "dot"].value]
    )


def test_what_cannot_be_averaged_is_refused(causal: Any) -> None:
    with pytest.raises(InvalidInput, match="cannot be averaged"):
        over_corpus(causal, TEXTS, mixing, category="nothing")
    with pytest.raises(InvalidInput, match="other rows than those of"):
        over_corpus(
            causal,
            TEXTS,
            lambda m, t: pandas.DataFrame({"batch": [9], "layer": [0], "value": [1.0]}),
        )
    for layer, number, seen in (("all", 1.0, "the layer 'all'"), (0, "a", "the value 'a'")):
        row = {"batch": [0], "layer": [layer], "value": [number]}
        with pytest.raises(InvalidInput, match=seen):
            over_corpus(causal, TEXTS, lambda m, t, row=row: pandas.DataFrame(row))
    with pytest.raises(InvalidInput, match="too many figures"):
        over_corpus(causal, TEXTS, mixing, most=1)
    with pytest.raises(InvalidInput, match="document 1 of"):
        over_corpus(causal, ["a", None], mixing)


def test_rows_without_a_category_are_of_no_other(causal: Any) -> None:
    def kinds(model: Any, texts: list[str]) -> Any:
        kind = ["a", None, float("nan")] * len(texts)
        rows = {"batch": [*range(len(texts))], "layer": 0, "value": 1.0}
        return pandas.DataFrame({**rows, "kind": kind[: len(texts)]})

    found = over_corpus(causal, TEXTS[:1] * 3, kinds, category="kind")
    assert [(p.category, p.sentences) for p in found.points] == [("a", 1), ("all", 2)]


# Processes that share a corpus: the figures of one process alone, bit by bit


def test_processes_that_share_a_corpus_find_the_same_bits(masked: Any, tmp_path: Path) -> None:
    texts = [f"{text[:-1]}{'old ' * more}." for more in range(4) for text in TEXTS]
    how: dict[str, Any] = {"batch_size": 2, "shard_size": 3, "checkpoint_seconds": 0.0}
    whole = over_corpus(masked, texts, mixing, out=tmp_path / "whole", **how)
    paths = [tmp_path / f"part {rank}" for rank in range(3)]
    calls: list[int] = []

    def stopped(model: Any, texts: list[str]) -> Any:
        calls.append(len(texts))
        if len(calls) == 3:
            raise Stopped
        return mixing(model, texts)

    stopped.__qualname__ = mixing.__qualname__
    for rank in (2, 0, 1):
        mine = {"out": paths[rank], "rank": rank, "world_size": 3, **how}
        if rank == 2:
            with pytest.raises(Stopped):
                over_corpus(masked, texts, stopped, **mine)
            with pytest.raises(InvalidInput, match=r"parts of processes \[2\]"):
                merge_figures(paths[2:], out=tmp_path / "merged")
        share = over_corpus(masked, texts, stopped, **mine)
        assert f"(share {rank + 1} of 3)" in share.caption
    # Only the batch that was stopped is read twice.
    assert sum(calls) == len(texts) + calls[2]
    merged = merge_figures([paths[1], paths[2], paths[0]], out=tmp_path / "merged")
    assert vars(merged) == vars(whole)
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()
    again = over_corpus(masked, texts, mixing, **{**how, "out": tmp_path / "merged"})
    assert again.points == whole.points


def test_parts_that_are_no_whole_are_not_merged(masked: Any, tmp_path: Path) -> None:
    def part(name: str, texts: list[str], rank: int = 0, **how: Any) -> Path:
        path = tmp_path / name
        over_corpus(masked, texts, mixing, out=path, rank=rank, world_size=2, shard_size=1, **how)
        return path

    first = part("first", TEXTS)
    for parts, message in (
        ([], "got no part"),
        ([first, first], r"processes \[0, 0\]; expected one of each of 2"),
        ([first, part("other", TEXTS[:2], 1)], "processes 0 and 1 have read different documents"),
        (
            [first, part("value", TEXTS, 1, value="value", batch_size=3)],
            "differs in model: options",
        ),
    ):
        with pytest.raises(InvalidInput, match=message):
            merge_figures(parts, out=tmp_path / "merged")
    whole = json.loads(part("last", TEXTS, 1).read_text())
    (tmp_path / "damaged").write_text(
        json.dumps({**whole, "moments": [["a", "b", 0, "x", 1, 1, 0]]})
    )
    with pytest.raises(FileFormatError, match="holds no figures"):
        merge_figures([first, tmp_path / "damaged"], out=tmp_path / "merged")
    (tmp_path / "last").write_text(json.dumps({**whole, "finished": False}))
    with pytest.raises(InvalidInput, match="an unfinished part of process 1"):
        merge_figures([first, tmp_path / "last"], out=tmp_path / "merged")
    with pytest.raises(FileFormatError, match="holds no figures"):
        merge_figures([tmp_path / "nothing"], out=tmp_path / "merged")
    with pytest.raises(InvalidInput, match="holds another share of the corpus"):
        over_corpus(masked, TEXTS, mixing, out=first, shard_size=1)
    with pytest.raises(InvalidInput, match="rank=2 of world_size=2"):
        part("none", TEXTS, 2)


def root(number: Fraction) -> float:
    """The square root, infinite where the number is too large."""
    try:
        return math.sqrt(number)
    except OverflowError:
        return math.inf


def test_exact_moments_are_those_of_fractions_in_any_order() -> None:
    random = Random(0)
    numbers = [random.gauss(0, 1) * 10 ** random.randint(-300, 300) for _ in range(50)]
    numbers += [5e-324, -5e-324, 1.7e308, 0.0]
    for some in (numbers, numbers[:2], numbers[:1], [0.1] * 10, [1e8 + x / 8 for x in range(9)]):
        exact = [Fraction(number) for number in some]
        mean = sum(exact, Fraction(0)) / len(exact)
        spread = sum(((one - mean) ** 2 for one in exact), Fraction(0))
        whole = ExactMoments.of(some)
        assert whole.mean() == float(mean)
        assert whole.standard_error() == root(spread / max(len(exact) - 1, 1) / len(exact))
        for cut in range(len(some)):
            random.shuffle(some)
            parts = (ExactMoments.of(some[cut:]), ExactMoments.of(some[:cut]))
            assert parts[0].merge(parts[1]) == whole
    assert ExactMoments.of([1.0, math.inf]).mean() == math.inf
    both = ExactMoments.of([math.inf]).merge(ExactMoments.of([-math.inf, 2.0]))
    assert math.isnan(both.mean())
    assert math.isnan(both.standard_error())


# Labels of words


def test_labels_of_words_reach_their_tokens(masked: Any) -> None:
    text = TEXTS[0]
    tokens = cm.attention(masked, text).source
    tags = ["DET", "NOUN", None, "DET", "NOUN", "VERB", "ADJ", None]
    expected = tuple(
        (place, place + 1, tag) for place, tag in enumerate(tags, 1) if tag is not None
    )
    assert label_tokens(tokens, text, [tags]) == (expected,)
    assert label_tokens(tokens, text, lambda text: tags) == (expected,)
    spans = [(0, 8, "NP"), (text.index("cabinet"), text.index("cabinet") + 7, "N")]
    assert label_tokens(tokens, text, [spans]) == (((1, 3, "NP"), (5, 6, "N")),)
    assert label_tokens(tokens, text, [[*map(list, spans)]]) == (((1, 3, "NP"), (5, 6, "N")),)


def test_documents_of_parsers_are_read(masked: Any) -> None:
    text = TEXTS[1]
    starts = [0, 4, 8, 11, 15]
    words = text.split()
    tokens = cm.attention(masked, text).source
    spacy = Words(
        [
            SimpleNamespace(idx=at, text=word, pos_=word.upper(), dep_="d")
            for at, word in zip(starts, words, strict=True)
        ]
    )
    spacy.ents = [SimpleNamespace(start_char=0, end_char=7, label_="E")]
    assert label_tokens(tokens, text, [spacy])[0][1] == (2, 3, "KEY")
    assert label_tokens(tokens, text, [spacy], of="entity") == (((1, 3, "E"),),)
    stanza = SimpleNamespace(
        sentences=[
            SimpleNamespace(
                tokens=[
                    SimpleNamespace(
                        start_char=at,
                        end_char=at + len(word),
                        ner="B-E" if at < 8 else "O",
                        words=[SimpleNamespace(upos="X", deprel="root")],
                    )
                    for at, word in zip(starts, words, strict=True)
                ]
            )
        ]
    )
    assert label_tokens(tokens, text, [stanza], of="dep")[0][4] == (5, 6, "root")
    assert label_tokens(tokens, text, [stanza], of="entity") == (((1, 2, "E"), (2, 3, "E")),)


class Words(list):
    """What a parser returns: words, and entities."""

    ents: Any = ()


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([["a", "b"]], "do not fit the words"),
        ([[(0, 99, "a")]], "do not fit the words"),
        (["NOUN"], "do not fit the words"),
        ([], "do not fit the texts"),
    ],
)
def test_labels_that_do_not_fit_are_refused(masked: Any, labels: Any, match: str) -> None:
    tokens = cm.attention(masked, TEXTS[0]).source
    with pytest.raises(InvalidInput, match=match):
        label_tokens(tokens, TEXTS[0], labels)


@pytest.mark.parametrize("name", ["masked-lm", "causal-lm"])
def test_kinds_of_pairs_are_what_they_say(name: str) -> None:
    model, texts = cm.load_demo(name), TEXTS[:2]
    maps = cm.attention_norms(model, texts, at=["mlp_in", "mlp_out"])
    change = maps["mlp_out"].normalize() - maps["mlp_in"].normalize()
    tags = [["D", "N", None, "D", "N", "V", "A", None], ["D", "N", "V", "A", None]]
    found = by_kind(change, texts=texts, labels=tags)
    named = {kind: found.select(quantity=kind).values for kind in found.quantities}
    causal = name == "causal-lm"
    for row, words in enumerate(change.source.strings):
        sums: dict[str, list[torch.Tensor]] = {}
        offset = 1  # both models put one mark in front
        for t, s in np.ndindex(len(words), len(words)):
            real = change.source.mask[row].tolist()
            if not (real[t] and real[s]) or (causal and s > t):
                continue
            pair = [tags[row][p - offset] if 0 < p <= len(tags[row]) else None for p in (t, s)]
            if any(words[p].startswith(("[", "<")) for p in (t, s)):
                kind = "special"
            elif t == s:
                kind = "self"
            elif words[t] == words[s]:
                kind = "same token"
            elif None not in pair:
                kind = f"{pair[0]} from {pair[1]}"
            else:
                kind = "neighbours" if abs(t - s) == 1 else "other"
            sums.setdefault(kind, []).append(change.scores[row, :, 0, t, s])
        for kind, values in named.items():
            if kind in sums:
                expected = torch.stack(sums[kind]).mean(0)
                torch.testing.assert_close(values[row, :, 0], expected, atol=1e-6, rtol=1e-5)
            else:
                assert bool(values[row].isnan().all())
        assert {*sums} <= {*named}


def test_kinds_need_one_map_and_both_texts_and_labels(masked: Any) -> None:
    with pytest.raises(InvalidInput, match="several heads"):
        by_kind(cm.attention(masked, TEXTS[0]))
    whole = cm.attention(masked, TEXTS[:2], heads=False)
    with pytest.raises(InvalidInput, match="labels are of words"):
        by_kind(whole, texts=TEXTS[:2])
    inside = by_kind(whole, texts=TEXTS[:2], labels=[[(0, 8, "NP")], []])
    assert "in one NP" in inside.quantities
    assert bool(inside.select(quantity="in one NP").values[1].isnan().all())


def test_arcs_tie_heads_to_dependents(masked: Any) -> None:
    text = TEXTS[1]  # the key is old .
    whole = cm.attention(masked, text, heads=False)
    arcs = [((4, 7), (0, 3), "det"), ((8, 10), (4, 7), "nsubj")]
    found = by_kind(whole, texts=text, arcs=[arcs])
    for name, target, source in (
        ("det: head", 2, 1),
        ("det: dependent", 1, 2),
        ("nsubj: head", 3, 2),
        ("nsubj: dependent", 2, 3),
    ):
        assert torch.equal(
            found.select(quantity=name).values[0, :, 0], whole.scores[0, :, 0, target, source]
        )
    words = Words(
        SimpleNamespace(idx=at, text=word, i=place, dep_=relation, head=SimpleNamespace(i=head))
        for place, (at, word, head, relation) in enumerate(
            [(0, "the", 1, "det"), (4, "key", 2, "nsubj"), (8, "is", 2, "ROOT")]
        )
    )
    assert by_kind(whole, texts=text, arcs=[words]).equals(found)
    stanza = SimpleNamespace(
        sentences=[
            SimpleNamespace(
                words=[
                    SimpleNamespace(
                        id=n, head=head, deprel=relation, start_char=at, end_char=at + size
                    )
                    for n, (at, size, head, relation) in enumerate(
                        [(0, 3, 2, "det"), (4, 3, 3, "nsubj"), (8, 2, 0, "root")], 1
                    )
                ]
            )
        ]
    )
    assert by_kind(whole, texts=text, arcs=lambda _: stanza).equals(found)
    for wrong, match in (([], "arcs do not fit"), ([[(1, 2, "x")]], "no arcs of the text")):
        with pytest.raises(InvalidInput, match=match):
            by_kind(whole, texts=text, arcs=wrong)


def test_cues_of_blimp_are_derived(tmp_path: Path) -> None:
    path = tmp_path / "blimp.jsonl"
    rows = [blimp_row(uid, text) for uid, text, _, _ in BLIMP]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert not any(pair.cues for pair in load_minimal_pairs(path))
    for pair, (_, text, *expected) in zip(
        load_minimal_pairs(path, cues="derived"), BLIMP, strict=True
    ):
        words = [[pair.good[slice(*span)] for span in some] for some in (pair.cues, pair.lures)]
        assert words == [one.split() for one in expected], text
    path.write_text(json.dumps({**rows[0], "UID": "wh_island"}))
    with pytest.raises(FileFormatError, match="line 1.*no rule.*wh_island"):
        load_minimal_pairs(path, cues="derived")
    path.write_text(
        json.dumps(
            {
                **rows[4],
                "sentence_good": "Ivan likes this",
                "sentence_bad": "Ivan likes these",
            }
        )
    )
    with pytest.raises(FileFormatError, match="does not fit this sentence"):
        load_minimal_pairs(path, cues="derived")
    given = {**rows[0], "cues": ["amused"]}
    path.write_text(json.dumps(given))
    (pair,) = load_minimal_pairs(path, cues="derived")
    assert pair.good[slice(*pair.cues[0])] == "amused", "what a line says itself has priority"


def test_a_comparison_without_cues_says_so(causal: Any) -> None:
    found = cm.compare(causal, TEXTS[:2], methods=["attention"])
    assert "No dot and average precision: the sentences have no cues." in repr(found)
    known = cm.compare(causal, demo_pairs(count=2), methods=["attention"])
    assert "no cues" not in repr(known)


# Norms


def test_dimensions_are_left_out_of_norms(causal: Any) -> None:
    parts = cm.decompose(causal, TEXTS[0], at="mlp_out")
    some = parts.parts.clone()
    some[..., [3, -1]] = 0
    found = parts.norms(without=[3, -1])
    torch.testing.assert_close(found.scores[:, :, 0], some.norm(dim=-1))
    bias = parts.bias.clone()
    bias[..., [3, -1]] = 0
    torch.testing.assert_close(found.bias[:, :, 0], bias.norm(dim=-1))
    with pytest.raises(InvalidInput, match="d_model"):
        parts.norms(without=[10**6])
    assert parts.norms(without=0).equals(parts.norms(without=[0]))


@pytest.mark.parametrize("family", ["causal", "masked"])
def test_kinds_of_a_part_are_those_of_the_whole(
    family: str, request: pytest.FixtureRequest
) -> None:
    map = cm.value_zeroing(request.getfixturevalue(family), "the keys to the cabinet are old .")
    scores, rows = map.scores[0, 0, 0], [3, 5]  # " to" and " cabinet", of either model
    each = {"self": [(t, t) for t in rows], "neighbours": [(t, t - 1) for t in rows]}
    if family == "masked":
        each["neighbours"] += [(t, t + 1) for t in rows]
    for part in (map.select(target=rows), map.select(target=rows, source=[2, 3, 4, 5, 6])):
        found = by_kind(part)
        for kind, pairs in each.items():
            mean = torch.stack([scores[pair] for pair in pairs]).mean()
            torch.testing.assert_close(found.select(quantity=kind).values[0, 0, 0], mean)
    # Later tokens are no pairs: what is left of a causal map's first row is itself.
    first = by_kind(map.select(target=[1], source=[1, 2, 3]))
    assert first.quantities[0] == "self"
    assert (len(first.quantities) == 1) == (family == "causal")


def test_alignment_error_rate_is_that_of_och_and_ney(masked: Any) -> None:
    whole = cm.attention(masked, TEXTS[:2], heads=False).select(layer=[1, 2])
    sure = [[(1, 1), (2, 2), (5, 6)], [(3, 3)]]
    possible = [[(4, 1), (2, 3)], []]
    found = alignment_error_rate(whole, sure, possible)
    for place, point in enumerate(found.points):
        hits, size = 0, 0
        for row in range(2):
            words = [
                w
                for w, real in zip(whole.source.strings[row], whole.source.mask[row], strict=True)
                if real
            ]
            links = {
                (t, int(whole.scores[row, place, 0, t, : len(words)].argmax()))
                for t in range(1, len(words) - 1)
            }
            links = {(t, s) for t, s in links if 0 < s < len(words) - 1}
            certain = {*sure[row]}
            hits += len(links & certain) + len(links & (certain | {*possible[row]}))
            size += len(links) + len(certain)
        assert point.value == pytest.approx(1 - hits / size)
    perfect = whole.scores.clone()[:1, :1] * 0
    for t in range(1, 9):
        perfect[0, 0, 0, t, t] = 1
    exact = type(whole)(**{**vars(whole.select(batch=0, layer=1)), "scores": perfect})
    assert alignment_error_rate(exact, [[(t, t) for t in range(1, 9)]]).points[0].value == 0
    # Positions are those of the input, in a part of a map as well.
    part = exact.select(target=[3, 4])
    assert alignment_error_rate(part, [[(3, 3), (4, 4)]]).points[0].value == 0
    with pytest.raises(InvalidInput, match="outside of the map"):
        alignment_error_rate(whole, [[(0, 99)], []])
    with pytest.raises(InvalidInput, match="do not fit the sentences"):
        alignment_error_rate(whole, [[]])


def test_frequency_ranks_correlate_as_scipy_says(masked: Any) -> None:
    ratios = cm.mixing_ratio(masked, TEXTS)
    tokens = ratios.tokens
    counts = Counter(tokens.ids[tokens.mask].tolist())
    found = frequency_correlation(ratios, counts)
    kept = tokens.mask & torch.tensor(
        [[not w.startswith("[") for w in row] for row in tokens.strings]
    )
    ranks = stats.rankdata([-counts[i] for i in tokens.ids[kept].tolist()])
    for place, point in enumerate(found.points):
        expected = stats.spearmanr(ratios.values[:, place][kept].numpy(), ranks).statistic
        assert point.value == pytest.approx(expected, abs=1e-6)
        assert point.low <= point.value <= point.high
    counts.pop(int(tokens.ids[kept][0]))
    with pytest.raises(InvalidInput, match="frequency of a token"):
        frequency_correlation(ratios, counts)


@pytest.mark.every
def test_expansion_rates_are_those_of_random_directions() -> None:
    found = expansion_rates(zoo.shared(case_of("gpt2"))).values[0]
    hf = zoo.hf_model("gpt2", dtype=torch.float64)
    heads = hf.config.n_head
    for layer, block in enumerate(hf.transformer.h):
        W = block.attn.c_attn.weight.detach().double().chunk(3, dim=1)[2]
        O = block.attn.c_proj.weight.detach().double()  # noqa: E741
        size = W.shape[1] // heads
        each = [
            W[:, h * size : (h + 1) * size] @ O[h * size : (h + 1) * size] for h in range(heads)
        ]
        for head, matrix in enumerate([*each, sum(each)]):
            rate = torch.linalg.svdvals(matrix).square().mean().sqrt()
            torch.testing.assert_close(found[layer, head], rate.double())


# Memories


def test_where_memories_agree(causal: Any) -> None:
    memories = cm.ff_memories(causal, TEXTS[:3])
    found = memories.agreements(stop_words=["The", " is"], short=3)
    one, listed = (memories.agreements(stop_words=words) for words in ("the", ["the"]))
    assert one.equals(listed)
    for row in range(3):
        for place in range(len(memories.layers)):
            agree, stop, early, every = [], [], [], []
            real = [i for i, keep in enumerate(memories.tokens.mask[row].tolist()) if keep]
            for number, pos in enumerate(real, 1):
                word = memories.words[str(int(memories.ffn_top[row, place, pos]))]
                agree.append(int(memories.agreeing[row, place, pos]) > 0)
                stop.append(word.strip() in ("the", "is"))
                early.append(number < 3)
                every.append(True)
            expected = [
                np.mean(agree),
                np.mean([s for s, a in zip(stop, agree, strict=True) if a]),
                np.mean(stop),
                np.mean([e for e, a in zip(early, agree, strict=True) if a]),
                np.mean(early),
            ]
            assert found.values[row, place].tolist() == pytest.approx(expected, nan_ok=True)


SHEET = (
    "layer neuron rank value document position context token next_token "
    "pattern_1 pattern_2 pattern_3 pattern_4 note"
).split()


def write_sheet(path: Path, patterns: list[str]) -> Path:
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(SHEET)
        for place, some in enumerate(patterns):
            cells = [*some.split("|"), "", "", "", ""][:4]
            writer.writerow([0, place // 2, place % 2, 1.0, 0, 0, "c", "t", "n", *cells, ""])
    return path


def test_annotated_sheets_are_read_back(tmp_path: Path) -> None:
    one = write_sheet(
        tmp_path / "a.csv", ["shallow: ends", "Semantic: towns", "", "shallow:x|semantic:y"]
    )
    two = write_sheet(tmp_path / "b.csv", ["shallow: ends", "", "", "shallow:x|semantic:y"])
    found = read_annotations(one)
    values = {point.category: point.value for point in found.points}
    assert values == {"shallow": 0.25, "semantic": 0.25, "shallow + semantic": 0.25, "none": 0.25}
    both = read_annotations(one, two)
    (kappa,) = both.select("kappa")
    chance = (1 * 1 + 1 * 0 + 1 * 1 + 1 * 2) / 16
    assert kappa.value == pytest.approx((0.75 - chance) / (1 - chance))
    assert {p.value for p in both.select("share of triggers", "none")} == {0.375}
    with pytest.raises(FileFormatError, match="has no kind"):
        read_annotations(write_sheet(tmp_path / "c.csv", ["ends with press"]))
    with pytest.raises(InvalidInput, match="cannot be read together"):
        read_annotations(one, write_sheet(tmp_path / "d.csv", ["", ""]))
    with pytest.raises(InvalidInput, match=r"cannot use this paths: got \["):
        read_annotations([one, two])  # pyright: ignore[reportArgumentType]
    (tmp_path / "e.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FileFormatError, match="no annotated sheet"):
        read_annotations(tmp_path / "e.csv")
    with pytest.raises(InvalidInput, match="cannot be read together"):
        read_annotations()


def test_a_sheet_that_triggers_wrote_is_read(causal: Any, tmp_path: Path) -> None:
    triggers = cm.mine_triggers(causal, TEXTS, out=tmp_path / "m", k=2, layer=1, neurons=[0, 1])
    found = read_annotations(triggers.to_sheet(tmp_path / "sheet.csv"))
    assert {(p.layer, p.category, p.value) for p in found.points if p.category == "none"} == {
        (1, "none", 1.0)
    }


@pytest.mark.every
def test_values_are_read_through_a_head() -> None:
    model, hf = zoo.shared(case_of("gpt2")), zoo.hf_model("gpt2", dtype=torch.float64)
    size = hf.config.n_embd // hf.config.n_head
    block, head = hf.transformer.h[1], slice(size, 2 * size)
    value = block.attn.c_attn.weight.detach().double().chunk(3, dim=1)[2][:, head]
    out = block.attn.c_proj.weight.detach().double()[head]
    v = hf.transformer.h[0].mlp.c_proj.weight.detach().double()
    for norm, matrix in (
        (block.ln_1, value @ out),
        (hf.transformer.ln_f, hf.lm_head.weight.detach().double().T),
    ):
        v = (v - v.mean(-1, keepdim=True)) * norm.weight.detach().double() @ matrix
    found = cm.ff_values(model, via=(1, 1), k=3)
    assert {*found.layer.tolist()} == {0}
    top = v.topk(3, dim=-1)
    torch.testing.assert_close(found.logits[:, 0], top.values, atol=1e-9, rtol=1e-8)
    assert torch.equal(found.ids[:, 0], top.indices)
    with pytest.raises(InvalidInput, match="a head reads only"):
        cm.ff_values(model, via=(1, 1), layer=1)
    with pytest.raises(InvalidInput, match="a head reads only"):
        cm.ff_values(model, via=(0, 1))


def test_values_of_post_ln_blocks_are_not_read_through_heads(masked: Any) -> None:
    with pytest.raises(UnsupportedModel, match="norms of the residual sum"):
        cm.ff_values(masked, via=(1, 1))


# Log-probabilities


@pytest.mark.every
def test_the_way_along_the_stream_is_read_by_hugging_face() -> None:
    case = case_of("gpt2")
    model, hf = zoo.shared(case), zoo.hf_model("gpt2", dtype=torch.float64)
    ids = zoo.inputs(case).tokens[:1]
    kept: list[torch.Tensor] = []
    handle = hf.transformer.ln_f.register_forward_pre_hook(lambda m, x: kept.append(x[0]))
    with torch.no_grad():
        first = hf(ids, output_hidden_states=True).hidden_states[0][0, -1]
        handle.remove()
        last = kept[0][0, -1]
        found = log_prob_path(model, ids, target=5, steps=4, norm="recompute")
        for row in found.itertuples():
            state = first + row.share * (last - first)
            expected = hf.lm_head(hf.transformer.ln_f(state)).log_softmax(-1)[5]
            assert row.log_prob == pytest.approx(float(expected), abs=1e-8)
            assert row.probability == pytest.approx(math.exp(row.log_prob))


def test_a_knockout_curve_is_one_knockout_after_the_other(causal: Any) -> None:
    texts = ["the capital of france is", "the capital of norway is"]
    asked: dict[str, Any] = {"target": [" paris", " oslo"]}
    best = cm.log_prob_contributions(causal, texts, by="ff_neuron", k=6, **asked)
    found = knockout_curve(causal, texts, best, counts=[1, 6], controls=2, **asked)
    for count in (1, 6):
        alone = cm.knockout(causal, texts, neurons=best.top(count), controls=2, **asked).summary()
        mine = found[found["count"] == count].drop(columns="count").reset_index(drop=True)
        pandas.testing.assert_frame_equal(mine, alone)
    with pytest.raises(InvalidInput, match="so many components"):
        knockout_curve(causal, texts, best, counts=[7], **asked)


def test_overlap_counts_what_two_facts_share(causal: Any) -> None:
    texts = ["the capital of france is", "the capital of norway is", "the key is old and the"]
    best = cm.log_prob_contributions(causal, texts, by="ff_neuron", k=20)
    frame = best.to_dataframe()
    sets = [
        {(r.layer, r.neuron) for r in frame[frame.batch == b].nlargest(5, "score").itertuples()}
        for b in range(3)
    ]
    alone = best.overlap(5)
    for a, b in np.ndindex(3, 3):
        assert alone.loc[a, b] == len(sets[a] & sets[b]) / 5
    by = best.overlap(5, categories=["x", "x", "y"])
    assert by.loc["x", "x"] == alone.loc[0, 1]
    assert by.loc["x", "y"] == pytest.approx((alone.loc[0, 2] + alone.loc[1, 2]) / 2)
    assert math.isnan(by.loc["y", "y"])
    with pytest.raises(InvalidInput, match="categories do not fit"):
        best.overlap(5, categories=["x"])


# Answers


def test_aliases_count_as_squad_counts_them() -> None:
    right = alias_match({"q": ["The Eiffel Tower", "tour eiffel"], "none": []})
    assert [right(text, None, "q") for text in ("eiffel tower.", "Tour  Eiffel", "eiffel")] == [
        1.0,
        1.0,
        0.0,
    ]
    assert math.isnan(right("x", None, "other"))
    assert math.isnan(right("x", None, "none"))
    with pytest.raises(InvalidInput, match="these are no answers"):
        alias_match({"q": "one"})


def test_formulas_are_checked_as_python_does() -> None:
    formula, python = "& | a ! b <-> c xor a b", "(a or not b) and (c == (a != b))"
    for number in range(8):
        values = {name: bool(number >> i & 1) for i, name in enumerate("abc")}
        answer = " ".join(f"{name} {int(value)}" for name, value in values.items())
        assert satisfies(answer, None, formula) == float(eval(python, {}, values)), answer
        assert satisfies(answer.replace(" ", ""), None, formula) == satisfies(answer, None, formula)
    assert satisfies("a 1", None, "| a b") == 1.0, "b is free"
    assert satisfies("b 0", None, "| a b") == 0.0
    assert satisfies("nothing", None, "| a b") == satisfies("a 1 a 0", None, "| a b") == 0.0
    assert assigns_variables("a 1 b 0", None, "| a b") == 1.0
    assert assigns_variables("a 1", None, "| a b") == assigns_variables("x", None, "a") == 0.0
    for wrong in ("& a", "a b", "a -> b"):
        with pytest.raises(InvalidInput, match="no formula"):
            satisfies("a 1 b 1", None, wrong)


def test_languages_are_told() -> None:
    pytest.importorskip("py3langid")
    french = in_language("fr")
    assert french("les chevaux sont rouges et le bateau tombait dans la mer", None, "") == 1.0
    assert french("the horses are red and the boat fell into the sea", None, "") == 0.0
    assert math.isnan(french(" ", None, ""))
    with pytest.raises(InvalidInput, match="got 'french'; expected one of .*'fr'"):
        in_language("french")


def test_without_the_package_languages_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ContextMixError, match=r"pip install .tl-contextmix\[metrics\]"):
        in_language("fr")


@pytest.mark.every
def test_reciprocal_ranks_are_those_of_the_answer() -> None:
    if zoo.major() < 3:
        pytest.skip("no encoder-decoder bridge")
    model = cm.load_demo("encoder-decoder")
    judged = cm.decoder_lens(
        model, ["the horses are red ."], ["les chevaux sont rouges ."], mode="teacher_forced"
    )
    (curve,) = [judged.metrics(metric="MRR").select("MRR")]
    for place, point in enumerate(curve):
        ranks = judged.ranks[0, place][judged.target.mask[0]]
        assert point.value == pytest.approx(float((1 / (1 + ranks.double())).mean()))


WRONG = {
    "alignment_error_rate(maps, [[(0, 1, 'sure')]])": "these are no links",
    "frequency_correlation(ratios, [1.0] * 500)": "these are no frequencies",
    "read_annotations(['a.csv', 'b.csv'])": "cannot use this paths",
    "alias_match([['one']])": "a dictionary with a list of texts for each input",
    "cm.ff_values(model, via=[1])": "names no head",
    "knockout_curve(model, 'the', [(1, 2)])": "these components have no order",
}


def test_what_is_of_the_wrong_kind_is_said() -> None:
    setting = """
        import tl_contextmix as cm
        from tl_contextmix.evaluation import *
        model = cm.load_demo("masked-lm")
        maps = cm.attention(model, "the key", heads=False)
        ratios = cm.mixing_ratio(model, "the key")
    """
    found = answers(textwrap.dedent(setting), *WRONG)
    for question, (kind, message) in found.items():
        assert kind == "InvalidInput", (question, message)
        assert WRONG[question] in message
