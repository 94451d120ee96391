"""Nodes of an attribution graph are ablated as hooks on the host's own activations ablate them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from asked import bound, case_of, first_of, shared, view_of
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.methods.flow_knockout import flow_knockout
from tl_contextmix.plotting.panels import Curves, Table
from tl_contextmix.results import AttributionGraph, FlowKnockout, Result

pytestmark = pytest.mark.mostly_once

FAMILIES = ["gpt2", "gptj", "gemma2", "t5", "bert"]
TEXT = "the keys to the cabinet"
ARE: Any = {"target": " are", "foil": " is"}


def of_case(case: zoo.Case, **options: Any) -> tuple[AttributionGraph, FlowKnockout]:
    """A graph and its knockout."""
    model, given = shared(case)
    graph = cm.flow(model, **first_of(given), pos=-1, target=3, foil=5, share=1.0, k=1000)
    return graph, flow_knockout(model, **first_of(given), graph=graph, **options)


def literal(case: zoo.Case, pos: int, edits: Any) -> float:
    """The difference of two logits with hooks on the host: name, place and the value there."""
    model, given = shared(case)

    def edit(at: tuple[Any, ...], new: Any) -> Any:
        def hook(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[(slice(None), *at)] = new
            return value

        return hook

    first = replace(given, **{n: ids[:1] for n, ids in vars(given).items() if ids is not None})
    with model.hooks(fwd_hooks=[(name, edit(at, new)) for name, at, new in edits]):
        found = zoo.logits(model, first)[0, pos]
    return float(found[3] - found[5])


@pytest.mark.every
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_what_the_linear_model_loses_without_a_node_is_its_score(family: str):
    case = case_of(family)
    limit = (1e-9 if bound(case) < 1e-9 else 1e-5) * 10
    model, given = shared(case)
    graph = cm.flow(model, **first_of(given), pos=-1, target=3, foil=5, share=1.0, k=6)
    for place in [p for p, node in enumerate(graph.nodes) if node.written][::2]:
        options: Any = {"nodes": [place], "controls": 1}
        found = flow_knockout(model, **first_of(given), graph=graph, **options)
        assert float(found.linear[0]) == pytest.approx(float(graph.scores[place]), abs=limit)
        assert float(found.together[0]) == pytest.approx(float(found.alone[0]), abs=1e-8)


@pytest.mark.every
@pytest.mark.parametrize("family", FAMILIES)
def test_nodes_vanish_as_with_hooks_of_ones_own(family: str):
    case = case_of(family)
    limit = 1e-9 if bound(case) < 1e-9 else 1e-5
    graph, found = of_case(case, k=1000, controls=0)
    view = view_of(shared(case)[0])
    whole = literal(case, graph.pos, [])
    edits = {}
    for place, node in enumerate(found.nodes):
        inside = "encoder" if node.kind.startswith("encoder ") else None
        kind, blocks = node.kind.removeprefix("encoder "), view.blocks(inside)
        if kind == "embed":
            edits[place] = (blocks[0].resid_in, (node.pos,), 0)
        elif kind == "mlp":
            ff = blocks[node.layer].feed_forward
            b_post = ff.weights("b_post")
            edits[place] = (ff.post, (node.pos,), 0 if b_post is None else b_post)
        else:
            attention = blocks[node.layer].attention("self" if kind == "attn" else "cross")
            edits[place] = (attention.mixed, (node.pos, node.head), 0)
    assert {node.kind for node in found.nodes} >= {"embed", "attn", "mlp"}
    for place in [*edits][:: max(1, len(edits) // 12)]:
        expected = whole - literal(case, graph.pos, [edits[place]])
        assert float(found.alone[place]) == pytest.approx(expected, abs=limit)
    expected = whole - literal(case, graph.pos, [edits[place] for place in range(4)])
    assert found.counts[2] == 4
    assert float(found.together[2]) == pytest.approx(expected, abs=limit)


@pytest.fixture(scope="module")
def graph(causal: Any) -> AttributionGraph:
    return cm.flow(causal, TEXT, **ARE)


def test_random_nodes_are_of_the_same_sublayers_and_reproducible(causal: Any):
    """Of the last layer only the position that predicts has an effect: the pool is small."""
    whole = cm.flow(causal, TEXT, **ARE, share=1.0, k=1000)
    last = [p for p, node in enumerate(whole.nodes) if node.label in ("L3H0", "L3H1")]
    once, again, other = (
        flow_knockout(causal, TEXT, graph=whole, nodes=last, controls=12, seed=seed)
        for seed in (1, 1, 2)
    )
    assert once.equals(again)
    assert not torch.equal(once.random, other.random)
    # One node drawn: one of the four heads at the last position, ablated alone.
    heads = [p for p, n in enumerate(whole.nodes) if n.layer == 3 and n.head >= 0]
    assert len(heads) == 4
    alone = flow_knockout(causal, TEXT, graph=whole, nodes=heads, controls=0).alone
    near = (once.random[0][:, None] - alone[None]).abs().min(dim=1)
    assert float(near.values.max()) < 1e-4
    assert len(near.indices.unique()) > 1
    # All four in any order are the same set.
    four = flow_knockout(causal, TEXT, graph=whole, nodes=heads, controls=3)
    assert torch.allclose(four.random[-1], four.together[-1].expand(3), atol=1e-4)


@pytest.mark.parametrize("replace_with", ["zero", "mean"])
def test_all_nodes_left_leave_everything(causal: Any, replace_with: Any):
    """Without all others: with every node kept nothing falls, with one kept nearly all does."""
    whole = cm.flow(causal, TEXT, **ARE, share=1.0, k=1000)
    options: Any = {"graph": whole, "k": 1000, "controls": 2, "replace_with": replace_with}
    found = flow_knockout(causal, TEXT, **options, others=True)
    assert found.counts[-1] == whole.possible
    assert abs(float(found.together[-1])) < 1e-4
    assert float(found.random[-1].abs().max()) < 1e-4
    assert abs(float(found.linear[-1])) < 1e-4
    assert abs(float(found.together[0])) > 1
    assert "With nodes" in found.panels()[0].title


def test_the_nodes_of_a_graph_hold_more_than_random_ones(causal: Any, graph: AttributionGraph):
    found = flow_knockout(causal, TEXT, graph=graph, others=True, replace_with="mean")
    frame = found.to_dataframe().set_index("count")
    last = frame.loc[frame.index[-1]]
    assert abs(last["together"]) < last["random_low"]
    assert abs(last["linear"]) < 0.2 * found.log_prob


def test_workspace_and_batches_change_no_number(causal: Any, graph: AttributionGraph):
    wide, narrow = (
        flow_knockout(causal, TEXT, graph=graph, k=6, controls=2, max_bytes=size)
        for size in (2**30, 1)
    )
    for name in ("alone", "together", "random"):
        assert torch.allclose(getattr(wide, name), getattr(narrow, name), atol=1e-4)


def test_neurons_are_ablated_one_by_one(causal: Any):
    graph = cm.flow(causal, TEXT, **ARE, neurons=True, k=40)
    place = next(p for p, node in enumerate(graph.nodes) if node.neuron >= 0)
    node = graph.nodes[place]
    found = flow_knockout(causal, TEXT, graph=graph, nodes=[place], controls=2)
    # At one position alone: every position is ablated where there is but one.
    if node.pos == graph.pos:
        same = cm.knockout(causal, TEXT, neurons=[(node.layer, node.neuron)], **ARE, controls=0)
        assert float(found.alone[0]) == pytest.approx(
            float(same.before[0, 0] - same.after[0, 0]), abs=1e-4
        )
    assert float(found.linear[0]) == pytest.approx(float(graph.scores[place]), abs=1e-4)


def test_without_a_foil_the_log_probability_falls(causal: Any):
    graph = cm.flow(causal, TEXT, target=" are")
    place = next(p for p, n in enumerate(graph.nodes) if n.head >= 0 and n.pos == graph.pos)
    node = graph.nodes[place]
    found = flow_knockout(causal, TEXT, graph=graph, nodes=[place], controls=0)
    same = cm.knockout(causal, TEXT, heads=[(node.layer, node.head)], target=" are", controls=0)
    assert found.log_prob == pytest.approx(float(same.before[0, 0]), abs=1e-5)
    assert float(found.alone[0]) == pytest.approx(
        float(same.before[0, 0] - same.after[0, 0]), abs=1e-4
    )


def test_what_cannot_be_ablated(causal: Any, graph: AttributionGraph):
    ask: Any = flow_knockout
    answer = len(graph.nodes) - 1
    for options, words in (
        ({"nodes": [answer]}, "cannot be ablated.*each once"),
        ({"nodes": [0, 0]}, "each once"),
        ({"nodes": [1000]}, "cannot be ablated"),
        ({"nodes": []}, "no node to ablate"),
        ({"replace_with": "noise"}, "replace_with"),
    ):
        with pytest.raises(cm.InvalidInput, match=words):
            ask(causal, TEXT, graph=graph, **options)
    with pytest.raises(cm.InvalidInput, match="belong to another input"):
        flow_knockout(causal, "the key to the cabinet", graph=graph)


def test_tables_files_and_pages(causal: Any, graph: AttributionGraph, tmp_path: Any):
    found = flow_knockout(causal, TEXT, graph=graph, k=8)
    assert Result.load(found.save(tmp_path / "out.safetensors")).equals(found)
    counts, nodes = found.to_dataframe(), found.to_dataframe("nodes")
    assert counts["count"].tolist() == [1, 2, 4, 8]
    assert (counts.random_low <= counts.random).all()
    assert (counts.random <= counts.random_high).all()
    assert nodes.score.abs().is_monotonic_decreasing
    assert found.rank_correlation() == pytest.approx(
        nodes[["score", "alone"]].corr("spearman").iloc[0, 1]
    )
    assert "rank correlation" in repr(found)
    curves, table = found.panels()
    assert isinstance(curves, Curves)
    assert isinstance(table, Table)
    assert len(table.rows) == 8
    assert curves.labels == ("1", "2", "4", "8")
    with pytest.raises(cm.InvalidInput, match="counts"):
        found.to_dataframe("edges")
