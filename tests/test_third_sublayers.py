"""Gemma 4: per-layer embeddings end each block, and later layers use earlier ones' values."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import zoo
import zoo_others
from asked import EXACT, FLOAT32_INSIDE, host_trace, relative, view_of
from test_attention_knockout import literal as with_edges_cut
from test_families import given
from test_value_zeroing import literal

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.evaluation import hook_names
from tl_contextmix.methods.decompx import decompx_vectors
from tl_contextmix.methods.flow_knockout import flow_knockout

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


@torch.no_grad()
def test_maps_of_the_whole_block_add_up_and_read_the_gate_s_slope() -> None:
    """A part goes through the third sublayer by the gate's secant from zero, times the vector."""
    model, inputs = built(), given()
    view = view_of(model)
    trace, blocks = host_trace(view, inputs, None)
    for bias in ("contributor", "fixed"):
        parts = cm.decompose(model, inputs.tokens, at="block_out", bias=bias)  # type: ignore[arg-type]
        own = torch.stack([trace[block.resid_out] for block in blocks], dim=1)
        assert relative(parts.total(), own) <= FLOAT32_INSIDE
    asked: dict[str, Any] = {"layer": 1}
    mid, out, post = (
        cm.decompose(model, inputs.tokens, at=at, **asked).parts[:, 0]  # type: ignore[arg-type]
        for at in ("resid_mid", "mlp_out", "resid_post")
    )
    block = model.blocks[1].original_component
    linear = torch.nn.functional.linear
    gate, project, norm = (
        block.per_layer_input_gate.weight,
        block.per_layer_projection.weight,
        block.post_per_layer_input_norm,
    )
    stream = trace[blocks[1].resid_out] / 0.7 - states(model, inputs)["1 ple"]
    pre = linear(stream, gate)
    vector = model.original_model.model
    embedded = vector.get_per_layer_inputs(inputs.tokens, None)
    vector = vector.project_per_layer_inputs(trace[blocks[0].resid_in], embedded)[:, :, 1]
    slope = block.act_fn(pre) * vector / pre
    written = linear(slope * pre, project)
    scale = (written.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    read = mid + out
    through = linear(linear(read, gate) * slope[:, :, None], project)
    assert relative(post, read + through * norm.weight / scale[:, :, None]) <= FLOAT32_INSIDE
    norms = cm.attention_norms(model, inputs.tokens, at=["resid_post", "block_out"], **asked)
    assert relative(norms["resid_post"].scores[:, 0, 0], post.norm(dim=-1)) <= EXACT
    assert relative(norms["block_out"].scores, 0.7 * norms["resid_post"].scores) <= EXACT
    skipped = cm.globenc(model, inputs.tokens, **asked).scores
    assert relative(skipped[:, 0, 0], 0.7 * mid.norm(dim=-1)) <= EXACT


def zeroed_in(model: Any, inputs: zoo.Inputs, layer: int) -> torch.Tensor:
    """Outputs [source batch target d_model] of a block that mixes values with one set to zero.

    The attention of a later layer is given an earlier one's values: zero there, and there alone.
    """
    block = model.blocks[layer].original_component
    found: list[torch.Tensor] = []
    for source in range(inputs.tokens.shape[1]):

        def zero(module: Any, args: Any, given: dict[str, Any], source: int = source) -> Any:
            shared = dict(given["shared_kv_states"])
            for kind, (keys, values) in shared.items():
                values = values.clone()
                values[:, :, source] = 0
                shared[kind] = keys, values
            return args, {**given, "shared_kv_states": shared}

        handles = [
            block.self_attn.register_forward_pre_hook(zero, with_kwargs=True),
            block.register_forward_hook(lambda module, args, out: found.append(out.clone())),
        ]
        with torch.no_grad():
            model.original_model(inputs.tokens)
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def test_a_value_is_zeroed_as_the_host_does_it_borrowed_or_not() -> None:
    model, inputs = built(), given()
    found = cm.value_zeroing(model, inputs.tokens, final_norm=False, metric="euclidean").scores
    own = literal(model, inputs, distance=lambda a, b: (a - b).norm(dim=-1))[0]
    assert relative(found[:, :2, 0], own[:, :2]) <= FLOAT32_INSIDE
    trace, blocks = host_trace(view_of(model), inputs, None)
    for layer in (2, 3):
        outputs = zeroed_in(model, inputs, layer)
        whole = trace[blocks[layer].resid_out]
        expected = (outputs - whole).norm(dim=-1).permute(1, 2, 0)
        assert relative(found[:, layer, 0], expected) <= FLOAT32_INSIDE
    row = cm.value_zeroing(model, inputs.tokens, target=9, pos=-1).scores[:, :, 0, 0]
    assert relative(row, cm.value_zeroing(model, inputs.tokens).scores[:, :, 0, -1]) <= EXACT


def test_vectors_and_graphs_run_through_third_sublayers_and_borrowed_values() -> None:
    model, inputs = built(), given()
    tokens = inputs.tokens[:1]
    trace, blocks = host_trace(view_of(model), zoo.Inputs(tokens), None)
    for bias in ("contributor", "fixed"):
        carried = decompx_vectors(model, tokens, bias=bias)  # type: ignore[arg-type]
        own = torch.stack([trace[block.resid_out] for block in blocks], dim=1)
        assert relative(carried.total(), own) <= FLOAT32_INSIDE
    asked: dict[str, Any] = {"target": 9, "foil": 12, "pos": -1}
    graph = cm.flow(model, tokens, k=300, share=1.0, **asked)
    # Carried up, and pulled down: what each token brings to the difference is the same.
    logits = cm.decompx(model, tokens, of="logit", **asked).scores[0, 0, 0, 0]
    frame = graph.to_dataframe()
    embeds = frame[frame.kind == "embed"].set_index("pos").score
    assert relative(torch.tensor([embeds.get(n, 0.0) for n in range(7)]), logits) <= FLOAT32_INSIDE
    reads = torch.tensor([not node.is_source for node in graph.nodes])
    assert relative(graph.edges.sum(dim=1)[reads], graph.scores[reads]) <= FLOAT32_INSIDE
    ends = [n for n, node in enumerate(graph.nodes) if node.kind == "per_layer_embed"]
    assert ends
    tested = flow_knockout(model, tokens, graph=graph, nodes=ends[:2], controls=0)
    assert relative(tested.linear[:1], graph.scores[ends[:1]]) <= FLOAT32_INSIDE
    view, without = view_of(model), [graph.nodes[ends[0]]]
    ablated = view.run(
        make_batch(view, Given(tokens)),
        [],
        edits={
            blocks[without[0].layer].ending.post: lambda x: zero_at(x, without[0].pos)  # type: ignore[union-attr]
        },
    ).logits
    assert ablated is not None
    before, after = (
        x[0, -1, 9] - x[0, -1, 12] for x in (zoo.logits(model, zoo.Inputs(tokens)), ablated)
    )
    assert relative(tested.alone[:1], (before - after)[None]) <= FLOAT32_INSIDE


def zero_at(x: torch.Tensor, pos: int) -> torch.Tensor:
    """A copy with one position at zero."""
    x = x.clone()
    x[:, pos] = 0
    return x


def test_routes_pass_the_state_in_front_of_a_third_sublayer() -> None:
    model, inputs = built(), given()
    tokens = inputs.tokens[:1]
    graph = cm.information_flow_routes(model, tokens, target=9, pos=-1, threshold=0.0)
    own = states(model, zoo.Inputs(tokens))
    trace, blocks = host_trace(view_of(model), zoo.Inputs(tokens), None)
    whole = trace[blocks[3].resid_out][0, -1]
    last = 0.7 * own["3 ple"][0, -1]
    near = torch.stack(
        [
            (whole.abs().sum() - (part - whole).abs().sum()).clamp(min=0)
            for part in (whole - last, last)
        ]
    )
    shares = near / near.sum()
    number = {(n.kind, n.layer, n.pos): place for place, n in enumerate(graph.nodes)}
    answer = next(place for place, n in enumerate(graph.nodes) if n.kind == "answer")
    for kind, share in zip(("resid_mid_mlp", "per_layer_embed"), shares, strict=True):
        found = graph.edges[answer, number[kind, 3, 6]]
        assert relative(found, share) <= FLOAT32_INSIDE
    # A head of layer 3 reads what enters layer 1, whose values it uses.
    heads = [place for place, n in enumerate(graph.nodes) if n.kind == "attn" and n.layer == 3]
    read = {
        graph.nodes[int(n)].layer for place in heads for n in graph.edges[place].nonzero()[:, 0]
    }
    assert read == {0}


def test_a_cache_and_a_steered_pass_tell_the_vectors_too() -> None:
    model, inputs = built(), given()
    names = hook_names(model, cm.decompose)
    _, cache = model.run_with_cache(inputs.tokens, names_filter=names)
    asked: dict[str, Any] = {"at": "block_out"}
    kept = cm.decompose(model, inputs.tokens, cache=cache, **asked).parts
    assert torch.equal(kept, cm.decompose(model, inputs.tokens, **asked).parts)
    steer = torch.linspace(-1, 1, 32, dtype=torch.float64)
    for name in ("blocks.0.hook_in", "embed.hook_out", "blocks.2.hook_in"):
        with model.hooks(fwd_hooks=[(name, lambda x, hook: x + steer)]):
            found = cm.decompose(model, inputs.tokens, **asked)
            trace, blocks = host_trace(view_of(model), inputs, None)
            own = torch.stack([trace[block.resid_out] for block in blocks], dim=1)
        assert relative(found.total(), own) <= FLOAT32_INSIDE


def test_what_borrowed_values_read_is_what_enters_the_lender() -> None:
    model, inputs = built(), given()
    tokens = inputs.tokens[:1]
    neurons = cm.log_prob_contributions(model, tokens, target=9, by="attn_neuron")
    top = neurons.top(1)
    one = top.components.at(0, 0)
    assert one["layer"] == 3
    found = cm.query_contributions(model, tokens, neurons=top, target=9)
    trace, blocks = host_trace(view_of(model), zoo.Inputs(tokens), None)
    attention = blocks[3].attentions[0]
    head, source, index = one["head"], one["source"], one["neuron"]
    weight = trace.pattern(attention)[0, head, one["pos"], source]
    value = trace.value(attention)[0, source, head, index]
    assert relative(found.activation, (weight * value)[None, None]) <= FLOAT32_INSIDE
    assert relative(found.shares.nansum(dim=-1), found.activation) <= FLOAT32_INSIDE
    assert int(found.components.layer.max()) == 0  # of layers before the lender's alone
    own = view_of(model).blocks()[1].attention("self")
    assert own.W_V.shape == (4, 32, 16)
    with pytest.raises(cm.UnsupportedModel, match=r"blocks.3.attn read.*values of layer 1"):
        _ = attention.W_V
