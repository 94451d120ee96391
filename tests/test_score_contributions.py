"""Why a head looks where it does: pairs add up to the model's own score, in every family."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import zoo
import zoo_others
from asked import bound, case_of, first_of, shared, stacks, view_of
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.adapters.inputs import Given, make_batch
from tl_contextmix.core.counters import count_operations
from tl_contextmix.results import Result, ScoreContributions

pytestmark = pytest.mark.mostly_once

TEXT = "the keys to the cabinet"
IDS = torch.tensor([[5, 9, 3, 17, 22, 8]])


def ask(model: Any, given: dict[str, Any], edge: Any, **options: Any) -> ScoreContributions:
    """The score of an edge."""
    found = cm.query_contributions(model, **given, edge=edge, **options)
    assert isinstance(found, ScoreContributions)
    return found


def check_edges(model: Any, given: dict[str, Any], stack: Any, limit: float, layer: int) -> None:
    """Pairs add up to a score; softmax makes the model's own weights of the scores."""
    view = view_of(model)
    attention = view.blocks(stack)[layer].attention("cross" if stack == "cross" else "self")
    names = [attention.pattern, *([attention.scores] if attention.scores else [])]
    sides = {name: value for name, value in given.items() if name != "input"}
    trace = view.run(make_batch(view, Given(given["input"], **sides)), names)
    head, pattern = 2, trace[attention.pattern][0, 2].double()
    target = len(pattern) - 1
    one, other = pattern[target].nonzero()[:, 0].tolist()[:2]
    weights, scores = [], []
    for source in (one, other):
        for by in ("layer", "head"):
            found = ask(model, given, (layer, head, -1, source), stack=stack, by=by)
            size = float(found.scores.abs().max())
            total = float(found.scores.sum()) + found.position
            assert total == pytest.approx(found.score, abs=limit * max(size, abs(found.score)))
        assert found.weight == pytest.approx(float(pattern[target, source]), rel=1e-9)
        cap = found.soft_cap
        told = found.score if cap is None else cap * math.tanh(found.score / cap)
        weights.append(found.weight)
        scores.append(told)
        shown = trace.values.get(attention.scores)
        if shown is not None and not bool(((shown >= 0) & (shown <= 1)).all()):
            own = float(shown[0, head, target, source])
            assert told == pytest.approx(own, abs=max(limit, 1e-9) * max(1.0, size))
    odds = math.log(weights[1] / weights[0])
    assert scores[1] - scores[0] == pytest.approx(odds, abs=10 * limit * max(1.0, size))


@pytest.mark.every
@pytest.mark.parametrize("case", zoo.cases(), ids=str)
def test_pairs_add_up_to_the_models_own_score(case: zoo.Case):
    model, inputs = shared(case)
    given = first_of(inputs)
    limit = 1e-9 if bound(case) < 1e-9 else 3e-6
    for stack in stacks(case):
        check_edges(model, given, stack, limit, layer=1)


_KINDS = (
    "bloom",  # ALiBi
    "mpt",
    "cohere",  # norms of each head, neighbours turned
    "gemma3_text",  # norms of queries and keys
    "qwen3",
    "stablelm",
    "hunyuan_v1_dense",  # norms after the rotation
    "nanochat",
    "llama4_text",
    "qwen3_5_text",  # gates beside the queries
    "gemma4_text",  # heads of unlike width
    "gpt_oss",  # sinks
    "deepseek_v2",  # latent attention
    "deepseek_v3",
)


@pytest.mark.parametrize("kind", _KINDS)
def test_norms_gates_and_biases_of_other_families(kind: str):
    check_edges(zoo_others.build(kind), {"input": IDS}, None, 3e-6, layer=1)


# ---- literal formulas, on Hugging Face's own modules


def stream_of(model: Any, *names: str) -> Tensor:
    """What modules of a Hugging Face model write to the stream, in order [part pos d_model]."""
    found: list[Tensor] = []

    def keep(module: Any, given: Any, out: Any) -> None:
        found.append((out[0] if isinstance(out, tuple) else out)[0])

    for name in names:
        model.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        model(IDS)
    return torch.stack(found)


def normed_parts(parts: Tensor, norm: Any, centre: bool) -> Tensor:
    """Parts [part d_model] after a norm with the scale of their sum, and its bias at last."""
    whole = parts.sum(0)
    mean = whole.mean() if centre else 0.0
    scale = ((whole - mean).square().mean() + getattr(norm, "eps", 1e-6)).sqrt()
    parts = parts - parts.mean(-1, keepdim=True) if centre else parts
    bias = getattr(norm, "bias", None)
    bias = torch.zeros_like(whole) if bias is None else bias
    return torch.cat([parts * norm.weight / scale, bias[None]]).detach()


@pytest.mark.every
def test_gpt2_by_hand():
    case = case_of("gpt2")
    hf = zoo.hf_model("gpt2")
    layers, head, target, source = 2, 2, 5, 3
    written = (f"transformer.h.{i}.{name}" for i in range(layers) for name in ("attn", "mlp"))
    stream = stream_of(hf, "transformer.drop", *written)
    block = hf.transformer.h[layers]
    sides = []
    for place, pos in enumerate((target, source)):
        parts = normed_parts(stream[:, pos], block.ln_1, centre=True)
        W = block.attn.c_attn.weight.detach().view(32, 3, 4, 8)[:, place, head]
        b = block.attn.c_attn.bias.detach().view(3, 4, 8)[place, head]
        own = parts @ W
        own[-1] += b
        sides.append(own)
    expected = sides[0] @ sides[1].T / 8**0.5
    found = ask(shared(case)[0], {"input": IDS}, (layers, head, target, source))
    torch.testing.assert_close(found.scores, expected, atol=1e-9, rtol=1e-9)
    names = ["embed", "L0 attn", "L0 mlp", "L1 attn", "L1 mlp", "L2 bias"]
    assert list(found.labels("target")) == list(found.labels("source")) == names


def rotated(x: Tensor, pos: int, width: int) -> Tensor:
    """Vectors turned by a position: pairs of two halves of the first dimensions."""
    half = width // 2
    angle = pos / 10_000 ** (torch.arange(half).double() / half)
    a, b = x[:, :half], x[:, half:width]
    turned = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
    return torch.cat([*turned, x[:, width:]], dim=1)


@pytest.mark.every
def test_pythia_by_hand():
    """Half of each head turned by rotary positions; heads laid out query, key, value."""
    case = case_of("neox")
    hf = zoo.hf_model("neox")
    head, target, source = 1, 4, 1
    layer = "gpt_neox.layers.0"
    stream = stream_of(hf, "gpt_neox.embed_in", f"{layer}.attention", f"{layer}.mlp")
    block = hf.gpt_neox.layers[1]
    sides = []
    for place, pos in enumerate((target, source)):
        parts = normed_parts(stream[:, pos], block.input_layernorm, centre=True)
        joint = block.attention.query_key_value
        own = parts @ joint.weight.detach().view(4, 3, 8, 32)[head, place].T
        own[-1] += joint.bias.detach().view(4, 3, 8)[head, place]
        sides.append(rotated(own, pos, 4))
    expected = sides[0] @ sides[1].T / 8**0.5
    found = ask(shared(case)[0], {"input": IDS}, (1, head, target, source))
    torch.testing.assert_close(found.scores, expected, atol=1e-7, rtol=1e-7)  # float32 angles


def test_norms_of_queries_and_keys_are_frozen_by_hand():
    model = zoo_others.build("qwen3")
    hf = model.original_model
    head, target, source = 3, 5, 2
    layer = "model.layers.0"
    stream = stream_of(hf, "model.embed_tokens", f"{layer}.self_attn", f"{layer}.mlp")
    block, sides = hf.model.layers[1], []
    for name, one, pos in (("q", head, target), ("k", head // 2, source)):
        attention = block.self_attn
        parts = normed_parts(stream[:, pos], block.input_layernorm, centre=False)
        W = getattr(attention, f"{name}_proj").weight.detach().view(-1, 8, 32)[one]
        own = parts @ W.T
        norm = getattr(attention, f"{name}_norm")
        own = own * norm.weight.detach() / (own.sum(0).square().mean() + 1e-6).sqrt()
        sides.append(rotated(own, pos, 8))
    expected = sides[0] @ sides[1].T / 8**0.5
    found = ask(model, {"input": IDS}, (1, head, target, source))
    torch.testing.assert_close(found.scores, expected, atol=3e-6, rtol=1e-5)


# ---- what can be asked, and what the result can do


def test_finer_cuts_add_up_to_the_coarser_ones(causal):
    layers = ask(causal, {"input": TEXT}, (3, 0, -1, 1))
    for by in ("head", "position", "head_position"):
        found = ask(causal, {"input": TEXT}, (3, 0, -1, 1), by=by)
        for axis, other in (("target", 1), ("source", 0)):
            names = [name.split("H")[0].split("<")[0] for name in found.labels(axis)]
            sums = found.scores.sum(dim=other)
            for name, whole in zip(
                layers.labels(axis), layers.scores.sum(dim=other).tolist(), strict=True
            ):
                layer = name.split()[0]
                own = [layer, f"{name} bias", name] if name.endswith("attn") else [name]
                mine = torch.tensor([one in own for one in names])
                assert float(sums[mine].sum()) == pytest.approx(whole, abs=1e-4)


def test_tables_files_and_words(causal, tmp_path):
    found = ask(causal, {"input": TEXT}, (3, 0, 5, 1))
    assert Result.load(found.save(tmp_path / "score.safetensors")).equals(found)
    pairs = found.to_dataframe()
    assert float(pairs.score.sum()) + found.position == pytest.approx(found.score, abs=1e-4)
    for side in ("target", "source"):
        sums = found.to_dataframe(side).set_index("component").score
        both = pairs.groupby(f"{side}_component").score.sum()
        assert both.to_dict() == pytest.approx(sums.to_dict(), abs=1e-5)
    assert "kamath2025attention" in cm.cite(found)
    assert "L3H0 from ' cabinet' (5) to ' the' (1)" in repr(found)
    panels: Any = found.panels()
    maps, table = panels
    assert maps.rows == found.labels("target")
    assert {row[0] for row in table.rows} == {"query", "key"}


def test_a_graph_says_why_its_heads_look_there(causal):
    graph = cm.flow(causal, TEXT, target=" are", foil=" is")
    found = ask(causal, {"input": TEXT}, (3, 0, 5, 1))
    told = graph.with_scores(found)
    (node,) = (node for node in told.nodes if node.reasons)
    assert (node.label, node.pos) == ("L3H0", 5)
    assert node.reasons[0].startswith("' the' (1) has score")
    panel: Any = told.panels()[0]
    facts = [fact for dot in panel.nodes for fact in dot.facts if fact[0] == "why"]
    assert facts == [("why", node.reasons[0])]
    with pytest.raises(cm.InvalidInput, match="of no node"):
        graph.with_scores(ask(causal, {"input": "the cats near the dog"}, (3, 0, 5, 1)))
    with pytest.raises(cm.InvalidInput, match="of no node"):
        graph.with_scores(ask(causal, {"input": TEXT}, (0, 0, 1, 0)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"edge": (4, 0, -1, 0)}, "no such layer"),
        ({"edge": (3, 9, -1, 0)}, "no such head"),
        ({"edge": (3, 0, 6, 0)}, "no such target"),
        ({"edge": (3, 0, 2, 4)}, "cannot look there"),
        ({"edge": (3, 0, -1)}, "edge"),
        ({"edge": (3, 0, -1, 0), "by": "ff_neuron"}, "not cut so finely"),
        ({"edge": (3, 0, -1, 0), "target": " are"}, "asked about alone"),
        ({"edge": (3, 0, -1, 0), "neurons": [(1, 2)]}, "asked about alone"),
        ({"edge": (3, 0, -1, 0), "norm": "recompute"}, "asked about alone"),
        ({"edge": (3, 0, -1, 0), "input": [TEXT, TEXT]}, "one text"),
        ({"neurons": [(1, 2)], "stack": "decoder"}, "no stack"),
        ({}, "nothing to ask about"),
    ],
)
def test_what_is_no_edge_is_refused(causal, options, words):
    asked: Any = {"input": TEXT, **options}
    with pytest.raises(cm.InvalidInput, match=words):
        cm.query_contributions(causal, **asked)


def test_a_weight_that_is_too_small_to_be_a_number_has_a_score():
    model = cm.load_demo("encoder-decoder")
    given = {"input": "the bat burned .", "decoder_input": "la batte"}
    found = ask(model, given, (1, 0, -1, 0), stack="encoder")
    assert found.weight == 0
    assert float(found.scores.sum()) + found.position == pytest.approx(found.score, rel=1e-4)
    with pytest.raises(cm.InvalidInput, match="cannot look there"):
        ask(model, given, (1, 0, 0, 1), stack="decoder")


@pytest.mark.every
def test_one_source_is_no_choice_where_scores_are_not_shown():
    model, inputs = shared(case_of("bart", host="TransformerBridge"))
    given = {"input": inputs.tokens[:1], "decoder_input": inputs.decoder_tokens[:1]}
    with pytest.raises(cm.InvalidInput, match="nothing to explain"):
        ask(model, given, (0, 0, 0, 0))


def test_hooks_that_edit_queries_are_refused_and_on_the_stream_they_count(causal):
    def double(q: Tensor, hook: Any) -> Tensor:
        return q * 2

    hooks = [("blocks.3.attn.hook_q", double)]
    with (
        causal.hooks(fwd_hooks=hooks),
        pytest.raises(cm.UnsupportedModel, match="queries and keys"),
    ):
        ask(causal, {"input": TEXT}, (3, 0, -1, 1))

    def steer(stream: Tensor, hook: Any) -> Tensor:
        return stream + 0.1

    with causal.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", steer)]):
        found = ask(causal, {"input": TEXT}, (3, 0, -1, 1))
    assert "L2 resid_pre steering" in found.labels("target")
    assert float(found.scores.sum()) == pytest.approx(found.score, abs=1e-4)


def test_a_small_workspace_changes_no_number_and_a_score_costs_few_passes(causal):
    wide, narrow = (ask(causal, {"input": TEXT}, (3, 0, -1, 1), max_bytes=b) for b in (2**28, 1))
    assert torch.allclose(wide.scores, narrow.scores, atol=1e-5)
    done = count_operations(lambda: ask(causal, {"input": TEXT}, (3, 0, -1, 1)))
    # Not rotary: a pass, and five copies of the text.
    assert done < 6.5 * count_operations(lambda: causal(TEXT))
