"""How each demo model is made: seeds, numbers of steps, learning rates.

A recipe has one or two phases. The second continues from the weights of the first with fresh
sentences and, for the causal model, more facts and names, which are learned last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tl_contextmix.demo_models import DemoName
from tl_contextmix.demo_models.grammar import Shares


@dataclass(frozen=True)
class Phase:
    """One run over a fixed set of sentences with one learning-rate schedule."""

    data_seed: int
    sentences: int
    order_seed: int
    steps: int
    peak_learning_rate: float
    warmup_steps: int = 200
    batch_size: int = 192
    shares: Shares | None = None
    """Mixture of the English grammar; None where there is none (translation)."""

    def learning_rate(self, step: int) -> float:
        """Returns the rate of a step: linear warm-up, then a cosine from the peak to 2 % of it."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.peak_learning_rate * warmup * (0.98 * cosine + 0.02)


@dataclass(frozen=True)
class Recipe:
    """How one demo model is made."""

    weight_seed: int
    tokenizer_sentences: int
    """How many of the first phase's sentences the tokenizer is trained on; 0: none needed."""
    weight_decay: float
    phases: tuple[Phase, ...]


RECIPES: dict[DemoName, Recipe] = {
    "causal-lm": Recipe(
        weight_seed=0,
        tokenizer_sentences=60_000,
        weight_decay=0.05,
        phases=(
            Phase(1, 400_000, 0, 2200, 2e-3, shares=Shares(0.66, 0.13, 0.11)),
            Phase(11, 400_000, 0, 2200, 1.5e-3, shares=Shares(0.38, 0.10, 0.26)),
        ),
    ),
    "masked-lm": Recipe(
        weight_seed=0,
        tokenizer_sentences=0,
        weight_decay=0.05,
        phases=(
            Phase(2, 350_000, 0, 3600, 1.2e-3, warmup_steps=300, shares=Shares(0.55, 0.12, 0.18)),
        ),
    ),
    "encoder-decoder": Recipe(
        weight_seed=0,
        tokenizer_sentences=30_000,
        weight_decay=0.01,
        phases=(
            Phase(3, 300_000, 0, 3200, 2e-3),
            Phase(13, 300_000, 1, 3600, 1.5e-3),
        ),
    ),
}
