"""What every evaluation shares: sentences of maps, rows of targets, and means with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tl_contextmix.core.statistics import bootstrap_interval
from tl_contextmix.errors import bad
from tl_contextmix.results import ContextMap, ScoreRow

Maps = ContextMap | Sequence[ContextMap]
Figures = dict[tuple[str, str], list[tuple[float, float]]]
"""By layer and metric: value and chance level of every sentence."""


def sentences(maps: Maps) -> Iterator[tuple[ContextMap, int]]:
    """Yields a map and the row of its batch for every sentence.

    Raises:
        InvalidInput: If a map has several heads, or is a difference.
    """
    for map in [maps] if isinstance(maps, ContextMap) else maps:
        if not isinstance(map, ContextMap):
            raise bad(
                "these are no maps",
                f"a {type(map).__name__}",
                "a ContextMap, or a list of them",
                "Give what a method returned.",
            )
        if len(map.heads) != 1:
            raise bad(
                "this map has several heads",
                f"{len(map.heads)} heads",
                "one map per layer",
                "Take .mean('head'), or ask the method to sum its heads.",
            )
        map.require_unsigned("an evaluation")
        for row in range(len(map.target.strings)):
            yield map, row


def target_place(map: ContextMap, row: int, target: int) -> int:
    """Returns the place of a target on the map's axis, checked.

    Args:
        map: The map.
        row: Row of the batch.
        target: The position in the input; negative counts from the last real token.

    Raises:
        InvalidInput: If it is no real token.
    """
    real = map.target.mask[row].nonzero()[:, 0].tolist()
    numbers = [map.target.labels()[place] for place in real]
    if target in numbers:
        return real[numbers.index(target)]
    if -len(real) <= target < 0:
        return real[target]
    raise bad(
        "this target is no token",
        f"{target} in sentence {row}",
        f"one of {numbers}, or a negative number that counts from the end",
        "Positions count all tokens, a beginning-of-sequence token included.",
    )


def readable(map: ContextMap, row: int, place: int) -> Tensor:
    """Returns which sources a target can read at all [source].

    In a decoder those of its own stack up to itself, whatever part of the map is at hand.
    """
    found = map.source.mask[row].cpu().clone()
    if map.stack != "encoder":
        own = torch.tensor([name == "decoder" for name in map.source.names()])
        later = map.source.positions()[row] > map.target.positions()[row, place]
        found &= ~(own & later)
    return found


def per_sentence(given: int | Sequence[int], count: int, what: str) -> list[int]:
    """Returns one position per sentence.

    Raises:
        InvalidInput: If there are more or fewer of them than sentences.
    """
    found = [given] * count if isinstance(given, int) else [*given]
    if len(found) != count:
        raise bad(
            f"{what} do not fit the sentences",
            f"{len(found)} for {count} sentences",
            "one for all, or one for each",
            "Give an integer, or a list as long as the sentences.",
        )
    return found


def summarise(method: str, figures: Figures) -> tuple[ScoreRow, ...]:
    """Returns a row per layer and metric: mean, 95 % bootstrap interval, mean chance level."""
    return tuple(_summary(method, layer, metric, v) for (layer, metric), v in figures.items())


def _summary(
    method: str, layer: str, metric: str, pairs: Sequence[tuple[float, float]]
) -> ScoreRow:
    values, levels = torch.tensor(pairs, dtype=torch.float64).T
    known = ~values.isnan()
    low, high = bootstrap_interval(values)
    mean, chance = float(values[known].mean()), float(levels[known].mean())
    return ScoreRow(method, layer, metric, mean, low, high, chance, int(known.sum()))
