"""No method takes more operations than it did; `python benchmarks/all.py --write` stores them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_estimate import LENS, PER_METHOD
from watched import operators

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
pytest.importorskip("tables", reason="the benchmarks are part of the repository only")

import methods
import tables

import tl_contextmix as cm
from tl_contextmix.engine import registry
from tl_contextmix.engine.parts import POINTS

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


def maps() -> dict[str, Callable[..., Any]]:
    """Every method that returns a map."""
    found = {
        name: partial(known.function, **options, **({"target": 5} if known.of_prediction else {}))
        for known in registry.methods().values()
        for name, options in known.compared.items()
    }
    norms = partial(cm.attention_norms, at=POINTS)
    # As many steps as one workspace has room for in 32 sentences.
    integrated = partial(found["integrated_gradients"], steps=10, max_bytes=2**31)
    others = {"attention_norms": norms, "integrated_gradients": integrated}
    return found | others | {"mixing_ratio": cm.mixing_ratio, "decompose": cm.decompose}


@pytest.mark.parametrize("name", maps())
def test_a_list_of_like_length_costs_a_fifth_of_a_loop(name: str) -> None:
    """In operators, of which short texts are made, their overhead: 32 sentences."""
    model, ask = cm.load_demo("causal-lm"), maps()[name]
    sentences = torch.randint(5, 100, (32, 6), generator=torch.Generator().manual_seed(0))
    ask(model, sentences[:1])
    loop = 32 * len(operators(lambda: ask(model, sentences[:1])))
    assert len(operators(lambda: ask(model, sentences))) <= loop / 5


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
