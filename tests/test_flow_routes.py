"""Information flow routes against the authors' way of building them, and circuit-tracer's rule."""

from __future__ import annotations

from typing import Any

import networkx
import pytest
import torch
import zoo
from asked import case_of, first_of, host_trace, shared, view_of
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.core.graph_pruning import influence, kept_by_influence
from tl_contextmix.results import AttributionGraph

TEXT = "the keys to the cabinet"
ARE: Any = {"target": " are", "foil": " is"}
STATES = ("resid_mid", "resid_mid_cross", "resid_post", "answer")


def routes_of(case: zoo.Case, **options: Any) -> AttributionGraph:
    """Routes to the last position of the first sentence."""
    model, given = shared(case)
    return cm.information_flow_routes(model, **first_of(given), pos=-1, **options)


def shares(parts: list[Tensor], whole: Tensor) -> list[float]:
    """Importance of the parts of a sum, one by one."""
    found = [max(0.0, float(whole.abs().sum() - (whole - z).abs().sum())) for z in parts]
    return [one / sum(found) for one in found]


def literal(model: Any, ids: Tensor, parallel: bool = False) -> networkx.MultiDiGraph:
    """The full graph of a pre-LN decoder, from what the host's own hooks see, edge by edge."""
    _, cache = model.run_with_cache(ids)
    cache = {name: value.detach() for name, value in cache.items()}
    graph, n = networkx.MultiDiGraph(), ids.shape[1]

    def state(kind: str, layer: int, pos: int) -> tuple[Any, ...]:
        return (kind, layer, pos) if layer >= 0 else ("embed", -1, pos)

    for layer, block in enumerate(model.blocks):
        v, W_O = cache[f"blocks.{layer}.attn.hook_v"][0], block.attn.W_O.detach()
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
        before = cache[f"blocks.{layer}.hook_resid_pre"][0]
        end = cache[f"blocks.{layer}.hook_resid_post"][0]
        ff = cache[f"blocks.{layer}.hook_mlp_out"][0]
        middle = end if parallel else cache[f"blocks.{layer}.hook_resid_mid"][0]
        for pos in range(n):
            low = state("resid_post", layer - 1, pos)
            mid, top = state("resid_mid", layer, pos), state("resid_post", layer, pos)
            read = [
                (head, source)
                for head in range(pattern.shape[0])
                for source in range(n)
                if float(pattern[head, pos, source])
            ]
            parts = [pattern[h, pos, s] * v[s, h] @ W_O[h] for h, s in read]
            parts += [before[pos]] + ([ff[pos]] if parallel else [])
            found = shares(parts, middle[pos])
            to = top if parallel else mid
            for (head, source), share in zip(read, found[: len(read)], strict=True):
                below = state("resid_post", layer - 1, source)
                graph.add_edge(below, to, by=("attn", layer, pos, head), share=share)
            graph.add_edge(low, to, by=None, share=found[len(read)])
            if parallel:
                graph.add_edge(low, to, by=("mlp", layer, pos, -1), share=found[-1])
            else:
                ours, residual = shares([ff[pos], middle[pos]], end[pos])
                graph.add_edge(mid, top, by=("mlp", layer, pos, -1), share=ours)
                graph.add_edge(mid, top, by=None, share=residual)
    return graph


def followed(graph: networkx.MultiDiGraph, start: Any, threshold: float) -> list[Any]:
    """The edges above a threshold on some way to a state, as the authors look for them."""
    kept = networkx.MultiDiGraph()
    kept.add_node(start)
    for u, v, told in graph.edges(data=True):
        if told["share"] > threshold:
            kept.add_edge(u, v, **told)
    reached = networkx.ancestors(kept, start) | {start}
    return [(u, v, told) for u, v, told in kept.edges(data=True) if v in reached]


@pytest.mark.parametrize(("family", "parallel"), [("gpt2", False), ("gptj", True)])
def test_routes_are_those_of_the_full_graph(family: str, parallel: bool):
    case = case_of(family)
    model, given = shared(case)
    ids = given.tokens[:1]
    full = literal(model, ids, parallel)
    last, start = len(model.blocks) - 1, ids.shape[1] - 1
    end = ("resid_post", last, start)
    for threshold in (0.1, 0.03):
        found = routes_of(case, threshold=threshold)
        edges: dict[Any, float] = {}
        for source, target, told in followed(full, end, threshold):
            by = told["by"]
            ways = [(source, target)] if by is None else [(source, by), (by, target)]
            for way in ways:
                edges[way] = edges.get(way, 0.0) + told["share"]

        def name(place: int, found: AttributionGraph = found) -> tuple[Any, ...]:
            node = found.nodes[place]
            if node.kind == "answer":
                return end
            numbers = (node.kind, node.layer, node.pos)
            return numbers if node.kind in (*STATES, "embed") else (*numbers, node.head)

        ours = {
            (name(source), name(target)): float(found.edges[target, source])
            for target, source in found.edges.nonzero().tolist()
        }
        assert ours == pytest.approx(edges, abs=1e-6)
        # A node's score is the largest threshold below which it is on a route.
        for place, node in enumerate(found.nodes):
            if node.written and place % 5 == 0:
                score = float(found.scores[place])
                for change, there in ((-1e-5, True), (1e-5, False)):
                    again = routes_of(case, threshold=max(0.0, score + change))
                    labels = {(n.label, n.pos) for n in again.nodes}
                    assert ((node.label, node.pos) in labels) == there


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma2", "t5", "bart", "bert"])
def test_shares_of_a_state_add_up_to_one(family: str):
    found = routes_of(case_of(family), threshold=0.0)
    into, out = found.edges.sum(dim=1), found.edges.sum(dim=0)
    for place, node in enumerate(found.nodes):
        if node.kind.removeprefix("encoder ") in STATES:
            assert float(into[place]) == pytest.approx(1, abs=1e-5)
        elif "embed" not in node.kind:
            assert float(into[place]) == pytest.approx(float(out[place]), abs=1e-5)
    assert bool((found.edges.triu() == 0).all())  # nodes stand after those they read
    assert found.unit == "importance"
    assert float(found.scores[-1]) == 1
    if found.encoder is not None:
        assert any(node.kind == "encoder embed" for node in found.nodes)


@pytest.mark.once
def test_post_norm_states_are_after_their_norm():
    """Of a post-LN block by hand: parts centred, scaled by the sum's own scale and by the gain."""
    case = case_of("bert")
    model, given = shared(case)
    found = routes_of(case, threshold=0.0)
    trace, blocks = host_trace(view_of(model), given, None)
    attention = blocks[-1].attentions[0]
    pos, head = found.pos, 1
    before = trace.resid_in(blocks[-1])[0, pos]
    norm = attention.norm_after
    total = before + attention.output(trace)[0, pos]
    scale = ((total - total.mean()).square().mean() + norm.eps).sqrt()
    pattern, values = trace.pattern(attention)[0], trace.value(attention)[0]
    parts = [
        pattern[h, pos, source] * values[source, h] @ attention.W_O[h]
        for h in range(len(attention.W_O))
        for source in range(len(values))
    ]
    assert norm.weight is not None
    assert norm is not None
    linear = [(x - x.mean()) / scale * norm.weight for x in (before, *parts)]
    expected = shares(linear, norm(total))
    mid = next(p for p, n in enumerate(found.nodes) if n.label == f"L{blocks[-1].layer} resid_mid")
    place = next(
        p
        for p, n in enumerate(found.nodes)
        if (n.layer, n.head, n.pos) == (blocks[-1].layer, head, pos)
    )
    sources = len(values)
    ours = expected[1 + head * sources : 1 + (head + 1) * sources]
    assert float(found.edges[mid, place]) == pytest.approx(sum(ours), abs=1e-6)


@pytest.mark.once
def test_workspace_changes_no_route():
    demo = cm.load_demo("causal-lm")
    wide, narrow = (
        cm.information_flow_routes(demo, TEXT, **ARE, max_bytes=size) for size in (2**30, 1)
    )
    assert wide.nodes == narrow.nodes
    assert torch.allclose(wide.edges, narrow.edges, atol=1e-6)
    assert wide.explained == pytest.approx(wide.score, rel=0.3)
    title = wide.panels()[0]
    assert "threshold" in title.caption
    told = wide.to_circuit_tracer()
    assert len({node["node_id"] for node in told["nodes"]}) == len(wide.nodes)
    with pytest.raises(cm.InvalidInput, match="below 1"):
        cm.information_flow_routes(demo, TEXT, threshold=1.0)


# ---- circuit-tracer's rule


def tracer(edges: Tensor, tokens: Tensor, nodes: float, edge: float) -> set[int]:
    """The nodes that circuit-tracer's pruning leaves, step by step, with its matrices."""
    count = len(edges)
    weights = torch.zeros(count, dtype=edges.dtype)
    weights[-1] = 1

    def shared_out(matrix: Tensor) -> Tensor:
        return matrix.abs() / matrix.abs().sum(1, keepdim=True).clamp(min=1e-10)

    def total(matrix: Tensor) -> Tensor:
        shares = shared_out(matrix)
        return weights @ (torch.linalg.inv(torch.eye(count, dtype=edges.dtype) - shares)) - weights

    def least(sizes: Tensor, share: float) -> float:
        order, so_far = sizes.flatten().sort(descending=True).values.tolist(), 0.0
        for one in order:
            so_far += one
            if so_far / sum(order) >= share:
                return one
        return order[-1]

    size = total(edges)
    kept = {i for i in range(count) if size[i] >= least(size, nodes) or tokens[i] or i == count - 1}
    left = edges.clone()
    gone = [i for i in range(count) if i not in kept]
    left[gone], left[:, gone] = 0, 0
    sizes = shared_out(left) * (total(left) + weights)[:, None]
    shown = sizes >= least(sizes, edge)
    while True:
        lost = {
            i
            for i in kept
            if not tokens[i]
            and i != count - 1
            and not (
                any(shown[j, i] for j in kept)
                and (any(shown[i, j] for j in kept) or not edges[i].any())
            )
        }
        if not lost:
            return kept
        kept -= lost


@pytest.mark.once
def test_influence_keeps_what_circuit_tracer_keeps():
    lost = 0
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        edges = torch.randn(24, 24, generator=draw, dtype=torch.float64).tril(-1) ** 3
        edges *= torch.rand(24, 24, generator=draw) < 0.4
        tokens = torch.arange(24) < 4
        edges[:6] = 0  # four tokens, two errors
        kept = kept_by_influence(edges, tokens, 0.8, 0.9)
        expected = tracer(edges, tokens, 0.8, 0.9)
        assert {*kept.nonzero()[:, 0].tolist()} == expected
        shares = edges.abs() / edges.abs().sum(1, keepdim=True).clamp(min=1e-10)
        paths = torch.linalg.inv(torch.eye(24, dtype=torch.float64) - shares)[-1]
        paths[-1] -= 1
        torch.testing.assert_close(influence(edges), paths)
        lost += 24 - len(expected)
    assert lost > 50


@pytest.mark.once
def test_graphs_pruned_by_influence_are_conserved():
    demo = cm.load_demo("causal-lm")
    whole = cm.flow(demo, TEXT, **ARE, share=1.0, k=1000)
    found = cm.flow(demo, TEXT, **ARE, prune="influence", share=0.8, k=1000)
    tokens = torch.tensor([node.kind == "embed" for node in whole.nodes])
    expected = tracer(whole.edges.double(), tokens, 0.8, 0.98)
    written = {
        (whole.nodes[p].label, whole.nodes[p].pos) for p in expected if whole.nodes[p].written
    }
    assert {(node.label, node.pos) for node in found.nodes if node.written} == written
    assert len(written) < whole.possible
    reads = torch.tensor([node.written and node.layer >= 0 for node in found.nodes])
    assert torch.allclose(found.edges.sum(dim=1)[reads], found.scores[reads], atol=1e-4)
    assert torch.allclose(found.edges.sum(dim=0)[:-1], found.scores[:-1], atol=1e-4)
    size = whole.influence()
    assert float(size[-1]) == 0
    assert float(size.max()) <= 1 + 1e-6
