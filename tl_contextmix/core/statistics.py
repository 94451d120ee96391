"""Statistics: rank correlations, average precision, running means, and their intervals."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import comb

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_SMALLEST = 1074
"""Every finite double is a whole multiple of two to the power of minus this."""


def spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Returns Spearman's rank correlation of two vectors; ties share their mean rank.

    NaN where one of them is constant, as there is no order to compare, or holds a NaN.
    """
    if bool(a.isnan().any() | b.isnan().any()):
        return a.new_full((), torch.nan)
    x, y = (rank - rank.mean() for rank in map(_ranks, (a, b)))
    # The root of a square is exact, so that equal orders give exactly 1.
    return (x @ y / ((x @ x) * (y @ y)).sqrt()).to(a.dtype)


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(torch.float64)
    return (last - (counts - 1) / 2)[place]


def kendall(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Returns Kendall's tau-b of two vectors, which corrects for ties.

    NaN where one of them is constant or holds a NaN.
    """
    if bool(a.isnan().any() | b.isnan().any()):
        return a.new_full((), torch.nan)
    x, y = (torch.sign(v[:, None] - v[None, :]).to(torch.float64) for v in (a, b))
    return ((x * y).sum() / ((x * x).sum() * (y * y).sum()).sqrt()).to(a.dtype)


def average_precision(
    scores: Float[Tensor, " n"], relevant: Bool[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Returns the average precision of ranking by score, tied items in every order at once.

    Items of the same score are ranked as if shuffled: the mean over all their orders, so that a
    constant score gets the chance level and not what the order of storage happens to give.
    NaN where nothing is relevant, or a score is NaN.
    """
    if bool(scores.isnan().any()):
        return scores.new_full((), torch.nan)
    order = scores.unique().flip(0)
    above, hits, total = 0, 0, scores.new_zeros((), dtype=torch.float64)
    for level in order:
        tied = scores == level
        size, found = int(tied.sum()), int((tied & relevant).sum())
        for place in range(1, size + 1):
            # The chance that this place is relevant times the precision expected there.
            share = found / size
            others = (found - 1) / (size - 1) if size > 1 else 0.0
            precision = (hits + 1 + (place - 1) * others) / (above + place)
            total = total + share * precision
        above, hits = above + size, hits + found
    count = int(relevant.sum())
    return (total / count if count else total * torch.nan).to(scores.dtype)


def expected_average_precision(items: int, relevant: int) -> float:
    """Returns the average precision of a random order: ``relevant`` of ``items`` are relevant."""
    if not 0 < relevant <= items:
        return float("nan")
    if items == 1:
        return 1.0
    harmonic = sum(1 / rank for rank in range(1, items + 1))
    rest = (items - relevant) / (items * (items - 1))
    return (relevant - 1) / (items - 1) + rest * harmonic


def bootstrap_interval(
    values: Float[Tensor, " *values"],
    figure: Callable[[Sequence[float]], float] | None = None,
    *,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of a mean, or of a figure of summed counts.

    The same values always get the same interval. NaN values are skipped. NaN where nothing is left,
    or one value, which says nothing of how values vary. Not scipy's: its import takes 1.5 s, a
    hundred times what most intervals take.

    Args:
        values: One value per sentence, or its counts.
        figure: From sums of counts to the figure; None for the mean of values.
        resamples: How many resamples of the same size are drawn.
    """
    values = values.to(torch.float64).cpu()
    values = values[~values.isnan()] if figure is None else values
    if len(values) < (2 if figure is None else 1):
        return float("nan"), float("nan")
    generator = torch.Generator().manual_seed(0)
    drawn = values[torch.randint(len(values), (resamples, len(values)), generator=generator)]
    if figure is None:
        figures = drawn.mean(1)
    else:
        figures = torch.tensor([figure(row) for row in drawn.sum(1).tolist()], dtype=torch.float64)
        figures = figures[~figures.isnan()]
    if not len(figures):
        return float("nan"), float("nan")
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(figures, ends).tolist()
    return low, high


def sign_flip_test(differences: Float[Tensor, " n"]) -> float:
    """Returns the two-sided p value of paired differences: would signs drawn at random do as much?

    Of 9,999 patterns of signs, or all there are. NaN where there is at most one difference, of
    which nothing can be told.

    Args:
        differences: One per sentence, none of them NaN.
    """
    # scipy takes long to import; most results are never asked for this.
    from scipy.stats import permutation_test

    if len(differences) < 2:
        return float("nan")
    found = permutation_test(
        (differences.double().cpu().numpy(),),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        n_resamples=9999,
        vectorized=True,
        rng=0,
    )
    return float(found.pvalue)


@dataclass(frozen=True)
class Moments:
    """Mean and spread of columns of numbers, of which none is kept.

    Attributes:
        count: How many rows there were.
        mean: Mean of each column.
        squares: Sum of the squared differences from the mean.
    """

    count: int
    mean: Float[Tensor, " column"]
    squares: Float[Tensor, " column"]

    @staticmethod
    def of(rows: Float[Tensor, "row column"]) -> Moments:
        """Returns those of some rows, in double precision."""
        rows = rows.to(torch.float64)
        mean = rows.mean(dim=0)
        return Moments(len(rows), mean, (rows - mean).square().sum(dim=0))

    def merge(self, other: Moments) -> Moments:
        """Returns those of the rows of both (Chan et al. 1983)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * (other.count / count),
            self.squares + other.squares + apart.square() * (self.count * other.count / count),
        )


@dataclass(frozen=True)
class ExactMoments:
    """Count, mean and spread of numbers in any order: their sums are kept without rounding.

    Every finite double is a whole multiple of 2**-1074, so that the sums are integers.

    Attributes:
        count: How many numbers there were.
        total: Sum of the finite ones, in units of 2**-1074.
        squares: Sum of their squares, in units of 2**-2148.
        infinite: Sum of the others: 0.0 without any, or not finite.
    """

    count: int = 0
    total: int = 0
    squares: int = 0
    infinite: float = 0.0

    @staticmethod
    def of(numbers: Iterable[float]) -> ExactMoments:
        """Returns those of some numbers."""
        count = total = squares = 0
        infinite = 0.0
        for number in numbers:
            count += 1
            if not math.isfinite(number):
                infinite += number
                continue
            over, under = number.as_integer_ratio()
            shift = _SMALLEST + 1 - under.bit_length()
            total += over << shift
            squares += over * over << 2 * shift
        return ExactMoments(count, total, squares, infinite)

    def merge(self, other: ExactMoments) -> ExactMoments:
        """Returns those of the numbers of both."""
        return ExactMoments(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            self.infinite + other.infinite,
        )

    def mean(self) -> float:
        """Returns the mean, rounded once."""
        return self.infinite or self.total / (self.count << _SMALLEST)

    def standard_error(self) -> float:
        """Returns that of the mean; zero for one number."""
        if self.infinite:
            return float("nan")
        apart = self.count * self.squares - self.total**2
        under = self.count**2 * max(self.count - 1, 1)
        try:
            return math.sqrt(apart / (under << 2 * _SMALLEST))
        except OverflowError:
            return float("inf")


@functools.lru_cache(maxsize=1024)
def t_quantile(freedom: int) -> float:
    """Returns how far a 95 % interval of Student's t reaches; NaN without a degree of freedom."""
    # Not scipy.stats, which takes four times as long to import.
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975)) if freedom >= 1 else float("nan")


def common_tail(items: int, chosen: int, sets: int, found: int) -> float:
    """Returns the chance that so many items, or more, are in all of some sets.

    Each is ``chosen`` of the same ``items``, drawn at random and without the others.
    """
    # How likely the sets so far have so many in common.
    shared = {chosen: 1.0}
    for _ in range(sets - 1):
        after: dict[int, float] = {}
        for held, chance in shared.items():
            for both in range(max(0, held + chosen - items), min(held, chosen) + 1):
                ways = comb(held, both) * comb(items - held, chosen - both)
                after[both] = after.get(both, 0.0) + chance * (ways / comb(items, chosen))
        shared = after
    return min(1.0, sum(chance for both, chance in shared.items() if both >= found))
