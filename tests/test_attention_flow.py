"""Attention flow against networkx's maximum flow, and against flows that can be seen."""

from __future__ import annotations

import itertools

import networkx
import numpy as np
import pytest
import torch
from asked import case_of, keywords, shared

import tl_contextmix as cm
from tl_contextmix.methods import attention_flow
from tl_contextmix.methods.attention_flow import _flows

pytestmark = pytest.mark.once


def literal(patterns: np.ndarray, target: int, source: int) -> float:
    """The maximum flow through mean patterns [layer target source], edge by edge."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(itertools.product(range(len(patterns) + 1), range(patterns.shape[1])))
    for (layer, i, j), weight in np.ndenumerate(patterns):
        graph.add_edge((layer, j), (layer + 1, i), capacity=weight / 2 + (i == j) / 2)
    return networkx.maximum_flow_value(graph, (0, source), (len(patterns), target))


@pytest.mark.parametrize("family", ["gpt2", "bert", "bart"])
def test_flows_are_those_of_networkx(family: str):
    model, given = shared(case_of(family))
    options = keywords(given)
    found = cm.attention_flow(model, given.tokens, **options)
    patterns = cm.attention(model, given.tokens, heads=False, **options).scores[:, :, 0].numpy()
    for row, depth in itertools.product(range(len(patterns)), range(len(found.layers))):
        part = patterns[row, : depth + 1]
        expected = [
            [literal(part, i, j) for j in range(part.shape[2])] for i in range(part.shape[1])
        ]
        np.testing.assert_allclose(found.scores[row, depth, 0].numpy(), expected, atol=1e-7)


def test_flows_that_can_be_seen():
    first = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    one, two = _flows(np.stack([first, first])[None], None)[0]
    assert np.array_equal(one, first)  # through one layer: the edge itself
    # Straight on through its own .5, and down through token 0: .5 of 1.
    assert two[1].tolist() == [1.0, 0.5, 0.0]
    assert two[2].tolist() == [0.0, 0.0, 1.0]


def test_sentences_are_solved_together(monkeypatch: pytest.MonkeyPatch):
    solved, solve = [], attention_flow.maximum_flow
    monkeypatch.setattr(
        attention_flow, "maximum_flow", lambda *args: solved.append(args) or solve(*args)
    )
    draw = np.random.default_rng(0)
    capacities = draw.dirichlet(np.ones(6), (32, 4, 6)) / 2
    capacities *= draw.random(capacities.shape) < 0.5  # some pairs have no way between them
    together = _flows(capacities, None)
    calls = len(solved)
    for found, one in zip(together, capacities, strict=True):
        assert np.array_equal(found, _flows(one[None], None)[0])
    assert calls <= (len(solved) - calls) / 5
    # Each pair on its own has what both have.
    graph = networkx.DiGraph()
    for (layer, i, j), weight in np.ndenumerate(capacities[3]):
        graph.add_edge((layer, j), (layer + 1, i), capacity=weight)
    for i, j in itertools.product(range(6), repeat=2):
        flow = networkx.maximum_flow_value(graph, (0, j), (4, i))
        assert together[3, 3, i, j] == pytest.approx(flow, abs=1e-7)


def test_a_decoder_and_its_encoder_are_not_one_graph():
    model, given = shared(case_of("bart"))
    with pytest.raises(cm.InvalidInput, match="attention flow stays within one stack"):
        cm.attention_flow(model, given.tokens, stack="cross", decoder_input=given.decoder_tokens)


def test_tokens_that_are_masked_carry_nothing():
    model = cm.load_demo("causal-lm")
    alone = cm.attention_flow(model, "the keys")
    both = cm.attention_flow(model, ["the keys", "the keys to the cabinet"])
    torch.testing.assert_close(both.scores[0, :, :, :3, :3], alone.scores[0], atol=1e-6, rtol=0)
    assert not both.scores[0, :, :, 3:].any()
    assert not both.scores[0, ..., 3:].any()
