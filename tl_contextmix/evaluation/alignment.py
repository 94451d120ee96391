"""Alignment of a map with the tokens known to decide a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tl_contextmix.core.statistics import average_precision, expected_average_precision
from tl_contextmix.core.validation import checked
from tl_contextmix.engine.registry import method
from tl_contextmix.errors import InvalidInput
from tl_contextmix.evaluation.aggregation import (
    Figures,
    Maps,
    per_sentence,
    readable,
    sentences,
    summarise,
    target_place,
)
from tl_contextmix.results import ContextMap, Score

Cues = Sequence[Sequence[int | str]]


@checked
@method(cites=("mohebbi2023quantifying",), on_text=False)
def cue_alignment(
    maps: Maps,
    cues: Cues,
    *,
    pos: Sequence[int] | int = -1,
    method: str | None = None,
) -> Score:
    r"""Returns how well a map's target rows align with the cues that decide the target.

    Two metrics per layer, averaged over sentences (Mohebbi et al. 2023):

    * ``dot``: :math:`\sum_{j \in cues} C_{ij}` of a row that sums to 1. Chance: the share of
      readable tokens that are cues.
    * ``average precision`` of ranking the readable tokens by score. Chance: that of a random order.

    Rows with a NaN score NaN. For words instead of tokens, pass ``map.words()``; cues and targets
    then index words.

    Args:
        maps: One map with a row of the batch per sentence, or one map per sentence. Rows must sum
            to 1 (`ContextMap.normalize`), as they do for attention weights.
        cues: Per sentence, one or more cues: positions on the source axis (which include a
            beginning-of-sequence token), or tokens as text, which match every readable token
            with that text up to spaces.
        pos: The target position, one for all or one per sentence; negative counts from the
            last real token.
        method: Name in the table; None for the map's own.

    Returns:
        A `Score`: value, 95 % bootstrap interval over sentences and chance level per layer.

    Raises:
        InvalidInput: If a cue or target is not a real token, or rows do not sum to 1.
    """
    found: Figures = {}
    listed = list(sentences(maps))
    cues = require_cues(len(listed), cues)
    places = per_sentence(pos, len(listed))
    name = method or (listed[0][0].provenance.method if listed else "")
    for (map, row), asked, target in zip(listed, cues, places, strict=True):
        place = target_place(map, row, target)
        seen = readable(map, row, place)
        relevant = torch.zeros_like(seen)
        for cue in asked:
            relevant[_positions(map, row, cue, seen)] = True
        items, hits = int(seen.sum()), int(relevant.sum())
        chance = expected_average_precision(items, hits)
        for layer, label in enumerate(map.layer_names):
            scores = map.scores[row, layer, 0, place].cpu()
            sink = 0.0 if map.sink is None else float(map.sink[row, layer, 0, place])
            # Attention in float32 sums to 1 within 1e-6; rows of zeros stay zero when normalised.
            total = float(scores.sum()) + sink
            if total != 0 and abs(total - 1) > 1e-3:
                raise InvalidInput(
                    "the dot product needs rows that sum to 1",
                    f"a row of {map.provenance.method} that sums to {total:.3g}",
                    "rows divided by their sums",
                    "Use map.normalize().",
                )
            dot = float(scores[relevant].sum()) if total == total else total
            precision = float(average_precision(scores[seen], relevant[seen]))
            found.setdefault((label, "dot"), []).append((dot, hits / items))
            found.setdefault((label, "average precision"), []).append((precision, chance))
    return Score(
        rows=summarise(name, found),
        title="Alignment with the cue",
        caption="Share of the target's row on the cue (dot), and its rank in it (average "
        "precision). Chance: a row without information.",
    )


def _positions(map: ContextMap, row: int, cue: int | str, seen: Tensor) -> list[int]:
    """Returns the readable positions that a cue matches."""
    real = seen.nonzero()[:, 0].tolist()
    words, numbers = map.source.strings[row], [map.source.labels()[place] for place in real]
    if isinstance(cue, str):
        named = [place for place in real if words[place].strip() == cue.strip()]
    else:
        named = [real[numbers.index(cue)]] if cue in numbers else []
    if not named:
        raise InvalidInput(
            "a cue matches no readable token",
            f"{cue!r}, a position or token, in sentence {row}"
            if isinstance(cue, str)
            else f"position {cue} in sentence {row}",
            f"one of {numbers}, or one of {[words[place] for place in real]}",
            "Give a word of several tokens by its positions, or use map.words().",
        )
    return named


def require_cues(count: int, cues: Any) -> list[list[int | str]]:
    """Returns the cues of every sentence."""
    listed = [] if isinstance(cues, str) or not isinstance(cues, Sequence) else [*cues]
    fine = len(listed) == count and all(
        isinstance(one, Sequence)
        and not isinstance(one, str)
        and len(one)
        and all(isinstance(c, (int, str)) and not isinstance(c, bool) for c in one)
        for one in listed
    )
    if not fine:
        raise InvalidInput(
            "the cues do not match the sentences",
            f"{cues!r} for {count} sentences" if count < 4 else f"{len(listed)} lists for {count}",
            "a list of at least one cue, positions or texts, for every sentence",
            "Pass [[cue, ...], ...] without the sentences that have no cue.",
        )
    return [[*one] for one in listed]
