r"""What is asked of the vocabulary: a token, one of several, or one rather than another.

.. math:: f(l) = \log\sum_{u \in T} e^{l_u} - \log\sum_{u \in F} e^{l_u}

for logits :math:`l`, target tokens :math:`T` and foil tokens :math:`F`. Without a foil, :math:`F`
is the whole vocabulary and :math:`f` the log-probability of the target. With one, the softmax
cancels: for two tokens :math:`f` is the difference of their logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Of = Literal["logit", "log_prob", "prob"]


@dataclass(frozen=True)
class Contrast:
    """The tokens that each prediction is asked about.

    Attributes:
        target: Ids of the alternatives, for each prediction.
        foil: Ids they are compared with; None for the whole vocabulary.
    """

    # "_": predictions may have unlike numbers of them.
    target: tuple[Int[Tensor, " _alternative"], ...]
    foil: tuple[Int[Tensor, " _alternative"], ...] | None = None

    @property
    def single(self) -> bool:
        """Whether every target and every foil is one token."""
        return all(len(ids) == 1 for ids in (*self.target, *(self.foil or ())))

    def repeat(self, times: int) -> Contrast:
        """Returns the predictions one after the other, as often as asked."""
        return Contrast(self.target * times, None if self.foil is None else self.foil * times)

    def at(self, places: list[int]) -> Contrast:
        """Returns some of the predictions."""
        foil = None if self.foil is None else tuple(self.foil[place] for place in places)
        return Contrast(tuple(self.target[place] for place in places), foil)

    def score(
        self, logits: Float[Tensor, "row d_vocab"], of: Of = "log_prob"
    ) -> Float[Tensor, " row"]:
        """Returns what is asked of logits, one row for each prediction.

        Args:
            logits: The logits.
            of: ``"log_prob"``: the log-odds of target and foil above. ``"logit"``: without a foil
                the target's logit instead of its log-probability; with one the same.
                ``"prob"``: the target's probability, less the foil's.
        """
        log_probs = logits.log_softmax(dim=-1)
        target = self._sums(logits if of == "logit" else log_probs, self.target)
        foil = None if self.foil is None else self._sums(log_probs, self.foil)
        if of == "prob":
            return target.exp() - (0 if foil is None else foil.exp())
        if foil is None:
            return target
        return (self._sums(log_probs, self.target) if of == "logit" else target) - foil

    @staticmethod
    def _sums(logits: Tensor, sets: tuple[Tensor, ...]) -> Tensor:
        pairs = zip(logits, sets, strict=True)
        return torch.stack([row[ids.to(row.device)].logsumexp(dim=-1) for row, ids in pairs])

    def mean_logits(self, logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
        """Returns the target's logit less the foil's; of a set their mean by likelihood."""

        def mean(sets: tuple[Tensor, ...]) -> Tensor:
            pairs = zip(logits, sets, strict=True)
            some = [row[ids.to(row.device)] for row, ids in pairs]
            return torch.stack([one @ one.softmax(dim=-1) for one in some])

        return mean(self.target) if self.foil is None else mean(self.target) - mean(self.foil)

    def best_ranks(self, logits: Float[Tensor, "row d_vocab"]) -> Int[Tensor, "row side"]:
        """Returns the rank of the best alternative of target, and of foil where there is one."""
        sides = [self.target] if self.foil is None else [self.target, self.foil]
        found = []
        for row, values in enumerate(logits):
            tops = [values[side[row].to(values.device)].max() for side in sides]
            found.append(torch.stack([1 + (values > top).sum() for top in tops]))
        return torch.stack(found)
