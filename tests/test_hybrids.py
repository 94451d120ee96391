"""Hybrids: layers of attention are analysed, others are one component each."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import zoo
import zoo_others
from asked import FLOAT32_INSIDE, host_trace, relative, view_of
from test_families import given
from test_value_zeroing import cosine, literal, norm_behind, zeroing

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given, make_batch

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(zoo.major() < 4, reason="bridges of TransformerLens 4"),
]
CASES = [*zoo_others.HYBRIDS]


@functools.cache
def built(kind: str) -> Any:
    """A hybrid that no test changes."""
    return zoo_others.build(kind, hybrid=True)


@pytest.mark.parametrize("kind", CASES)
def test_log_probs_and_memories_are_of_all_layers(kind: str) -> None:
    model, inputs = built(kind), given()
    assert cm.check(model).ok
    trace, blocks = host_trace(view_of(model), inputs, None)
    said = zoo.logits(model, inputs)[:, -1].log_softmax(dim=-1)[:, 9]
    scores = cm.log_prob_contributions(model, inputs.tokens, target=9)
    assert relative(scores.trajectory[:, -1], said) <= FLOAT32_INSIDE
    mixers = sum(len(block.mixers) for block in blocks)
    assert int(scores.components.of_kind("mixer").sum()) == 2 * mixers > 0
    assert relative(blocks[0].output(trace), trace[blocks[1].resid_in]) <= FLOAT32_INSIDE
    for by in ("head", "position", "ff_neuron", "attn_neuron"):
        found = cm.log_prob_contributions(model, inputs.tokens, target=9, by=by)
        assert relative(found.log_prob, said) <= FLOAT32_INSIDE
    for layer in range(len(blocks)):  # which may differ in width
        tops = cm.ff_memories(model, inputs.tokens, layer=layer)
        assert torch.equal(tops.final_top, zoo.logits(model, inputs).argmax(dim=-1))


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "falcon_h1"])
def test_layers_of_attention_have_maps_and_others_are_refused_by_name(kind: str) -> None:
    model, inputs = built(kind), given()
    zeroed = cm.value_zeroing(model, inputs.tokens, layer=1).scores[:, 0, 0]
    view, expected = view_of(model), literal_of_layer_1(model, inputs)
    assert relative(zeroed, expected) <= FLOAT32_INSIDE
    parts = cm.decompose(model, inputs.tokens, at="block_out", layer=1)
    trace, blocks = host_trace(view, inputs, None)
    assert relative(parts.total()[:, 0], trace[blocks[1].resid_out]) <= FLOAT32_INSIDE
    place = blocks[0].mixers[0].out.removesuffix(".hook_out")
    asked = {
        cm.attention: {},
        cm.value_zeroing: {},
        cm.attention_norms: {"layer": 0},
        cm.attention_flow: {},
        cm.decompx: {},
        cm.alti: {},
        cm.attention_knockout: {"sources": [0], "pos": -1},
        cm.flow: {"pos": -1},
        cm.information_flow_routes: {"pos": -1},
    }
    for method, options in asked.items():
        with pytest.raises(cm.UnsupportedModel, match=place) as raised:
            method(model, inputs.tokens[:1], **options)
        assert "layer=[1], which have attention, of a method that looks at each" in str(
            raised.value
        )
    cut = cm.attention_knockout(model, inputs.tokens, sources=[0], pos=-1, layer=1)
    assert bool(cut.log_probs.isfinite().all())


def literal_of_layer_1(model: Any, inputs: zoo.Inputs) -> torch.Tensor:
    """Value Zeroing of layer 1 by runs of the model."""
    view = view_of(model)
    block = view.blocks()[1]
    batch, norm = make_batch(view, Given(inputs.tokens)), norm_behind(model, None)

    def out(edits: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            assert norm is not None
            return norm(view.run(batch, [block.resid_out], edits=edits)[block.resid_out])

    whole = out({})
    value = block.attention("self").value
    found = [out({value: zeroing([place], None)}) for place in range(inputs.tokens.shape[1])]
    return torch.stack([cosine(one, whole) for one in found], dim=-1)


def test_attention_beside_a_state_space_has_maps_of_its_own() -> None:
    model, inputs = built("falcon_h1"), given()
    zeroed = cm.value_zeroing(model, inputs.tokens).scores[:, :, 0]
    assert relative(zeroed, literal(model, inputs)[1]) <= FLOAT32_INSIDE
    trace, blocks = host_trace(view_of(model), inputs, None)
    parts = cm.decompose(model, inputs.tokens, at="attn_out")
    own = torch.stack([block.attention("self").output(trace) for block in blocks], dim=1)
    assert relative(parts.total(), own) <= FLOAT32_INSIDE
    with pytest.raises(cm.UnsupportedModel, match="blocks.0.mamba.*at='attn_out'"):
        cm.attention_norms(model, inputs.tokens, at="block_out")
    with pytest.raises(cm.InvalidInput, match=r"blocks.0.mamba.hook_out.* mix tokens, too"):
        cm.attention(model, inputs.tokens, heads=False).rollout()
    # The neuron's value, with the factor of what attention reads.
    neurons = cm.log_prob_contributions(model, inputs.tokens, target=9, by="attn_neuron", pos=-1)
    asked = cm.query_contributions(model, inputs.tokens, neurons=neurons.top(1), pos=-1)
    assert relative(asked.activation, neurons.top(1).coefficients) <= FLOAT32_INSIDE


def test_a_model_without_attention_stays_refused() -> None:
    model = zoo_others.build("mamba", state_size=8)
    with pytest.raises(cm.UnsupportedModel, match="state-space model"):
        cm.log_prob_contributions(model, given().tokens, target=9)
