"""Statistics of orders against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tl_contextmix.core.statistics import (
    average_precision,
    bootstrap_interval,
    expected_average_precision,
    kendall,
)
from tl_contextmix.core.text_metrics import resampled_interval

pytestmark = pytest.mark.once


def precision_of(order: tuple[int, ...], relevant: Tensor) -> float:
    hits, total = 0, 0.0
    for place, item in enumerate(order, start=1):
        if relevant[item]:
            hits += 1
            total += hits / place
    return total / int(relevant.sum())


@pytest.mark.parametrize(
    "scores", [[0.1, 0.9, 0.5, 0.3], [0.5, 0.5, 0.2, 0.9], [1.0, 1.0, 1.0, 1.0], [0, 0, 1, 1]]
)
@pytest.mark.parametrize("hits", [[0], [0, 2], [1, 2, 3], [0, 1, 2, 3]])
def test_average_precision_is_the_mean_over_orders_of_ties(
    scores: list[float], hits: list[int]
) -> None:
    values = torch.tensor(scores, dtype=torch.float64)
    relevant = torch.zeros(4, dtype=torch.bool)
    relevant[hits] = True
    orders = [
        order
        for order in itertools.permutations(range(4))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    expected = sum(precision_of(order, relevant) for order in orders) / len(orders)
    assert float(average_precision(values, relevant)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("items", "hits"), [(1, 1), (5, 1), (6, 2), (6, 6), (7, 3)])
def test_chance_of_average_precision_is_the_mean_over_all_orders(items: int, hits: int) -> None:
    relevant = torch.arange(items) < hits
    orders = list(itertools.permutations(range(items)))
    expected = sum(precision_of(order, relevant) for order in orders) / len(orders)
    assert expected_average_precision(items, hits) == pytest.approx(expected, abs=1e-12)
    shuffled = average_precision(torch.ones(items, dtype=torch.float64), relevant)
    assert float(shuffled) == pytest.approx(expected, abs=1e-12)


def test_nothing_relevant_is_no_number() -> None:
    assert math.isnan(expected_average_precision(3, 0))
    assert bool(average_precision(torch.rand(3), torch.zeros(3, dtype=torch.bool)).isnan())


def test_kendall_counts_pairs() -> None:
    a, b = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 3, 2, 4])
    # Five pairs agree, one does not.
    assert float(kendall(a, b)) == pytest.approx(4 / 6)
    assert float(kendall(a, -a)) == -1
    # tau-b with one tie in b: (5 - 0) / sqrt(6 * 5).
    tied = torch.tensor([1.0, 2, 2, 4])
    assert float(kendall(a, tied)) == pytest.approx(5 / math.sqrt(30))
    assert bool(kendall(a, torch.ones(4)).isnan())
    assert bool(kendall(a, torch.tensor([1.0, 2, 3, torch.nan])).isnan())


def test_bootstrap_interval_covers_and_repeats() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    low, high = bootstrap_interval(values)
    half = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.02)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.02)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(torch.tensor([2.0, torch.nan, 2.0])) == (2.0, 2.0)
    # One value says nothing of how values vary.
    assert all(math.isnan(end) for end in bootstrap_interval(torch.tensor([2.0, torch.nan])))
    assert all(math.isnan(end) for end in bootstrap_interval(torch.tensor([torch.nan])))


def test_figures_of_nothing_have_no_interval() -> None:
    counts = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    assert resampled_interval(counts, lambda row: row[0] / row[1]) == (0.5, 0.5)
    for some, figure in ((counts[:0], sum), (counts, lambda row: math.nan)):
        assert all(math.isnan(end) for end in resampled_interval(some, figure))
