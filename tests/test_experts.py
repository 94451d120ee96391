"""Mixtures of experts: every method against the host's own modules."""

from __future__ import annotations

import functools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_build
import zoo_others
from asked import EXACT, FLOAT32_INSIDE, case_of, host_trace, relative, shared, view_of
from test_families import given
from torch import Tensor
from zoo_configs import LLAMA_LIKE

import tl_contextmix as cm
from tl_contextmix.adapters.expert_reading import read_experts
from tl_contextmix.adapters.handles import Handle
from tl_contextmix.core.activations import ACTIVATIONS, Activation, clamped, gated_slopes
from tl_contextmix.core.blocks import EditPoints
from tl_contextmix.core.counters import count_operations
from tl_contextmix.core.experts import Experts
from tl_contextmix.evaluation import hook_names
from tl_contextmix.methods.decompx import decompx_vectors

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(zoo.major() < 4, reason="bridges of TransformerLens 4"),
]
MIXTURES = (
    *("ernie4_5_moe", "flex_olmo", "glm4_moe", "llama4_text", "minimax_m2"),
    *("olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "granitemoehybrid, experts"),
)
F = 16  # neurons of an expert


def mixtral(experts: int = 4, *, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A random Mixtral of two layers, two experts for each token."""
    sizes = {"num_local_experts": experts, "num_experts_per_tok": 2, "intermediate_size": F}
    hf = zoo_build.hugging_face(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**LLAMA_LIKE, **sizes, **options},
        dtype=dtype,
        seed=0,
    )
    with zoo_build.quiet():
        return zoo_build.bridge(hf, "llama", dtype=dtype, processed=False)


@pytest.fixture(scope="module")
def model() -> Any:
    """One that no test changes."""
    return mixtral()


def module_of(model: Any, layer: int) -> Any:
    """The host's own module."""
    return model.blocks[layer].mlp.original_component


def router(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The host's own routing of [token d_model]: weights and experts."""
    gate = module.gate
    gate = getattr(gate, "original_component", gate)
    with torch.no_grad():
        _, weights, chosen = gate(x)
    return weights, chosen


def literal_coefficients(module: Any, x: Tensor) -> Tensor:
    """Coefficients [token expert neuron] of a Mixtral, token by token, from the host's weights."""
    weights, chosen = router(module, x)
    up, down = module.experts.gate_up_proj.detach(), module.experts.down_proj
    found = x.new_zeros(len(x), len(up), down.shape[2])
    for token in range(len(x)):
        for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
            gate, linear = (up[expert] @ x[token]).chunk(2)
            found[token, expert] = weight * torch.nn.functional.silu(gate) * linear
    return found


def test_memories_are_experts_neurons_times_the_router_s_weight(model: Any) -> None:
    tokens = given().tokens
    found = cm.ff_memories(model, tokens)
    trace, blocks = host_trace(view_of(model), given(), None)
    for layer, block in enumerate(blocks):
        ff = block.feed_forward
        assert isinstance(ff, Experts)
        x = trace[ff.pre]
        expected = literal_coefficients(module_of(model, layer), x.flatten(0, 1))
        assert relative(found.coefficients[:, layer].flatten(0, 1), expected.flatten(1)) < 1e-6
        values = module_of(model, layer).experts.down_proj.detach().transpose(1, 2)
        assert torch.equal(ff.W_out, values.flatten(0, 1))
        made = found.coefficients[:, layer] @ ff.W_out
        assert relative(made, trace[ff.written]) < 1e-6
    assert found.top(3).expert.tolist() == (found.top(3).neuron // F).tolist()
    static = cm.ff_values(model, neurons=[3, 40], layer=1)
    assert static.to_dataframe().expert.tolist() == [0, 0, 2, 2]
    norms = found.norm[1, [3, 40]]
    assert torch.allclose(static.norm, norms)
    # Two of four experts are silent everywhere, and count as no quadrant.
    share = (found.coefficients != 0).to(torch.float64).mean(dim=-1)
    assert torch.equal(share, torch.full_like(share, 0.5))
    assert torch.allclose(found.quadrants.sum(dim=-1), share)


@pytest.mark.parametrize("version", ["V2", "V3"])
def test_experts_beside_latent_attention_are_read(version: str) -> None:
    """Grouped and bias-corrected routing, shared experts, a first layer without any."""
    sizes = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "num_key_value_heads": 4, **sizes}
    names = (f"Deepseek{version}ForCausalLM", f"Deepseek{version}Config")
    options = {**LLAMA_LIKE, **latent, **zoo_others.GROUPED}
    hf = zoo_build.hugging_face(*names, options, dtype=torch.float64, seed=0)
    with zoo_build.quiet():
        model = zoo_build.bridge(hf, "llama", dtype=torch.float64, processed=False)
    block = model.blocks[1].mlp
    handle = Handle(weakref.ref(model), "TransformerBridge", torch.float64, torch.device("cpu"))
    # It is None unless the experts compute what their module does.
    found = read_experts(handle, "blocks.1.mlp", EditPoints(), lambda x: block(x).detach())
    assert found.sizes == (F, F, F, F, F)
    assert found.active == 3


def test_layers_of_unlike_width_are_asked_apart() -> None:
    mixed = zoo_others.build("qwen3_moe")
    with pytest.raises(cm.InvalidInput, match=r"different numbers.*layer=\[0\]"):
        cm.ff_memories(mixed, given().tokens)
    assert cm.ff_memories(mixed, given().tokens, layer=0).coefficients.shape[-1] == 48


@pytest.mark.parametrize(
    ("kind", "bias"),
    [(kind, "contributor") for kind in MIXTURES] + [("llama4_text", "fixed"), ("olmoe", "fixed")],
)
def test_parts_add_up_at_every_point(kind: str, bias: Any) -> None:
    model = zoo_others.build(kind)
    trace, blocks = host_trace(view_of(model), given(), None)
    ff = blocks[-1].feed_forward
    assert isinstance(ff, Experts)
    tokens = given().tokens
    added = cm.decompose(model, tokens, at="mlp_out", bias=bias, layer=-1).total()[:, 0]
    own = trace[ff.written]
    assert relative(added, own if ff.norm_out is None else ff.norm_out(own)) < FLOAT32_INSIDE
    whole = decompx_vectors(model, tokens, bias=bias)
    assert relative(whole.total()[:, -1], trace[blocks[-1].resid_out]) < FLOAT32_INSIDE
    fed = cm.token_memory(model, tokens, layer=-1, bias=bias)
    coefficients = cm.ff_memories(model, tokens, layer=-1).coefficients
    assert relative(fed.shares.sum(dim=3) + fed.bias, coefficients) < FLOAT32_INSIDE


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_experts_of_an_encoder_decoder_are_read(stack: Any) -> None:
    """One expert for each token, whose probability is its weight; every other layer is dense."""
    switch = zoo_others.build("switch_transformers")
    tokens = given().tokens
    asked: dict[str, Any] = {"decoder_input": tokens[:, 2:6]}
    inputs = zoo.Inputs(tokens, asked["decoder_input"])
    trace, blocks = host_trace(view_of(switch), inputs, stack)
    ff = blocks[1].feed_forward
    assert isinstance(ff, Experts)
    assert (ff.sizes, ff.active, ff.gated) == ((48,) * 4, 1, False)
    own = switch.get_submodule(f"{stack}_blocks.1.mlp").original_component
    x = trace[ff.pre].flatten(0, 1)
    router = getattr(own.router, "original_component", own.router)
    with torch.no_grad():
        probabilities, chosen = router.classifier(x.float()).softmax(dim=-1).max(dim=-1)
        expected = x.new_zeros(len(x), 4, 48)
        for row, (weight, expert) in enumerate(zip(probabilities, chosen.tolist(), strict=True)):
            hidden = own.experts[f"expert_{expert}"].wi(x[row].to(own.experts.expert_0.wi.weight))
            expected[row, expert] = weight * hidden.relu()
    assert len(set(chosen.tolist())) > 1
    found = ff.coefficients(trace)
    assert relative(found.flatten(0, 1), expected.flatten(1)) <= FLOAT32_INSIDE
    maps: dict[str, Any] = {**asked, "stack": stack, "layer": -1}
    added = cm.decompose(switch, tokens, at="mlp_out", **maps).total()[:, 0]
    assert relative(added, trace[ff.written]) <= FLOAT32_INSIDE
    zeroed = cm.value_zeroing(switch, tokens, **maps)
    assert zeroed.provenance.options["routing"] == "anew"
    if stack == "decoder":
        memories = cm.ff_memories(switch, tokens, layer=-1, **asked)
        assert torch.equal(memories.coefficients[:, 0], found)
        by = cm.log_prob_contributions(switch, tokens, target=9, by="expert", **asked)
        assert bool(by.scores.isfinite().all())


def test_a_text_that_may_be_too_much_for_an_expert_is_refused() -> None:
    switch = zoo_others.build("switch_transformers")
    tokens = torch.full((1, 17), 9)
    with pytest.raises(cm.InvalidInput, match="17 tokens; expected at most 16"):
        cm.value_zeroing(switch, tokens)


def test_a_bridge_of_switch_without_patterns_is_refused_by_name() -> None:
    switch = zoo_others.direct("SwitchTransformers")
    with zoo_build.quiet():
        plain = zoo_build.bridge(switch, "bart", dtype=torch.float64, processed=False)
    with pytest.raises(cm.UnsupportedModel, match=r"hold position biases.*Load it with load_model"):
        cm.attention(plain, given().tokens)


def test_maps_say_that_the_routing_is_held(model: Any) -> None:
    tokens = given().tokens
    before = cm.attention_norms(model, tokens, at="resid_mid")
    after = cm.attention_norms(model, tokens, at="block_out")
    assert "routing" not in before.provenance.options
    for found in (after, cm.decompx(model, tokens)):
        assert found.provenance.options["routing"] == "held"
        assert "experts that it is routed to" in found.panels()[0].caption


def chosen_by(model: Any, tokens: Tensor, layer: int, edits: Any) -> Tensor:
    """Which experts [batch pos expert] the host's router chooses in an edited pass."""
    seen: list[Tensor] = []
    name = f"blocks.{layer}.mlp.gate.hook_expert_indices"
    model.run_with_hooks(tokens, fwd_hooks=[*edits, (name, lambda x, hook: seen.append(x.clone()))])
    return torch.nn.functional.one_hot(seen[0].view(*tokens.shape, -1), 4).sum(dim=2)


def test_value_zeroing_routes_anew_and_counts(model: Any) -> None:
    tokens = given().tokens
    found = cm.value_zeroing(model, tokens)  # equal to literally zeroed: test_value_zeroing
    expected = {}
    for layer in range(2):
        kept, moved = chosen_by(model, tokens, layer, []), 0
        for place in range(tokens.shape[1]):

            def zero(value: Tensor, hook: Any, place: int = place) -> Tensor:
                value = value.clone()
                value[:, place] = 0
                return value

            edits = [(view_of(model).blocks()[layer].attentions[0].value, zero)]
            other = chosen_by(model, tokens, layer, edits)
            moved += int((other != kept).any(dim=-1).sum())
        expected[str(layer)] = [moved, 2 * 28]
    assert found.provenance.options["routing"] == "anew"
    assert found.provenance.options["rerouted"] == expected
    total = sum(moved for moved, _ in expected.values())
    assert total > 0
    assert f"for {total} of 112 pairs" in found.panels()[0].caption


def test_contributions_of_experts_and_of_their_neurons(model: Any) -> None:
    tokens = given().tokens
    by_expert = cm.log_prob_contributions(model, tokens, target=9, by="expert")
    best = cm.log_prob_contributions(model, tokens, target=9, by="expert", k=3)
    assert best.labels(0) == by_expert.top(3).labels(0)
    torch.testing.assert_close(best.scores, by_expert.top(3).scores)
    each = cm.log_prob_contributions(model, tokens, target=9, by="ff_neuron")
    frame = each.to_dataframe()
    assert {"expert", "neuron"} <= set(frame.columns)
    trace, blocks = host_trace(view_of(model), given(), None)
    view = view_of(model)
    with torch.no_grad():
        for layer, block in enumerate(blocks):
            ff = block.feed_forward
            assert isinstance(ff, Experts)
            read = literal_coefficients(module_of(model, layer), trace[ff.pre][:, -1])
            values = module_of(model, layer).experts.down_proj.transpose(1, 2)
            vectors = torch.einsum("ben,enm->bem", read, values)
            # The scale of the last norm is frozen at its value in the pass.
            stream = block.middle(trace)[:, -1]
            W_U = view.readout.weights("W_U")
            assert W_U is not None
            scale = view.readout.norm.scale(trace[blocks[-1].resid_out][:, -1])

            def says(x: Tensor, scale: Tensor = scale, W_U: Tensor = W_U) -> Tensor:
                logits = view.readout.norm.linear(x) / scale @ W_U
                return logits.log_softmax(dim=-1)[..., 9]

            expected = says(stream[:, None] + vectors, scale[:, None]) - says(stream)[:, None]
            mine = (by_expert.components.layer[0] == layer) & (by_expert.components.expert[0] >= 0)
            assert relative(by_expert.scores[:, mine], expected) < 1e-5
            one = read[..., None] * values
            expected = says(stream[:, None, None] + one, scale[:, None, None])
            expected = (expected - says(stream)[:, None, None]).flatten(1)
            mine = (each.components.layer[0] == layer) & (each.components.neuron[0] >= 0)
            assert relative(each.scores[:, mine], expected) < 1e-5
    assert by_expert.components.label(0, 0) == "L0E0"
    best = cm.log_prob_contributions(model, tokens, target=9, by="ff_neuron", k=7)
    assert relative(best.scores, each.top(7).scores) < 1e-9
    names = [[r.components.label(0, i) for i in range(7)] for r in (best, each.top(7))]
    assert names[0] == names[1]
    assert "E" in names[0][0]
    read = cm.query_contributions(model, tokens, neurons=best.top(3))
    assert relative(read.activation, best.top(3).coefficients) < 1e-6


def test_a_scan_says_of_which_expert_a_neuron_is(model: Any) -> None:
    found = cm.scan(model, [([5, 9, 17], 9, 7), ([5, 8], 9, 7)], by=["head", "ff_neuron"])
    frame = found.to_dataframe()
    for row in frame[frame.neuron >= 0].itertuples():
        assert row.component == f"L{row.layer}E{row.expert}N{row.neuron}"
    assert (frame.expert[frame["head"] >= 0] == -1).all()
    best = found.top(1, level="ff_neuron")[0]
    assert best["component"] == f"L{best['layer']}E{best['expert']}N{best['neuron']}"


def test_a_dense_model_has_no_experts() -> None:
    dense = zoo_others.build("qwen3")
    with pytest.raises(cm.InvalidInput, match="no components by expert: got .* without experts"):
        cm.log_prob_contributions(dense, given().tokens, target=9, by="expert")
    with pytest.raises(cm.InvalidInput, match="no such component"):
        cm.knockout(dense, given().tokens, target=9, experts=[(0, 1)])


def test_a_knocked_out_expert_is_one_without_its_value_vectors(model: Any, tmp_path: Path) -> None:
    tokens = given().tokens
    asked: dict[str, Any] = {"target": 9, "controls": 0, "everywhere": True}
    for experts, where in (([(1, 2)], slice(None)), ([(1, 2, 5)], 5), ([(1, 2, 5), (0, 1)], 5)):
        found = cm.knockout(model, tokens, experts=experts, **asked)
        other = mixtral()
        with torch.no_grad():
            module_of(other, 1).experts.down_proj[2][:, where] = 0
            if len(experts) > 1:
                module_of(other, 0).experts.down_proj[1] = 0
            said = other(tokens)[:, -1].log_softmax(dim=-1)[:, 9]
        assert relative(found.after[:, 0], said) < 1e-9
    chosen = cm.log_prob_contributions(model, tokens, target=9, by="expert").top(2)
    again = cm.knockout(model, tokens, experts=chosen, target=9, controls=2)
    assert (
        type(again).load(again.save(tmp_path / "one")).components.expert.tolist()
        == again.components.expert.tolist()
    )
    mean = cm.knockout(model, tokens, experts=[(1, 2)], replace_with="mean", target=9, controls=0)
    assert bool((mean.after != mean.before).any())
    with pytest.raises(cm.InvalidInput, match="no such component"):
        cm.knockout(model, tokens, experts=[(1, 4)], target=9)
    held = "no such component.* one of layer 1: attn 4 x 8, 4 experts of mlp 0 x "
    with pytest.raises(cm.InvalidInput, match=held):
        cm.knockout(model, tokens, neurons=[(1, 3)], target=9)


def test_granite_4_adds_a_shared_layer_to_its_experts_in_the_block() -> None:
    granite, tokens = zoo_others.build("granitemoehybrid, experts"), given().tokens
    asked: dict[str, Any] = {"target": 9, "controls": 0, "everywhere": True}
    shared, neuron = 4, 7  # the last expert is the layer that every token goes through
    found = cm.knockout(granite, tokens, experts=[(1, shared, neuron)], **asked)

    def silence(post: Tensor, hook: Any) -> Tensor:
        post = post.clone()
        post[..., neuron] = 0
        return post

    with torch.no_grad():
        hooks = [("blocks.1.shared_mlp.hook_post", silence)]
        said = granite.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1].log_softmax(dim=-1)[:, 9]
    assert relative(found.after[:, 0], said) < FLOAT32_INSIDE
    assert relative(found.before[:, 0], said) > FLOAT32_INSIDE
    names = hook_names(granite, cm.decompose)
    _, cache = granite.run_with_cache(tokens, names_filter=names)
    kept = cm.decompose(granite, tokens, at="block_out", cache=cache).parts
    assert torch.equal(kept, cm.decompose(granite, tokens, at="block_out").parts)


def test_experts_neurons_are_nodes_of_a_graph(model: Any) -> None:
    found = cm.flow(model, given().tokens[:1], target=9, neurons=True, share=1.0, k=500)
    assert relative(found.edges.sum(dim=1)[-1:], found.scores[-1:]) < 1e-6


@pytest.mark.parametrize("experts", [4, 16])
def test_an_expert_that_no_token_reached_has_no_triggers(experts: int, tmp_path: Path) -> None:
    model = mixtral(experts)
    texts = [[5, 9, 12, 7, 20]]
    found = cm.mine_triggers(model, texts, out=tmp_path / "mined", k=2, tails="both")
    frame = found.to_dataframe()
    trace, blocks = host_trace(view_of(model), zoo.Inputs(torch.tensor(texts)), None)
    for layer, block in enumerate(blocks):
        ff = block.feed_forward
        assert isinstance(ff, Experts)
        reached = (ff.gains(trace[ff.pre]) != 0)[0].any(dim=0).nonzero()[:, 0].tolist()
        assert sorted(set(frame[frame.layer == layer].neuron // F)) == reached
        silent = tuple(e for e in range(experts) if e not in reached)
        assert found.silent_experts.get(layer, ()) == silent
    if found.silent_experts:
        assert "Experts without triggers" in repr(found)


@pytest.mark.parametrize(
    "ask",
    [
        lambda model, tokens: cm.attention_norms(model, tokens, at="block_out"),
        cm.value_zeroing,
        cm.decompx,
        lambda model, tokens: cm.log_prob_contributions(model, tokens, target=9, by="ff_neuron"),
        lambda m, tokens: cm.log_prob_contributions(m, tokens, target=9, by="ff_neuron", k=5),
        lambda model, tokens: cm.log_prob_contributions(model, tokens, target=9, by="expert"),
        lambda model, tokens: cm.flow(model, tokens[:1], target=9),
    ],
    ids=["norms", "value_zeroing", "decompx", "ff_neuron", "best", "expert", "flow"],
)
def test_operations_follow_the_experts_that_a_token_goes_through(ask: Any) -> None:
    """Of thirty-two experts as of four; but for the router, and which experts a batch shares."""
    few, many = (mixtral(count, intermediate_size=128) for count in (4, 32))
    tokens = given().tokens[:1]
    costs = []
    for model in (few, many):
        ask(model, tokens)  # the checks of the first call
        costs.append(count_operations(lambda model=model: ask(model, tokens)))
    assert costs[1] <= 1.15 * costs[0]


@pytest.mark.parametrize("name", ["attention_norms", "value_zeroing", "decompx"])
def test_operations_are_estimated(name: str) -> None:
    model = mixtral(dtype=torch.float32)  # with the host's own kernels
    tokens, options = given().tokens, {"at": "block_out"} if name == "attention_norms" else {}
    ask = functools.partial(getattr(cm, name), **options)
    expected = cm.estimate(model, tokens.shape[1], ask, batch=len(tokens)).flops
    done = count_operations(lambda: ask(model, tokens))
    assert abs(expected - done) <= 0.1 * done


@pytest.mark.parametrize("name", ["silu", "relu"])
def test_slopes_where_branches_are_cut_off(name: str) -> None:
    plain = next(one for one in ACTIVATIONS if one.name == name)
    activation, bounds = clamped(plain, 2.0), (-1.5, 2.5)
    generator = torch.Generator().manual_seed(0)
    ends = [4 * torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(4)]
    for start in (None, ends[2]):
        other = None if start is None else ends[3]
        linear, gate = gated_slopes(activation, (start, ends[0]), (other, ends[1]), bounds)
        zero = torch.zeros_like(ends[0])
        begin = (zero, zero) if start is None or other is None else (start, other)
        assert relative(linear, _integral(activation, begin, (ends[0], ends[1]), bounds)) < 2e-3
        gained = activation(ends[0]) * ends[1].clamp(*bounds)
        gained -= activation(begin[0]) * begin[1].clamp(*bounds)
        parts = linear * (ends[1] - begin[1]) + gate * (ends[0] - begin[0])
        assert relative(parts, gained) < EXACT


def _integral(
    activation: Activation,
    start: tuple[Tensor, Tensor],
    end: tuple[Tensor, Tensor],
    bounds: tuple[float, float],
) -> Tensor:
    """The linear branch's integrated gradient, by the midpoint rule."""
    total = torch.zeros_like(end[0])
    for step in range(2000):
        share = (step + 0.5) / 2000
        gate, linear = (a + share * (b - a) for a, b in zip(start, end, strict=True))
        total += activation(gate) * ((linear > bounds[0]) & (linear < bounds[1])) / 2000
    return total


def test_single_precision_and_the_host_s_own_kernels() -> None:
    model = mixtral(dtype=torch.float32)
    assert cm.check(model).ok
    assert bool(torch.isfinite(cm.value_zeroing(model, given().tokens).scores).all())


def test_every_method_answers_about_the_zoo_s_mixture() -> None:
    model, inputs = shared(case_of("mixtral"))
    assert cm.check(model).ok
    assert cm.composition(model, [[5, 9, 12, 7, 20]]).examples == 1
    assert cm.ff_values(model, layer=1, neurons=[0, 30, 95]).neuron.tolist() == [0, 30, 95]
    direction = cm.Direction(layer=1, neuron=30)
    found = cm.log_prob_contributions(model, inputs.tokens, target=direction, pos=-1)
    assert found.of_direction
