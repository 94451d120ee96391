"""Shared by all evaluations: iteration over sentences, target rows, means with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tl_contextmix.core.statistics import bootstrap_interval
from tl_contextmix.errors import InvalidInput
from tl_contextmix.results import ContextMap, ScoreRow

Maps = ContextMap | Sequence[ContextMap]
Figures = dict[tuple[str, str], list[tuple[float, float]]]
"""Value and chance level of every sentence, by layer and metric."""


def sentences(maps: Maps) -> Iterator[tuple[ContextMap, int]]:
    """Yields each sentence's map and its row in the batch."""
    for map in [maps] if isinstance(maps, ContextMap) else maps:
        if not isinstance(map, ContextMap):
            raise InvalidInput(
                "cannot evaluate this",
                f"a {type(map).__name__}",
                "a ContextMap, or a list of them",
                "Pass what a method returned.",
            )
        if len(map.heads) != 1:
            raise InvalidInput(
                "this map has several heads",
                f"{len(map.heads)} heads",
                "one map per layer",
                "Use .mean('head'), or compute the map with heads=False.",
            )
        map.require_unsigned("an evaluation")
        for row in range(len(map.target.strings)):
            yield map, row


def target_place(map: ContextMap, row: int, target: int) -> int:
    """Returns the index of a target on the map's axis.

    Args:
        map: The map.
        row: Row of the batch.
        target: The position in the input; negative counts from the last real token.
    """
    real = map.target.mask[row].nonzero()[:, 0].tolist()
    numbers = [map.target.labels()[place] for place in real]
    if target in numbers:
        return real[numbers.index(target)]
    if -len(real) <= target < 0:
        return real[target]
    raise InvalidInput(
        "the target is not a token of the sentence",
        f"{target} in sentence {row}",
        f"one of {numbers}, or a negative index",
        "Positions count all tokens, a beginning-of-sequence token included.",
    )


def readable(map: ContextMap, row: int, place: int) -> Tensor:
    """Returns which sources a target can attend to [source].

    In a decoder: those of its own stack up to itself, also for a selection of the map.
    """
    result = map.source.mask[row].cpu().clone()
    if map.stack != "encoder":
        own = torch.tensor([name != "encoder" for name in map.source.names()])
        later = map.source.positions()[row] > map.target.positions()[row, place]
        result &= ~(own & later)
    return result


def per_sentence(given: int | Sequence[int], count: int) -> list[int]:
    """Returns one position per sentence."""
    result = [given] * count if isinstance(given, int) else [*given]
    if len(result) != count:
        raise InvalidInput(
            "positions do not match the sentences",
            f"{len(result)} for {count} sentences",
            "one for all, or one for each",
            "Pass an integer, or a list with one per sentence.",
        )
    return result


def summarise(method: str, figures: Figures) -> tuple[ScoreRow, ...]:
    """Returns a row per layer and metric: mean, 95 % bootstrap interval, mean chance level."""
    rows = []
    for (layer, metric), pairs in figures.items():
        values, levels = torch.tensor(pairs, dtype=torch.float64).T
        known = ~values.isnan()
        low, high = bootstrap_interval(values)
        mean, chance = float(values[known].mean()), float(levels[known].mean())
        count, each = int(known.sum()), tuple(values.tolist())
        rows.append(ScoreRow(method, layer, metric, mean, low, high, chance, count, each))
    return tuple(rows)
