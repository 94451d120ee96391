"""Rollout against the sum over paths, sentence by sentence, and what it refuses."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from hand_built import map_of, random_map, tokens

import tl_contextmix as cm
from tl_contextmix.errors import ContextMixWarning, InvalidInput
from tl_contextmix.results import ContextMap

NAN = float("nan")


def _by_hand(map: ContextMap, row: int, *, identity: bool) -> list[list[list[float]]]:
    """Rollout of one sentence over its real tokens, one number at a time."""
    real = map.target.mask[row].nonzero()[:, 0].tolist()
    size = range(len(real))
    found: list[list[list[float]]] = []
    for layer in map.scores[row, :, 0]:
        mixing = [[float(layer[i, j]) for j in real] for i in real]
        if identity:
            for i in size:
                total = sum(mixing[i])
                mixing[i] = [(s + total * (i == j)) / 2 for j, s in enumerate(mixing[i])]
                if total == 0:
                    mixing[i][i] = 1.0
        if found:
            last = found[-1]
            mixing = [[sum(mixing[i][k] * last[k][j] for k in size) for j in size] for i in size]
        found.append(mixing)
    return found


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize(("padding", "left"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("causal", [False, True])
def test_rollout_is_the_product_of_the_layers(
    identity: bool, padding: int, left: bool, causal: bool
):
    map = random_map(2, 4, padding=padding, left=left, causal=causal)
    if identity:
        scores = map.scores.clone()
        scores[1, 2, 0, 0] = 0  # a token that nothing reaches
        map = dataclasses.replace(map, scores=scores)
    rolled = map.rollout(add_identity=identity)
    for row in range(2):
        real = map.target.mask[row]
        expected = torch.tensor(_by_hand(map, row, identity=identity), dtype=torch.float64)
        assert torch.allclose(rolled.scores[row, :, 0][:, real][:, :, real], expected, rtol=1e-13)
        assert not rolled.scores[row, :, 0, ~real].any()
        assert not rolled.scores[row, :, 0, :, ~real].any()
    assert rolled.causal is causal


def test_labels_say_what_happened():
    map = random_map(2, 3, bias=True, includes_residual=False).normalize()
    rolled = map.rollout(add_identity=False)
    assert (rolled.layers, rolled.heads, rolled.point) == (map.layers, map.heads, map.point)
    assert rolled.unit == "rollout of norm / row sum"
    assert rolled.normalized == "sum"
    assert rolled.bias is None
    assert not rolled.includes_residual  # no layer had it
    assert random_map().rollout().includes_residual
    options = map.provenance.options | {"rollout": True, "add_identity": False}
    assert rolled.provenance == dataclasses.replace(map.provenance, options=options)


def test_the_first_layers_are_enough():
    map = random_map(2, 4)
    part = map.select(layer=[0, 1]).rollout()
    assert torch.equal(part.scores, map.rollout().scores[:, :2])
    assert torch.equal(map.select(layer=0).rollout().scores, map.scores[:, :1])


def test_special_tokens_can_be_left_out_first():
    inner = random_map(1, 3).select(target=[1, 2, 3], source=[1, 2, 3]).normalize()
    assert inner.rollout().scores.shape == (1, 3, 1, 3, 3)


def test_a_nan_spreads_over_all_it_is_multiplied_with():
    map = map_of(torch.tensor([[[[[1.0, 0.0], [NAN, 1.0]]], [[[1.0, 0.0], [0.5, 0.5]]]]]))
    rolled = map.rollout()
    assert rolled.scores[0, 1, 0].isnan().tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize(
    ("map", "seen", "remedy"),
    [
        (random_map(head=2), "got 2 heads", r"Take \.mean\('head'\)"),
        (random_map(source=7), r"\('encoder', 7\)", "Use the encoder stack"),
        (random_map().select(layer=[1, 2]), r"layers \[1, 2\]", r"every layer \(layer=None\)"),
        (random_map().select(layer=[1, 0]), r"layers \[1, 0\]", "in order"),
        (random_map().select(layer=-1), r"layers \[2\]", "all layers from 0"),
        (random_map().select(layer=[0, 0]), r"layers \[0, 0\]", "all layers from 0"),
        (random_map().select(target=[0, 1], source=[2, 3]), "sources of", "same positions"),
        (random_map().select(target=[0, 1], source=[1, 0]), "sources of", "same positions"),
        (random_map().rollout(), "got rollout of norm", "out once"),
        (random_map().rollout().normalize(), "got rollout of norm", "out once"),
    ],
    ids=range(10),
)
def test_what_cannot_be_multiplied_is_refused(map: ContextMap, seen: str, remedy: str):
    with pytest.raises(InvalidInput, match=f"cannot be rolled out: .*{seen}.*; .*{remedy}"):
        map.rollout()


def test_a_decoder_is_rolled_out_without_the_encoder():
    words = tokens(1, 3)
    both = words.cat(tokens(1, 2, side="encoder"))
    map = map_of(torch.rand(1, 2, 1, 3, 5), words, both)
    with pytest.raises(InvalidInput, match=r"select\(source='decoder'\)"):
        map.rollout()
    rolled = map.select(source="decoder").rollout()
    expected = map.scores[0, 1, 0, :, :3] @ map.scores[0, 0, 0, :, :3]
    assert torch.allclose(rolled.scores[0, 1, 0], expected)


@pytest.mark.parametrize(("at", "identity"), [("attn_out", True), ("block_out", False)])
def test_maps_of_a_model_roll_out(causal: Any, at: Any, identity: bool):
    text = "the keys to the cabinet are old"
    rolled = cm.attention_norms(causal, text, at=at).normalize().rollout()
    assert rolled.provenance.options["add_identity"] is identity
    assert rolled.causal
    sums = rolled.scores.sum(-1)
    # float32; measured 2e-7 over its layers.
    assert torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-5)
    assert bool((rolled.scores[0, :, 0, 0, 0] > 0.999).all())


@pytest.mark.once
def test_rows_that_do_not_sum_to_1_are_warned_of():
    """Raw Value Zeroing peaks far below 1 and ranks the inputs otherwise; rows of 1 say nothing."""
    model, text = cm.load_demo("causal-lm"), "the keys to the cabinet are"
    zeroed = cm.value_zeroing(model, text)
    with pytest.warns(ContextMixWarning, match=r"rows that sum to .* up to .*\.normalize\(\)"):
        raw = zeroed.rollout()
    shares = zeroed.normalize().rollout()
    first, last = (map.scores[0, -1, 0, -1] for map in (raw, shares))
    assert float(first.max()) < 0.01 < float(last.max())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zeroed.normalize().select(layer=[0, 1]).rollout()
        zeroed.normalize("max").rollout()
        cm.attention(model, text, heads=False).rollout()
        dataclasses.replace(zeroed, scores=zeroed.normalize().scores).rollout()
