"""A corpus is what it says it is: nothing is read as text that is none, nothing is left out."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
import torch
import zoo
from asked import case_of, view_of
from test_mining import texts

import tl_contextmix as cm
from tl_contextmix.errors import ContextMixWarning
from tl_contextmix.methods.memories import corpus_formats, merge_triggers, shards
from tl_contextmix.methods.memories.corpus_formats import open_corpus

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def model() -> Any:
    """A model that takes no time."""
    return zoo.build(case_of("gpt2"), dtype=torch.float32)


def read(corpus: Any, column: str | None = None) -> list[Any]:
    """Texts, or what is the matter."""
    return [d.text if d.text is not None else d for d in open_corpus(corpus, column).documents()]


def write(path: Path, data: bytes) -> Path:
    """A file of these bytes."""
    path.write_bytes(data)
    return path


def test_lines_end_at_line_feeds_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", "\ufeffthe cat\r\ndog\u2028sat\x0b\x85 a\n\nmat".encode())
    assert read(text) == ["the cat", "dog\u2028sat\x0b\x85 a", "", "mat"]
    lines = write(
        tmp_path / "a.jsonl", '\ufeff{"text": "the cat"}\r\n{"text": "a\\u2028"}'.encode()
    )
    assert read(lines) == ["the cat", "a\u2028"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\xff", "no UTF-8 (invalid start byte at byte 0)"),
        (b'{"text": "\\ud800"}', "no Unicode text (surrogates not allowed at character 0)"),
        (b'{"a":' * 10**5, "no JSON (maximum recursion"),
        (b'{"text": NaN}', "a float, no text"),
        (b'{"text": null}', "a NoneType, no text"),
        (b'["a"]', "a list, no object with columns"),
        (b'{"n": ' + b"1" * 5000 + b"}", "no JSON (Exceeds the limit"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_document_says_why(data: bytes, problem: str, tmp_path: Path) -> None:
    (found,) = read(write(tmp_path / "a.jsonl", data))
    assert found.problem.startswith(problem)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({"a": "the cat"}, r"Pass one of its parts: \['a'\]"),
        ({"the cat", "a dog"}, "sets have no order"),
        (b"the cat", "got a bytes"),
        (np.array("the cat"), "got a ndarray"),
        ("a " * 4000, "which is no file"),
        ("a\0b", "which is no file"),
        ("", "which is no file"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_corpus_is_refused(corpus: Any, message: str) -> None:
    with pytest.raises(cm.InvalidInput, match=message) as caught:
        open_corpus(corpus)
    assert len(str(caught.value)) < 1000


def test_files_of_other_formats_are_not_read_line_by_line(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.xlsx", "a.ZST"):
        with pytest.raises(cm.InvalidInput, match="Unpack it, or load it with datasets"):
            open_corpus(write(tmp_path / name, b"the cat\n"))


def test_a_column_that_is_not_there_is_named(model: Any, tmp_path: Path) -> None:
    import datasets

    frame = pandas.DataFrame({"words": ["the cat"]})
    frame.to_parquet(tmp_path / "a.parquet")
    dataset = datasets.Dataset.from_dict({"words": ["the cat"]})
    tables = (frame, pyarrow.table(frame), dataset, dataset.to_iterable_dataset())
    for corpus in (tmp_path / "a.parquet", *tables):
        assert read(corpus, "words") == ["the cat"]
        with pytest.raises(cm.InvalidInput, match=r"'text'; expected one of \['words'\].*column="):
            read(corpus)
    lines = write(tmp_path / "a.jsonl", b'{"words": "the cat"}')
    assert read(lines, "words") == ["the cat"]
    with pytest.raises(cm.InvalidInput, match=r"It has \['words'\]: name one with column="):
        cm.mine_triggers(model, lines, out=tmp_path / "out")


ROWS = [{"text": "the cat, sat"}, {"text": 'a "dog"\n'}, {"text": "\u00e9"}] * 3


@pytest.mark.parametrize("block", [1, 7, 2**20])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_read_block_by_block(
    indent: int | None, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.json", json.dumps(ROWS, indent=indent).encode())
    found = open_corpus(path)
    assert found.kind == "array"
    monkeypatch.setattr(corpus_formats, "_PEEK", block)
    assert [one.text for one in found.documents()] == [row["text"] for row in ROWS]


def test_a_json_array_may_be_empty_or_follow_blank_lines(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", b"[]\n")) == []
    assert read(write(tmp_path / "b.json", b'\n\n[\n{"text": "cat"}]')) == ["cat"]


def test_a_json_array_that_breaks_off_says_where(tmp_path: Path) -> None:
    whole = json.dumps(ROWS).encode()
    path = write(tmp_path / "a.json", whole[: whole.index(b"dog")])
    with pytest.raises(cm.InvalidInput, match=r"'\{\"text\": \"a .*entry 1; expected a JSON array"):
        read(path)


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.TSV", "\t")])
def test_tables_of_text_are_read_by_column(name: str, separator: str, tmp_path: Path) -> None:
    path = tmp_path / name
    pandas.DataFrame(ROWS).assign(n=1).to_csv(path, sep=separator, index=False)
    assert read(path) == [row["text"] for row in ROWS]
    corpus = open_corpus(path, "text")
    head = len(f"text{separator}n\n")
    assert corpus.size() == path.stat().st_size
    assert sum(one.size for one in corpus.documents()) == corpus.size() >= head
    with pytest.raises(cm.InvalidInput, match=r"'words'; expected one of \['text', 'n'\]"):
        read(path, "words")
    ragged = write(tmp_path / "b.csv", b"text,n\nthe cat\na dog,1,2\n\xff,1\n")
    assert [one.problem for one in read(ragged)] == [
        "a row of 1 for the columns ['text', 'n']",
        "a row of 3 for the columns ['text', 'n']",
        "no Unicode text (surrogates not allowed at character 0)",
    ]
    long = "the cat " * 20_000
    assert read(write(tmp_path / "l.csv", f"text\n{long}\n".encode())) == [long]
    quoted = write(tmp_path / "c.csv", b'text\n"the cat\n')
    with pytest.raises(cm.InvalidInput, match="unexpected end of data"):
        read(quoted)


def test_whole_rows_are_read_from_everything(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": "the cat", "n": 1}, {"prompt": "\u00e9", "n": 2}]
    frame = pandas.DataFrame(rows)
    frame.to_parquet(tmp_path / "a.parquet")
    write(tmp_path / "a.json", json.dumps(rows).encode())
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    paths = [tmp_path / f"a.{suffix}" for suffix in ("parquet", "json", "jsonl")]
    dataset = datasets.Dataset.from_pandas(frame)
    for held in (*paths, frame, pyarrow.table(frame), dataset, dataset.to_iterable_dataset(), rows):
        found = [json.loads(one.text or "") for one in open_corpus(held, rows=True).documents()]
        assert found == rows
    frame.to_csv(tmp_path / "a.csv", index=False)
    (first, _) = open_corpus(tmp_path / "a.csv", rows=True).documents()
    assert first.text == '{"prompt": "the cat", "n": "1"}'
    (one, other) = open_corpus([("a", {2, 1}), (object(),)], rows=True).documents()
    assert one.text == '["a", [1, 2]]'
    assert other.problem == "a tuple, which is no JSON (a object in it)"


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (["paris", " "], None),
        ([" "] * 3, "no position of the corpus counts .3 documents, 3 empty"),
        ([5] * 3, "no position of the corpus counts .3 documents, 3 malformed"),
        (["cat " * 100, "a dog"], r"cut off than read .2 documents, 1 too_long, \d+ cut_tokens"),
    ],
    ids=str,
)
def test_a_corpus_that_was_hardly_read_is_warned_of(
    corpus: list[Any], message: str | None, model: Any, tmp_path: Path
) -> None:
    def mine(out: str, **share: Any) -> None:
        cm.mine_triggers(model, corpus, out=tmp_path / out, k=2, malformed="skip", **share)

    for rank in range(2):
        mine("two", rank=rank, world_size=2)
    asked: list[Callable[[], Any]] = [
        lambda: mine("one"),
        lambda: merge_triggers(tmp_path / "two"),
        lambda: cm.composition(model, corpus, malformed="skip"),
    ]
    for ask in asked:
        if message is None:
            ask()
        else:
            with pytest.warns(ContextMixWarning, match=message):
                ask()


KINDS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "iterator": iter,
    "arrays": lambda rows: [np.array(row) if isinstance(row, list) else row for row in rows],
    "tensors": lambda rows: [torch.tensor(row) if isinstance(row, list) else row for row in rows],
    "series": pandas.Series,
    "table of pandas": lambda rows: pandas.DataFrame({"text": rows}),
    "table of Arrow": lambda rows: pyarrow.table({"text": rows}),
    "column of Arrow": pyarrow.array,
    "dataset": lambda rows: _dataset(rows),
    "streamed": lambda rows: _dataset(rows).to_iterable_dataset(),
    "column of a dataset": lambda rows: _dataset(rows)["text"],
}


def _dataset(rows: list[Any]) -> Any:
    import datasets

    return datasets.Dataset.from_dict({"text": rows})


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("tokenized", [False, True], ids=["texts", "ids"])
def test_every_kind_of_corpus_is_mined_alike(
    kind: Callable[[list[Any]], Any], tokenized: bool, model: Any, tmp_path: Path
) -> None:
    rows: list[Any] = texts(12)
    options: dict[str, Any] = {"k": 3, "shard_size": 5, "batch_size": 2, "layer": 1}
    whole = cm.mine_triggers(model, rows, out=tmp_path / "texts", **options).to_dataframe()
    if tokenized:
        rows = [view_of(model).encode(text, None) for text in rows]
    found = cm.mine_triggers(model, kind(rows), out=tmp_path / "kind", **options)
    frame = found.to_dataframe()
    # What was tokenized before is another document, with the same triggers.
    assert frame["hash"].equals(whole["hash"]) != tokenized
    assert frame.drop(columns="hash").equals(whole.drop(columns="hash"))
    if kind is not iter:
        again = cm.load_triggers(tmp_path / "kind", model=model, corpus=kind(rows))
        for trigger in again.examples(1, 3).triggers:
            text = texts(12)[trigger.document].replace(" ", "")
            assert text.startswith("".join(trigger.tokens[1:]))
        assert again.patterns(1, 3).rows


def test_token_ids_are_mined_as_they_are(model: Any, tmp_path: Path) -> None:
    view = view_of(model)
    framed = view.encode("the cat sat", None)
    bare = framed[1:]
    corpus = [framed, bare, [], [view.d_vocab], [-1], [2**40]]
    found = cm.mine_triggers(model, corpus, out=tmp_path / "out", k=9, malformed="skip")
    counts = found.manifest["counts"]
    assert (counts["empty"], counts["malformed"]) == (1, 3)
    # No beginning-of-sequence token is put in front, and one that is there does not count.
    assert (counts["tokens"], counts["positions"]) == (len(framed) + len(bare), 2 * len(bare))
    alone = [cm.ff_memories(model, torch.tensor([ids])).coefficients[0] for ids in corpus[:2]]
    for row in found.to_dataframe().itertuples():
        assert row.token == corpus[row.document][row.position]
        value = float(alone[row.document][row.layer, row.position, row.neuron])
        assert row.value == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_token_ids_is_not_read(side: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    model = cm.load_demo("masked-lm")
    rows = ["the keys to the cabinet are here", "the cat"]
    padded = model.tokenizer(rows, padding=True, padding_side=side)
    dataset = datasets.Dataset.from_dict(dict(padded))
    frames = []
    for name, corpus, column in (("texts", rows, None), ("ids", dataset, "input_ids")):
        found = cm.mine_triggers(model, corpus, out=tmp_path / name, k=3, column=column)
        frames.append(found.to_dataframe().drop(columns="hash"))
    assert frames[0].equals(frames[1])
    padding = [mask.count(0) for mask in padded["attention_mask"]]
    assert found.manifest["counts"]["padding"] == sum(padding) > 0
    # Contexts are read without it, too.
    again = cm.load_triggers(tmp_path / "ids", model=model, corpus=dataset)
    contexts = again.examples(0, int(frames[1]["neuron"][0])).to_dataframe()["context"]
    assert not contexts.str.contains("PAD").any()


def test_a_file_that_has_gone_is_named(tmp_path: Path) -> None:
    corpus = open_corpus(write(tmp_path / "a.txt", b"the cat\na dog\n"))
    assert corpus.pick([1])[1].text == "a dog"
    (tmp_path / "a.txt").unlink()
    with pytest.raises(cm.InvalidInput, match=r"a\.txt cannot be read"):
        corpus.pick([1])


def test_arrays_and_series_are_texts() -> None:
    for kind in (np.array(["the cat", "a dog"]), pandas.Series(["the cat", "a dog"])):
        assert read(kind) == ["the cat", "a dog"]


def test_layers_and_neurons_count_once_and_in_order(model: Any, tmp_path: Path) -> None:
    corpus = texts(20)
    one = cm.mine_triggers(
        model, corpus, out=tmp_path / "a", k=3, layer=[2, 1, -1], neurons=[5, 2, -123, 5]
    )
    two = cm.mine_triggers(model, corpus, out=tmp_path / "b", k=3, layer=[1, 2], neurons=[2, 5])
    assert one.layers == (1, 2)
    assert one.manifest == {**two.manifest}
    for name in ("triggers.parquet", "manifest.json"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert not one.to_dataframe().duplicated().any()


@pytest.mark.parametrize("known", [True, False])
def test_the_bar_gives_tokens_per_second_and_the_time_left(
    known: bool, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen, bar = io.StringIO(), shards.tqdm
    options = {"delay": 0, "mininterval": 0, "file": screen, "ncols": 120, "disable": False}
    monkeypatch.setattr(shards, "tqdm", lambda **given: bar(**{**given, **options}))
    corpus = texts(64)
    lines = [json.dumps({"text": text}) for text in corpus]
    path = write(tmp_path / "c.jsonl", "\n".join(lines).encode())
    given = path if known else iter(corpus)
    cm.mine_triggers(model, given, out=tmp_path / "out", k=2, shard_size=8)
    shown = [part for part in screen.getvalue().split("\r") if "mining" in part]
    assert "token/s" in shown[-1]
    # A percentage, tokens of all that are expected, and the time left.
    whole = [re.search(r"(\d+)%.*?([\d.]+)/([\d.]+) \[.*<00:", part) for part in shown]
    assert any(whole) == known
    if known:
        expected = [float(found[3]) for found in whole if found]
        assert 0.7 < expected[0] / expected[-1] < 1.4
