"""What must hold of every block and every model, on random ones; see `drawn`."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from asked import host_trace, host_value, points, relative, view_of
from drawn import FAMILIES, SEEDS, Plan, World, plans, world_of
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import tl_contextmix as cm
from tl_contextmix.core.feed_forward_parts import FeedForwardParts
from tl_contextmix.engine.parts import linear_points, norms_at, parts_at_all
from tl_contextmix.results import ContextMap

pytestmark = pytest.mark.once
EVERY_CHECK: Any = list(HealthCheck)
DRAW = settings(deadline=None, derandomize=True, database=None, suppress_health_check=EVERY_CHECK)


@settings(DRAW, max_examples=40)
@given(
    plan=plans(),
    bias=st.sampled_from(["contributor", "fixed"]),
    max_bytes=st.sampled_from([3000, 2**30]),
)
def test_every_block_is_the_sum_of_its_parts(plan: Plan, bias: Any, max_bytes: int) -> None:
    block, trace = plan.build()
    limit = 1e-9 if trace.dtype == torch.float64 else 1e-3
    kind = "cross" if plan.stack == "cross" else "self"
    linear = linear_points(block, trace, plan.stack)
    found = parts_at_all(block, linear, points(block), bias, max_bytes)
    sizes = norms_at(found, max_bytes)
    real = trace.batch.main.mask
    for point, token_sum in found.items():
        expected = host_value(block, trace, point, kind)
        whole = slice(0, expected.shape[1])
        behind = isinstance(token_sum, FeedForwardParts)
        dense = token_sum.parts(max_bytes) if behind else token_sum.dense(whole).transpose(1, 2)
        total = dense.sum(dim=2) + token_sum.bias
        assert close(total, expected, real, limit), point
        # A sum of parts that cancel is as exact as its largest part.
        assert float((sizes[point] - dense.norm(dim=-1)).abs().max()) <= limit * (
            1 + float(dense.abs().max())
        )


def close(found: Tensor, expected: Tensor, real: Tensor, limit: float) -> bool:
    """Whether the rows of real tokens are equal, relative to the largest entry."""
    if not bool(real.any()):
        return True
    return relative(found[real], expected[real]) <= limit


# Not shrunk: a model is as small as it is drawn, and building one takes its time.
@pytest.mark.parametrize("family", FAMILIES)
@settings(DRAW, max_examples=2, phases=[Phase.generate])
@given(seed=SEEDS)
def test_every_model_is_the_sum_of_its_parts(family: str, seed: int) -> None:
    chance = random.Random(f"{family} {seed}")
    world = world_of(family, chance)
    note(repr(world))
    model, stacks = world.build(), [None, "encoder", "cross"]
    try:
        first = cm.attention(model, world.given.tokens, **world.asked)
    except cm.InvalidInput as refusal:
        # Some hosts count positions wrong there; that is measured, and said.
        if not world.left or "padding before the text gives wrong" not in str(refusal):
            raise
        return
    for stack in stacks if "decoder_input" in world.asked else stacks[:1]:
        parts_add_up(world, model, stack, chance)
        zeroing_keeps_its_bounds(world, model, stack)
    rollouts_keep_their_sums(world, model, first)
    layers_telescope(world, model)


def parts_add_up(world: World, model: Any, stack: Any, chance: random.Random) -> None:
    """Parts and bias make the host's own activation, and maps hold the parts' norms."""
    trace, blocks = host_trace(view_of(model), world.given, stack, attention_mask=world.mask)
    kind = "cross" if stack == "cross" else "self"
    asked = {"stack": stack, **world.asked}
    some = chance.sample(points(blocks[0]), 2)
    maps = cm.attention_norms(model, world.given.tokens, at=some, **asked)
    for point in some:
        parts = cm.decompose(model, world.given.tokens, at=point, **asked)
        real = parts.target.mask[:, None].expand(-1, len(blocks), -1)
        expected = torch.stack([host_value(b, trace, point, kind) for b in blocks], dim=1)
        assert close(parts.total(), expected, real, world.limit), (stack, point)
        assert relative(maps[point].scores, parts.norms().scores) <= 1e-4, (stack, point)


def zeroing_keeps_its_bounds(world: World, model: Any, stack: Any) -> None:
    """Cosine distances, zero where nothing is read: at padding, and from the future."""
    found = cm.value_zeroing(model, world.given.tokens, stack=stack, **world.asked)
    scores = found.scores[:, :, 0]
    assert bool((scores >= 0).all())
    assert bool((scores <= 2 + 1e-5).all())
    pattern = cm.attention(model, world.given.tokens, stack=stack, **world.asked).scores
    assert not bool(scores[(pattern == 0).all(dim=2)].any())
    real = found.target.mask[:, :, None] & found.source.mask[:, None]
    assert not bool(scores.masked_fill(real[:, None], 0).any())
    sums = found.normalize().scores.sum(-1)
    assert bool(((sums - 1).abs() < 1e-4).logical_or(sums == 0).all())


def rollouts_keep_their_sums(world: World, model: Any, attention: ContextMap) -> None:
    """Rows of a normalised map sum to 1 through all layers, at real tokens and nowhere else."""
    asked = {"at": points(view_of(model).blocks()[0])[-1], **world.asked}
    mixing, encoder = cm.attention_norms(model, world.given.tokens, **asked), None
    if "decoder_input" in asked:
        encoder = cm.attention_norms(model, world.given.tokens, stack="encoder", **asked)
        encoder = encoder.normalize()
    rolled = [mixing.normalize().rollout(encoder=encoder), attention.mean().rollout()]
    for map in rolled:
        sums = map.scores.sum(-1)[:, :, 0]
        expected = map.target.mask[:, None].expand_as(sums).to(sums)
        # Rows of half-precision patterns sum to 1 as well as the model's own do.
        assert float((sums - expected).abs().max()) <= world.limit, map.unit


def layers_telescope(world: World, model: Any) -> None:
    """What the layers add, from the empty stream on, ends at the model's own log-probability."""
    pos = -1 - world.seed % min(world.lengths)
    pos = -1 if "decoder_input" in world.asked else pos
    found = cm.log_prob_contributions(model, world.given.tokens, pos=pos, **world.asked)
    steps = found.trajectory
    atol = 1e-9 if world.dtype == torch.float64 else 1e-3
    torch.testing.assert_close(found.scores, steps.diff(dim=1), atol=atol, rtol=0)
    # The readout of a half-precision model rounds its logits; a log-probability is as large.
    size = float(steps.abs().max()) + 1
    assert float((steps[:, -1] - found.log_prob).abs().max()) <= world.limit * size
