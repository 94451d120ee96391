"""Gemma 4: per-layer embeddings end each block, and later layers use earlier ones' values."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import zoo
import zoo_others
from asked import FLOAT32_INSIDE, relative, view_of
from test_attention_knockout import literal as with_edges_cut
from test_families import given

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given, make_batch

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(zoo.major() < 4, reason="bridges of TransformerLens 4"),
]


@functools.cache
def built() -> Any:
    """A model that no test changes; its blocks scale the stream, too."""
    model = zoo_others.build("gemma4_text", ending=True)
    for block in model.blocks:
        block.original_component.layer_scalar.fill_(0.7)
    return model


def states(model: Any, inputs: zoo.Inputs) -> dict[str, torch.Tensor]:
    """What Hugging Face's own modules put out, by their names."""
    kept: dict[str, torch.Tensor] = {}
    layers = model.original_model.model.layers
    handles = [
        module.register_forward_hook(lambda m, given, found, name=name: kept.update({name: found}))
        for index, block in enumerate(layers)
        for name, module in (
            (f"{index} attn", block.post_attention_layernorm),
            (f"{index} mlp", block.post_feedforward_layernorm),
            (f"{index} ple", block.post_per_layer_input_norm),
        )
    ]
    with torch.no_grad():
        kept["logits"] = model.original_model(inputs.tokens).logits
    for handle in handles:
        handle.remove()
    return kept


def test_the_stream_is_the_sum_of_three_sublayers() -> None:
    model, inputs = built(), given()
    report = cm.check(model)
    assert report.ok, str(report)
    own = states(model, inputs)
    view = view_of(model)
    blocks = view.blocks()
    names = [name for block in blocks for name in (*block.points(), *block.checkpoints())]
    trace = view.run(make_batch(view, Given(inputs.tokens)), names)
    for block in blocks:
        attention, ff, last = block.sublayers
        for one, name in ((attention, "attn"), (ff, "mlp"), (last, "ple")):
            assert relative(one.output(trace), own[f"{block.layer} {name}"]) <= FLOAT32_INSIDE
    said = own["logits"][:, -1].log_softmax(dim=-1)[:, 9]
    layers = cm.log_prob_contributions(model, inputs.tokens, target=9)
    assert relative(layers.trajectory[:, -1], said) <= FLOAT32_INSIDE
    assert int(layers.components.of_kind("per_layer_embed").sum()) == 2 * len(blocks)
    for by in ("head", "position", "head_position", "ff_neuron", "attn_neuron"):
        found = cm.log_prob_contributions(model, inputs.tokens, target=9, by=by)
        assert relative(found.log_prob, said) <= FLOAT32_INSIDE
    contrast = cm.log_prob_contributions(model, inputs.tokens, target=9, foil=12)
    logits = own["logits"][:, -1]
    assert relative(contrast.scores.nansum(dim=-1), logits[:, 9] - logits[:, 12]) <= FLOAT32_INSIDE


def test_maps_up_to_the_feed_forward_output_add_up() -> None:
    model, inputs = built(), given()
    own = states(model, inputs)
    for at, name in (("attn_out", "attn"), ("mlp_out", "mlp")):
        found = cm.decompose(model, inputs.tokens, at=at, layer=[0, 1]).total()  # type: ignore[arg-type]
        expected = torch.stack([own[f"{layer} {name}"] for layer in (0, 1)], dim=1)
        assert relative(found, expected) <= FLOAT32_INSIDE
        later = cm.decompose(model, inputs.tokens, at=at, layer=3).total()[:, 0]  # type: ignore[arg-type]
        assert relative(later, own[f"3 {name}"]) <= FLOAT32_INSIDE


def test_memories_and_knocked_out_edges_are_the_models() -> None:
    model, inputs = built(), given()
    tops = cm.ff_memories(model, inputs.tokens, layer=-1)
    assert torch.equal(tops.output_top[:, -1], zoo.logits(model, inputs).argmax(dim=-1))
    asked: dict[str, Any] = {"target": 9, "pos": -1, "sources": 1, "to": -1, "window": None}
    cut = cm.attention_knockout(model, inputs.tokens, heads=[1], **asked).log_probs
    said = with_edges_cut(view_of(model), inputs, None, [0, 1, 2, 3], [(1, [6], [1])])
    said = said[:, -1].log_softmax(dim=-1)[:, 9]
    assert relative(cut.flatten(), said) <= FLOAT32_INSIDE


def test_what_it_takes_more_for_is_refused_by_name() -> None:
    model, inputs = built(), given()
    one: dict[str, Any] = {"target": 9, "pos": -1}
    asked: list[tuple[Any, dict[str, Any]]] = [
        (cm.value_zeroing, {}),
        (cm.attention_norms, {"at": "block_out"}),
        (cm.decompose, {"at": "resid_post"}),
        (cm.globenc, {}),
        (cm.decompx, {}),
        (cm.flow, one),
        (cm.information_flow_routes, one),
    ]
    for method, options in asked:
        with pytest.raises(cm.UnsupportedModel, match=r"per-layer embeddings \(blocks.0.per_layer"):
            method(model, inputs.tokens[:1], **options)


def test_what_borrowed_values_read_is_refused_by_name() -> None:
    model, inputs = built(), given()
    neurons = cm.log_prob_contributions(model, inputs.tokens[:1], target=9, by="attn_neuron")
    asked: dict[str, Any] = {"neurons": neurons.top(1), "target": 9}
    assert int(asked["neurons"].components.layer) == 3
    with pytest.raises(cm.UnsupportedModel, match=r"blocks.3.attn read.*values of blocks.1.attn"):
        cm.query_contributions(model, inputs.tokens[:1], **asked)
    own = view_of(model).blocks()[1].attention("self")
    assert own.W_V.shape == (4, 32, 16)
