"""Mining finds what a search through every coefficient finds, and loses nothing on the way."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import zoo
from asked import bound, case_of, view_of

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.core.counters import Memory
from tl_contextmix.errors import ContextMixWarning, FileFormatError
from tl_contextmix.methods.memories import merge_triggers, mining, topk
from tl_contextmix.methods.memories.corpus_formats import open_corpus
from tl_contextmix.methods.memories.shards import TooLong, frame_of
from tl_contextmix.methods.memories.topk import TopK, update_all

pytestmark = pytest.mark.mostly_once

WORDS = "cat sat paris france dog mat the a is of in on".split()


def texts(count: int, seed: int = 0) -> list[str]:
    """Random sentences of 2 to 7 words of the zoo's tokenizers."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 7))) for _ in range(count)]


def every_coefficient(
    model: Any, corpus: list[str], stack: str
) -> list[tuple[int, int, int, int, float]]:
    """One row per layer, neuron, document and position that counts: one document at a time."""
    view = view_of(model)
    before, behind = map(len, frame_of(view, None))
    rows = []
    for document, text in enumerate(corpus):
        trace_of = [name for b in view.stacks[stack] for name in (b.feed_forward.post,)]
        ids = torch.tensor([view.encode(text, None)])
        trace = view.run(make_batch(view, Given(ids)), trace_of)
        for block in view.stacks[stack]:
            found = block.feed_forward.coefficients(trace)[0]
            for pos in range(before, ids.shape[1] - behind):
                for neuron in range(found.shape[1]):
                    value = float(found[pos, neuron])
                    rows.append((block.layer, neuron, document, pos, value))
    return rows


def search(rows: list[Any], k: int, sign: int = 1) -> dict[tuple[int, int], list[Any]]:
    """The k highest positive values of each memory, from all of them."""
    found: dict[tuple[int, int], list[Any]] = {}
    for layer, neuron, document, pos, value in rows:
        if sign * value > 0:
            found.setdefault((layer, neuron), []).append((-sign * value, document, pos))
    return {key: sorted(entries)[:k] for key, entries in found.items()}


def best_of_each(rows: list[Any]) -> list[Any]:
    """The highest positive row of every layer, neuron and document."""
    best: dict[Any, Any] = {}
    for row in rows:
        if row[4] > best.get(row[:3], (0,) * 5)[4]:
            best[row[:3]] = row
    return list(best.values())


def check_frame(
    frame: pandas.DataFrame, rows: list[Any], k: int, sign: int = 1, off: float = 1e-12
) -> None:
    """Every memory has its highest values, at places that have them."""
    expected = search(rows, k, sign)
    known = {(r[0], r[1], r[2], r[3]): r[4] for r in rows}
    groups = dict(list(frame.groupby(["layer", "neuron"])))
    assert groups.keys() == expected.keys()
    for key, group in groups.items():
        best = [-sign * entry[0] for entry in expected[key]]
        assert group["value"].tolist() == pytest.approx(best, rel=1e-9, abs=off)
        assert group["rank"].tolist() == list(range(len(best)))
        places = list(zip(group["document"], group["position"], strict=True))
        assert len(set(places)) == len(places)
        for place, value in zip(places, group["value"], strict=True):
            assert value == pytest.approx(known[(*key, *place)], rel=1e-9, abs=off)


FAMILIES = [("gpt2",), ("llama", "qwen2"), ("bert",), ("t5", "flan", "bart")]


@pytest.mark.every
@pytest.mark.parametrize("families", FAMILIES, ids="/".join)
def test_mining_equals_a_search_through_everything(families: tuple[str, ...], tmp_path: Path):
    case = case_of(*families)
    model, corpus = zoo.build(case), texts(40)
    stack = "encoder" if case.encoder_decoder or case.family == "bert" else "decoder"
    rows = every_coefficient(model, corpus, stack)
    # A document alone is run as in the search. In a batch it is padded, and a host's softmax in
    # float32 then rounds differently: AVX2 adds 8 entries as a vector, the first 7 one by one.
    largest = max(abs(row[4]) for row in rows)
    offs = {1: 1e-12, 3: 1e-12 if bound(case) < 1e-9 else bound(case) * largest}
    for size, off in offs.items():
        options: dict[str, Any] = {"tails": "both", "shard_size": 16, "batch_size": size}
        mined = cm.mine_triggers(model, corpus, out=tmp_path / str(size), k=4, **options)
        check_frame(mined.to_dataframe(tail="positive"), rows, 4, off=off)
        check_frame(mined.to_dataframe(tail="negative"), rows, 4, sign=-1, off=off)
        counts = mined.manifest["counts"]
        assert counts["documents"] == 40
        layers, neurons = len(mined.layers), len(mined.manifest["neurons"]["0"])
        assert counts["positions"] * layers * neurons == len(rows)


def test_best_per_document_and_chosen_neurons(tmp_path: Path):
    model, corpus = zoo.build(case_of("gpt2")), texts(40)
    rows = every_coefficient(model, corpus, "decoder")
    best = best_of_each([row for row in rows if row[0] == 1 and row[1] in (2, 5)])
    mined = cm.mine_triggers(
        model, corpus, out=tmp_path, k=6, unit="document", layer=1, neurons=[2, 5], shard_size=7
    )
    check_frame(mined.to_dataframe(), best, 6)


def test_quadrants_are_the_signs_of_both_branches(tmp_path: Path):
    case = case_of("llama", "qwen2")
    model, corpus = zoo.build(case), texts(20)
    view = view_of(model)
    mined = cm.mine_triggers(model, corpus, out=tmp_path, k=3, tails="quadrants", shard_size=7)
    frame = mined.to_dataframe()
    assert set(frame["tail"]) == {"++", "+-", "-+", "--"}
    signs = {"++": 1, "--": 1, "+-": -1, "-+": -1}
    off = bound(case) * frame["value"].abs().max()  # padded, see above
    for row in frame.sample(60, random_state=0).itertuples():
        ff = view.blocks()[row.layer].feed_forward
        ids = torch.tensor([view.encode(corpus[row.document], None)])
        trace = view.run(make_batch(view, Given(ids)), [ff.pre, ff.pre_linear, ff.post])
        gate, up = (trace[n][0, row.position, row.neuron] for n in (ff.pre, ff.pre_linear))
        assert ("-" if gate < 0 else "+") + ("-" if up < 0 else "+") == row.tail
        value = float(trace[ff.post][0, row.position, row.neuron])
        assert row.value == pytest.approx(value, rel=1e-9, abs=off)
        assert row.value * signs[row.tail] > 0


# The monoid


def random_top(seed: int) -> list[tuple[int, float, int]]:
    """Entries of 5 columns with many ties: column, value, place."""
    draw = random.Random(seed)
    return [(draw.randrange(5), draw.randint(-2, 3) / 2, place) for place in range(seed, 60, 4)]


def filled(entries: list[Any], k: int, *, distinct: bool = False) -> TopK:
    """The state after some entries, one row each: column, value, place and, if distinct, key."""
    top = TopK.zero(5, k, torch.float64, torch.device("cpu"), distinct=distinct)
    scores = torch.full((len(entries), 5), -1.0, dtype=torch.float64)
    for row, (column, value, *_) in enumerate(entries):
        scores[row, column] = value
    places, *keys = torch.tensor([entry[2:] for entry in entries]).T
    counted = torch.ones(len(entries), dtype=torch.bool)

    def looked_up(rows: Any, *_: Any) -> Any:
        return (places[rows], places[rows] * 7, places[rows] * 5, *(key[rows] for key in keys))

    update_all([top], [scores], counted, looked_up, repeats=distinct)
    return top


def merged(parts: list[TopK], order: list[int]) -> TopK:
    """All states in one, merged in an order."""
    return functools.reduce(lambda one, other: one.merge(other), [parts[i] for i in order])


def kept(top: TopK, column: int) -> list[tuple[float, int]]:
    """What a column holds: negative values, places; tokens and hashes belong to the places."""
    here = top.values[column] > -torch.inf
    values, places = top.values[column][here], top.places[column][here]
    assert torch.equal(top.tokens[column][here], places * 7)
    assert torch.equal(top.hashes[column][here], places * 5)
    return list(zip((-values).tolist(), places.tolist(), strict=True))


@pytest.mark.parametrize("k", [1, 3, 20])
def test_updates_and_merges_equal_a_sort_of_everything(k: int):
    parts = [random_top(seed) for seed in range(4)]
    expected = {}
    for column in range(5):
        mine = [(-v, p) for part in parts for c, v, p in part if c == column and v > 0]
        expected[column] = sorted(mine)[:k]
    tops = [filled(part, k) for part in parts]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        whole = merged(tops, order)
        assert {column: kept(whole, column) for column in range(5)} == expected
    one = filled([entry for part in parts for entry in part], k)
    assert torch.equal(one.values, whole.values)
    assert torch.equal(one.places, whole.places)


@pytest.mark.parametrize("together", [1, 500, 2**24])
def test_states_that_are_updated_together_are_those_updated_alone(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "_TOGETHER", together)
    generator = torch.Generator().manual_seed(0)
    widths, counted = (5, 1, 7), torch.ones(30, dtype=torch.bool)
    counted[3] = False
    every, alone = (
        [TopK.zero(width, 4, torch.float64, torch.device("cpu")) for width in widths]
        for _ in range(2)
    )
    for step in range(6):
        # Ties, fewer and fewer of which are new.
        scores = [
            torch.randint(-3, 9, (30, width), generator=generator).double() / (1 + step)
            for width in widths
        ]
        places = torch.randperm(30, generator=generator) + 30 * step

        def locate(rows: Any, *_: Any, places: Any = places) -> Any:
            return places[rows], places[rows] * 7, places[rows] * 5

        update_all(every, scores, counted, locate)
        for one, some in zip(alone, scores, strict=True):
            update_all([one], [some], counted, locate)
        for one, other in zip(every, alone, strict=True):
            assert all(map(torch.equal, one.columns(), other.columns()))
    assert bool((every[0].values > 0).all())


# Division of the work


def test_a_batch_that_shows_nothing_new_is_looked_at_once():
    """One number for each memory; a mask of what is high enough would be a quarter of the batch."""
    generator = torch.Generator().manual_seed(0)
    top = TopK.zero(64, 5, torch.float32, torch.device("cpu"))
    counted, places = torch.ones(512, dtype=torch.bool), torch.arange(512)

    def take(scores: torch.Tensor) -> None:
        update_all([top], [scores], counted, lambda rows, *_: (places[rows],) * 3)

    scores = torch.rand(512, 64, generator=generator)
    take(scores + 1)
    before = top.values.clone()
    with Memory() as meter:
        take(scores)
    assert meter.peak <= scores.nbytes // 50
    assert torch.equal(top.values, before)
    # What does not count may be no number.
    scores[0], counted[0] = torch.nan, False
    scores[7, 3] = 9
    take(scores)
    assert float(top.values[3, 0]) == 9
    assert int(top.places[3, 0]) == 7


def result(folder: Path) -> list[bytes]:
    """The bytes of a finished run."""
    return [(folder / name).read_bytes() for name in ("triggers.parquet", "manifest.json")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, Any], Path]:
    """A model, a corpus on disk, options, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("mined")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join([*texts(150, 1), "", *texts(10, 2)]) + "\n")
    options = {"k": 5, "shard_size": 8, "batch_size": 4, "tails": "both"}
    model = zoo.build(case_of("gpt2"), dtype=torch.float32)
    cm.mine_triggers(model, corpus, out=folder / "whole", **options)
    return model, corpus, options, folder / "whole"


@pytest.mark.parametrize("world_size", [2, 3, 25])
def test_any_number_of_processes_gives_the_same_bytes(shared: Any, world_size: int, tmp_path: Path):
    model, corpus, options, whole = shared
    for rank in reversed(range(world_size)):
        done = cm.mine_triggers(
            model, corpus, out=tmp_path, rank=rank, world_size=world_size, **options
        )
        assert done is None
    merge_triggers(tmp_path)
    assert result(tmp_path) == result(whole)


def test_every_kind_of_corpus_gives_the_same_triggers(shared: Any, tmp_path: Path):
    model, corpus, options, whole = shared
    import datasets

    listed = corpus.read_text().split("\n")[:-1]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in listed)
    (tmp_path / "c.jsonl").write_text(lines)
    pandas.DataFrame({"text": listed}).to_parquet(tmp_path / "c.parquet", row_group_size=9)
    dataset = datasets.Dataset.from_dict({"text": listed})
    pandas.DataFrame({"text": listed}).to_csv(tmp_path / "c.csv", index=False)
    (tmp_path / "c.json").write_text(json.dumps([{"text": text} for text in listed]))
    files = [tmp_path / f"c.{name}" for name in ("jsonl", "parquet", "csv", "json")]
    kinds = [*files, dataset, dataset.to_iterable_dataset(), listed, iter(listed)]
    for index, kind in enumerate(kinds):
        found = cm.mine_triggers(model, kind, out=tmp_path / str(index), **options)
        assert result(found.folder)[0] == result(whole)[0]
        assert found.manifest["corpus"] == json.loads(result(whole)[1])["corpus"]
        if kind in files:  # which are found again
            assert cm.load_triggers(found.folder, model=model).examples(0, 1).triggers


def test_another_batch_size_only_rounds_differently(shared: Any, tmp_path: Path):
    model, corpus, options, whole = shared
    other = cm.mine_triggers(model, corpus, out=tmp_path, **{**options, "batch_size": 16})
    frames = [t.to_dataframe() for t in (cm.load_triggers(whole), other)]
    one, two = (f.set_index(["layer", "neuron", "tail", "rank"]).sort_index() for f in frames)
    assert one.index.equals(two.index)
    assert (one["value"] - two["value"]).abs().max() < 1e-5
    moved = (one[["document", "position"]] != two[["document", "position"]]).any(axis=1)
    # Where the pointer is another one, the values are equal but for rounding.
    places = {
        (*index[:3], row["document"], row["position"]): row["value"]
        for index, row in one.iterrows()
    }
    for index, row in two[moved].iterrows():
        key = (*index[:3], row["document"], row["position"])
        # One that was not among the first k is as high as the last of them.
        last = one.loc[index[:3]]["value"].iloc[-1]
        assert abs(places.get(key, last) - row["value"]) < 1e-5


# Interruptions


def mine_in_child(model: Any, corpus: Path, out: Path, options: dict[str, Any]) -> Any:
    """A real process that mines; it has the model already."""
    context = multiprocessing.get_context("fork")

    def work() -> None:
        torch.set_num_threads(1)
        cm.mine_triggers(model, corpus, out=out, checkpoint_seconds=0.0, **options)
        os._exit(0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = context.Process(target=work)
        child.start()
    return child


def test_killed_at_twenty_random_moments_it_loses_nothing(shared: Any, tmp_path: Path):
    model, corpus, options, whole = shared
    started = time.monotonic()
    child = mine_in_child(model, corpus, tmp_path / "timed", options)
    child.join(60)
    took = time.monotonic() - started
    assert child.exitcode == 0
    draw, kills, finished = random.Random(3), 0, 0
    folder = tmp_path / "0"
    while kills < 20:
        child = mine_in_child(model, corpus, folder, options)
        child.join(draw.uniform(0, took / 2))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join(60)
        if (folder / "manifest.json").exists():
            assert result(folder) == result(whole)
            finished += 1
            folder = tmp_path / str(finished)
    last = mine_in_child(model, corpus, folder, options)
    last.join(60)
    assert last.exitcode == 0
    assert result(folder) == result(whole)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "triggers.parquet"]


def stop_after_writing(patch: pytest.MonkeyPatch, when: Callable[[list[bool]], bool]) -> list[bool]:
    """Stops a run behind the parts that `when` chooses, from which of those so far were done."""
    save, written = mining.save_part, []

    def stop(part: Any, folder: Path) -> None:
        save(part, folder)
        written.append(part.done)
        if when(written):
            raise KeyboardInterrupt

    patch.setattr(mining, "save_part", stop)
    return written


def test_one_shard_at_a_time_gives_the_same_bytes(
    shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, corpus, options, whole = shared
    written = stop_after_writing(monkeypatch, lambda written: not written[-1])
    while True:
        try:
            cm.mine_triggers(model, corpus, out=tmp_path, checkpoint_seconds=0.0, **options)
            break
        except KeyboardInterrupt:
            continue
    assert written.count(False) == 21  # 161 documents in shards of 8
    assert result(tmp_path) == result(whole)
    again = cm.mine_triggers(model, corpus, out=tmp_path, **options)
    assert result(again.folder) == result(whole)


@pytest.fixture
def stopped(shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run that was stopped after its third shard."""
    model, corpus, options, _ = shared
    with monkeypatch.context() as patch:
        stop_after_writing(patch, lambda written: len(written) == 3)
        with pytest.raises(KeyboardInterrupt):
            cm.mine_triggers(model, corpus, out=tmp_path, checkpoint_seconds=0.0, **options)
    return model, corpus, options, tmp_path


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": 6}, "differs in options: k: got 6; expected 5"),
        ({"tails": "positive"}, "differs in options: tails"),
        ({"layer": 0}, r"differs in options: layers: got \[0\]"),
        ({"batch_size": 5}, "differs in options: batch_size"),
        ({"too_long": "skip"}, "differs in options: too_long"),
        ({"prepend_bos": False}, "differs in tokenizer"),
    ],
    ids=str,
)
def test_other_options_are_refused_by_name(stopped: Any, change: dict[str, Any], named: str):
    model, corpus, options, folder = stopped
    with pytest.raises(cm.InvalidInput, match=named):
        cm.mine_triggers(model, corpus, out=folder, **{**options, **change})


def test_another_model_tokenizer_or_corpus_is_refused_by_name(
    stopped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, corpus, options, folder = stopped
    other = zoo.build(case_of("gpt2"), dtype=torch.float32, seed=1)
    with pytest.raises(cm.InvalidInput, match="differs in weights"):
        cm.mine_triggers(other, corpus, out=folder, **options)
    with monkeypatch.context() as patch:
        patch.setattr(model, "tokenizer", zoo.build(case_of("llama")).tokenizer)
        with pytest.raises(cm.InvalidInput, match="differs in tokenizer"):
            cm.mine_triggers(model, corpus, out=folder, **options)
    lines = corpus.read_text().split("\n")
    changed = tmp_path / "changed.txt"
    changed.write_text("\n".join([lines[0], "the cat", *lines[2:]]))
    with pytest.raises(cm.InvalidInput, match="other documents among those from 0 to 7"):
        cm.mine_triggers(model, changed, out=folder, **options)
    changed.write_text("\n".join(lines[:9]) + "\n")
    with pytest.raises(cm.InvalidInput, match="not the one that was mined before"):
        cm.mine_triggers(model, changed, out=folder, **options)
    with pytest.raises(cm.InvalidInput, match="another division"):
        cm.mine_triggers(model, corpus, out=folder, rank=0, world_size=2, **options)
    # Left alone it goes on and ends as if nothing had been asked.
    cm.mine_triggers(model, corpus, out=folder, **options)


def test_a_finished_run_refuses_another_corpus(shared: Any, tmp_path: Path):
    model, corpus, options, whole = shared
    longer = tmp_path / "longer.txt"
    longer.write_text(corpus.read_text() + "the cat sat\n")
    with pytest.raises(cm.InvalidInput, match="not the one that was mined"):
        cm.mine_triggers(model, longer, out=whole, **options)


# What cannot be used


def test_a_full_disk_is_named_and_what_was_written_before_stays(stopped: Any):
    model, corpus, options, folder = stopped
    import resource

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(cm.InvalidInput, match=r"cannot be written: got .*Free some space"):
            cm.mine_triggers(model, corpus, out=folder, checkpoint_seconds=0.0, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_documents_that_cannot_be_used(tmp_path: Path):
    model = zoo.build(case_of("gpt2"))
    corpus = tmp_path / "c.jsonl"
    n_ctx = view_of(model).n_ctx
    lines = [
        b'{"text": "the cat sat"}',
        b"{broken",
        b'{"other": "x"}',
        b'{"text": 3}',
        b'"text"',
        b"\xff\xfe",
        b"",
        b'{"text": "  "}',
        json.dumps({"text": "cat " * (n_ctx + 5)}).encode(),
        b'{"text": "paris"}',
    ]
    corpus.write_bytes(b"\n".join(lines))
    for index in range(1, 6):
        (tmp_path / "one.jsonl").write_bytes(lines[index])
        with pytest.raises(cm.InvalidInput, match=r"document 0 of .*one.jsonl cannot be used"):
            cm.mine_triggers(model, tmp_path / "one.jsonl", out=tmp_path / "o", k=2)
    with pytest.raises(cm.InvalidInput, match=rf"document 8 .*got {n_ctx + 6} tokens"):
        cm.mine_triggers(
            model, corpus, out=tmp_path / "long", malformed="skip", too_long="error", k=2
        )
    ways: list[tuple[TooLong, int]] = [("cut", 6), ("skip", 0)]
    for too_long, cut in ways:
        found = cm.mine_triggers(
            model, corpus, out=tmp_path / too_long, malformed="skip", too_long=too_long, k=2
        )
        counts = found.manifest["counts"]
        assert counts["documents"] == 10
        assert (counts["malformed"], counts["empty"], counts["too_long"]) == (5, 2, 1)
        assert counts["cut_tokens"] == cut
        assert n_ctx is not None
        assert counts["tokens"] == 4 + 2 + (n_ctx if cut else 0)
        assert str(counts["malformed"]) in repr(found)


def test_special_positions_count_only_when_asked(tmp_path: Path):
    model, corpus = zoo.build(case_of("gpt2")), texts(9)
    plain = cm.mine_triggers(model, corpus, out=tmp_path / "a", k=50, layer=0)
    framed = cm.mine_triggers(model, corpus, out=tmp_path / "b", k=50, layer=0, special=True)
    assert set(plain.to_dataframe()["position"]) == set(range(1, 8))
    assert 0 in set(framed.to_dataframe()["position"])


@pytest.mark.parametrize(
    ("corpus", "options", "message"),
    [
        (3, {}, "got a int; expected the path"),
        ("nowhere.txt", {}, "nowhere.txt, which is no file"),
        (["a"], {"column": "text"}, "column='text' of a list"),
        (["the cat", 3], {}, "document 1 of a list cannot be used: got a int, no text"),
        (["the cat"], {"k": 0}, "this k: got 0"),
        (["the cat"], {"rank": 2, "world_size": 2}, "rank=2 of world_size=2"),
        (["the cat"], {"layer": 9}, "no such layer"),
        (["the cat"], {"neurons": 10**6}, "neuron"),
        (["the cat"], {"tails": "quadrants"}, "there are no quadrants"),
        (["the cat"], {"stack": "encoder"}, "no such stack"),
    ],
    ids=str,
)
def test_bad_questions_are_refused(
    shared: Any, corpus: Any, options: dict[str, Any], message: str, tmp_path: Path
):
    model = shared[0]
    with pytest.raises(cm.InvalidInput, match=message):
        cm.mine_triggers(model, corpus, out=tmp_path, **options)


def test_more_triggers_than_memory_may_hold_are_warned_of(
    shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tl_contextmix.methods.memories.miner._MANY_BYTES", 100_000)
    with pytest.warns(ContextMixWarning, match=r"the 1,000 highest contexts of \d+ memories"):
        cm.mine_triggers(shared[0], ["the cat sat"], out=tmp_path / "mined", k=1000)


def test_parts_that_do_not_fit_are_not_merged(shared: Any, tmp_path: Path):
    model, corpus, options, _ = shared
    with pytest.raises(cm.InvalidInput, match="got no part"):
        merge_triggers(tmp_path)
    cm.mine_triggers(model, corpus, out=tmp_path, rank=0, world_size=2, **options)
    with pytest.raises(cm.InvalidInput, match=r"the parts of processes \[0\]"):
        merge_triggers(tmp_path)
    with pytest.raises(FileFormatError, match="1 parts of a run"):
        cm.load_triggers(tmp_path)
    (tmp_path / "part-00001-of-00002.safetensors").write_bytes(b"something else")
    with pytest.raises(FileFormatError, match="cannot read"):
        merge_triggers(tmp_path)


def test_documents_are_picked_from_every_kind_of_corpus(shared: Any, tmp_path: Path):
    import datasets

    whole = [document.text for document in open_corpus(shared[1]).documents()]
    assert len(whole) == 161
    lines = [json.dumps({"text": text}) for text in whole]
    lines[5] = "{broken"  # what is not asked for is not read
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    pandas.DataFrame({"text": whole}).to_parquet(tmp_path / "c.parquet", row_group_size=9)
    dataset = datasets.Dataset.from_dict({"text": whole})
    kinds = [shared[1], tmp_path / "c.jsonl", tmp_path / "c.parquet", dataset, whole]
    sizes = [shared[1].stat().st_size, (tmp_path / "c.jsonl").stat().st_size, 161, 161, 161]
    for kind, size in zip([*kinds, dataset.to_iterable_dataset()], [*sizes, None], strict=True):
        corpus = open_corpus(kind)
        picked = corpus.pick([157, 3], [8, 999])
        assert {n: d.text for n, d in picked.items()} == {n: whole[n] for n in (3, 8, 157)}
        assert corpus.size() == size
        if size is not None:
            assert sum(document.size for document in corpus.documents()) == size
        with pytest.raises(cm.InvalidInput, match="no document 161"):
            corpus.pick([161])
