"""Means of exponentials under distributions too long to be held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

# Below this above their mean, exponentials are exact in float32, those of probabilities that are
# below its smallest number included.
_FAR, _TINY = 80.0, 1e-30


class LogMean:
    r"""log E exp(shift) under distributions, the vocabulary tile by tile, in one sum.

    .. math:: \log E\, e^s = m + \log(1 + E\, (e^{s-m} - 1)), \quad m = E\, s

    No digits are lost in it, as the last sum is not negative (Jensen): small shifts keep their own
    last digits, where a sum of exponentials near 1 keeps its own (1e-7 nats in float32). Each tile
    has its own mean; they are joined by the tiles' masses.

    Args:
        like: A number for each shift.
        far: Whether shifts may be further above their mean than an exponential reaches.
    """

    def __init__(self, like: Tensor, *, far: bool = False) -> None:
        """Starts with nothing added."""
        self.far = far
        self.mass, self.mean, self.excess = (torch.zeros_like(like) for _ in range(3))
        self.highest = torch.full_like(like, -torch.inf)

    def add(self, at: Any, before: Tensor, shift: Float[Tensor, "*some tile"]) -> None:
        """Adds a tile, and overwrites the shifts.

        Args:
            at: Which numbers it is about.
            before: Log-probabilities of the tile's tokens, of all shifts or of each.
            shift: What is added to each.
        """
        if self.far:
            log_sum = (before + shift).logsumexp(dim=-1)
            self.highest[at] = self.highest[at].logaddexp(log_sum)
            return
        self.highest[at] = self.highest[at].maximum(shift.amax(dim=-1))
        probs = before.exp()
        mass = probs.sum(dim=-1)
        mean = (_expected(shift, probs) / mass).masked_fill(mass == 0, 0)
        excess = _expected(shift.sub_(mean[..., None]).expm1_(), probs)
        old, total = self.mass[at], self.mass[at] + mass
        joint = (old * self.mean[at] + mass * mean) / total.clamp(min=_TINY)
        excess = excess + (mean - joint).expm1() * (mass + excess)
        kept = self.excess[at]
        self.excess[at] = excess + kept + (self.mean[at] - joint).expm1() * (old + kept)
        self.mass[at], self.mean[at] = total, joint

    def value(self) -> Tensor:
        """Returns what has been added up; NaN where it is out of reach."""
        if self.far:
            return self.highest
        found = self.mean + (self.excess / self.mass).log1p()
        near = (self.highest - self.mean <= _FAR) & found.isfinite()
        return torch.where(near, found, torch.nan)


def _expected(
    numbers: Float[Tensor, "*some tile"], probs: Float[Tensor, "*one tile"]
) -> Float[Tensor, "*some"]:
    """Returns sums of numbers times probabilities, of all rows or of each."""
    if probs.numel() != probs.shape[-1]:
        return (numbers * probs).sum(dim=-1)
    return numbers @ probs.flatten()


Reach = Literal["near", "far", "either"]
"""How exponentials are added up: as means; as log-sum-exps; as these where means overflow."""


def log_mean(like: Tensor, add_to: Callable[[LogMean], None], reach: Reach = "either") -> Tensor:
    """Returns log E exp(shift) of the tiles that a function adds.

    Args:
        like: A number for each shift.
        add_to: Adds them; called twice if need be.
        reach: ``"near"`` leaves NaN where exponentials overflow, and asks nothing of the numbers.
    """
    mean = LogMean(like, far=reach == "far")
    add_to(mean)
    result = mean.value()
    if reach == "either" and bool(result.isnan().any()):
        result = torch.where(result.isnan(), log_mean(like, add_to, "far"), result)
    return result
