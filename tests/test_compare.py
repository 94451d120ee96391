"""Comparing methods: minimal pairs, words, one table, and what is refused."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from asked import view_of
from hand_built import sentence
from test_value_zeroing import case_of

import tl_contextmix as cm
from tl_contextmix.__main__ import main
from tl_contextmix.adapters.questions import Answer
from tl_contextmix.core.counters import count_operations
from tl_contextmix.core.statistics import bootstrap_interval, spearman
from tl_contextmix.errors import ContextMixWarning, FileFormatError
from tl_contextmix.evaluation import (
    MinimalPair,
    blanked,
    cue_alignment,
    demo_pairs,
    load_minimal_pairs,
    overlapping,
    place_tokens,
)
from tl_contextmix.evaluation.compare import comparable
from tl_contextmix.reporting.comparison_section import compared_page
from tl_contextmix.results import Comparison, ContextMap, Score, ScoreRow, Tokens

pytestmark = pytest.mark.once

FAST = ["attention", "attention_norms block_out", "decompx", "gradient_x_input", "value_zeroing"]


@pytest.fixture(scope="module")
def found(causal: Any) -> Comparison:
    return cm.compare(causal, demo_pairs(count=6), methods=FAST)


# Minimal pairs


@pytest.mark.parametrize(
    ("good", "bad", "prefix", "answer", "wrong"),
    [
        ("The cat sleeps.", "The cat sleep.", "The cat", "sleeps", "sleep"),
        ("Katherine can't help herself.", "Katherine can't help himself.",
         "Katherine can't help", "herself", "himself"),
        # Only the place differs, not what is alike behind it.
        ("the keys are old .", "the keys is old .", "the keys", "are", "is"),
        ("a well-known man", "a well-worn man", "a", "well-known", "well-worn"),
        ("They have seen it", "They has been seen it", "They", "have", "has been"),
        ("Who sees?", "Who see?", "Who", "sees", "see"),
        ("is is is", "is is are", "is is", "is", "are"),
        ("these dogs", "this dogs", "", "these", "this"),
    ],
)  # fmt: skip
def test_the_target_is_what_differs(
    good: str, bad: str, prefix: str, answer: str, wrong: str
) -> None:
    pair = MinimalPair(good, bad)
    assert (pair.prefix, pair.answer, pair.wrong) == (prefix, answer, wrong)
    assert pair.masked("[MASK]") == good[: pair.target[0]] + "[MASK]" + good[pair.target[1] :]


@pytest.mark.parametrize("pair", [("a b", "a b"), ("a b c", "a c"), ("a", ""), ("", "")])
def test_what_is_no_minimal_pair(pair: tuple[str, str]) -> None:
    with pytest.raises(cm.InvalidInput, match="not a minimal pair"):
        MinimalPair(*pair)


def test_cues_lie_in_the_sentence() -> None:
    for cue in ((3, 4), (8, 14), (6, 9), (-3, 2)):  # a space, the place itself, a part of it
        with pytest.raises(cm.InvalidInput, match="must be another part of the sentence"):
            MinimalPair("the cat sleeps", "the cat sleep", cues=(cue,))
    with pytest.raises(cm.InvalidInput, match=r"got \(4, 40\) in 'the cat sleeps'"):
        MinimalPair("the cat sleeps", "the cat sleep", cues=((4, 40),))


def test_pairs_are_read_from_blimp_s_format(tmp_path: Path) -> None:
    lines = [
        # A line of BLiMP, with the fields that it has.
        {"sentence_good": "Many girls insulted themselves.", "field": "morphology", "UID": "x",
         "sentence_bad": "Many girls insulted herself.", "pairID": "0", "one_prefix_method": False},
        {"sentence_good": "the dog by the dogs barks", "sentence_bad": "the dog by the dogs bark",
         "cues": ["dog"], "lures": [[15, 19]]},
        {"sentence_good": "les \u2028 chats dorment", "sentence_bad": "les \u2028 chats dort"},
    ]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n")
    pairs = load_minimal_pairs(path)
    assert [pair.answer for pair in pairs] == ["themselves", "barks", "dorment"]
    assert pairs[0].cues == ()
    spans = pairs[1].cues + pairs[1].lures
    assert [pairs[1].good[slice(*span)] for span in spans] == ["dog", "dogs"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 of .*which is not JSON; expected a JSON object"),
        ("[1]", r"line 2 of .*which is not an object"),
        ('{"sentence_good": "a"}', r"line 2 of .*got the fields \['sentence_good'\]"),
        ('{"sentence_good": 1, "sentence_bad": "b"}', r"line 2 of .*got the fields"),
        ('{"sentence_good": "a b", "sentence_bad": "a b"}', r"line 2 of .*not a minimal pair"),
        ('{"sentence_good": "a a b", "sentence_bad": "a a c", "cues": ["a"]}',
         r"line 2 of .*'a', which occurs 2 times.*\[start, stop\]"),
        ('{"sentence_good": "a b", "sentence_bad": "a c", "cues": ["x"]}', r"which occurs 0 times"),
        ('{"sentence_good": "a b", "sentence_bad": "a c", "cues": "a"}', r"a list of words"),
        ('{"sentence_good": "a b", "sentence_bad": "a c", "cues": [[0, 9]]}', r"\(0, 9\) in 'a b'"),
        ("\udcff", r"line 2 of .*not UTF-8"),
        ('{"sentence_good": "a \\ud800", "sentence_bad": "a c"}', r"line 2 of .*surrogate"),
        ("[" * 100_000, r"line 2 of .*not JSON"),
    ],
)  # fmt: skip
def test_lines_that_are_no_pairs_are_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    first = '{"sentence_good": "a b", "sentence_bad": "a c"}\n'
    path.write_text(first + line, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(FileFormatError, match=message):
        load_minimal_pairs(path)


def test_files_that_are_not_there_or_empty(tmp_path: Path) -> None:
    for path, name in ((tmp_path / "none.jsonl", r"none\.jsonl.*"), (tmp_path, ""), ("a\0b", "")):
        with pytest.raises(cm.InvalidInput, match=name + "a (local file|path)"):
            load_minimal_pairs(path)
    marked = tmp_path / "marked"
    marked.write_text('\ufeff{"sentence_good": "a b", "sentence_bad": "a c"}')
    assert len(load_minimal_pairs(marked)) == 1
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(FileFormatError, match="an empty file"):
        load_minimal_pairs(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["agreement", "reflexive", "name", "determiner", "fact"])
def test_pairs_of_the_grammar(kind: str) -> None:
    tempted = kind in ("agreement", "reflexive", "name")
    pairs = demo_pairs(kind, 20, lures=tempted)
    assert len(pairs) == len(set(pairs)) == 20
    for pair in pairs:
        assert pair.cues
        assert bool(pair.lures) == tempted
        assert max(stop for _, stop in pair.cues) <= pair.target[0]
        assert pair.good.replace(pair.answer, "") != pair.good
    assert demo_pairs(kind, 5, lures=tempted) == pairs[:5]
    assert demo_pairs(kind, 5, lures=tempted, seed=6) != pairs[:5]
    if kind == "agreement":
        singular = [pair for pair in pairs if pair.answer == "is"]
        assert all(pair.wrong == "are" for pair in singular)


def test_pairs_that_the_grammar_has_not() -> None:
    wrong: list[dict[str, Any]] = [{"kind": "tense"}, {"kind": "fact"}]
    for options in wrong:
        with pytest.raises(cm.InvalidInput, match=r"no such pairs.*one of .*with lures"):
            demo_pairs(**options)


# Tokens in their text, and words


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("the cats", ("<|endoftext|>", "the", " cat", "s"), [None, (0, 3), (4, 7), (7, 8)]),
        ("The Cats!", ("[CLS]", "the", "cat", "##s", "!", "[SEP]"),
         [None, (0, 3), (4, 7), (7, 8), (8, 9), None]),
        ("a  b", (" ", "a", " ", "b"), [None, (0, 1), None, (3, 4)]),
        ("##s a", ("##", "s", " a"), [(0, 2), (2, 3), (4, 5)]),
        ("İs it", ("İs", " it"), [(0, 2), (3, 5)]),
    ],
)  # fmt: skip
def test_tokens_are_placed_in_their_text(
    text: str, words: tuple[str, ...], expected: list[Any]
) -> None:
    assert place_tokens(text, sentence(*words)) == expected


def test_tokens_that_cannot_be_placed_are_named() -> None:
    with pytest.raises(cm.InvalidInput, match=r"'chat'.*from 'cat' on.*cues= as positions"):
        place_tokens("the cat", sentence("the", "chat"))


def test_bytes_and_unknown_words_stand_for_what_is_between() -> None:
    # A byte-level tokenizer cuts the apostrophe into bytes that are no text on their own.
    words = ("<s>", "the", " cook", "\ufffd", "\ufffd", "s", " key")
    found = place_tokens("the cook\u2019s key", sentence(*words))
    assert found == [None, (0, 3), (4, 8), (8, 9), (8, 9), (9, 10), (11, 14)]
    assert place_tokens("a zebra x", sentence("a", "[UNK]", "x")) == [(0, 1), (2, 7), (8, 9)]
    assert place_tokens("a zebra", sentence("a", "[UNK]")) == [(0, 1), (2, 7)]


def test_tokens_that_share_a_character() -> None:
    places = [None, (0, 3), (4, 6), (6, 9)]
    assert overlapping(places, (4, 9)) == [2, 3]
    assert overlapping(places, (3, 4)) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((" the", " un", "believ", "able", " cat"), [(0, 1), (1, 4), (4, 5)]),
        (("the", "un", "##believ", "##able", "cat"), [(0, 1), (1, 4), (4, 5)]),
        (("<s>", "Un", "able", " to", ".", "</s>"), [(0, 1), (1, 3), (3, 4), (4, 5), (5, 6)]),
        ((" don", "'", "t", " well", "-", "known"), [(0, 3), (3, 6)]),
        ((" say", ' "', "hello", '"', " ", "x"), [(0, 1), (1, 2), (2, 3), (3, 4), (4, 6)]),
        (("the", "cat", "[MASK]"), [(0, 1), (1, 2), (2, 3)]),
    ],
)  # fmt: skip
def test_words_are_told_from_their_pieces(
    words: tuple[str, ...], expected: list[tuple[int, int]]
) -> None:
    assert sentence(*words).words() == [expected]


def test_padding_is_no_word() -> None:
    tokens = sentence("a", " b", "c", "<p>", mask=[True, True, True, False])
    assert tokens.words() == [[(0, 1), (1, 3)]]
    left = sentence("<p>", "a", " b", mask=[False, True, True])
    assert left.words() == [[(1, 2), (2, 3)]]


def test_a_map_of_words_by_hand(causal: Any) -> None:
    fmap = cm.attention_norms(causal, ["the keys to", "dogs"]).normalize()
    spans = [(0, 1), (1, 3), (3, 4)]
    merged = fmap.words(spans)
    assert merged.target.strings[0][1:] == (" the keys", " to")
    expected = fmap.scores[0, :, 0, 1:3].mean(1)
    columns = torch.stack([expected[:, a:b].sum(1) for a, b in spans], dim=1)
    assert torch.allclose(merged.scores[0, :, 0, 1], columns)
    # The second sentence has two tokens: its rows and columns of padding count for nothing.
    assert merged.target.mask.tolist() == [[True] * 3, [True, True, False]]
    assert torch.allclose(merged.scores[1, :, 0, 1, :2], fmap.scores[1, :, 0, 1, :2])
    assert torch.allclose(merged.bias[1, :, 0, 1], fmap.bias[1, :, 0, 1])
    sums = merged.scores.sum(-1)[:, :, 0]
    assert torch.allclose(sums[merged.target.mask[:, None].expand_as(sums)], torch.ones(()))
    most = fmap.words(spans, rows="max", columns="max")
    assert torch.equal(most.scores[0, :, 0, 1, 1], fmap.scores[0, :, 0, 1:3, 1:3].amax((1, 2)))
    # Rows of another number of words are padded.
    own = fmap.words()
    assert own.scores.equal(fmap.scores)
    for wrong in ([(0, 9)], []):
        with pytest.raises(cm.InvalidInput, match=r"covers no token|no spans"):
            fmap.words(wrong)
    ask = inspect.unwrap(ContextMap.words)
    with pytest.raises(cm.InvalidInput, match="no such way to merge rows"):
        ask(fmap, rows="median")


def test_cues_as_text_and_on_words(causal: Any) -> None:
    fmap = cm.attention_norms(causal, "the keys to the cabinet").normalize()
    by_place = cue_alignment(fmap, [[2]]).to_dataframe()
    assert by_place.equals(cue_alignment(fmap, [["keys"]]).to_dataframe())
    # A text stands for all of its kind: both "the".
    both = cue_alignment(fmap, [[1, 4]]).to_dataframe()
    assert both.equals(cue_alignment(fmap, [[" the"]]).to_dataframe())
    words = cue_alignment(fmap.words([(0, 1), (1, 3), (3, 4), (4, 5), (5, 6)]), [["the keys"]])
    dots = [row.value for row in words.rows if row.metric == "dot"]
    pieces = [row.value for row in cue_alignment(fmap, [[1, 2]]).rows if row.metric == "dot"]
    assert dots == pytest.approx(pieces)
    with pytest.raises(cm.InvalidInput, match=r"'dogs', a position or token, in sentence 0"):
        cue_alignment(fmap, [["dogs"]])
    with pytest.raises(cm.InvalidInput, match=r"this cues: got \['keys'\]"):
        cue_alignment(fmap, ["keys"])
    with pytest.raises(cm.InvalidInput, match=r"2 for 1 sentences"):
        cue_alignment(fmap, [[1]], pos=[1, 2])


# The comparison


def test_figures_are_those_of_the_single_functions(causal: Any, found: Comparison) -> None:
    pairs = demo_pairs(count=6)
    maps = [cm.value_zeroing(causal, pair.prefix).normalize() for pair in pairs]
    cues = []
    for pair, map in zip(pairs, maps, strict=True):
        assert map.target.strings[0][-1].strip() == pair.prefix.split()[-1]
        before = [pair.good[:start].count(" ") for start, _ in pair.cues]
        cues.append([place + 1 for place in before])  # one token per word, behind the first mark
    expected = cue_alignment(maps, cues)
    rolled = cue_alignment([map.rollout() for map in maps], cues)
    added = cue_alignment([map.rollout(add_identity=True) for map in maps], cues)
    ours = {(r.layer, r.metric): r for r in found.rows if r.method == "value_zeroing"}
    whole = [replace(r, layer=f"{r.layer}, with identity") for r in added.rows]
    for row in (*expected.rows, *(r for r in (*rolled.rows, *whole) if "to 3" in r.layer)):
        mine = ours[row.layer, row.metric]
        assert mine.values == pytest.approx(row.values)
        assert (mine.value, mine.chance) == pytest.approx((row.value, row.chance))
        assert (mine.low, mine.high) == pytest.approx((row.low, row.high))
    answers = [causal.to_tokens(pair.prefix + " " + pair.answer)[0, -1].item() for pair in pairs]
    single = [
        cm.faithfulness(causal, pair.prefix, map, target=[answer])
        for pair, map, answer in zip(pairs, maps, answers, strict=True)
    ]
    for metric in ("comprehensiveness", "sufficiency"):
        values = [r.value for s in single for r in s.rows if (r.layer, r.metric) == ("1", metric)]
        assert ours["1", metric].value == pytest.approx(sum(values) / 6, abs=1e-4)


def test_every_method_has_its_rows_and_its_cost(found: Comparison, causal: Any) -> None:
    frame = found.to_dataframe()
    assert set(frame.method) == set(FAST)
    assert found.metrics == (
        "dot", "average precision", "blank-out", "comprehensiveness", "sufficiency"
    )  # fmt: skip
    layers = {"0", "1", "2", "3", "input to 3"}
    assert set(frame[frame.method == "attention"].layer) == layers | {
        "input to 3, without identity"
    }
    assert set(frame[frame.method == "value_zeroing"].layer) == layers | {
        "input to 3, with identity"
    }
    assert "values" not in frame
    assert set(frame[frame.method == "decompx"].layer) == {f"input to {n}" for n in range(4)}
    assert set(frame[frame.method == "gradient_x_input"].layer) == {"prediction"}
    costs = {cost.method: cost for cost in found.costs}
    # A pass without the logits, which are three tenths of one.
    assert costs["attention"].forward == pytest.approx(0.69, abs=0.02)
    # Backward to the embeddings alone costs as much as forward.
    assert 1.7 < costs["gradient_x_input"].forward < 2.3
    assert all(cost.seconds > 0 for cost in found.costs)
    assert found.correct is not None
    assert 0 <= found.correct <= 6
    assert found.sentences == 6


def test_tables_and_likeness(found: Comparison) -> None:
    best = found.best("sufficiency")
    assert best["value"].is_monotonic_increasing  # low is good
    assert found.best()["value"].is_monotonic_decreasing
    table = found.table("dot")
    assert list(table.columns) == [
        "0", "1", "2", "3", *(f"input to {n}" for n in range(4)),
        "input to 3, with identity", "input to 3, without identity", "prediction",
    ]  # fmt: skip
    assert math.isnan(table.loc["decompx", "0"])
    assert torch.allclose(found.alike, found.alike.T)
    assert torch.equal(found.alike.diagonal(), torch.ones(5, dtype=torch.float64))
    assert found.alike_methods == tuple(FAST)
    with pytest.raises(cm.InvalidInput, match=r"no figures of this metric: got 'accuracy'"):
        found.best("accuracy")


def test_differences_are_paired_by_sentence(found: Comparison) -> None:
    values = {(r.method, r.layer, r.metric): torch.tensor(r.values) for r in found.rows}
    one, two = ((name, "2", "dot") for name in ("value_zeroing", "attention"))
    apart = (values[one] - values[two]).double()
    (row,) = found.difference("value_zeroing", "attention", layer="2").rows
    assert (row.value, row.sentences) == (pytest.approx(float(apart.mean())), 6)
    assert (row.low, row.high) == pytest.approx(bootstrap_interval(apart), abs=1e-6)
    # Of the 64 patterns of signs, so many have a mean as far from zero.
    signs = torch.tensor([*itertools.product((1.0, -1.0), repeat=6)], dtype=torch.float64)
    drawn = (signs * apart).mean(1).abs()
    expected = (drawn >= apart.mean().abs() - 1e-9).double().mean()
    assert row.p == pytest.approx(float(expected), abs=1e-6)
    (other,) = found.difference("attention", "value_zeroing", layer="2").rows
    assert (other.value, other.p) == (pytest.approx(-row.value), pytest.approx(row.p))
    # Every layer that both have, and the best one.
    every = found.difference("value_zeroing", "attention", metric="blank-out").rows
    assert [row.layer for row in every] == ["best", "0", "1", "2", "3", "input to 3"]
    (crossed,) = found.difference(
        "value_zeroing", "decompx", layer=("2", "input to 3"), metric="dot"
    ).rows
    assert crossed.layer == "2 / input to 3"
    apart = values[one] - values["decompx", "input to 3", "dot"]
    assert crossed.value == pytest.approx(float(apart.mean()), abs=1e-6)
    others = found.difference("value_zeroing", layer="best").rows
    assert [row.other for row in others] == [name for name in FAST if name != "value_zeroing"]


def rows_of(method: str, values: dict[str, list[float]], metric: str = "dot") -> list[ScoreRow]:
    return [
        ScoreRow(method, layer, metric, 0.0, 0.0, 0.0, 0.0, len(some), tuple(some))
        for layer, some in values.items()
    ]


@pytest.mark.parametrize(("metric", "sign"), [("dot", 1.0), ("sufficiency", -1.0)])
def test_the_best_layer_is_chosen_on_the_other_sentences(metric: str, sign: float) -> None:
    # On all three sentences layer 1 is best; without the last one layer 0 is.
    table = {"0": [0.3, 0.3, 0.0], "1": [0.2, 0.2, 0.9], "2": [math.nan] * 3}
    table = {layer: [sign * value for value in some] for layer, some in table.items()}
    rows = (*rows_of("a", table, metric), *rows_of("b", {"0": [0.0] * 3}, metric))
    score = Score(rows, "by hand", "")
    (row,) = score.difference("a", "b", layer="best").rows
    assert row.value == pytest.approx(sign * (0.2 + 0.2 + 0.0) / 3)


def test_differences_that_cannot_be_told(found: Comparison) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"method": "value_zeroings"}, "Did you mean 'value_zeroing'"),
        ({"other": "lime"}, "no figures of this method: got 'lime'"),
        ({"layer": "7"}, "no figures of this layer: got '7'.*or 'best'"),
        ({"layer": ("0", "1", "2")}, "one layer, or two"),
        ({"metric": "accuracy"}, "no figures of this metric"),
    ]
    for asked, message in wrong:
        with pytest.raises(cm.InvalidInput, match=message):
            found.difference(**{"method": "value_zeroing", "other": "attention", **asked})
    old = Score(tuple(replace(row, values=()) for row in found.rows), "old", "")
    with pytest.raises(cm.InvalidInput, match="means alone.*older versions"):
        old.difference("value_zeroing", "attention")
    twice = Score((*found.rows, *found.rows), "twice", "")
    with pytest.raises(cm.InvalidInput, match="two figures of 'value_zeroing' for one layer"):
        twice.difference("value_zeroing", "attention")
    uneven = Score((*rows_of("a", {"0": [1.0]}), *rows_of("b", {"0": [1.0, 2.0]})), "", "")
    with pytest.raises(cm.InvalidInput, match="1 sentences of 'a' and 2 of 'b'"):
        uneven.difference("a", "b")
    nothing = Score((*rows_of("a", {"0": [math.nan]}), *rows_of("b", {"0": [1.0]})), "", "")
    (row,) = nothing.difference("a", "b", layer="0").rows
    assert math.isnan(row.value)
    assert math.isnan(row.p)
    assert row.sentences == 0


def test_files_of_older_versions_have_means_alone() -> None:
    old = Comparison.load(Path(__file__).parent / "data/v1/Comparison.safetensors")
    with pytest.raises(cm.InvalidInput, match="means alone.*older versions"):
        old.difference(old.methods[0], old.methods[1])


def test_the_page_says_how_far_behind_the_best_each_method_is(found: Comparison) -> None:
    behind = next(panel for panel in found.panels() if panel.title == "Behind the best method")
    cells = {row[0]: row[1] for row in behind.table().rows}
    best = found.best("dot")["method"].iloc[0]
    assert cells[best] == "the best"
    (row,) = found.difference("attention", best, layer="best").rows
    assert str(cells["attention"]).startswith(
        f"{row.value:+.2f} ({row.low:.2f} to {row.high:.2f}; p "
    )
    old = replace(found, rows=tuple(replace(row, values=()) for row in found.rows))
    assert "Behind the best method" not in [panel.title for panel in old.panels()]


def test_likeness_by_hand(causal: Any, found: Comparison) -> None:
    values = []
    for pair in demo_pairs(count=6):
        a = cm.attention(causal, pair.prefix, heads=False).normalize().rollout()
        b = cm.decompx(causal, pair.prefix)
        values.append(float(spearman(a.scores[0, -1, 0, -1], b.scores[0, -1, 0, -1])))
    here = found.alike[FAST.index("attention"), FAST.index("decompx")]
    assert float(here) == pytest.approx(sum(values) / 6, abs=1e-6)


def test_saved_shown_and_printed(found: Comparison, tmp_path: Path) -> None:
    assert Comparison.load(found.save(tmp_path / "c")).equals(found)
    page = found.show().html()
    assert "value_zeroing" in page
    assert "Comprehensiveness, by method and layer" in page
    assert "Comparison of 5 methods over 6 sentences of causal-lm" in repr(found)


def test_masked_models_are_asked_at_the_mask() -> None:
    model = cm.load_demo("masked-lm")
    pairs = demo_pairs(count=3)
    found = cm.compare(model, pairs, methods=["attention"])
    texts = [pair.masked("[MASK]") for pair in pairs]
    cues = [[pair.good[slice(*cue)] for cue in pair.cues] for pair in pairs]
    again = cm.compare(model, texts, cues=cues, methods=["attention"])
    places = [text.split().index("[MASK]") + 1 for text in texts]
    maps = [cm.attention(model, text, heads=False).normalize() for text in texts]
    expected = cue_alignment(maps, cues, pos=places)
    for one in (found, again):
        rows = {(r.layer, r.metric): r.value for r in one.rows}
        for row in expected.rows:
            assert rows[row.layer, row.metric] == pytest.approx(row.value, abs=1e-6)
    assert found.correct is not None
    assert again.correct is None


def test_texts_without_cues_and_methods_of_ones_own(causal: Any) -> None:
    def uniform(model: Any, tokens: torch.Tensor) -> ContextMap:
        map = cm.attention(model, tokens, heads=False)
        return replace(map, scores=torch.ones_like(map.scores).tril())

    texts = ["the keys to the cabinet", "the dogs near the cat"]
    found = cm.compare(causal, texts, methods={"uniform": uniform})
    assert "dot" not in found.metrics
    assert {row.method for row in found.rows} == {"uniform"}
    cued = cm.compare(causal, texts, cues=[["keys"], ["dogs"]], methods={"uniform": uniform})
    for row in cued.rows:
        if row.metric in ("dot", "average precision") and not row.layer.startswith("input"):
            # A map without information is at chance.
            assert row.value == pytest.approx(row.chance)
    # Heads are averaged, and layers that do not begin at the input are not rolled out.
    some: dict[str, Any] = {
        "heads": lambda m, t: cm.attention_norms(m, t, at="attn_out", heads=True),
        "mean": lambda m, t: cm.attention_norms(m, t, at="attn_out", heads=True).mean("head"),
        "later": lambda m, t: cm.attention_norms(m, t, layer=(1, 2)),
    }
    found = cm.compare(causal, texts, cues=[["keys"], ["dogs"]], methods=some)
    layers = {name: {r.layer for r in found.rows if r.method == name} for name in some}
    assert len(layers["heads"]) == len(layers["mean"]) > len(layers["later"])
    values = {name: [r.value for r in found.rows if r.method == name] for name in ("heads", "mean")}
    assert values["heads"] == pytest.approx(values["mean"], nan_ok=True)


def test_words_of_several_tokens(causal: Any) -> None:
    texts = ["the unbelievable keys to the cabinetry", "the keys to the unbelievable cabinetry"]
    cues = [["keys"], ["keys"]]
    few = ["value_zeroing", "gradient_x_input"]
    found = cm.compare(causal, texts, cues=cues, methods=few, words=True)
    tokens = cm.compare(causal, texts, cues=cues, methods=few)
    # A word is a cue where its only piece was; the target's row is now the mean of its pieces'.
    chance = {row.chance for row in found.rows if row.metric == "dot"}
    # Six words and the beginning of the sequence.
    assert chance == {sum([1 / 7, 1 / 7]) / 2}
    assert {row.chance for row in tokens.rows if row.metric == "dot"} != chance
    maps = [cm.value_zeroing(causal, text).normalize().words() for text in texts]
    expected = {(row.layer, row.metric): row.value for row in cue_alignment(maps, cues).rows}
    ours = {(r.layer, r.metric): r.value for r in found.rows if r.method == "value_zeroing"}
    for key, value in expected.items():
        assert ours[key] == pytest.approx(value, abs=1e-6)


def test_words_are_blanked_as_a_whole(causal: Any) -> None:
    text = "the unbelievable keys to the cabinet"
    fmap = cm.attention(causal, text, heads=False)
    ids, words = fmap.source.ids[0], fmap.source.words()[0]
    drop = blanked(view_of(causal), ids, Answer(pos=-1), 7, words)
    long = next(unit for unit, (start, stop) in enumerate(words) if stop - start > 1)
    changed = ids.clone()
    changed[slice(*words[long])] = 7
    with torch.no_grad():
        before, after = (causal(one[None])[0, -1].log_softmax(-1) for one in (ids, changed))
    answer = int(before.argmax())
    assert drop.answer.target[0].tolist() == [answer]
    expected = float(before[answer] - after[answer])
    assert drop.falls([[long]])[0] == pytest.approx(expected, abs=1e-4)


def test_no_word_reaches_from_one_stack_into_another() -> None:
    words = sentence("the", " cat", "s")
    other = Tokens(torch.arange(2)[None], (("s", " x"),), words.mask[:, :2], (("encoder", 2),))
    both = words.cat(other)
    assert both.words() == [[(0, 1), (1, 3), (3, 4), (4, 5)]]
    joined = both.join(both.words())
    assert joined.sides == (("decoder", 2), ("encoder", 2))
    assert joined.strings == (("the", " cats", "s", " x"),)
    assert joined.positions().tolist() == [[0, 2, 0, 1]]
    with pytest.raises(cm.InvalidInput, match=r"\(2, 4\).*one stack"):
        both.join([[(2, 4)]])


def test_sentences_that_cannot_be_asked_about_are_dropped_if_wished_and_listed(
    causal: Any, tmp_path: Path
) -> None:
    pairs = list(demo_pairs(count=3))
    other = MinimalPair("the keys are old", "the keys is old", cues=((13, 16),))
    mixed = [other, *pairs[:1], other, *pairs[1:]]
    found = cm.compare(causal, mixed, methods=["attention"], unusable="drop")
    alone = cm.compare(causal, pairs, methods=["attention"])
    assert alone.dropped == ()
    assert alone.without() == ()
    assert found.rows == alone.rows
    assert (found.sentences, found.correct) == (3, alone.correct)
    assert [text for text, _ in found.dropped] == ["the keys are old"] * 2
    assert all("a cue after the answer" in reason for _, reason in found.dropped)
    assert "3 sentences (2 more were skipped)" in repr(found)
    assert found.without()[0] in found.panels()
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"sentence_good": one.good, "sentence_bad": one.bad, "cues": [list(c) for c in one.cues]}
        for one in mixed[:2]
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    page = tmp_path / "page.html"
    assert main(["compare", "--pairs", str(path), "--drop-unusable", "-o", str(page)]) == 0
    assert "Sentences skipped" in page.read_text()
    assert "1 sentences (1 more were skipped)" in page.read_text()
    assert main(["compare", "--pairs", str(path), "-o", str(page)]) == 2
    # Where nothing is left there is nothing to compare.
    with pytest.raises(cm.InvalidInput, match=r"a cue after the answer.*unusable='drop'"):
        cm.compare(causal, [other], methods=["attention"], unusable="drop")


def test_only_what_resumes_is_said_to_go_on_when_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for module in ("on_texts", "on_corpora"):
        monkeypatch.setattr(f"tl_contextmix.commands.{module}.load_model", interrupt)
    for words, more in (
        ("check causal-lm", ""),
        ("scan causal-lm rows.csv", ""),
        ("scan causal-lm rows.csv -o heads", "; run the same command to resume"),
        ("mine causal-lm corpus.txt -o mined", "; run the same command to resume"),
    ):
        assert main(words.split()) == 130
        assert capsys.readouterr().err == f"tl-contextmix: interrupted{more}\n"


def test_sentences_too_short_to_blank_are_warned_of(causal: Any) -> None:
    with pytest.warns(ContextMixWarning, match="no sentence has at least two tokens") as caught:
        found = cm.compare(causal, ["the keys"], methods=["attention"])
    assert len(caught) == 1
    assert all(math.isnan(row.value) for row in found.rows)
    with pytest.warns(ContextMixWarning, match="no sentence has at least two tokens"):
        cm.faithfulness(causal, "the keys", cm.attention(causal, "the keys", heads=False))


def test_texts_that_ask_for_nothing_are_dropped_if_wished() -> None:
    model, texts = cm.load_demo("masked-lm"), ["the keys [MASK] old .", "the keys are old ."]
    with pytest.raises(cm.InvalidInput, match="0 masks in 'the keys are old"):
        cm.compare(model, texts, methods=["attention"])
    kept = cm.compare(
        model, texts, cues=[["keys"], ["keys"]], methods=["attention"], unusable="drop"
    )
    assert (kept.sentences, [text for text, _ in kept.dropped]) == (1, texts[1:])
    alone = cm.compare(model, texts[:1], cues=[["keys"]], methods=["attention"])
    assert [row.value for row in kept.rows] == [row.value for row in alone.rows]


def test_a_model_must_tell_the_sentences_of_a_pair_apart_behind_a_token() -> None:
    model = zoo.build(case_of("gpt2"), dtype=torch.float32)
    for pair, message in (
        # Both are the unknown word.
        (MinimalPair("the cat xyzzy", "the cat zyxxy"), "tokens that differ"),
        (MinimalPair("cat sat", "dog sat"), "no token before the answer"),
        (MinimalPair("the  cat sat", "the cat ran"), "other spaces before the word"),
    ):
        model.cfg.default_prepend_bos = False
        with pytest.raises(cm.InvalidInput, match=message):
            cm.compare(model, [pair], methods=["attention"])


def test_a_method_may_return_the_target_s_row_alone(causal: Any) -> None:
    ask = {
        "whole": cm.value_zeroing,
        "row": lambda model, tokens: cm.value_zeroing(model, tokens).select(target=-1),
    }
    found = cm.compare(causal, demo_pairs(count=3), methods=ask)
    values = {(row.method, row.layer, row.metric): row.values for row in found.rows}
    rows = {key[1:]: value for key, value in values.items() if key[0] == "row"}
    assert rows
    assert all(values[("whole", *key)] == value for key, value in rows.items())


def test_what_a_model_does_not_support_is_left_out_by_name() -> None:
    cases = [case for case in zoo.cases() if case.family == "solu"]
    for case in cases:
        model = zoo.build(case, dtype=torch.float32)
        found = cm.compare(model, ["the cat sat", "a dog ran to"], blank=3)
        names = [name for name, _ in found.left_out]
        assert "value_zeroing" in names
        assert all("SoLU" in reason for _, reason in found.left_out)
        assert {*names, *(cost.method for cost in found.costs)} == {*comparable()}
        assert "Left out" in found.show().html()
        with pytest.raises(cm.UnsupportedModel, match="SoLU"):
            cm.compare(model, ["the cat sat"], methods=["value_zeroing"], blank=3)
    assert bool(cases) == (zoo.major() < 4)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (
            "the keys",
            {},
            r"got a str; expected a list of texts, of rows of token ids",
        ),
        ([], {}, r"a list of texts"),
        (["a cat", MinimalPair("a b", "a c")], {}, r"this input: got a list of MinimalPair, str"),
        (["the keys"], {"methods": ["lime"]}, r"got \['lime'\]; expected a list of some of"),
        (["the keys"], {"methods": []}, r"a list of some of"),
        (["the keys"], {"cues": [[1], [2]]}, r"got \[\[1\], \[2\]\] for 1 sentences"),
        (["the keys", "a cat"], {"cues": [["keys"], []]}, r"at least one cue, positions or texts"),
        (["the keys"], {"cues": ["keys"]}, r"this cues: got \['keys'\]"),
        (["the keys"], {"methods": {}}, r"got \{\}; expected a list of some of"),
        (["the keys"], {"methods": {"mine": lambda m, t: 3}}, r"'mine' cannot be .*got a int"),
        (None, {}, r"this input: got a NoneType; expected a list of texts"),
        ([MinimalPair("these dogs", "this dogs")], {"methods": []}, r"a list of some of"),
        (["the keys"], {"cues": [[7]]}, r"position 7 in sentence 0"),
        (
            [MinimalPair("the keys", "the key")],
            {"cues": [[1]]},
            r"have their own cues",
        ),
        (
            [MinimalPair("the keys", "the key", cues=((0, 3),)), MinimalPair("a b", "a c")],
            {},
            r"1 of 2 pairs with cues",
        ),
        (["the keys"], {"blank": 10**6}, r"got 1000000; expected an integer from 0"),
    ],
)
def test_bad_input(causal: Any, given: Any, options: dict[str, Any], message: str) -> None:
    ask: Any = cm.compare
    with pytest.raises(cm.InvalidInput, match=message):
        ask(causal, given, **{"methods": ["attention"], **options})


def test_other_models_than_the_demos_need_sentences() -> None:
    with pytest.raises(cm.InvalidInput, match="which is not a demo model.*Pass --pairs FILE"):
        compared_page(zoo.build(case_of("gpt2"), dtype=torch.float32))


def test_masked_bad_input() -> None:
    model = cm.load_demo("masked-lm")
    with pytest.raises(cm.InvalidInput, match=r"0 masks in 'the keys'"):
        cm.compare(model, ["the keys"], methods=["attention"])
    pair = MinimalPair("the keys are old .", "the keys is being old .")
    with pytest.raises(cm.InvalidInput, match=r"1 tokens for 'are' and \d for 'is being'"):
        cm.compare(model, [pair], methods=["attention"])
    model.tokenizer.mask_token = None
    with pytest.raises(cm.InvalidInput, match="a masked model needs a mask token"):
        cm.compare(model, [pair], methods=["attention"])


def test_encoder_decoders_are_refused() -> None:
    if zoo.major() == 2:
        pytest.skip("TransformerLens 2 has no encoder-decoder that works")
    model = cm.load_demo("encoder-decoder")
    with pytest.raises(cm.UnsupportedModel, match="two stacks"):
        cm.compare(model, ["the cat sees the dog ."])
    map = cm.attention_norms(model, "the cat sees the dog .", stack="encoder").normalize()
    with pytest.raises(cm.UnsupportedModel, match="faithfulness does not support encoder-decoders"):
        cm.faithfulness(model, "the cat sees the dog .", map)


def test_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: comparable()[name] for name in ("attention", "globenc")}
    monkeypatch.setattr("tl_contextmix.evaluation.compare.comparable", lambda: few)
    page = tmp_path / "page.html"
    pairs = tmp_path / "pairs.jsonl"
    three = demo_pairs(count=3)
    lines = [json.dumps({"sentence_good": one.good, "sentence_bad": one.bad}) for one in three]
    pairs.write_text("\n".join(lines))
    arguments = ["compare", "masked-lm", "--sentences", "2", "-o", str(page)]
    assert main([*arguments, "--words"]) == 0
    shown = capsys.readouterr().out
    assert "over 2 sentences of masked-lm" in shown
    assert shown.rstrip().endswith(str(page))
    assert "Which map to believe" in page.read_text()
    assert main([*arguments, "--pairs", str(pairs)]) == 0
    assert "over 2 sentences" in capsys.readouterr().out
    # Nothing is computed for a page that cannot be written.
    monkeypatch.setattr("tl_contextmix.evaluation.compare.comparable", dict)
    assert main([*arguments[:-1], str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["compare", "--sentences", "0"]) == 2
    assert "at least 1 sentence" in capsys.readouterr().err


# Operations


def test_operations_are_those_of_the_products() -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 5, requires_grad=True)
    assert count_operations(lambda: a @ b) == 2 * 2 * 3 * 5
    assert count_operations(lambda: torch.einsum("ij,jk->ik", a, b)) == 2 * 2 * 3 * 5

    def backward() -> None:
        torch.autograd.grad((a @ b).sum(), b)

    assert count_operations(backward) == 2 * (2 * 2 * 3 * 5)
    with torch.inference_mode():
        assert count_operations(lambda: torch.nn.functional.linear(a, b.T)) == 2 * 2 * 3 * 5
