"""No method takes more operations than it did; `python benchmarks/all.py --write` stores them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_estimate import LENS, PER_METHOD

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
pytest.importorskip("tables", reason="the benchmarks are part of the repository only")

import methods
import tables

pytestmark = pytest.mark.once


def test_no_method_takes_more_operations_than_it_did() -> None:
    stored = tables.stored()["counts"]
    with torch.no_grad():
        counted = methods.counts()
    assert counted.keys() == stored.keys()
    assert methods.more(counted, stored) == []


def test_one_operation_more_is_noticed_and_one_less_is_not() -> None:
    stored = {"attention": 100, "alti": 50}
    assert methods.more({"attention": 101, "alti": 49}, stored) == [
        "attention: 101 operations, 100 before"
    ]


def test_every_method_of_a_model_is_counted() -> None:
    known = {name.split(",")[0] for name in methods.METHODS}
    # Its vectors are those of decompx, which takes their norms.
    assert {name.split()[0] for name in (*PER_METHOD, *LENS)} - known == {"decompx_vectors"}


def test_exponents_are_those_of_a_power_law() -> None:
    lengths = [32, 64, 128]
    assert methods.exponent(lengths, [5 * n**1.5 for n in lengths]) == pytest.approx(1.5)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.parent.name)
def test_pages_hold_what_was_measured(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    stored = tables.stored()
    assert tables.rewritten(text, stored) == text
    for part in (stored, stored["numbers"]):
        part["machine"] = "another one"
    assert tables.rewritten(text, stored) != text
