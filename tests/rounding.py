"""How far numbers of a model in a lower precision are from those of the same weights in float64.

The exact model has the rounded weights: what is measured is arithmetic, not what rounding does to a
model. A method's error has two parts. The model's is in the activations of its own passes; ours is
what the maths adds to them, found by doing it once more in float64 on the same passes.
`benchmarks/precision.py` writes both into docs/pages/numbers.md, and `test_numbers` holds them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import zoo
from asked import host_trace, keywords, post_of, relative, view_of
from test_conformance import Method, ask
from test_devices import methods, numbers
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters import building, views
from tl_contextmix.engine.parts import POINTS
from tl_contextmix.methods.decompx import decompx_vectors
from tl_contextmix.results import (
    ContextMap,
    Decomposition,
    LogProbContributions,
    QueryContributions,
    TokenMemory,
)

FAMILIES = ("gpt2", "mistral", "gemma2", "bert", "bart", "flan")
KINKED = "t5"
"""With ReLU: a neuron within rounding of zero is on or off, and its shares there or not."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYERS, LOGITS = "the model's layers", "the model's logits"
"""Rows about the model itself: what a forward pass in its dtype is off by."""


def models(case: zoo.Case, dtype: torch.dtype, seed: int = 0) -> tuple[Any, Any]:
    """A model of a dtype, and one that has its weights and computes in float64."""
    exact = zoo.build(case, seed=seed)
    with torch.no_grad():
        for tensor in itertools.chain(exact.parameters(), exact.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype))
    return zoo.build(case, dtype=dtype, seed=seed), exact


@contextlib.contextmanager
def maths_in(dtype: torch.dtype, model: Any) -> Iterator[None]:
    """Has the maths about a model done in another dtype than the package chooses."""
    plain = building._handle
    views._KNOWN.pop(model, None)
    with mock.patch.object(building, "_handle", lambda facts: replace(plain(facts), dtype=dtype)):
        yield
    views._KNOWN.pop(model, None)


def answers(model: Any, case: zoo.Case) -> dict[str, Tensor]:
    """The numbers of every method about the same input, in float64."""
    return {method.name: answer(method, model, case) for method in methods(case)}


def answer(method: Method, model: Any, case: zoo.Case) -> Tensor:
    """The numbers of a method, in float64.

    Not those that rounding changes by a whole step or not at all: the last of a knockout's figures
    is a rank.
    """
    found = numbers(method, model, case, zoo.inputs(case)).double()
    if method.name == "ff_memories":
        return torch.stack([found, top_tokens(model, case).expand_as(found)])
    return found[..., :2] if method.name == "knockout" else found


def top_tokens(model: Any, case: zoo.Case) -> Tensor:
    """The token whose probability is asked for: where two are nearly as likely, either of them."""
    given = zoo.inputs(case)
    return cm.ff_memories(model, given.tokens, **keywords(given)).final_top[:, None].double()


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of each method, relative to its largest number."""
    return {name: difference(name, found[name], expected[name]) for name in expected}


def difference(name: str, found: Tensor, expected: Tensor) -> float:
    """The largest difference of a method, relative to its largest number."""
    if name == "ff_memories":
        same = found[1] == expected[1]
        assert same.double().mean() > 0.5
        found, expected = found[0] * same, expected[0] * same
    return relative(found, expected)


def errors(case: zoo.Case, dtype: torch.dtype, seed: int = 0) -> dict[str, dict[str, float]]:
    """Each method's error against float64, and the part of it that is ours."""
    low, exact = models(case, dtype, seed)
    found, expected = answers(low, case), answers(exact, case)
    with maths_in(torch.float64, low):
        ours = off(found, answers(low, case))
    return {"whole": _of_passes(low, exact, case) | off(found, expected), "ours": ours}


def _of_passes(low: Any, exact: Any, case: zoo.Case) -> dict[str, float]:
    """How far the model's own numbers are off."""
    given, layers = zoo.inputs(case), []
    for model in (low, exact):
        trace, blocks = host_trace(view_of(model), given, None)
        layers.append(torch.stack([trace[block.resid_out].double() for block in blocks]))
    logits = [zoo.logits(model, given).double() for model in (low, exact)]
    return {LAYERS: relative(*layers), LOGITS: relative(*logits)}


# Products in bfloat16


def products(case: zoo.Case, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Errors of ``precision="bfloat16"`` in a float64 model, see `of_products`."""
    given = zoo.inputs(case)
    return of_products(zoo.build(case, seed=seed), given.tokens, **keywords(given))


def of_products(model: Any, tokens: Tensor, **given: Any) -> dict[str, tuple[float, float]]:
    """By point: the largest error relative to the largest norm, the median relative to each."""
    points = POINTS[3:]
    exact, low = (
        cm.attention_norms(model, tokens, at=points, precision=precision, **given)
        for precision in ("full", "bfloat16")
    )
    found = {}
    for at in points:
        there, here = exact[at].scores, low[at].scores
        each = ((here - there).abs() / there)[there > 0]
        found[at] = relative(here, there), float(each.median())
    return found


# Identities


def _sum_of_parts(found: Decomposition, model: Any, case: zoo.Case) -> float:
    trace, blocks = host_trace(view_of(model), zoo.inputs(case), None)
    own = torch.stack([trace[block.resid_out] for block in blocks], dim=1)
    return relative(found.total(), own)


def _vectors(found: ContextMap, model: Any, case: zoo.Case) -> float:
    given = zoo.inputs(case)
    asked = {"at": "resid_mid", **keywords(given)}  # further on both take the same way
    norms = cm.attention_norms(model, given.tokens, **asked)
    return relative(norms.scores, cm.decompose(model, given.tokens, **asked).norms().scores)


def _last_state(found: LogProbContributions, model: Any, case: zoo.Case) -> float:
    return relative(found.trajectory[:, -1], found.log_prob)


def _inner_products(found: QueryContributions, model: Any, case: zoo.Case) -> float:
    return relative(found.inner.nan_to_num(0).sum(-1) + found.constant, found.pre)


def _neurons(found: TokenMemory, model: Any, case: zoo.Case) -> float:
    trace, blocks = host_trace(view_of(model), zoo.inputs(case), None)
    own = torch.stack([post_of(b.feed_forward, trace) for b in blocks if b.feed_forward], dim=1)
    return relative(found.shares.sum(dim=3) + found.bias, own)


def _one(found: ContextMap, model: Any, case: zoo.Case) -> float:
    rows = found.scores.sum(dim=-1)
    return relative(rows, torch.ones_like(rows))


def _carried(found: ContextMap, model: Any, case: zoo.Case) -> float:
    given = zoo.inputs(case)
    return _sum_of_parts(decompx_vectors(model, given.tokens, **keywords(given)), model, case)


IDENTITIES: dict[str, tuple[str, Callable[[Any, Any, zoo.Case], float]]] = {
    "decompose": ("parts and bias add up to the layer's output", _sum_of_parts),
    "attention_norms": ("norms are those of the parts", _vectors),
    "attention": ("a target's weights add up to 1", _one),
    "decompx": ("vectors and bias add up to the layer's output", _carried),
    "log_prob_contributions": ("the last state has the model's log-probability", _last_state),
    "query_contributions": ("inner products and constant are the pre-activation", _inner_products),
    "token_memory": ("shares and bias add up to the neuron", _neurons),
}
"""By method: an equation that holds for its result, and how far it is off."""


def gaps(case: zoo.Case, dtype: torch.dtype, seed: int = 0) -> dict[str, float]:
    """How far each identity is off, relative to the largest number."""
    model, given = zoo.build(case, dtype=dtype, seed=seed), zoo.inputs(case)
    asked = {method.name: method for method in methods(case)}
    return {
        name: gap(ask(asked[name], model, case, given), model, case)
        for name, (_, gap) in IDENTITIES.items()
    }
