"""What the norms cost: operations and bytes, counted; nothing here depends on the machine.

Sizes are GPT-2's and BERT's (d=768, 12 heads, 3072 neurons) unless a test says otherwise. Where
only counts are asked for, products of matrices are replaced by constants (tested below).
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("meters", reason="the benchmarks are part of the repository only")

import reference
import run
import value_zeroing
from blocks import Sizes, build
from meters import WithoutProducts, flops
from run import Cost, measure, ours

from tl_contextmix.core.feed_forward_parts import FeedForwardParts
from tl_contextmix.engine.parts import POINTS, Point, linear_points, parts_at
from tl_contextmix.methods.alti import _closer

pytestmark = pytest.mark.once

LINEAR, NEURON = POINTS[:3], POINTS[3:]
CAUSAL, BOTH_WAYS = Sizes(512), Sizes(512, causal=False, post_norm=True)
SMALL = Sizes(24, d=48, heads=4, m=96)
MASKS = pytest.mark.parametrize("sizes", [CAUSAL, BOTH_WAYS], ids=["causal", "both_ways"])
MIB = 2**20
# Forward-mode derivatives load what PyTorch 2.13 has itself deprecated.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


@functools.cache
def counted(sizes: Sizes, *points: Point, max_bytes: int = run.MAX_BYTES) -> Cost:
    """The cost of the norms at some points, products of matrices left out of the run."""
    block, trace = build(sizes)
    return measure(partial(ours, block, trace, *points, max_bytes=max_bytes), products=False)


# What is compared is the same


@pytest.mark.parametrize("mask", [{}, {"causal": False, "post_norm": True}], ids=str)
def test_the_reference_computes_the_same_norms(mask: dict) -> None:
    sizes = replace(SMALL, **mask)
    block, trace = build(sizes, torch.float64)
    with torch.no_grad():
        found = ours(block, trace, *POINTS)
        for point in POINTS:
            expected = reference.norms(block, trace, point, sizes.causal)
            torch.testing.assert_close(found[point][0], expected, rtol=1e-11, atol=1e-11)


@FORWARD_MODE
def test_fifty_steps_of_integrated_gradients_come_close() -> None:
    block, trace = build(SMALL, torch.float64)
    with torch.no_grad():
        parts = parts_at(block, linear_points(block, trace, "decoder"), "mlp_out", "contributor")
        assert isinstance(parts, FeedForwardParts)
        parts = parts.parts(run.MAX_BYTES)[0]
        start = reference.attention_parts(block, trace, "mlp_in")
        found = reference.integrated_gradients(block, *start, run.STEPS, SMALL.causal)
    # The midpoint rule's own error: 5e-5 measured.
    assert float((found - parts).norm() / parts.norm()) < 1e-3


@pytest.mark.parametrize("extra", [{}, {"gated": True}, {"encoder": 20}, {"batch": 5}], ids=str)
def test_leaving_products_out_changes_no_count(extra: dict) -> None:
    sizes = replace(SMALL, n=64, **extra)
    block, trace = build(sizes)
    for max_bytes in (run.MAX_BYTES, MIB):
        whole = measure(partial(ours, block, trace, "block_out", max_bytes=max_bytes))
        without = counted(sizes, "block_out", max_bytes=max_bytes)
        assert (without.peak, without.largest) == (whole.peak, whole.largest)
        # Gates whose path is too short to divide by are few, and other ones.
        assert without.flops == pytest.approx(whole.flops, rel=0.02 if sizes.gated else 0)


def test_the_meters_see_what_is_made_and_given_back() -> None:
    def work() -> None:
        a = torch.ones(1000)
        b = a.view(10, 100).T.expand(3, 100, 10)
        del a, b
        c = torch.ones(500) + given
        c += 1

    given = torch.ones(500)
    assert measure(work) == Cost(flops=1000, peak=4000, largest=4000)
    assert flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5), elementwise=False) == 60


# Up to the feed-forward input


@MASKS
@pytest.mark.parametrize("point", LINEAR)
def test_up_to_the_feed_forward_input_a_tenth_of_operations_and_memory(
    sizes: Sizes, point: Point
) -> None:
    block, trace = build(sizes)
    cost = measure(partial(ours, block, trace, point))
    shapes = build(sizes, device="meta")
    literal = measure(partial(reference.norms, *shapes, point, sizes.causal))
    pairs = sizes.heads * sizes.n**2 * sizes.d
    own = cost.flops - run.output_products(sizes, point)
    assert own <= (literal.flops - run.output_products(sizes, "attn_out")) / 10
    # And than the sum over heads alone, a multiplication and an addition per number.
    assert own <= 2 * pairs / 10
    assert literal.largest == 4 * pairs
    assert cost.peak <= 4 * pairs / 10
    assert cost.largest < 4 * pairs / sizes.heads


@pytest.mark.parametrize("extra", [{"encoder": 128}, {"batch": 4}, {"sandwich": True}], ids=str)
@pytest.mark.parametrize("point", POINTS)
def test_no_path_to_norms_builds_target_source_d_model(point: Point, extra: dict) -> None:
    sizes = Sizes(128, d=192, heads=6, m=768, **extra)
    block, trace = build(sizes)
    cost = measure(partial(ours, block, trace, point, max_bytes=32 * MIB))
    assert cost.largest < 4 * sizes.batch * sizes.n * (sizes.n + sizes.encoder) * sizes.d


def test_the_points_before_the_first_norm_need_no_second_product() -> None:
    expected: list[tuple[Point, int]] = [("attn_out", 1), ("resid_mid", 1), ("mlp_in", 2)]
    for point, products in expected:
        sizes = Sizes(64, heads=1)
        block, trace = build(sizes)
        count = flops(partial(ours, block, trace, point), elementwise=False)
        # One head: n products of vectors with themselves, and patterns.
        gram = 2 * sizes.n * sizes.d + 4 * sizes.n**2 + 2 * sizes.n * sizes.d
        assert products * 2 * sizes.n * sizes.d**2 <= count
        assert count <= products * 2 * sizes.n * sizes.d**2 + gram


# Behind the activation


@MASKS
def test_feed_forward_points_stay_close_to_the_least_that_is_possible(sizes: Sizes) -> None:
    """All three together: they are looks at the same tiles."""
    assert counted(sizes, *NEURON).flops <= 1.25 * run.bound(sizes)


@FORWARD_MODE
@MASKS
@pytest.mark.parametrize("n", [128, 512])
def test_a_fiftieth_of_integrated_gradients_in_fifty_steps(sizes: Sizes, n: int) -> None:
    sizes = replace(sizes, n=n)
    shapes = build(sizes, device="meta")
    parts = reference.attention_parts(*shapes, "mlp_in")
    step = measure(partial(reference.gradient_step, shapes[0], *parts, 0.5, sizes.causal))
    assert run.STEPS * step.flops >= 50 * counted(sizes, *NEURON).flops


def test_several_points_cost_what_the_last_costs() -> None:
    sizes = replace(CAUSAL, n=256)
    assert counted(sizes, *POINTS).flops <= 1.02 * counted(sizes, "block_out").flops


def test_operations_grow_with_the_square_of_the_length() -> None:
    costs = {n: counted(replace(CAUSAL, n=n), *NEURON) for n in (256, 512)}
    assert 1.8 <= math.log2(costs[512].flops / costs[256].flops) <= 2


def test_memory_grows_no_faster_than_the_pattern() -> None:
    def peak(n: int) -> int:
        block, trace = build(replace(CAUSAL, n=n))
        return measure(partial(ours, block, trace, "mlp_in")).peak

    assert peak(512) <= 4 * peak(256)


def test_a_sliding_window_costs_its_share() -> None:
    window = counted(replace(CAUSAL, window=64), *NEURON).flops
    # Tiles are 32 targets high: 96 sources each, of 272 on average without a window.
    assert window <= 0.45 * counted(CAUSAL, *NEURON).flops


def test_a_parallel_block_costs_its_diagonal() -> None:
    sizes = replace(CAUSAL, n=256)
    parallel = counted(replace(sizes, parallel=True), *NEURON).flops
    assert parallel <= 0.25 * counted(sizes, *NEURON).flops


@pytest.mark.parametrize("point", ["mlp_in", "block_out"])
def test_the_mixing_ratio_never_looks_at_all_pairs(point: Point) -> None:
    def count(n: int) -> int:
        block, trace = build(replace(CAUSAL, n=n))

        def work() -> None:
            linear = linear_points(block, trace, "decoder", (point,))
            parts = parts_at(block, linear, point, "contributor")
            assert parts.diagonal().shape == parts.total.shape

        with torch.no_grad():
            return flops(work)

    assert count(128) <= 2.01 * count(64)


# Within the budget

CASES = {
    "causal": Sizes(256),
    "both_ways": Sizes(256, causal=False, post_norm=True),
    "gated": Sizes(128, gated=True),
    "sandwich": Sizes(128, sandwich=True),
    "cross_attention": Sizes(128, encoder=128),
    "parallel": Sizes(256, parallel=True),
    "short_sequences": Sizes(16, batch=24),
    "one_long_sequence": Sizes(1024, d=96, heads=4, m=384),
}


def results(sizes: Sizes, points: tuple[str, ...]) -> int:
    """Bytes of the maps that are asked for."""
    return 4 * len(points) * sizes.batch * sizes.n * (sizes.n + sizes.encoder)


def least(sizes: Sizes) -> int:
    """Bytes that a layer takes whatever the budget.

    Its weights folded into each other and rescaled by norms, its neurons' slopes and own shares,
    and a dozen vectors per token.
    """
    branches, reads = 1 + sizes.gated, 1 + bool(sizes.encoder)
    tokens = sizes.batch * sizes.n
    weights = reads * sizes.d * (branches * sizes.m + 3 * sizes.d)
    return 4 * (weights + 2 * branches * tokens * sizes.m + 12 * tokens * sizes.d)


@MASKS
def test_the_default_budget_is_kept(sizes: Sizes) -> None:
    cost = counted(sizes, *NEURON)
    assert cost.peak <= run.MAX_BYTES + results(sizes, NEURON)
    # Sources and neurons times targets would be 3 GiB.
    assert cost.peak <= 400 * MIB


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("budget", [64 * MIB, 16 * MIB], ids=["64MiB", "16MiB"])
def test_a_tight_budget_is_kept(name: str, budget: int) -> None:
    """Where the layer alone takes more, a quarter of the budget is used for pairs."""
    sizes = CASES[name]
    cost = counted(sizes, *NEURON, max_bytes=budget)
    limit = max(budget, least(sizes) + budget // 4)
    assert cost.peak <= limit + results(sizes, NEURON)
    # A smaller budget costs few operations more.
    assert cost.flops <= 1.1 * counted(sizes, *NEURON).flops


@pytest.mark.parametrize("name", CASES)
def test_norms_up_to_the_feed_forward_input_keep_the_budget(name: str) -> None:
    sizes = CASES[name]
    block, trace = build(sizes)
    cost = measure(partial(ours, block, trace, *LINEAR, max_bytes=32 * MIB))
    assert cost.peak <= max(32 * MIB, least(sizes)) + results(sizes, LINEAR)


def test_parts_themselves_need_the_budget_besides_the_result() -> None:
    sizes = Sizes(128, d=192, heads=6, m=768)
    block, trace = build(sizes)

    def work() -> None:
        linear = linear_points(block, trace, "decoder")
        parts = parts_at(block, linear, "block_out", "contributor", 8 * MIB)
        assert isinstance(parts, FeedForwardParts)
        parts.parts(8 * MIB)

    result = 4 * sizes.n**2 * sizes.d
    assert result < measure(work).peak <= result + 8 * MIB


def test_tiles_fit_the_cache_however_much_they_might_take() -> None:
    """At n = 512, 664 MiB (Value Zeroing) and 623 MiB (ALTI) were no faster."""
    n = 256
    block, trace = value_zeroing.made(n, causal=True).view()
    with WithoutProducts():
        for work in (
            partial(value_zeroing.ours, block, trace),
            partial(_closer, block, trace, 2**30),
        ):
            assert measure(work).peak <= 44 * MIB


# The benchmark


@FORWARD_MODE
def test_the_benchmark_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["--quick"])
    out = capsys.readouterr().out
    assert out.count("| --- |") >= 3
    for expected in ("torch " + torch.__version__, *POINTS, "causal", "both ways"):
        assert expected in out
