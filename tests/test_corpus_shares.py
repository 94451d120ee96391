"""Processes that share a corpus: the figures of one process alone, bit by bit."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest

import tl_contextmix as cm
from tl_contextmix.core.statistics import ExactMoments
from tl_contextmix.errors import FileFormatError, InvalidInput
from tl_contextmix.evaluation import merge_figures, over_corpus

pytestmark = pytest.mark.once
TEXTS = ["the keys are old .", "the cow is old .", "anna sings .", "the doctors sing .", "a"]


class Stopped(Exception):
    """A run that is stopped."""


def mixing(model: Any, texts: list[str]) -> Any:
    return cm.mixing_ratio(model, texts)


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
