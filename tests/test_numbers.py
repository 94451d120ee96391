"""Every method in every precision stays within the bounds that docs/pages/numbers.md states."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import rounding
import torch
import zoo
from test_conformance import METHODS, QUESTIONS
from torch import Tensor

pytest.importorskip("tables", reason="the benchmarks are part of the repository only")

import tables

import tl_contextmix as cm
from tl_contextmix.adapters import handles

pytestmark = pytest.mark.once
CASES = {case.family: case for case in zoo.cases()}
GPT2 = CASES["gpt2"]
# One model for each precision; the benchmark looks at all of them.
LOOKED_AT = {torch.float32: "gpt2", torch.bfloat16: "bart", torch.float16: "mistral"}


def stated(kind: str, dtype: torch.dtype) -> dict[str, float]:
    """The bounds: of whole errors or of the part that is ours."""
    rows = tables.stored()["numbers"]["errors"][name_of(dtype)]
    return {name: tables.bound(row[kind]) for name, row in rows.items() if kind in row}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def exceeded(found: dict[str, float], limits: dict[str, float]) -> list[str]:
    """What is larger than its bound, and by how much."""
    return [f"{n}: {e:.1e} > {limits[n]:.1e}" for n, e in found.items() if not e <= limits[n]]


@pytest.mark.parametrize("dtype", LOOKED_AT, ids=name_of)
def test_errors_are_within_the_stated_bounds(dtype: torch.dtype) -> None:
    found = rounding.errors(CASES[LOOKED_AT[dtype]], dtype)
    assert found["ours"].keys() == {method.name for method in (*METHODS, *QUESTIONS)}
    for kind, errors in found.items():
        limits = stated(kind, dtype)
        assert errors.keys() == limits.keys()
        assert exceeded(errors, limits) == []


@pytest.mark.parametrize("dtype", [torch.float64, *LOOKED_AT], ids=name_of)
def test_identities_hold_within_the_stated_bounds(dtype: torch.dtype) -> None:
    limits = tables.stored()["numbers"]["gaps"][name_of(dtype)]
    found = rounding.gaps(CASES[LOOKED_AT.get(dtype, "bart")], dtype)
    assert found.keys() == limits.keys() == rounding.IDENTITIES.keys()
    assert exceeded(found, {name: tables.bound(gap) for name, gap in limits.items()}) == []


def test_what_is_ours_is_small_beside_what_is_the_models() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        whole, ours = stated("whole", dtype), stated("ours", dtype)
        assert [name for name in ours if not ours[name] <= whole[name] / 100] == []
    # In float32 both are roundings of the same size.
    assert max(stated("whole", torch.float32).values()) < 1e-2


def test_products_in_bfloat16_are_within_the_stated_bounds() -> None:
    stated = tables.stored()["products"]["tests' families"]
    found = rounding.products(GPT2)
    assert found.keys() == stated.keys()
    largest = {at: tables.bound(error) for at, (error, _) in stated.items()}
    assert exceeded({at: error for at, (error, _) in found.items()}, largest) == []
    # And they are in bfloat16: in float32 errors are a thousandth of these.
    assert min(error for error, _ in found.values()) > 1e-5


# Would a mistake be noticed?


@pytest.fixture(scope="module")
def low() -> Any:
    return zoo.build(GPT2, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def right(low: Any) -> dict[str, Tensor]:
    """The numbers, the maths done in float64."""
    with rounding.maths_in(torch.float64, low):
        return rounding.answers(low, GPT2)


def noticed(low: Any, right: dict[str, Tensor]) -> set[str]:
    """The methods whose numbers are beyond their bounds, or that refuse to give any."""
    beyond, limits = set(), stated("ours", torch.bfloat16)
    for method in rounding.methods(GPT2):
        try:
            found = rounding.answer(method, low, GPT2)
            error = rounding.difference(method.name, found, right[method.name])
        except cm.UnsupportedModel:
            error = float("inf")
        if not error <= limits[method.name]:
            beyond.add(method.name)
    return beyond


def test_maths_in_half_precision_would_be_noticed(low: Any, right: dict[str, Tensor]) -> None:
    with rounding.maths_in(torch.bfloat16, low):
        found = noticed(low, right)
    # The model's own numbers as they are: there is no maths.
    assert {method.name for method in METHODS} - found == {"attention"}


def test_a_bias_left_out_would_be_noticed(low: Any, right: dict[str, Tensor]) -> None:
    plain = handles.attribute_of

    def without(module: Any, name: str) -> Any:
        return None if name == "b_O" else plain(module, name)

    cm.check(low)  # read while nothing is left out
    with mock.patch.object(handles, "attribute_of", without):
        found = noticed(low, right)
    # GlobEnc's map of a pre-LN block is of parts that no bias reaches; the others read passes.
    passes = {"attention", "attention_flow", "gradient_x_input", "integrated_gradients", "knockout"}
    passes |= {"attention_knockout"}
    assert {method.name for method in METHODS} - found == {"globenc", *passes}
