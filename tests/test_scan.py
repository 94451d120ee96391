"""Scans: means over many prompts, held against each prompt alone; stopped, resumed, misused."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import zoo
from asked import case_of, shared, view_of
from scipy import stats

import tl_contextmix as cm
from tl_contextmix.__main__ import main
from tl_contextmix.adapters.questions import Answer
from tl_contextmix.core.statistics import Moments, common_tail, t_quantile
from tl_contextmix.demo_models.pairs import minimal_pairs
from tl_contextmix.evaluation import demo_pairs
from tl_contextmix.evaluation import scan as scanning
from tl_contextmix.evaluation.prompt_rows import read_row
from tl_contextmix.results import Scan
from tl_contextmix.results.components import KINDS

pytestmark = pytest.mark.mostly_once

LEVELS: tuple[Any, ...] = ("layer", "head", "ff_neuron")
# Unlike lengths; one token, alternatives, an answer of two tokens, the model's own best; a foil.
ROWS: list[Any] = [
    {"prompt": [5, 9, 17, 3], "target": 9, "foil": 7, "category": "a"},
    {"prompt": [5, 8], "target": [9, 4], "foil": [7, 3], "category": "b"},
    {"prompt": [6, 8, 11], "target": 9, "category": "a"},
    {"prompt": [5, 9, 13, 12, 3], "target": None, "category": "a"},
    {"prompt": [7, 7, 3], "target": 5, "foil": 7, "category": "b"},
]


def alone(model: Any, row: dict[str, Any], by: Any) -> Any:
    """The contributions to one prompt."""
    asked: dict[str, Any] = {n: frozenset(v) if isinstance(v, list) else v for n, v in row.items()}
    given = torch.tensor([row["prompt"]])
    del asked["prompt"], asked["category"]
    return cm.log_prob_contributions(model, given, by=by, **asked)


@pytest.mark.every
@pytest.mark.parametrize("case", zoo.kinds(), ids=str)
def test_means_are_those_of_each_prompt_alone(case: zoo.Case) -> None:
    model, _ = shared(case)
    view = view_of(model)
    levels: Any = [by for by in LEVELS if by != "ff_neuron" or view.blocks()[0].feed_forward]
    rows = ROWS
    if view.base_stack(None) == "encoder":
        mask = view.special_ids().get("mask")
        if mask is None:
            pytest.skip("a model without a tokenizer has no mask")
        rows = [{**row, "prompt": [mask, *row["prompt"]]} for row in ROWS]
    found = cm.scan(model, rows, by=levels, batch_size=2)
    assert found.categories == ("a", "b")
    assert found.prompts.tolist() == [3, 2]
    for by in levels:
        part = found.of(by)
        for place, name in enumerate(found.categories):
            each = [alone(model, row, by) for row in rows if row["category"] == name]
            scores = torch.cat([one.scores for one in each]).double()
            assert torch.allclose(part.mean[place], scores.mean(0), rtol=0, atol=1e-9)
            reach = stats.t.ppf(0.975, len(scores) - 1) * scores.std(0) / len(scores) ** 0.5
            assert torch.allclose(part.high[place] - scores.mean(0), reach, rtol=0, atol=1e-8)
            assert torch.allclose(scores.mean(0) - part.low[place], reach, rtol=0, atol=1e-8)
            own = ~each[0].components.is_bias()[0]
            order = [stats.rankdata(-row.numpy(), method="ordinal") for row in scores[:, own]]
            if by == "head":  # neurons that are silent are equal, and in some order
                mean = torch.tensor(sum(order) / len(order))
                assert torch.allclose(part.mean_rank[place, own], mean)
            assert bool(part.mean_rank[place, ~own].isnan().all())
            log_probs = torch.stack([one.log_prob[0] for one in each]).double()
            assert abs(float(part.log_prob[place] - log_probs.mean())) <= 1e-9
            assert part.components.kind.equal(each[0].components.kind[:1])
    every = torch.cat([alone(model, row, "head").scores for row in rows]).double()
    whole = found.of("head").pooled()
    assert torch.allclose(whole.mean[0], every.mean(0), rtol=0, atol=1e-9)
    assert torch.allclose(whole.squares[0], every.var(0) * 4, rtol=1e-9, atol=1e-12)


@pytest.mark.every
def test_an_answer_of_several_tokens_is_added_up() -> None:
    model, _ = shared(case_of("gpt2"))
    view = view_of(model)
    text = torch.tensor([[5, 9, 17]])
    found = cm.scan(model, [([5, 9, 17], 4), ([5, 9], 9)], by="head", unusable="drop")
    assert found.prompts.tolist() == [2]
    answer = cm.log_prob_contributions(model, text, target=[[4, 6]], by="head").summed()
    question = scanning.ask(view, scanning.read_batch(view, scanning.Given(text)), Answer([[4, 6]]))
    together = scanning._together([question, question])
    done = scanning.run_predictions(together, scanning.Given(text), "head")
    parts = [
        scanning.contributions_to(some, "head") for some in done.predictions("frozen+beta", 2**30)
    ]
    both = scanning.join_rows(parts).summed()
    assert torch.allclose(both.scores, answer.scores.expand(2, -1), rtol=0, atol=1e-9)


def test_memory_does_not_grow_with_the_number_of_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = shared(case_of("gpt2"))
    sizes, ahead = [], []
    pulled = [0]

    class Counted(scanning._Scanner):
        def take(self, shard: Any, name: str) -> None:
            super().take(shard, name)
            ahead.append(pulled[0] - self.read)

    def prompts(count: int) -> Iterator[Any]:
        for number in range(count):
            pulled[0] = number + 1
            yield {"prompt": [5, 9, number % 7], "target": 3, "foil": 4, "category": number % 2}

    monkeypatch.setattr(scanning, "_Scanner", Counted)
    for count in (8, 64):
        out = tmp_path / f"{count}.safetensors"
        found = cm.scan(model, prompts(count), out=out, shard_size=4, batch_size=4, by=LEVELS)
        assert found.read == int(found.prompts.sum()) == count
        tensors = [v for v in vars(found).values() if isinstance(v, torch.Tensor)]
        sizes.append((sum(one.numel() for one in tensors), found.components.shape))
    assert ahead == [0] * (2 + 16)  # never more than one shard is held
    assert sizes[0] == sizes[1]


def scan_in_child(model: Any, out: Path, take: Any = None) -> Any:
    """A real process that scans; it has the model already."""

    def work() -> None:
        torch.set_num_threads(1)
        scanning._Scanner.take = take or scanning._Scanner.take
        cm.scan(model, ROWS * 2, out=out, shard_size=3, checkpoint_seconds=0)
        os._exit(0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
    return child


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Any, list[Any], Path]:
    """A scan of ten rows whose process was killed in its third shard."""
    model, _ = shared(case_of("gpt2"))
    out, take = tmp_path / "a.safetensors", scanning._Scanner.take
    there = multiprocessing.get_context("fork").Event()

    def wait(self: Any, shard: Any, name: str) -> None:
        if shard.index == 2:
            there.set()
            time.sleep(60)
        take(self, shard, name)

    child = scan_in_child(model, out, wait)
    assert there.wait(60)
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    return model, ROWS * 2, out


def test_killed_at_random_moments_it_loses_nothing(tmp_path: Path) -> None:
    model, _ = shared(case_of("gpt2"))
    whole = cm.scan(model, ROWS * 2, shard_size=3)
    started = time.monotonic()
    child = scan_in_child(model, tmp_path / "timed")
    child.join(60)
    took = time.monotonic() - started
    assert child.exitcode == 0
    draw, kills, out = random.Random(5), 0, tmp_path / "0"
    while kills < 4:
        child = scan_in_child(model, out)
        child.join(draw.uniform(0, took))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join(60)
        if out.exists() and Scan.load(out).finished:
            assert Scan.load(out).equals(whole)
            out = tmp_path / str(kills)
    assert cm.scan(model, ROWS * 2, out=out, shard_size=3).equals(whole)
    kept = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert {path.name for path in tmp_path.iterdir()} - kept <= {f".{name}.lock" for name in kept}


def test_a_scan_that_was_stopped_goes_on(
    stopped: tuple[Any, list[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows, out = stopped
    part = Scan.load(out)
    assert (part.read, part.finished) == (6, False)
    assert "not finished" in repr(part)
    shards = []
    take = scanning._Scanner.take
    monkeypatch.setattr(
        scanning._Scanner,
        "take",
        lambda self, shard, name: (shards.append(shard.index), take(self, shard, name))[1],
    )
    whole = cm.scan(model, rows, shard_size=3)
    assert shards == [0, 1, 2, 3]
    resumed = cm.scan(model, rows, out=out, shard_size=3)
    assert shards[4:] == [2, 3]
    assert resumed.equals(whole)
    assert Scan.load(out).equals(whole)
    again = cm.scan(model, rows, out=out, shard_size=3)
    assert len(shards) == 6
    assert again.equals(whole)
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]


def test_another_scan_is_not_mixed_with_the_first(stopped: tuple[Any, list[Any], Path]) -> None:
    model, rows, out = stopped
    with pytest.raises(cm.InvalidInput, match="holds a run that differs in options: norm"):
        cm.scan(model, rows, out=out, shard_size=3, norm="recompute")
    with pytest.raises(cm.InvalidInput, match="other rows among the first 6"):
        cm.scan(model, rows[::-1], out=out, shard_size=3)
    with pytest.raises(cm.InvalidInput, match="fewer than the 6 rows"):
        cm.scan(model, rows[:3], out=out, shard_size=3)
    cm.scan(model, rows, out=out, shard_size=3)
    with pytest.raises(cm.InvalidInput, match="12 rows where there were 10|among the first 12"):
        cm.scan(model, [*rows, *rows], out=out, shard_size=3)
    out.write_bytes(b"nothing")
    with pytest.raises(cm.errors.FileFormatError):
        cm.scan(model, rows, out=out, shard_size=3)


def test_rows_that_cannot_be_used_stop_it_or_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cm.load_demo("causal-lm")
    rows: list[Any] = [
        ("the keys to the cabinet", " are", " is"),
        ("the keys", " are red", " is"),
        {"question": "the keys"},
        ("the keys", " are", [" is", " aardvark"]),
        ("", " are"),
        object(),
        ("the keys", [[5, 6], [7, 8]]),
        (["the keys", "the cabinet"], " are"),
        {"good": "the keys are", "bad": "the keys is", "cues": 5},
        {"one_prefix_prefix": 5, "one_prefix_word_good": "are", "one_prefix_word_bad": "is"},
        {"requested_rewrite": {"prompt": "{} is", "subject": "rome"}},
    ]
    with pytest.raises(cm.InvalidInput, match=r"row 1 of a list cannot be used: .*unusable='drop'"):
        cm.scan(model, rows)
    with pytest.raises(cm.InvalidInput, match=r"no such by: got \[\]"):
        cm.scan(model, rows, by=[])
    found = cm.scan(model, rows, unusable="drop")
    assert (found.read, found.skipped, found.prompts.tolist()) == (11, 10, [1])
    assert [reason.split(" of ")[0] for reason in found.reasons] == [
        f"row {n}" for n in range(1, 11)
    ]
    assert "10 of 11 rows skipped" in repr(found)
    assert bool(found.low.isnan().all())  # one prompt says nothing of others
    with pytest.raises(cm.InvalidInput, match="no prompt to explain"):
        cm.scan(model, rows[1:], unusable="drop")
    with pytest.raises(cm.InvalidInput, match="no prompt to explain: got 0 rows"):
        cm.scan(model, [])
    text = tmp_path / "a.txt"
    text.write_text("the keys\n")
    with pytest.raises(cm.InvalidInput, match="a text; expected the path of a jsonl"):
        cm.scan(model, text)
    lines = tmp_path / "a.jsonl"
    lines.write_text(f"\n{json.dumps(rows[0])}\n\nno JSON\n")
    blank = cm.scan(model, lines, unusable="drop", out=tmp_path / "b", shard_size=1, by="head")
    assert (blank.read, blank.skipped, blank.prompts.tolist()) == (4, 1, [1])
    assert "no JSON" in blank.reasons[0]
    # Whom the first such row stopped may go on without it.
    out = tmp_path / "a.safetensors"
    with pytest.raises(cm.InvalidInput):
        cm.scan(model, rows, out=out, shard_size=1, checkpoint_seconds=0)
    again = cm.scan(model, rows, out=out, shard_size=1, unusable="drop")
    assert again.prompts.tolist() == [1]
    monkeypatch.setattr(scanning, "_MOST_CATEGORIES", 2)
    with pytest.raises(cm.InvalidInput, match="too many categories: got more than 2"):
        cm.scan(model, [("the keys", " are", " is", n) for n in range(3)], by="head")


PAIR = {"sentence_good": "the keys are old .", "sentence_bad": "the keys is old ."}
PREFIX = {
    "one_prefix_prefix": "the keys",
    "one_prefix_word_good": "are",
    "one_prefix_word_bad": "is",
}
FACT = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
}
KNOWN = {
    "known_id": 0,
    "subject": "Vinson Massif",
    "attribute": "Antarctica",
    "template": "{} is located in the continent of",
    "prediction": " of Antarctica. It is",
    "prompt": "Vinson Massif is located in the continent of ",
    "relation_id": "P30",
}
IOI = "When Mary and John went to the store, John gave a drink to Mary"


@pytest.mark.parametrize(
    ("row", "text", "target", "foil", "category"),
    [
        ({**PAIR, **PREFIX, "UID": "sva"}, "the keys", " are", " is", "sva"),
        (FACT, "The mother tongue of Danielle Darrieux is", " French", " English", "P103"),
        (KNOWN, "Vinson Massif is located in the continent of", " Antarctica", None, "P30"),
        (
            {"prompt": "Paris is in", "target_true": " France", "target_false": " Peru"},
            *("Paris is in", " France", " Peru", ""),
        ),
        ({"text": IOI, "IO": "Mary", "S": "John"}, IOI[:-5], " Mary", " John", ""),
        ({"ioi_sentences": IOI}, IOI[:-5], " Mary", " John", ""),
        (
            {"prompt": IOI[:-5], "choices": ["Mary", "John"], "answerKey": 0},
            *(IOI[:-5], " Mary", {" John"}, ""),
        ),
        (["a", " b"], "a", " b", None, ""),
        (["a", [" b", " c"], " d", "e"], "a", {" b", " c"}, " d", "e"),
        ({"prompt": "a", "target": 3, "foil": float("nan"), "category": 1}, "a", 3, None, "1"),
        ({"prompt": "a", "target": "", "foil": ""}, "a", None, None, ""),
    ],
)
def test_published_formats(row: Any, text: str, target: Any, foil: Any, category: str) -> None:
    found = read_row(json.dumps(row), {}, causal=True)
    assert (found.text, found.target, found.foil, found.category) == (text, target, foil, category)


def test_rows_of_no_format_are_named() -> None:
    found = read_row(
        json.dumps({"q": "a", "a": " b", "prompt": "c"}),
        {"prompt": "q", "target": "a"},
        causal=True,
    )
    assert (found.text, found.target) == ("a", " b")
    for row, message in (
        ({"question": "a"}, r"got \['question'\]; expected columns prompt"),
        ("a", "got 'a'"),
        ([], r"got \[\]"),
        ({"prompt": "a", "choices": ["b"], "answerKey": 4}, "the number of the right one"),
        ({"ioi_sentences": "the cat sat"}, "one name twice"),
        ({"text": "a cat", "IO": "Mary", "S": "John"}, "its indirect object IO"),
        ({"requested_rewrite": {"prompt": "{} is"}}, "requested_rewrite"),
        ({"sentence_good": "a", "sentence_bad": "a"}, "not a minimal pair"),
    ):
        with pytest.raises(cm.InvalidInput, match=message):
            read_row(json.dumps(row), {}, causal=True)
    with pytest.raises(cm.InvalidInput, match="a column 'x', the target"):
        read_row(json.dumps({"prompt": "a"}), {"target": "x"}, causal=True)


def test_minimal_pairs_differ_in_one_token(tmp_path: Path) -> None:
    model, masked = cm.load_demo("causal-lm"), cm.load_demo("masked-lm")
    other = {"sentence_good": "the keys are old .", "sentence_bad": "the keys is red ."}
    path = tmp_path / "blimp.jsonl"
    path.write_text("\n".join(json.dumps({**row, "UID": "sva"}) for row in (PAIR, other)))
    with pytest.raises(cm.InvalidInput, match="row 1 .*more than one token that differs"):
        cm.scan(model, path)
    found = cm.scan(model, path, unusable="drop")
    assert (found.categories, found.skipped) == (("sva",), 1)
    expected = cm.log_prob_contributions(model, "the keys", target=" are", foil=" is", by="head")
    assert torch.allclose(found.of("head").mean[0].float(), expected.scores[0], atol=1e-5)
    # A masked model is asked for the word between, whatever prefix the row names.
    filled = cm.scan(masked, [{**PAIR, **PREFIX}], by="head")
    blank = f"the keys {masked.tokenizer.mask_token} old ."
    expected = cm.log_prob_contributions(masked, blank, target=" are", foil=" is", by="head")
    assert torch.allclose(filled.mean[0].float(), expected.scores[0], atol=1e-5)
    pairs = demo_pairs(count=3)
    assert cm.scan(model, pairs, by="head").prompts.tolist() == [3]


@pytest.fixture(scope="module")
def grammar() -> Scan:
    """A scan of what the demo model learned: agreement, reflexives, facts."""
    rows = [
        {"sentence_good": good, "sentence_bad": bad, "UID": kind}
        for kind in ("agreement", "reflexive", "fact")
        for good, bad, _, _ in minimal_pairs(kind, 60, lures=False, seed=0)
    ]
    return cm.scan(cm.load_demo("causal-lm"), rows, by=LEVELS)


def test_the_heads_it_finds_are_those_that_knockout_confirms(grammar: Scan) -> None:
    model = cm.load_demo("causal-lm")
    pairs = [
        cm.evaluation.MinimalPair(*pair[:2]) for pair in minimal_pairs("agreement", 24, False, 9)
    ]
    asked: dict[str, Any] = {
        "target": [f" {pair.answer}" for pair in pairs],
        "foil": [f" {pair.wrong}" for pair in pairs],
    }
    texts = [pair.prefix for pair in pairs]
    ranked = [(one["layer"], one["head"]) for one in grammar.top(16, category="agreement")]
    means = {}
    for name, heads in (("best", ranked[:2]), ("worst", ranked[-2:])):
        out = cm.knockout(model, texts, heads=heads, controls=4, **asked)
        means[name] = float((out.before - out.after)[:, 0].mean())
        means["random"] = float((out.before[:, None] - out.controls)[..., 0].mean())
    assert means["best"] > 3 * max(means["random"], means["worst"], 0.5)


def test_what_categories_share(grammar: Scan) -> None:
    shared_heads = grammar.of("head").shared(3)
    assert len(shared_heads) == 4  # three pairs, and all
    for row in shared_heads.itertuples():
        best = [
            {one["component"] for one in grammar.top(3, category=name, level="head")}
            for name in row.categories
        ]
        assert set(row.components) == set.intersection(*best)
        assert row.shared == len(row.components)
        if len(row.categories) == 2:
            assert row.expected == pytest.approx(9 / 16)
            assert row.p == pytest.approx(stats.hypergeom.sf(row.shared - 1, 16, 3, 3))
    assert set(grammar.shared().level) == set(LEVELS)
    with pytest.raises(cm.InvalidInput, match="shared by one category"):
        grammar.pooled().shared()


def test_a_scan_is_a_result_like_others(grammar: Scan, tmp_path: Path) -> None:
    assert Scan.load(grammar.save(tmp_path / "a")).equals(grammar)
    frame = grammar.to_dataframe()
    assert len(frame) == grammar.mean.numel()
    one = frame[(frame.component == "L3H0") & (frame.category == "agreement")].iloc[0]
    best = grammar.top(1, category="agreement")[0]
    assert (best["component"], best["mean"]) == ("L3H0", one["mean"])
    assert one["rank"] == 1
    assert grammar.select(category="fact").categories == ("fact",)
    for text in (grammar.sentence(), repr(grammar), str(grammar.panels())):
        assert "180" in text
    assert "first in" in grammar.sentence()
    assert grammar.show()._repr_html_().count("agreement") > 2
    assert isinstance(grammar.shared(), pandas.DataFrame)
    assert {KINDS[kind] for kind in grammar.of("head").components.kind[0].tolist()} == {
        "attn",
        "attn bias",
    }
    with pytest.raises(cm.InvalidInput, match="no such level"):
        grammar.of("head").of("ff_neuron")
    with pytest.raises(cm.InvalidInput, match="category axis"):
        grammar.top(category="nothing")


def test_the_command_line_scans_and_explains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out, page = (tmp_path / name for name in ("rows.csv", "scan.safetensors", "page.html"))
    rows.write_text(
        "question,target,foil,number\n"
        "the keys to the cabinet, are, is,plural\n"
        "the key to the cabinets, is, are,singular\n"
        "the key, is red, are red,singular\n"
        "the key, is, is red,singular\n"
    )
    words = ["scan", "causal-lm", str(rows), "--by", "head", "-o", str(out), "--page", str(page)]
    columns = ["--columns", "prompt=question,category=number"]
    assert main([*words, *columns]) == 2
    assert "row 3 of" in capsys.readouterr().err
    assert main([*words, *columns, "--drop-unusable"]) == 0
    printed = capsys.readouterr().out
    assert "3 prompts in 2 categories, 1 of 4 rows skipped" in printed
    assert "L3H0 adds most" in printed
    assert printed.splitlines()[-1] == str(page)
    assert Scan.load(out).prompts.tolist() == [1, 2]
    assert main([*words, "--columns", "prompt"]) == 2
    assert "this names no column: got 'prompt'; expected NAME=COLUMN" in capsys.readouterr().err
    text = ["explain", "causal-lm", "the keys to the cabinet", "--target", " are", "--foil", " is"]
    assert main([*text, "-o", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "ttention in layer 3 (" in printed
    assert "\u201care\u201d rather than \u201cis\u201d" in printed
    assert "Knockout of the best components" in printed
    assert "Which components wrote the answer?" in page.read_text()
    assert main(["explain", "masked-lm", "the keys are old ."]) == 0
    assert "no mask" in capsys.readouterr().out


def test_statistics() -> None:
    for freedom in (1, 2, 5, 30, 100, 101, 10**5):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-12)
    rows = torch.randn(9, 4, dtype=torch.float64) + 100
    parts = Moments.of(rows[:2]).merge(Moments.of(rows[2:3])).merge(Moments.of(rows[3:]))
    assert torch.allclose(parts.mean, rows.mean(0))
    assert torch.allclose(parts.squares, rows.var(0) * 8)
    assert common_tail(30, 5, 2, 2) == pytest.approx(stats.hypergeom.sf(1, 30, 5, 5))
    assert common_tail(30, 5, 4, 0) == pytest.approx(1)
