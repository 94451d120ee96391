"""Attention that is not plain: latent, normed values, output gates, factors, sinks.

The references are Hugging Face's own modules, without TransformerLens.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_build
import zoo_others
from asked import FLOAT32_INSIDE, relative, view_of
from test_conformance import queried
from test_families import given
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import tl_contextmix as cm
from tl_contextmix.core.attention_terms import GatedTerm
from tl_contextmix.evaluation import hook_names
from tl_contextmix.plotting.panels import Heatmap
from tl_contextmix.results import ContextMap

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(zoo.major() < 4, reason="bridges of TransformerLens 4"),
]
KINDS = ("deepseek_v3", "gemma4_text", "granite", "qwen3_5_text")


@functools.cache
def built(kind: str) -> tuple[Any, Any]:
    """A bridge that no test changes, and its Hugging Face model as it was before."""
    model = zoo_others.build(kind)
    plain = type(model.original_model)(model.original_model.config).double().eval()
    plain.set_attn_implementation("eager")
    zoo_build.randomize(plain, seed=0)
    return model, plain.requires_grad_(False)


def layers_of(plain: Any) -> Any:
    """The blocks of a Hugging Face model."""
    return plain.model.layers


@contextmanager
def zeroed(kind: str, layer: Any, place: int) -> Iterator[None]:
    """Values of one source are zero where Hugging Face's attention module has them."""
    attention = layer.self_attn

    def zero(module: nn.Module, inputs: Any, found: Tensor) -> Tensor:
        found = found.clone()
        if kind == "deepseek_v3":
            cut = found[..., place, :].unflatten(-1, (attention.num_heads, -1))
            cut[..., attention.qk_nope_head_dim :] = 0
        else:
            found[:, place] = 0
        return found

    name = {"deepseek_v3": "kv_b_proj", "gemma4_text": "v_norm"}.get(kind, "v_proj")
    handle = getattr(attention, name).register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()


def streams(plain: Any, tokens: Tensor) -> list[Tensor]:
    """The output of each block, the last one normed."""
    with torch.no_grad():
        return list(plain(tokens, output_hidden_states=True).hidden_states[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_streams_and_value_zeroing_are_those_of_hugging_face(kind: str) -> None:
    (model, plain), tokens = built(kind), given().tokens
    own = streams(plain, tokens)
    parts = cm.decompose(model, tokens, at="block_out").total()
    assert relative(parts[:, 0], own[0]) <= FLOAT32_INSIDE
    assert relative(plain.model.norm(parts[:, 1]), own[1]) <= FLOAT32_INSIDE
    scores = cm.value_zeroing(model, tokens).scores[:, :, 0]
    for number, layer in enumerate(layers_of(plain)):
        for place in range(tokens.shape[1]):
            with zeroed(kind, layer, place):
                changed = streams(plain, tokens)[number]
            expected = 1 - cosine_similarity(changed, own[number], dim=-1)
            assert float((scores[:, number, :, place] - expected).abs().max()) <= FLOAT32_INSIDE
    with torch.no_grad():
        said = plain(tokens).logits[:, -1].log_softmax(dim=-1)[:, 9]
    for by in ("layer", "head", "position", "attn_neuron"):
        assert relative(
            cm.log_prob_contributions(model, tokens, target=9, by=by).log_prob, said
        ) <= (FLOAT32_INSIDE)


@pytest.mark.parametrize("kind", KINDS)
def test_what_reads_the_values_weights_adds_up(kind: str) -> None:
    model, tokens = built(kind)[0], given().tokens
    found = queried(model, tokens, 9)
    # The neurons' own numbers come from the values that the model computed.
    own = cm.log_prob_contributions(model, tokens, by="attn_neuron", target=9, pos=-1)
    coefficients = own.coefficients[found_places(own, found)]
    assert relative(found.activation.flatten(), coefficients) <= FLOAT32_INSIDE
    cm.decompx(model, tokens)  # raises where the vectors do not add up to the stream
    graph = cm.flow(model, tokens[:1], target=9)
    assert graph.nodes


def found_places(own: Any, found: Any) -> tuple[Tensor, Tensor]:
    """Where the neurons that were asked about stand among all attention neurons."""
    rows, places = [], []
    for row in range(found.neurons.shape[0]):
        for column in range(found.neurons.shape[1]):
            one = found.neurons.at(row, column)
            same = torch.ones(own.components.shape[1], dtype=torch.bool)
            for name in ("layer", "pos", "head", "source", "neuron"):
                same &= getattr(own.components, name)[row] == (
                    -1 if one[name] is None else one[name]
                )
            rows.append(row)
            places.append(int((same & (own.components.of_kind("attn")[row])).nonzero()[0]))
    return torch.tensor(rows), torch.tensor(places)


def test_latent_attention_is_read_from_caches_and_edited_by_head() -> None:
    (model, plain), tokens = built("deepseek_v3"), given().tokens
    names = hook_names(model, "value_zeroing")
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names)
    kept = cm.value_zeroing(model, tokens, cache=cache).scores
    assert relative(kept, cm.value_zeroing(model, tokens).scores) <= FLOAT32_INSIDE
    found = cm.knockout(model, tokens, heads=[(1, 2)], target=9, pos=-1, controls=0)
    without = copy.deepcopy(plain)
    weight = layers_of(without)[1].self_attn.o_proj.weight
    with torch.no_grad():
        weight.view(weight.shape[0], 4, -1)[:, 2] = 0
        said = without(tokens).logits[:, -1].log_softmax(dim=-1)[:, 9]
    assert relative(found.after[:, 0], said) <= FLOAT32_INSIDE


def test_an_edit_before_a_factor_is_multiplied_and_one_after_it_is_not() -> None:
    model, tokens = zoo_others.build("granite"), given().tokens
    said = {}
    for name in ("blocks.0.attn.hook_out", "blocks.0.hook_attn_out", "blocks.1.mlp.hook_out"):
        with model.hooks(fwd_hooks=[(name, lambda x, hook: x + 0.3)]):
            scores = cm.log_prob_contributions(model, tokens, target=9)
            own = zoo.logits(model, given())[:, -1].log_softmax(dim=-1)[:, 9]
        assert relative(scores.trajectory[:, -1], own) <= FLOAT32_INSIDE
        said[name] = own
    assert relative(said["blocks.0.attn.hook_out"], said["blocks.0.hook_attn_out"]) > 1e-4


# Sinks


@functools.cache
def with_sinks() -> tuple[Any, Tensor]:
    """gpt-oss, whose softmaxes have one more logit for each head, and these."""
    model = zoo_others.build("gpt_oss")
    layers = layers_of(model.original_model)
    return model, torch.stack([layer.self_attn.sinks.detach() for layer in layers])


def test_rows_and_the_sink_sum_to_one() -> None:
    model, sinks = with_sinks()
    tokens = given().tokens
    report = cm.check(model)
    assert report.ok
    assert "pattern and sink sum to 1" in {row.identity for row in report.rows}
    seen: dict[str, Tensor] = {}
    name = "blocks.1.attn.hook_attn_scores"
    model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: seen.update(scores=x.detach()))])
    logits = torch.cat([seen["scores"], sinks[1][:, None, None].expand(2, 4, 7, 1)], dim=-1)
    expected = logits.softmax(dim=-1)[..., -1]
    found = cm.attention(model, tokens)
    assert relative(found.sink[:, 1], expected) <= FLOAT32_INSIDE
    for one in (found, found.mean(), found.normalize(), found.words(), found.select(source=[0, 1])):
        assert one.sink is not None
    for one in (found, found.mean(), found.normalize(), found.words()):
        assert one.sink is not None
        assert torch.allclose(one.scores.sum(-1) + one.sink, torch.ones_like(one.sink))
    assert "attention sink" in repr(found)
    assert cm.attention(zoo_others.build("qwen3"), tokens).sink is None


def test_a_table_has_the_sink_as_the_first_source_of_each_row() -> None:
    model, tokens = with_sinks()[0], given().tokens
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    found = cm.attention(model, tokens, attention_mask=mask, layer=[1, 0])
    frame = found.to_dataframe()
    rows = frame.groupby(["batch", "layer", "head", "target"], sort=False)
    assert len(rows) == 2 * 4 * (7 + 5)
    assert float((rows.score.sum() - 1).abs().max()) <= FLOAT32_INSIDE
    first = rows.first()
    assert (first.source == -1).all()
    assert (first.source_token == "(sink)").all()
    assert found.sink is not None
    real = mask.bool()[:, None, None].expand_as(found.sink)
    assert torch.equal(torch.tensor(first.score.to_numpy()), found.sink[real])
    assert (frame.source == -1).sum() == len(rows)


def test_an_edited_pattern_takes_nothing_from_the_sink() -> None:
    model, tokens = with_sinks()[0], given().tokens
    plain, name = cm.attention(model, tokens), "blocks.1.attn.hook_pattern"
    with model.hooks(fwd_hooks=[(name, lambda pattern, hook: pattern / 2)]):
        edited = cm.attention(model, tokens)
        _, cache = model.run_with_cache(tokens)
    assert relative(2 * edited.scores[:, 1], plain.scores[:, 1]) <= FLOAT32_INSIDE
    for found in (edited, cm.attention(model, tokens, cache=cache)):
        assert relative(found.sink[:, 1], plain.sink[:, 1]) <= FLOAT32_INSIDE
    _, cache = model.run_with_cache(tokens, names_filter=hook_names(model, cm.attention))
    kept = cm.attention(model, tokens, cache=cache)
    assert kept.sink is not None
    assert plain.sink is not None
    assert relative(kept.sink, plain.sink) <= FLOAT32_INSIDE


def test_a_rollout_shows_what_has_ended_in_sinks(tmp_path: Path) -> None:
    model, tokens = with_sinks()[0], given().tokens
    found = cm.attention(model, tokens, heads=False)
    rolled = found.rollout()
    # Literally: the sink is one more token, which reads itself alone.
    product = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
    for layer in range(len(found.layers)):
        whole = torch.eye(8, dtype=torch.float64).repeat(2, 1, 1)
        whole[:, :7, :7], whole[:, :7, 7] = found.scores[:, layer, 0], found.sink[:, layer, 0]
        product = (whole / 2 + torch.eye(8) / 2) @ product
        assert relative(rolled.scores[:, layer, 0], product[:, :7, :7]) <= 1e-12
        assert relative(rolled.sink[:, layer, 0], product[:, :7, 7]) <= 1e-12
    again = ContextMap.load(rolled.save(tmp_path / "rollout.safetensors"))
    assert again.sink is not None
    assert rolled.sink is not None
    assert torch.equal(again.sink, rolled.sink)
    panel = rolled.panels()[0]
    assert isinstance(panel, Heatmap)
    assert panel.columns[0] == "(sink)"
    assert torch.equal(panel.values[:, :, 0], rolled.sink[0, :, 0])
    assert "attention sink" in panel.caption
    assert "(sink)" in found.show()._repr_html_()
    difference = found - found
    assert not bool(difference.sink.any())


def test_an_edge_that_is_cut_leaves_its_weight_to_the_sink_too() -> None:
    model, tokens = with_sinks()[0], given().tokens
    found = cm.attention_knockout(model, tokens, sources=[2], target=9, pos=-1, layer=1)

    def cut(scores: Tensor, hook: Any) -> Tensor:
        scores = scores.clone()
        scores[:, :, -1, 2] = torch.finfo(scores.dtype).min
        return scores

    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_attn_scores", cut)])
    said = logits[:, -1].log_softmax(dim=-1)[:, 9]
    assert relative(found.log_probs.flatten(), said) <= FLOAT32_INSIDE


def test_weights_and_sinks_of_gpt_oss_are_those_of_hugging_face() -> None:
    model, tokens = zoo_others.build("gpt_oss", dtype=torch.float32), given().tokens
    plain = type(model.original_model)(model.original_model.config).eval()
    plain.set_attn_implementation("eager")
    zoo_build.randomize(plain, seed=0)
    with torch.no_grad():
        own = torch.stack(plain(tokens, output_attentions=True).attentions, dim=1)
    found = cm.attention(model, tokens)
    assert relative(found.scores, own) <= 2e-6
    assert float((found.sink - (1 - own.sum(dim=-1))).abs().max()) <= 2e-6
    assert float(found.sink.max()) > 0.1


# Gates


def gated() -> tuple[GatedTerm, Tensor]:
    """A term of three heads with a gate, and its vectors [batch target source head d_out]."""
    torch.manual_seed(0)
    term = GatedTerm(
        pattern=torch.rand(2, 3, 5, 5, dtype=torch.float64).tril(),
        value=torch.randn(2, 5, 3, 4, dtype=torch.float64),
        weight=torch.randn(3, 4, 6, dtype=torch.float64),
        scale=torch.rand(2, 5, 1, dtype=torch.float64) + 1,
        gate=torch.rand(2, 5, 3, 4, dtype=torch.float64),
    )
    each = torch.einsum(
        "bhts,bshd,bthd,hdm->btshm", term.pattern, term.value, term.gate, term.weight
    )
    return term, each / term.scale[:, :, None, None]


LOOKS: dict[str, Callable[[GatedTerm, Tensor], tuple[Tensor, Tensor]]] = {
    "dense": lambda term, each: (
        term.dense(slice(1, 4), slice(0, 3)),
        each.sum(3)[:, 1:4, :3].transpose(1, 2),
    ),
    "together": lambda term, each: (
        term.together(slice(1, 4), slice(0, 3)),
        each.sum(3)[:, 1:4, :3].sum(2),
    ),
    "diagonal": lambda term, each: (
        term.diagonal(),
        each.sum(3).diagonal(dim1=1, dim2=2).transpose(1, 2),
    ),
    "norms": lambda term, each: (term.norms(1), each.sum(3).norm(dim=-1)),
    "head norms": lambda term, each: (term.head_norms(), each.norm(dim=-1).permute(0, 3, 1, 2)),
    "heads": lambda term, each: (
        term.through([2, 0]).norms(2**20),
        each[:, :, :, [2, 0]].sum(3).norm(dim=-1),
    ),
    "through": lambda term, each: (
        term.through(slice(1, 2)).norms(2**20),
        each[:, :, :, 1].norm(dim=-1),
    ),
    "row": lambda term, each: (
        term.row(slice(1, 2)).ready().norms(2**20),
        each[1:].sum(3).norm(dim=-1),
    ),
    "map": lambda term, each: (
        term.map(torch.arange(12.0).double().view(6, 2)).norms(2**20),
        (each.sum(3) @ torch.arange(12.0).double().view(6, 2)).norm(dim=-1),
    ),
    "columns": lambda term, each: (
        term.columns(slice(2, 5)).norms(2**20),
        each.sum(3)[..., 2:5].norm(dim=-1),
    ),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_gated_term_is_the_sum_that_it_stands_for(look: str) -> None:
    found, expected = LOOKS[look](*gated())
    assert relative(found, expected) <= 1e-12


def test_heads_and_spans_of_a_gated_model() -> None:
    model, tokens = built("qwen3_5_text")[0], given().tokens
    view = view_of(model)
    each = cm.decompose(model, tokens, at="resid_mid", heads=True)
    whole = cm.decompose(model, tokens, at="resid_mid")
    assert relative(each.parts.sum(dim=2), whole.parts) <= 1e-10
    heads = len(view.blocks()[0].attention("self").W_O)
    norms = cm.attention_norms(model, tokens, at="attn_out", heads=True).scores
    alone = [
        cm.decompose(model, tokens, at="attn_out", heads=True).parts[:, :, head]
        for head in range(heads)
    ]
    assert relative(norms, torch.stack([one.norm(dim=-1) for one in alone], dim=2)) <= 1e-10
    spans = cm.value_zeroing(model, tokens, spans=[(0, 2), (2, 7)])
    assert bool(spans.scores.isfinite().all())


def test_routes_through_gated_heads_are_those_of_their_parts() -> None:
    model, tokens = built("qwen3_5_text")[0], given().tokens[:1]
    found = cm.information_flow_routes(model, tokens, threshold=0.0)
    parts = cm.decompose(model, tokens, at="attn_out", layer=1, heads=True).parts[0, 0, :, -1]
    _, cache = model.run_with_cache(tokens)
    before, state = (cache[f"blocks.1.hook_{name}"][0, -1] for name in ("resid_pre", "resid_mid"))
    each = torch.cat([before.detach()[None], parts.flatten(0, 1)])
    near = (state.abs().sum() - (each - state).abs().sum(dim=-1)).clamp(min=0).detach()
    shares = (near / near.sum())[1:].view(parts.shape[:2]).sum(dim=1)
    places = {(n.kind, n.layer, n.pos, n.head): place for place, n in enumerate(found.nodes)}
    mid = places["resid_mid", 1, found.pos, -1]
    for head, share in enumerate(shares.tolist()):
        place = places.get(("attn", 1, found.pos, head))
        ours = 0.0 if place is None else float(found.edges[mid, place])
        assert ours == pytest.approx(share, abs=1e-6)
