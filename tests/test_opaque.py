"""Feed-forward sublayers that are not taken apart: what does not need their neurons is answered."""

from __future__ import annotations

import functools
import unittest.mock
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
import zoo_build
import zoo_others
from asked import host_trace, relative, view_of
from test_families import given
from test_value_zeroing import literal

import tl_contextmix as cm
from tl_contextmix.adapters import reading
from tl_contextmix.core.counters import count_operations

# Hosts run experts in single precision at most.
EXACT = 2e-6


@functools.cache
def opaque() -> Any:
    """A model whose feed-forward sublayers are a mixture of experts, as each version has one."""
    if zoo.major() == 4:
        model = zoo_others.build("minimax_m2", dtype=torch.float32)
        with unittest.mock.patch.object(reading, "read_experts", return_value=None):
            cm.check(model)  # as one whose experts are of an unknown kind
        return model
    options = {"num_experts": 4, "experts_per_token": 2, "gated_mlp": True, "act_fn": "silu"}
    with zoo_build.quiet():
        options = {"normalization_type": "RMS", **options}
        return zoo_build.config_built(options, dtype=torch.float32, seed=0).eval()


def test_what_does_not_need_the_neurons_is_answered() -> None:
    model, inputs = opaque(), given()
    report = cm.check(model)
    assert report.ok, str(report)
    assert "module(input) = output" in {row.identity for row in report.rows}
    assert "not taken apart into neurons" in report.limits[0]
    trace, blocks = host_trace(view_of(model), inputs, None)
    parts = cm.decompose(model, inputs.tokens, at="resid_mid")
    assert relative(parts.total(), torch.stack([b.middle(trace) for b in blocks], 1)) <= EXACT
    zeroed = cm.value_zeroing(model, inputs.tokens).scores[:, :, 0]
    assert relative(zeroed, literal(model, inputs)[1]) <= EXACT
    said = zoo.logits(model, inputs)[:, -1].log_softmax(dim=-1)[:, 9]
    for by in ("layer", "head", "position", "head_position", "attn_neuron"):
        scores = cm.log_prob_contributions(model, inputs.tokens, target=9, by=by)
        assert relative(scores.log_prob, said) <= EXACT
    layers = cm.log_prob_contributions(model, inputs.tokens, target=9)
    assert relative(layers.trajectory[:, -1], said) <= EXACT
    assert layers.components.of_kind("mlp").sum() == 2 * len(blocks)


NEURONS: dict[str, Callable[..., Any]] = {
    "parts after it": functools.partial(cm.attention_norms, at="mlp_out"),
    "log_prob_contributions": functools.partial(
        cm.log_prob_contributions, target=9, by="ff_neuron"
    ),
    "knockout": functools.partial(cm.knockout, target=9, neurons=[(1, 3)]),
    "query_contributions": functools.partial(cm.query_contributions, neurons=[(1, 3)]),
    "ff_memories": cm.ff_memories,
    "token_memory": cm.token_memory,
    "ff_values": lambda model, tokens: cm.ff_values(model, layer=0),
    "decompx": cm.decompx,
    "flow": lambda model, tokens: cm.flow(model, tokens[:1], target=9),
}


@pytest.mark.parametrize("name", NEURONS)
def test_what_needs_the_neurons_is_refused_by_name(name: str) -> None:
    with pytest.raises(cm.UnsupportedModel, match=r"not taken apart into neurons: got a MoE.*mlp"):
        NEURONS[name](opaque(), given().tokens)


def test_random_heads_are_drawn_and_gradients_taken() -> None:
    model, inputs = opaque(), given()
    found = cm.knockout(model, inputs.tokens, heads=[(0, 1)], target=9, controls=2)
    assert not torch.equal(found.before, found.after)
    taken = cm.gradient_x_input(model, inputs.tokens, target=9)
    assert bool(taken.scores.isfinite().all())
    assert bool(taken.scores.any())


def test_hooks_in_the_module_are_noticed() -> None:
    model, inputs = opaque(), given()
    name = view_of(model).blocks()[1].feed_forward.post
    with model.hooks(fwd_hooks=[(name, lambda tensor, hook: 2 * tensor)]):
        with pytest.raises(cm.UnsupportedModel, match=r"module\(input\) = output fails in .*1"):
            cm.value_zeroing(model, inputs.tokens)
        # What it adds is known as it is.
        layers = cm.log_prob_contributions(model, inputs.tokens, target=9)
        said = zoo.logits(model, inputs)[:, -1].log_softmax(dim=-1)[:, 9]
    assert relative(layers.trajectory[:, -1], said) <= EXACT


@pytest.mark.skipif(zoo.major() != 4, reason="the experts of this bridge")
def test_operations_of_experts_are_counted_and_estimated() -> None:
    model, tokens = opaque(), given().tokens
    expected = cm.estimate(model, tokens.shape[1], "value_zeroing", batch=len(tokens))
    done = count_operations(lambda: cm.value_zeroing(model, tokens))
    assert abs(expected.flops - done) <= 0.2 * done
