"""Every option of a method changes what it should, on every kind of stack.

What it changes it to is in the tests of each method.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from asked import case_of, keywords
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.methods.decompx import decompx_vectors
from tl_contextmix.results import (
    AttributionGraph,
    ComponentReadouts,
    Knockout,
    QueryContributions,
    ValueReadouts,
)

# Version 3 has every class that version 2 has.
pytestmark = pytest.mark.skipif(zoo.major() == 2, reason="the same classes as on version 3")

# A model for each kind of stack; its own options as the second entry.
STACKS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "causal": (("gpt2",), {}),
    "gated": (("llama",), {}),
    "both ways": (("both_ways",), {}),
    "masked": (("bert",), {}),
    "encoder": (("t5",), {"stack": "encoder"}),
    "decoder": (("t5",), {"stack": "decoder"}),
    "cross": (("t5",), {"stack": "cross"}),
    "post-LN encoder": (("bart",), {"stack": "encoder"}),
    "post-LN decoder": (("bart",), {"stack": "decoder"}),
    "post-LN cross": (("bart",), {"stack": "cross"}),
}
ONE = tuple(stack for stack in STACKS if stack in ("causal", "gated", "both ways", "masked"))
PAIRS = ("decoder", "post-LN decoder")
POST_LN = ("masked", "post-LN encoder", "post-LN decoder", "post-LN cross")


def readouts(model: Any, tokens: Tensor, k: int = 2, **given: Any) -> ComponentReadouts:
    """The extremes of what components promote."""
    found = cm.log_prob_contributions(model, tokens, pos=-1, **given)
    return cm.component_readouts(model, tokens, components=found, k=k, **given)


def graph(model: Any, tokens: Tensor, **options: Any) -> AttributionGraph:
    """The graph of the first sentence's prediction."""
    options = {"pos": -1, **options}
    if "decoder_input" in options:
        options["decoder_input"] = options["decoder_input"][:1]
    return cm.flow(model, tokens[:1], **options)


def queries(model: Any, tokens: Tensor, **options: Any) -> QueryContributions:
    """What activates two feed-forward neurons of the second layer."""
    options = {"neurons": [(1, 1), (1, 3)], "pos": -1, **options}
    return cm.query_contributions(model, tokens, **options)


def out(model: Any, tokens: Tensor, **options: Any) -> Knockout:
    """What is left without one head, unless others are named."""
    if "neurons" not in options:
        options = {"heads": [(0, 1)], **options}
    options = {"controls": 0, "pos": -1, **options}
    return cm.knockout(model, tokens, **options)


def values(model: Any, tokens: Tensor, **options: Any) -> ValueReadouts:
    """What feed-forward values are."""
    options.pop("decoder_input", None)
    return cm.ff_values(model, **{"layer": 0, "neurons": [0, 3], "k": 2, **options})


@dataclasses.dataclass(frozen=True)
class Row:
    """One option: a method, what it is asked otherwise, and two values of the option.

    Attributes:
        ask: The method.
        option: The option.
        values: Two values of it.
        number: Name of the tensor that it changes.
        given: Further options.
        idle: Stacks on which the option changes nothing, for the reason that the table says.
        only: Stacks that are asked; None for all.
    """

    ask: Callable[..., Any]
    option: str
    values: tuple[Any, Any]
    number: str = "scores"
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    idle: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.ask.__name__}-{self.option}-{self.values[1]}".replace(" ", "")


LAYERS = (0, 1)
SINGLE = (*ONE, *PAIRS)  # asked about a prediction, or about the stack that predicts
NORMED = ("causal", "gated", "both ways", "decoder")
BIAS = ("contributor", "fixed")
MLP = {"at": "mlp_out"}
# RMS norms and no biases (Llama, T5): there is nothing to start from.
UNBIASED = ("gated", "encoder", "decoder", "cross")
ROWS = [
    # Maps
    Row(cm.decompose, "at", ("attn_out", "resid_mid"), "parts"),
    Row(cm.decompose, "at", ("mlp_out", "block_out"), "parts"),
    Row(cm.decompose, "bias", BIAS, "parts", MLP, idle=UNBIASED),
    Row(cm.decompose, "layer", LAYERS, "parts"),
    Row(cm.attention_norms, "at", ("resid_mid", "mlp_in"), idle=()),
    Row(cm.attention_norms, "heads", (False, True), given={"at": "attn_out"}),
    Row(cm.attention_norms, "bias", BIAS, given=MLP, idle=UNBIASED),
    Row(cm.attention_norms, "precision", ("full", "bfloat16"), given=MLP),
    Row(cm.attention_norms, "layer", LAYERS),
    Row(cm.mixing_ratio, "at", ("resid_mid", "mlp_out"), "values"),
    Row(cm.mixing_ratio, "bias", BIAS, "values", MLP, idle=UNBIASED),
    Row(cm.mixing_ratio, "layer", LAYERS, "values"),
    Row(cm.value_zeroing, "heads", (False, 0)),
    Row(cm.value_zeroing, "layer", LAYERS),
    Row(cm.value_zeroing, "pos", (None, [1])),
    Row(cm.value_zeroing, "spans", (None, [(0, 2)])),
    Row(
        cm.value_zeroing,
        "span_rows",
        ("mean", "max"),
        given={"spans": [(0, 2), (2, 4)]},
        only=tuple(stack for stack in STACKS if "cross" not in stack),
    ),
    Row(cm.value_zeroing, "metric", ("cosine", "euclidean")),
    # A post-LN stack ends in the norm of its last block.
    Row(cm.value_zeroing, "final_norm", (True, False), idle=POST_LN),
    Row(cm.attention, "heads", (True, False)),
    Row(cm.attention, "layer", LAYERS),
    Row(cm.globenc, "layer", LAYERS),
    Row(cm.alti, "layer", LAYERS),
    Row(cm.decompx, "bias", BIAS, idle=UNBIASED),
    Row(cm.decompx, "layer", LAYERS),
    Row(decompx_vectors, "bias", BIAS, "parts", idle=UNBIASED),
    Row(decompx_vectors, "layer", LAYERS, "parts"),
    Row(cm.token_memory, "bias", BIAS, "shares", idle=UNBIASED),
    Row(cm.token_memory, "layer", LAYERS, "shares"),
    Row(cm.token_memory, "pos", (1, 2), "shares"),
    Row(cm.token_memory, "neurons", (0, 1), "shares"),
    # Predictions
    Row(cm.log_prob_contributions, "target", (7, 9), given={"pos": -1}, only=SINGLE),
    Row(cm.log_prob_contributions, "foil", (8, 9), given={"pos": -1, "target": 7}, only=SINGLE),
    Row(
        cm.log_prob_contributions,
        "target",
        (cm.Direction(layer=1, neuron=1), cm.Direction(layer=1, neuron=3)),
        given={"pos": -1},
        only=SINGLE,
    ),
    Row(graph, "neurons", (False, True), given={"k": 20, "share": 1.0}, only=SINGLE),
    Row(graph, "share", (0.05, 1.0), only=SINGLE),
    Row(graph, "k", (2, 3), given={"share": 1.0}, only=SINGLE),
    Row(graph, "target", (7, 9), only=SINGLE),
    Row(graph, "foil", (8, 9), given={"target": 7}, only=SINGLE),
    Row(graph, "pos", (1, 2), given={"target": 7}, only=SINGLE),
    Row(queries, "target", (7, 9), only=SINGLE),
    Row(queries, "foil", (8, 9), given={"target": 7}, only=SINGLE),
    Row(queries, "neurons", ([(1, 1)], [(1, 3)]), only=SINGLE),
    Row(queries, "pos", (1, 2), given={"target": 7}, only=SINGLE),
    Row(cm.log_prob_contributions, "by", ("layer", "head"), given={"pos": -1}, only=SINGLE),
    Row(cm.log_prob_contributions, "pos", (1, 2), given={"target": 7}, only=SINGLE),
    # Llama and T5 have no biases to leave out.
    Row(
        cm.log_prob_contributions,
        "norm",
        ("frozen", "frozen+beta"),
        given={"pos": -1, "target": 7},
        only=SINGLE,
        idle=("gated", "decoder"),
    ),
    Row(
        cm.log_prob_contributions,
        "norm",
        ("frozen+beta", "recompute"),
        given={"pos": -1, "target": 7},
        only=SINGLE,
        idle=("masked", "post-LN decoder"),  # there is no final norm; a head is taken in full
    ),
    *(
        Row(
            cm.log_prob_contributions,
            "score",
            ("log_prob_increase", score),
            given={"pos": -1, "target": 7, "by": "ff_neuron"},
            only=SINGLE,
        )
        for score in ("log_prob", "prob_increase", "norm", "coefficient", "rank")
    ),
    Row(
        cm.log_prob_contributions,
        "k",
        (None, 2),
        given={"pos": -1, "by": "ff_neuron"},
        only=SINGLE,
    ),
    Row(queries, "by", ("layer", "head"), only=SINGLE),
    # T5's ReLU, without biases in front of it, is the same by either.
    Row(queries, "share", ("exact", "ratio"), only=SINGLE, idle=("decoder",)),
    Row(queries, "k", (None, 2), only=SINGLE),
    Row(readouts, "k", (2, 3), "top_logits", only=SINGLE),
    Row(out, "heads", ([(0, 1)], [(1, 0)]), "after", only=SINGLE),
    Row(out, "neurons", ([(0, 1)], [(1, 0)]), "after", only=SINGLE),
    Row(out, "target", (7, 9), "after", only=SINGLE),
    Row(out, "foil", (8, 9), "after", {"target": 7}, only=SINGLE),
    Row(out, "pos", (1, 2), "after", {"target": 7}, only=SINGLE),
    Row(out, "everywhere", (False, True), "after", only=SINGLE),
    Row(out, "replace_with", ("zero", "mean"), "after", only=SINGLE),
    Row(out, "controls", (1, 2), "controls", only=SINGLE),
    Row(out, "seed", (0, 1), "controls", {"controls": 4}, only=SINGLE),
    *(
        row
        for ask in (cm.gradient_x_input, cm.integrated_gradients)
        for row in (
            Row(ask, "target", (7, 9), given={"pos": -1}, only=SINGLE),
            Row(ask, "foil", (8, 9), given={"pos": -1, "target": 7}, only=SINGLE),
            Row(ask, "pos", (1, 2), given={"target": 7}, only=SINGLE),
            Row(ask, "of", ("logit", "log_prob"), given={"pos": -1}, only=SINGLE),
            Row(ask, "score", ("l2", "l1"), given={"pos": -1}, only=SINGLE),
            Row(ask, "score", ("l2", "sum"), given={"pos": -1}, only=SINGLE),
        )
    ),
    Row(cm.integrated_gradients, "steps", (40, 60), given={"pos": -1}, only=SINGLE),
    Row(cm.ff_memories, "layer", LAYERS, "probability", only=SINGLE),
    # T5's ReLU has no negative coefficients.
    Row(
        cm.ff_memories, "active", ("positive", "nonzero"), "active", only=SINGLE, idle=("decoder",)
    ),
    # A masked LM's head is read in one way, and BART has no norm to fold or to freeze.
    Row(cm.ff_memories, "projection", ("model", "frozen"), "probability", only=NORMED),
    Row(cm.ff_memories, "projection", ("frozen", "none"), "probability", only=NORMED),
    Row(cm.ff_memories, "k", (1, 2), "promoted", only=SINGLE),
    Row(cm.ff_memories, "pos", (0, [0, 1]), "promoted", only=SINGLE),
    Row(values, "layer", LAYERS, "logits", only=SINGLE),
    Row(values, "neurons", ([0], [3]), "logits", only=SINGLE),
    Row(values, "k", (1, 2), "logits", only=SINGLE),
    Row(values, "projection", ("none", "folded"), "logits", only=NORMED),
]


# What version 3 alone has.
HERE = list(STACKS) if zoo.major() == 4 else ["both ways"]


_NUMBERS: dict[tuple[Any, ...], Tensor] = {}


def _asked(ask: Callable[..., Any], stack: str, options: dict[str, Any], number: str) -> Tensor:
    """A number of a call; calls that only spell a default out are made once."""
    case, defaults = case_of(*STACKS[stack][0]), inspect.signature(ask).parameters
    spelt = {
        name: value
        for name, value in options.items()
        if name not in defaults or value is not defaults[name].default
    }
    key = (ask, stack, repr(sorted(spelt.items(), key=lambda item: item[0])), number)
    if key not in _NUMBERS:
        model, given = zoo.shared(case), zoo.inputs(case)
        _NUMBERS[key] = getattr(ask(model, given.tokens, **{**keywords(given), **spelt}), number)
    return _NUMBERS[key]


@pytest.mark.parametrize("stack", HERE)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_an_option_changes_what_it_should(row: Row, stack: str) -> None:
    if row.only is not None and stack not in row.only:
        pytest.skip("this method is not asked about this stack")
    own = {} if row.only in (SINGLE, NORMED) else STACKS[stack][1]
    one, other = (
        _asked(row.ask, stack, {**own, **row.given, row.option: value}, row.number)
        for value in row.values
    )
    same = one.shape == other.shape and torch.allclose(
        one, other, rtol=1e-9, atol=1e-12, equal_nan=True
    )
    assert same == (stack in row.idle)
