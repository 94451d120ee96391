"""Predictions as rows of a map, those of a sentence one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch.nn.utils.rnn import pad_sequence

from tl_contextmix.results.labels import Tokens


@dataclass(frozen=True)
class PredictedRows:
    """Which prediction is which row of which sentence.

    Attributes:
        order: Number of the prediction; the last one of a sentence is repeated where it has fewer.
        mask: False where it is repeated.
    """

    order: Int[torch.Tensor, "batch target"]
    mask: Bool[torch.Tensor, "batch target"]

    @staticmethod
    def of(sentences: Int[torch.Tensor, " row"]) -> PredictedRows:
        """Returns the rows of predictions, given the sentence of each."""
        numbers = sentences.cpu().unique().tolist()
        found = _side_by_side([(sentences.cpu() == row).nonzero()[:, 0] for row in numbers])
        return PredictedRows(*found)

    def label(self, tokens: Tokens, pos: Int[torch.Tensor, " row"], predicted: Tokens) -> Tokens:
        """Returns what the rows are called: what each predicts, at the position that does."""
        words = [predicted.alternatives(row) for row in range(len(predicted.ids))]
        pairs = zip(self.order.tolist(), self.mask.tolist(), strict=True)
        return replace(
            tokens.gather(pos.cpu()[self.order], self.mask, "prediction"),
            ids=predicted.ids.cpu()[:, 0][self.order],
            strings=tuple(
                tuple(words[place] if real else "" for place, real in zip(*pair, strict=True))
                for pair in pairs
            ),
        )


def split_at(tokens: Tokens, first: Sequence[int], names: tuple[str, str]) -> Tokens:
    """Returns an axis as two sides, of what comes before a place of each sentence and the rest."""
    real = [mask.nonzero()[:, 0].cpu() for mask in tokens.mask]
    pairs = [*zip(real, first, strict=True)]
    before = tokens.gather(*_side_by_side([x[x < at] for x, at in pairs]), names[0])
    return before.cat(tokens.gather(*_side_by_side([x[x >= at] for x, at in pairs]), names[1]))


def _side_by_side(
    rows: Sequence[Int[torch.Tensor, " _"]],
) -> tuple[Int[torch.Tensor, "batch most"], Bool[torch.Tensor, "batch most"]]:
    """Returns rows of unlike length as one tensor, their last number repeated, and a mask."""
    lengths = torch.tensor([len(row) for row in rows])
    index = pad_sequence([*rows], batch_first=True)
    mask = torch.arange(index.shape[1]) < lengths[:, None]
    return torch.where(mask, index, index.gather(1, lengths[:, None] - 1)), mask
