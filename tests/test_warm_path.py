"""What a call goes through once its model is known, and what the first one takes besides."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
pytest.importorskip("meters", reason="the benchmarks are part of the repository only")

import memories
from meters import flops

import tl_contextmix as cm
from tl_contextmix.adapters import as_view
from tl_contextmix.adapters.views import _KNOWN

PACKAGE = Path(cm.__file__).parent
MOST = 16


def modules_of_a_call() -> dict[str, set[str]]:
    """Functions by module, in the order in which a second call of `attention_norms` enters them."""
    model = cm.load_demo("causal-lm")
    cm.attention_norms(model, "the cat sat", at="mlp_out")
    found: dict[str, set[str]] = {}

    def enter(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            found.setdefault(str(path.relative_to(PACKAGE)), set()).add(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        cm.attention_norms(model, "the cat sat", at="mlp_out")
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.once
def test_a_warm_call_stays_within_few_modules() -> None:
    found = modules_of_a_call()
    assert "attention_norms" in found["methods/norms.py"]
    assert "run" in found["adapters/running.py"]
    assert len(found) <= MOST, list(found)


def calls_of(work: Callable[[], object]) -> int:
    """How many functions a piece of work enters."""
    calls = 0

    def enter(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def count() -> dict[str, int]:
    """Functions that a first call, the checks of a later one and a pass over six tokens enter."""
    model, ids = cm.load_demo("causal-lm"), torch.arange(3, 9)[None]
    as_view(model).hooked()  # what is imported and kept for all models
    model(ids)
    seed = torch.random.get_rng_state()
    result = {"checks": calls_of(lambda: as_view(model).hooked())}
    _KNOWN.pop(model)
    result["first"] = calls_of(lambda: as_view(model))
    result["reseeded"] = int(not torch.equal(seed, torch.random.get_rng_state()))
    result["pass"] = calls_of(lambda: model(ids))
    return result | {"modules": len([*model.modules()])}


@functools.cache
def counted() -> dict[str, int]:
    """The same without checks of types as it runs, which enter functions, too."""
    found = subprocess.run([sys.executable, __file__, "count"], capture_output=True, check=True)
    return json.loads(found.stdout)


@pytest.mark.once
def test_checks_that_are_repeated_do_not_walk_through_the_model() -> None:
    """A call for each of its 280 modules made them three times as long (0.8 ms, now 0.3)."""
    assert counted()["checks"] < counted()["modules"] / 2


@pytest.mark.newest
def test_a_first_call_enters_few_functions_and_leaves_the_seed() -> None:
    """As many as six passes; they were thirteen, and most of a small model's first call."""
    assert counted()["first"] <= 6 * counted()["pass"]
    assert not counted()["reseeded"]


@pytest.mark.newest
def test_a_first_call_takes_a_fraction_of_a_pass_more() -> None:
    """Two rows of four tokens, the Hugging Face model, and each product once: 0.2 of 64 tokens."""
    model, ids = memories.gpt2(2, 128, 500), torch.arange(3, 67)[None]

    def first() -> None:
        _KNOWN.pop(model, None)
        cm.check(model)

    with torch.no_grad():
        once = flops(partial(model, ids), elementwise=False)
    assert flops(first, elementwise=False) <= 0.35 * once


if __name__ == "__main__" and "count" in sys.argv:
    sys.stdout.write(json.dumps(count()))
elif __name__ == "__main__":
    for module, functions in modules_of_a_call().items():
        sys.stdout.write(f"{module}: {', '.join(sorted(functions))}\n")
