"""Cross-attention: rollout through both stacks, and maps whose axes are different tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from asked import keywords
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.core.model_view import StackName
from tl_contextmix.engine.parts import Point
from tl_contextmix.plotting.panels import Heatmap
from tl_contextmix.results import ContextMap

CASES = [case for case in zoo.cases() if case.encoder_decoder]
EACH = pytest.mark.parametrize("case", CASES, ids=str)


def ways(scores: Tensor, memory: Tensor, own: int) -> Tensor:
    """The sum over all paths, one number at a time: rows target, columns decoder then encoder.

    Args:
        scores: Maps of the decoder's layers [layer target source], residual included.
        memory: Rollout of the encoder [pos source].
        own: Number of decoder tokens.
    """
    layers, width = len(scores), scores.shape[-1]
    out = torch.zeros(own, width, dtype=scores.dtype)

    def walk(layer: int, place: int, weight: float, start: int) -> None:
        """Goes down from the output of a layer at a decoder position."""
        if layer < 0:
            out[start, place] += weight
            return
        for source in range(width):
            step = weight * float(scores[layer, place, source])
            if source < own:
                walk(layer - 1, source, step, start)
                continue
            for token in range(width - own):
                out[start, own + token] += step * float(memory[source - own, token])

    for target in range(own):
        walk(layers - 1, target, 1.0, target)
    return out


MAPS: list[Callable[..., ContextMap]] = [cm.attention_norms, cm.alti, cm.globenc]


@EACH
def test_rollout_through_both_stacks_is_the_sum_over_paths(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case, batch=1)
    given = zoo.Inputs(given.tokens[:, :3], given.decoder_tokens[:, :3])
    for method in MAPS:
        encoder, decoder = (
            method(model, given.tokens, stack=stack, **keywords(given)).normalize()
            for stack in ("encoder", "decoder")
        )
        rolled = decoder.rollout(encoder=encoder)
        memory = encoder.rollout().scores[0, -1, 0]
        expected = ways(decoder.scores[0, :, 0], memory, 3)
        torch.testing.assert_close(rolled.scores[0, -1, 0], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            rolled.scores.sum(-1), torch.ones_like(rolled.scores[..., 0]), rtol=1e-10, atol=1e-10
        )
        direct = decoder.scores[..., 3:]
        torch.testing.assert_close(
            rolled.scores[:, 0, 0, :, 3:], direct[:, 0, 0] @ memory, rtol=1e-10, atol=1e-12
        )
        assert rolled.source.equals(decoder.source)
        assert rolled.provenance.options["rollout"] is True


@EACH
def test_the_identity_is_added_to_the_decoders_own_tokens(case: zoo.Case) -> None:
    model, given = zoo.shared(case), zoo.inputs(case)
    encoder, decoder = (
        cm.attention_norms(model, given.tokens, stack=stack, **keywords(given)).normalize()
        for stack in ("encoder", "decoder")
    )
    rolled = decoder.rollout(encoder=encoder, add_identity=True)
    own = decoder.target.ids.shape[1]
    eye = torch.eye(own, dtype=torch.float64)
    halves = [0.5 * decoder.scores[:, layer, 0] for layer in range(len(decoder.layers))]
    for half in halves:
        half[..., :own] += 0.5 * eye
    memory = encoder.rollout(add_identity=True).scores[:, -1, 0]
    reached = torch.cat([eye, torch.zeros(own, memory.shape[-1]).double()], 1).expand(2, -1, -1)
    for half in halves:
        read = half[..., own:] @ memory
        reached = half[..., :own] @ reached
        reached = torch.cat([reached[..., :own], reached[..., own:] + read], dim=-1)
    torch.testing.assert_close(rolled.scores[:, -1, 0], reached, rtol=1e-10, atol=1e-12)


def test_what_does_not_fit_together_is_refused() -> None:
    if not CASES:
        pytest.skip("this version has no encoder-decoder that runs")
    model, given = zoo.shared(CASES[0]), zoo.inputs(CASES[0])
    places: list[tuple[StackName, Point]] = [
        ("encoder", "block_out"),
        ("decoder", "block_out"),
        ("cross", "attn_out"),
    ]
    encoder, decoder, cross = (
        cm.attention_norms(model, given.tokens, stack=stack, at=at, **keywords(given))
        for stack, at in places
    )
    other = cm.attention_norms(
        model, given.tokens.flip(1), stack="encoder", at="block_out", **keywords(given)
    )
    for map, memory, match in (
        (decoder, None, "encoder="),
        (cross, encoder, "followed by its encoder's"),
        (decoder, other, "encoder's map of the same input"),
        (encoder, encoder, "and none else"),
        (decoder, encoder.rollout(), "Roll the map out once"),
        (decoder, replace(encoder, layers=(1, 2)), "all layers from 0"),
    ):
        with pytest.raises(cm.InvalidInput, match=match):
            map.rollout(encoder=memory)
    with pytest.raises(cm.InvalidInput, match="no mixing ratio of cross-attention alone"):
        cm.mixing_ratio(model, given.tokens, stack="cross", at="attn_out", **keywords(given))
    alone = decoder.select(source="decoder").rollout()
    assert alone.target.equals(alone.source)


METHODS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (cm.attention, {}),
    (cm.attention_norms, {"at": "attn_out"}),
    (cm.attention_norms, {"at": "block_out"}),
    (cm.value_zeroing, {}),
]


@EACH
def test_maps_of_cross_attention_show_both_token_axes(case: zoo.Case) -> None:
    model, text, answer = zoo.build(case), "the cat sat on the mat", "a dog"
    for method, options in METHODS:
        map = method(model, text, stack="cross", decoder_input=answer, **options)
        panel = map.panels()[0]
        assert isinstance(panel, Heatmap)
        assert panel.rows == map.target.strings[0]
        assert panel.columns == map.source.strings[0]
        assert map.source.sides[-1][0] == "encoder"
        assert map.target.sides[0][0] == "decoder"
        assert len(panel.columns) != len(panel.rows)
        assert not panel.causal
        page = map.show()._repr_html_()
        for word in ("mat", "dog"):
            assert word in page
