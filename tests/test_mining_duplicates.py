"""A context that occurs again counts once, exactly, in whatever order it comes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from asked import case_of, view_of
from test_mining import (
    best_of_each,
    every_coefficient,
    filled,
    kept,
    merged,
    result,
    search,
    stop_after_writing,
    texts,
)

import tl_contextmix as cm
from tl_contextmix.methods.memories import merge_triggers
from tl_contextmix.methods.memories.topk import first_of_each, hash_prefixes

pytestmark = pytest.mark.once


def repetitive() -> list[str]:
    """Sentences of which many begin alike, and some are the same."""
    draw = random.Random(4)
    heads = ["the cat", "a dog is", "paris", "paris is in"]
    return [f"{draw.choice(heads)} {text}" for text in texts(18)] + texts(4) + ["paris is in"] * 3


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("unit", ["prefix", "document"])
def test_dropping_equals_a_search_through_distinct_contexts(
    family: str, unit: str, tmp_path: Path
) -> None:
    model, corpus = zoo.build(case_of(family)), repetitive()
    view = view_of(model)
    rows = every_coefficient(model, corpus, "encoder" if family == "bert" else "decoder")
    ids = [view.encode(text, None) for text in corpus]
    if unit == "document":
        rows = best_of_each(rows)

    def context(document: int, pos: int) -> Any:
        whole = ids[document]
        return (tuple(whole), pos) if family == "bert" else tuple(whole[: pos + 1])

    first: dict[Any, Any] = {}
    for row in rows:
        first.setdefault((row[0], row[1], context(row[2], row[3])), row)
    assert len(first) < len(rows)
    expected = search(list(first.values()), 4)
    options = {"k": 4, "unit": unit, "shard_size": 8, "batch_size": 3, "duplicates": "drop"}
    found = cm.mine_triggers(model, corpus, out=tmp_path / "one", **options)
    frame = found.to_dataframe()
    for (layer, neuron), group in frame.groupby(["layer", "neuron"]):
        best_values = [-entry[0] for entry in expected[layer, neuron]]
        assert group["value"].tolist() == pytest.approx(best_values, rel=1e-9, abs=1e-12)
        pairs = zip(group["document"], group["position"], strict=True)
        contexts = [context(*pair) for pair in pairs]
        assert len(set(contexts)) == len(contexts)
    assert frame.groupby(["layer", "neuron"]).ngroups == len(expected)
    for rank in (2, 0, 1):
        cm.mine_triggers(model, corpus, out=tmp_path / "three", rank=rank, world_size=3, **options)
    merge_triggers(tmp_path / "three")
    assert result(tmp_path / "three") == result(tmp_path / "one")
    every = cm.mine_triggers(
        model, corpus, out=tmp_path / "every", **{**options, "duplicates": "keep"}
    )
    assert not every.to_dataframe()["value"].equals(frame["value"])


def test_a_run_that_was_stopped_keeps_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, corpus = zoo.build(case_of("gpt2"), dtype=torch.float32), repetitive()
    options = {"k": 4, "shard_size": 8, "batch_size": 3, "duplicates": "drop"}
    cm.mine_triggers(model, corpus, out=tmp_path / "whole", **options)
    again = {"out": tmp_path / "stopped", "checkpoint_seconds": 0.0, **options}
    with monkeypatch.context() as patch:
        stop_after_writing(patch, lambda written: not written[-1])
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                cm.mine_triggers(model, corpus, **again)
    cm.mine_triggers(model, corpus, **again)
    assert result(tmp_path / "stopped") == result(tmp_path / "whole")


@pytest.mark.parametrize("seed", range(5))
def test_states_with_keys_are_a_commutative_monoid(seed: int) -> None:
    draw = random.Random(seed)
    entries = [
        (draw.randrange(5), draw.randint(-2, 9) / 4, place, draw.randrange(6))
        for place in range(100)
    ]
    expected = {}
    for column in range(5):
        best: dict[int, tuple[float, int]] = {}
        for at, value, place, key in entries:
            if at == column and value > 0:
                best[key] = min(best.get(key, (0.0, 0)), (-value, place))
        expected[column] = sorted(best.values())[:3]
    draw.shuffle(entries)
    parts = [filled(entries[start::4], 3, distinct=True) for start in range(4)]
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        whole = merged(parts, order)
        assert {column: kept(whole, column) for column in range(5)} == expected


def test_hashes_tell_prefixes_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, (400, 12), generator=generator)
    hashes = hash_prefixes(ids)
    known: dict[int, Any] = {}
    for row, found in zip(ids.tolist(), hashes.tolist(), strict=True):
        for end, one in enumerate(found, 1):
            assert known.setdefault(one, tuple(row[:end])) == tuple(row[:end])
    distinct = {tuple(row[:end]) for row in ids.tolist() for end in range(1, 13)}
    assert len(known) == len(distinct)
    keys, places = torch.tensor([5, 7, 5, 5, 7]), torch.tensor([3, 2, 1, 4, 0])
    assert first_of_each(keys, places).tolist() == [False, False, True, False, True]
